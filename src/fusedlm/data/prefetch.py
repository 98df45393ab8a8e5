"""The next batches, made and brought to a device by a thread while the last one is trained on."""

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType

import torch

from fusedlm.data.rows import Batch

_POLL_SECONDS = 0.1


class Prefetch(AbstractContextManager["Prefetch"], Iterator[Batch]):
    """What an iterable of batches gives, on a device, in the same order; `ahead` of them wait at a time.

    On a GPU copies come from pinned memory on a stream of their own, and the stream that is current where a batch is
    taken waits for its copy. What the iterable raises is raised where its batch would be. Use it as a context, or call
    `close`: the thread then ends; batches that wait are dropped.
    Raises ValueError for ahead below 1.
    """

    def __init__(self, batches: Iterable[Batch], device: torch.device | str, *, ahead: int = 2) -> None:
        if ahead < 1:
            raise ValueError(f"ahead is {ahead}; expected 1 or more")
        self._batches = batches
        self._device = torch.device(device)
        index: int | None = self._device.index
        if self._device.type == "cuda" and index is None:  # a thread has a current device of its own
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._queue: queue.Queue[tuple[Batch, torch.cuda.Event | None] | BaseException | None] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="prefetch")
        self._thread.start()

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> Batch:
        if self._ended:
            raise StopIteration
        item = self._queue.get()
        if item is None or isinstance(item, BaseException):
            self.close()
            raise StopIteration if item is None else item
        batch, copied = item
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            for tensor in batch.tensors():
                tensor.record_stream(stream)  # else its memory could be given away while that stream still reads it
        return batch

    def close(self) -> None:
        """End the thread and drop what waits; more batches there are none. May be called twice."""
        self._ended = True
        self._stop.set()
        self._thread.join()
        while not self._queue.empty():
            self._queue.get_nowait()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        end: BaseException | None = None
        try:
            stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
            for batch in self._batches:
                if not self._put(self._copied(batch, stream)):
                    return
        except BaseException as error:  # whoever waits must hear of it
            end = error
        self._put(end)

    def _copied(self, batch: Batch, stream: torch.cuda.Stream | None) -> tuple[Batch, torch.cuda.Event | None]:
        if stream is None:
            return batch.to(self._device), None
        with torch.cuda.stream(stream):
            there = batch.pin_memory().to(self._device, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(stream)
        return there, copied

    def _put(self, item: tuple[Batch, torch.cuda.Event | None] | BaseException | None) -> bool:
        """Wait for a place in the queue; False where nobody takes from it any more."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False
