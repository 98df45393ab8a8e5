"""The life of a run: what it is made of, its loop over steps, and where it stops."""

import math
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedlm.checkpoint.config import config_to_huggingface
from fusedlm.data.dataset import Dataset
from fusedlm.data.format import tokenizer_fingerprint
from fusedlm.data.loader import Evaluation, Loader
from fusedlm.data.prefetch import Prefetch
from fusedlm.data.rows import Batch
from fusedlm.hardware import GPU, detect
from fusedlm.models import DecoderModel
from fusedlm.planner import compute_mfu, flops_per_token
from fusedlm.tokenizer.interface import Tokenizer
from fusedlm.training.checkpoints import Checkpoints, SavedCheckpoint, StateError
from fusedlm.training.clock import Clock
from fusedlm.training.config import RunConfig
from fusedlm.training.evaluation import Evaluated, evaluate
from fusedlm.training.guard import first_nonfinite
from fusedlm.training.identity import check_frozen, check_tokenizer
from fusedlm.training.judge import Judge, batch_of
from fusedlm.training.lora import frozen_fingerprint, merged
from fusedlm.training.memory import peak_memory
from fusedlm.training.metrics import METRICS_FILE, Observer, Record, read_metrics
from fusedlm.training.optimizer import Optimizer
from fusedlm.training.parallel import fill, gathered, let_go, shard
from fusedlm.training.profiling import STEPS, profiled
from fusedlm.training.publish import model_of, publish
from fusedlm.training.randomness import seed_step
from fusedlm.training.ranks import Ranks
from fusedlm.training.readings import Reading, Readings
from fusedlm.training.recompute import RecomputeCheap, recompute_blocks
from fusedlm.training.saver import Saver, load_state
from fusedlm.training.schedule import Schedule
from fusedlm.training.signals import Interrupts
from fusedlm.training.step import CapturedStep, Step, forward_of

Sample = Callable[[DecoderModel, Tokenizer, int], str]  # a text that the model writes, of so many tokens


@dataclass(frozen=True)
class Result:
    """What came of a run.

    first: whether this is the process that writes. interrupted: the signal that stopped it, or 0. loss, val_loss: the
    last ones of this part of the run; best_val_loss: of all of it; None where there are none.
    """

    folder: Path
    first: bool
    steps: int
    interrupted: int
    loss: float | None
    val_loss: float | None
    best_val_loss: float | None


class Trainer:
    """A run in a folder, from its first step or from its last good checkpoint.

    model: with its first weights, on the ranks' device. Of several ranks it is on "meta", and `whole` has the weights,
    on the first rank's host; it is not kept. sample: writes a text; called at evaluations.
    profile: a folder for a profile of a few steps, of the first rank.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        *,
        model: DecoderModel,
        whole: DecoderModel | None = None,
        dataset: Dataset,
        ranks: Ranks,
        observers: Sequence[Observer] = (),
        sample: Sample | None = None,
        profile: Path | None = None,
    ) -> None:
        self.config, self.folder, self.dataset, self.ranks = config, folder, dataset, ranks
        self.model, self.sample, self.profile = model, sample, profile
        self.observers = list(observers) if ranks.first else []
        self.tokenizer = dataset.tokenizer()
        training = config.training
        dataset.check_vocabulary(model.config.vocab_size)
        self.context = training.context or min(model.config.context_length, 1024)
        self.micro_batches = training.micro_batches or 1
        share: dict[str, Any] = {"rank": ranks.rank, "world_size": ranks.size}
        rows: dict[str, Any] = {"context": self.context, "documents": config.data.documents, **share}
        self.loader = Loader(
            dataset,
            batch_size=training.batch_size,
            seed=training.seed,
            order=config.data.order,
            micro_batches=self.micro_batches,
            **rows,
        )
        each = training.batch_size // ranks.size // self.micro_batches
        self.rows: Evaluation | None = None
        if "val" in dataset.splits:
            self.rows = Evaluation(dataset, batch_size=config.evaluation.batch_size or each, **rows)

        self.model_facts = config_to_huggingface(model.config, model.embedding.weight.dtype)
        self.tokens_a_step = training.batch_size * self.context
        self.flops_a_token = flops_per_token(model.config, self.context).total
        self.gpu = _known_gpu(ranks.device, self.dtype)
        frozen = ranks.gather(frozen_fingerprint(whole or model) if ranks.first else None)[0]
        if training.recompute == "blocks":
            recompute_blocks(model)
        cheap = RecomputeCheap(model) if training.recompute == "cheap" else None
        shard(model, config.parallel, ranks)
        if ranks.size > 1:
            fill(model, whole, ranks)
        forward = forward_of(model, training)
        self.forward = forward if cheap is None else _inside(cheap, forward)
        self.optimizer = Optimizer(model, training, pure=training.precision == "bf16-pure")
        self.step = Step(self.forward, self.optimizer, training, ranks)
        self.schedule = Schedule.of(training)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.checkpoints.keep)
        run = {"loader": self.loader.signature, "tokenizer": tokenizer_fingerprint(self.tokenizer), "frozen": frozen}
        self.saver = Saver(
            self.checkpoints, ranks, run=run, model=self.model_facts, asynchronous=config.checkpoints.asynchronous
        )
        self.done = 0
        self.saved = -1  # the step of the last checkpoint
        self.losses: list[float] = []  # since the last record
        self.last_loss: float | None = None
        self.val_losses: list[float] = []
        self.earlier: list[Record] = []  # what metrics.csv has of an earlier part of the run; of the first rank
        self.judge = Judge(training, self._say, self._diagnosis)
        self.clock = Clock()

    @property
    def dtype(self) -> str:
        """Of products, as `hardware.DTYPES` names it."""
        return (self.config.training.precision or "fp32").removesuffix("-pure")

    def state(self) -> dict[str, Tensor]:
        """All tensors that decide how the run goes on, by name."""
        parameters = {f"model.{name}": p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return parameters | dict(self.step.state())

    def resume(self) -> None:
        """Go on from the last good checkpoint; from the beginning where there is none. Raises StateError."""
        found: SavedCheckpoint | None = None
        problem = ""
        if self.ranks.first:
            self.checkpoints.clean()
            try:
                found = self.checkpoints.last_good(lambda text: self._say(f"{text}; an earlier checkpoint is tried"))
            except StateError as error:
                problem = str(error)
        found, problem = self.ranks.gather((found, problem))[0]
        if problem:
            raise StateError(problem)
        if found is None:
            return
        self._check_run(found)
        load_state(found, self.state(), self.ranks)
        self.done = self.saved = found.manifest.step
        if self.ranks.first:
            self.earlier = self._records_before()
        guard = self.step.guard
        self.judge.resume(skipped=float(self.optimizer.skipped), spikes=0.0 if guard is None else float(guard.spikes))

    def _check_run(self, found: SavedCheckpoint) -> None:
        before, now = found.manifest.run, self.saver.run
        self.dataset.check_fingerprint(before["loader"]["dataset"])
        check_tokenizer(self.tokenizer, found, f"the tokenizer of {self.dataset.folder}")
        check_frozen(now["frozen"], found, self.config)
        for key, value in before["loader"].items():
            if now["loader"].get(key) != value:
                raise StateError(
                    f"{found.folder} was made with {key} {value!r}, and the run has {now['loader'].get(key)!r}; a run "
                    "goes on with the same data, seed, batch size and context"
                )
        if dict(found.manifest.model) != self.model_facts:
            was, is_now = dict(found.manifest.model), self.model_facts
            names = [name for name in was.keys() | is_now if was.get(name) != is_now.get(name)]
            told = ", ".join(f"{name} {was.get(name)!r}, now {is_now.get(name)!r}" for name in sorted(names))
            raise StateError(f"{found.folder} is of another model: {told}")

    def run(self) -> Result:
        """Train to the last step, or until a signal comes; then save. Raises TrainingError and StateError."""
        interrupted = 0
        try:
            with ExitStack() as stack:
                interrupts = stack.enter_context(Interrupts())
                self._tell(lambda observer: observer.begin(self, self.done))
                if self.rows is None and self.config.evaluation.interval:
                    self._say(
                        "the dataset has no split val, so no validation loss; data.val_fraction=0.1 would make one"
                    )
                stack.enter_context(self._surroundings())
                stack.callback(self.saver.close)
                interrupted = self._loop(interrupts)
                self._save()
            self._publish()
        finally:
            self._tell(lambda observer: observer.end())
        before = [record.val_loss for record in self.earlier if record.val_loss is not None]
        best = min([*before, *self.val_losses], default=None)
        val_loss = self.val_losses[-1] if self.val_losses else None
        return Result(self.folder, self.ranks.first, self.done, interrupted, self.last_loss, val_loss, best)

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        """What torch is asked for while a run lasts."""
        device, training = self.ranks.device, self.config.training
        precision = torch.get_float32_matmul_precision()
        deterministic = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            # FSDP2 minds in-place operations on what a block gives. There are none.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
            stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            if device.type == "cuda":
                # A stream of the run's own, for the default one cannot be captured.
                stream, default = torch.cuda.Stream(device), torch.cuda.current_stream(device)  # type: ignore[no-untyped-call]
                stream.wait_stream(default)
                stack.callback(default.wait_stream, stream)
                stack.enter_context(torch.cuda.stream(stream))
            try:
                torch.set_float32_matmul_precision("high" if training.precision == "tf32" else "highest")
                # With warnings alone: cuBLAS is deterministic on one stream, which torch does not count on.
                torch.use_deterministic_algorithms(training.deterministic or deterministic, warn_only=not deterministic)
                yield
            finally:
                torch.set_float32_matmul_precision(precision)
                torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)

    def _loop(self, interrupts: Interrupts) -> int:
        """Returns the signal that stopped it, or 0."""
        config, steps = self.config, self.config.training.steps
        micro_batches = self.micro_batches
        ahead = 1 if self.judge.stops_at_once else 8
        readings = Readings(self.ranks.device, self.clock, ahead, together=self.ranks.size > 1)
        step: Callable[[Sequence[Batch]], Tensor] = CapturedStep(self.step) if self._captured else self.step
        self.model.train()
        self.clock.start(self.done, max((record.seconds for record in self.earlier), default=0.0))
        with (
            Prefetch(self.loader.batches(self.done, steps), self.ranks.device, ahead=2 * micro_batches) as batches,
            profiled(self.profile if self.ranks.first else None, self.ranks.device) as profile,
        ):
            while self.done < steps:
                stop = self.ranks.any(interrupts.received)
                if stop:
                    self._read(readings.rest())
                    self._say(f"{signal.Signals(stop).name}: saving step {self.done}")
                    return stop
                self.optimizer.schedule(self.schedule(self.done))
                seed_step(config.training.seed, self.done, self.ranks)
                metrics = step(list(islice(batches, micro_batches)))
                self.done += 1
                if profile is not None:
                    profile.step()
                self._read(readings.put(self.done - 1, metrics))
                last = self.done == steps
                evaluated = self._due(config.evaluation.interval) or (last and config.evaluation.interval > 0)
                if evaluated or last:
                    self._read(readings.rest())
                if evaluated:
                    self._evaluate()
                if self._due(config.checkpoints.interval) and not last:
                    self._save()
                self.saver.check()
            if profile is not None and not profile.written:
                self._say(f"there is no profile: that takes {STEPS} steps, and there were fewer")
        return 0

    def _records_before(self) -> list[Record]:
        """Of the steps that an earlier part of the run has done. A log that cannot be read is no reason to stop."""
        path = self.folder / METRICS_FILE
        if not path.exists():
            return []
        try:
            return [record for record in read_metrics(path) if record.step <= self.done]
        except ValueError as error:
            aside = path.with_name(f"{path.name}.damaged")
            path.replace(aside)
            self._say(f"{error}; it is {aside.name} now, and {path.name} begins anew")
            return []

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.done % interval == 0

    @property
    def _captured(self) -> bool:
        """Whether a step is a CUDA graph: shapes are fixed, nothing talks to other GPUs, and torch's generator, which a
        block that is computed again would have to rewind, is not asked."""
        training = self.config.training
        fixed = self.loader.signature["documents"] == "joined"
        rewinds = training.recompute == "blocks" and training.dropout > 0
        return training.graph and self.ranks.device.type == "cuda" and self.ranks.size == 1 and fixed and not rewinds

    # What steps gave

    def _read(self, readings: Iterator[Reading]) -> None:
        for index, seconds, values in readings:
            done = index + 1
            self.judge(index, values)
            self.losses.append(values["loss"])
            if done % self.config.log.interval == 0 or done == self.config.training.steps:
                self._record(done, seconds, values)

    def _record(self, done: int, seconds: float, values: dict[str, float]) -> None:
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        self.last_loss = sum(finite) / len(finite) if finite else math.nan
        self.losses = []
        speed = self.clock.lap(done, seconds) * self.tokens_a_step
        record = Record(
            step=done,
            tokens=done * self.tokens_a_step,
            seconds=seconds,
            loss=self.last_loss,
            lr=self.config.training.lr * self.schedule(done - 1),
            norm=values["norm"],
            tokens_per_second=speed,
            mfu=self._mfu(speed),
            memory=peak_memory(self.ranks.device) / 2**30,
            skipped=int(values["skipped"]),
        )
        self._tell(lambda observer: observer.record(record))

    def _mfu(self, tokens_per_second: float) -> float | None:
        if self.gpu is None:
            return None
        flops = self.flops_a_token * tokens_per_second
        return compute_mfu(flops, 1.0, gpu=self.gpu, dtype=self.dtype, gpus=self.ranks.size)

    def _diagnosis(self, index: int) -> str:
        """Where in a step, and in which layer, numbers stop being finite. Steps that are skipped leave the weights as
        they were, so it can be computed again."""
        training = self.config.training
        for micro_batch in range(self.micro_batches):
            batch = self.loader.batch(index, micro_batch).to(self.ranks.device)
            seed_step(training.seed, index, self.ranks)
            self.optimizer.zero_grad()
            found = first_nonfinite(self.model, lambda batch=batch: self.step.backward([batch]))  # type: ignore[misc]
            told = next((text for text in self.ranks.gather(found) if text), "")
            if told:
                return (
                    f"step {index + 1}, micro-batch {micro_batch + 1} of {self.micro_batches}: {told}. "
                    f"{batch_of(index, training)}; a lower learning rate, or max_norm, may help"
                )
        where = batch_of(index, training)
        return f"step {index + 1}: its gradients are not finite, and computed again they are. {where}"

    # Pauses

    def _evaluate(self) -> None:
        if self.rows is None:
            return
        with self.clock.paused():
            found: Evaluated = evaluate(self.model, self.rows, self.ranks, self.config.evaluation.batches)
            if self.ranks.size > 1:
                let_go(self.model)
            self.val_losses.append(found.loss)
            tokens = self.done * self.tokens_a_step
            record = Record(step=self.done, tokens=tokens, seconds=self.clock.seconds, val_loss=found.loss)
            self._tell(lambda observer: observer.record(record))
            wanted = self.config.evaluation.sample_tokens
            if self.sample is not None and wanted and self.ranks.size == 1:
                self.model.eval()
                with torch.random.fork_rng([self.ranks.device] if self.ranks.device.type == "cuda" else []):
                    text = self.sample(self.model, self.tokenizer, wanted)
                self.model.train()
                self._tell(lambda observer: observer.sample(self.done, text))

    def _save(self) -> None:
        with self.clock.paused():
            if self.done != self.saved:
                self.saver.save(self.done, self.state())
                self.saved = self.done

    def _publish(self) -> None:
        """The model in the parameters' own dtype, for `fusedlm generate --model RUN`."""
        parameters = gathered(self.model, self.ranks)
        if self.ranks.first:
            whole = model_of(self.model.config, merged(parameters, self.config.lora))
            publish(whole, self.folder, self.tokenizer, {})

    def _say(self, text: str) -> None:
        self._tell(lambda observer: observer.say(text))

    def _tell(self, call: Callable[[Observer], None]) -> None:
        for observer in self.observers:
            call(observer)


def _inside(surrounding: Any, forward: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
    def call(batch: Batch) -> Tensor:
        with surrounding:
            return forward(batch)

    return call


def _known_gpu(device: torch.device, dtype: str) -> GPU | None:
    """The GPU, where its peak in a dtype is known."""
    gpu = detect(device) if device.type == "cuda" else None
    return gpu if gpu is not None and dtype in gpu.flops else None
