"""Saving while training goes on: the state is copied to the host, and a thread writes the copy."""

import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedlm.kernels import set_master
from fusedlm.training.checkpoints import Checkpoints, FileFacts, SavedCheckpoint, StateError, facts_of
from fusedlm.training.ranks import Ranks, local

State = Mapping[str, Tensor]


class Saver:
    """Writes a run's state into its checkpoints. Every rank has one, and they are called together.

    run, model: see `checkpoints.Manifest`. asynchronous: `save` returns once the state is copied. Errors of a save are
    raised by the next call.
    """

    def __init__(
        self, checkpoints: Checkpoints, ranks: Ranks, *, run: Any, model: Any, asynchronous: bool = True
    ) -> None:
        self.checkpoints = checkpoints
        self.ranks = replace(ranks, control=ranks.saving)  # the thread must not meet in the middle of other talk
        self.run = run
        self.model = model
        self.asynchronous = asynchronous
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[Path] | None = None
        self._copies: dict[str, Tensor] = {}

    def save(self, step: int, state: State) -> None:
        """Save the state of so many steps. Waits for an earlier save first. Raises StateError."""
        self.wait()
        copies = self._copied(state)
        self._running = self._threads.submit(self._write, step, copies)
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written. Raises StateError where that failed."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def check(self) -> None:
        """Raise StateError where a save has failed by now."""
        if self._running is not None and self._running.done():
            self.wait()

    def close(self) -> None:
        """As wait; the saver is of no use afterwards."""
        try:
            self.wait()
        finally:
            self._threads.shutdown()

    @torch.no_grad()
    def _copied(self, state: State) -> dict[str, Tensor]:
        """The state on the host, in memory that stays for the next save."""
        pinned = self.ranks.device.type == "cuda"
        copies: dict[str, Tensor] = {}
        for name, tensor in state.items():
            shard = local(tensor)
            copy = self._copies.get(name)
            if copy is None:
                copy = torch.empty_like(shard, device="cpu", pin_memory=pinned and shard.is_cuda)
                self._copies[name] = copy
            copy.copy_(shard, non_blocking=True)
            copies[name] = _like(tensor, copy)
        if pinned:
            torch.cuda.current_stream(self.ranks.device).synchronize()
        return copies

    def _write(self, step: int, state: dict[str, Tensor]) -> Path:
        # What one rank cannot do all must hear of, or they would wait for it for good.
        partial = self._agreed(step, lambda: self._prepared(step, state))
        mine = self._agreed(step, lambda: self._written(partial, state))
        return self._agreed(step, lambda: self._finished(step, partial, mine))

    def _agreed(self, step: int, work: Any) -> Any:
        """What the work gives on this rank. Raises StateError on every rank where it fails on one."""
        result, message = None, ""
        try:
            result = work()
        except StateError as error:
            message = str(error)
        except OSError as error:
            message = str(self.checkpoints.error(step, error))
        failed = next((text for text in self.ranks.gather(message) if text), "")
        if failed:
            raise StateError(failed)
        return result

    def _prepared(self, step: int, state: State) -> Path | None:
        needed = sum(local(t).nbytes for t in state.values()) * self.ranks.size
        return self.checkpoints.prepare(step, needed) if self.ranks.first else None

    def _written(self, partial: Path | None, state: State) -> dict[str, FileFacts]:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        (folder, *_) = self.ranks.gather(partial)
        with _plain_errors():
            save(
                dict(state),
                storage_writer=FileSystemWriter(folder, sync_files=True),
                process_group=self.ranks.control,
                no_dist=self.ranks.size == 1,
            )
        own = f"__{self.ranks.rank}_"
        names = [p for p in folder.iterdir() if p.name.startswith(own) or (self.ranks.first and p.name[0] == ".")]
        return {path.name: facts_of(path) for path in names}

    def _finished(self, step: int, partial: Path | None, mine: dict[str, FileFacts]) -> Path | None:
        files = {name: facts for part in self.ranks.gather(mine) for name, facts in part.items()}
        if partial is None:
            return None
        options = {"world_size": self.ranks.size, "run": self.run, "model": self.model}
        return self.checkpoints.finish(partial, dict(sorted(files.items())), step=step, **options)


def load_state(checkpoint: SavedCheckpoint, state: State, ranks: Ranks) -> None:
    """Write a checkpoint into the tensors of a state, on any number of ranks. Raises StateError if it does not fit.

    Where the checkpoint has masters of bf16 parameters whole, as earlier versions wrote them, they are taken apart.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(checkpoint.folder)
    try:
        saved = reader.read_metadata().state_dict_metadata
        whole = {
            name: torch.empty_like(low, dtype=torch.float32)
            for name, low in state.items()
            if name.endswith(".master_low") and name not in saved and name.removesuffix("_low") in saved
        }
        wanted = {name: tensor for name, tensor in state.items() if name not in whole}
        wanted |= {name.removesuffix("_low"): master for name, master in whole.items()}
        for name, tensor in wanted.items():
            found = getattr(saved.get(name), "size", None)
            if found is None:
                raise StateError(f"{checkpoint.folder} has no {name}; it is of a run with other settings")
            if tuple(found) != tuple(tensor.shape):
                raise StateError(
                    f"{checkpoint.folder}: {name} has shape {tuple(found)}; expected {tuple(tensor.shape)}. It is of "
                    "another model"
                )
        with _plain_errors():
            load(wanted, storage_reader=reader, process_group=ranks.control, no_dist=ranks.size == 1)
        for name, master in whole.items():
            parameter = name.removeprefix("optimizer.").removesuffix(".master_low")
            set_master(state[f"model.{parameter}"], state[name], master)
    except (OSError, RuntimeError, EOFError) as error:
        raise StateError(f"{checkpoint.folder} cannot be read: {error}") from error


def _like(tensor: Any, copy: Tensor) -> Tensor:
    """The copy of a local part, sharded as the whole tensor is."""
    if not hasattr(tensor, "to_local"):
        return copy
    from torch.distributed.tensor import DTensor

    sharded: Tensor = DTensor(copy, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]
    return sharded  # from_local would have moved it to the mesh's device


@contextmanager
def _plain_errors() -> Iterator[None]:
    """torch.distributed.checkpoint wraps what its reader and writer meet, in an error that no `except Exception` sees,
    and warns where there is one process alone."""
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            full = [cause for cause in causes if isinstance(cause, OSError)]
            raise (full or causes)[0] from None
