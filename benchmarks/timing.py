"""Time work on a GPU: replays of a CUDA graph, variants interleaved, medians, inputs that rotate past the L2 cache."""

import statistics
import time
from collections.abc import Callable, Collection, Mapping

import torch

Work = Callable[[int], object]  # called with the number of the input set


def input_sets(bytes_a_call: float, cache: float, most: int = 128) -> int:
    """How many sets of inputs it takes to go past a cache of that size, in bytes, twice."""
    return min(2 + int(2 * cache // max(bytes_a_call, 1)), most)


def _capture(work: Work, sets: int, calls: int) -> Callable[[], None]:
    """A CUDA graph of `calls` calls that go round the input sets. In a graph the host's pace does not count.

    Needs a current stream that is not the default one, and the same one on which the forward pass of a backward ran.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for i in range(calls):
            work(i % sets)
    return graph.replay


def time_variants(
    variants: Mapping[str, Work], *, sets: int, waits: Collection[str] = (), rounds: int = 9, budget: float = 2.0
) -> dict[str, float]:
    """Median seconds a call of each variant, measured in turns.

    waits: variants that wait for the host inside and so cannot be in a graph; they are called one after the other, and
    their waiting counts. budget: seconds after which no more rounds begin, three at least.
    """

    def launched(work: Work) -> Callable[[], None]:
        def run() -> None:
            for i in range(calls):
                work(i % sets)

        return run

    calls = sets if sets >= 10 else 10 // sets * sets
    replays = {}
    for name, work in variants.items():
        for i in range(sets):  # compiles, loads, and creates whatever handles there are
            work(i)
        torch.cuda.synchronize()
        try:
            replays[name] = launched(work) if name in waits else _capture(work, sets, calls)
        except RuntimeError as error:
            raise RuntimeError(f"{name} cannot be captured in a CUDA graph; does it wait for the host?") from error
    times: dict[str, list[float]] = {name: [] for name in replays}
    begin = time.perf_counter()
    for turn in range(rounds + 1):  # the first one warms up
        if turn > 3 and time.perf_counter() - begin > budget:
            break
        for name, replay in replays.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e-3 / calls)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def host_seconds(
    variants: Mapping[str, Callable[[], object]],
    *,
    calls: int = 100,
    rounds: int = 20,
    wait: Callable[[], None] = torch.cuda.synchronize,
) -> dict[str, float]:
    """Median seconds until a call returns to the host, of each variant, measured in turns of `calls` calls.

    wait: runs before each turn, so that the GPU's queue is empty then and never full.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):  # the first one warms up
        for name, call in variants.items():
            wait()
            for _ in range(calls):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
        if turn == 0:
            times = {name: [] for name in variants}
    return {name: statistics.median(t) for name, t in times.items()}


def peak_memory(work: Work) -> int:
    """Bytes that a call allocates beyond what is there before it, at the most. Outside of graphs; has run before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _median_seconds(work: Callable[[], object]) -> float:
    times: list[float] = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times[1:])


def copy_bandwidth() -> float:
    """Bytes a second, read plus written, of a copy between two buffers of 512 MB, by a kernel.

    Timed outside of graphs: in one, a copy becomes a node of its own kind, which is a fifth slower.
    """
    a = torch.empty(2**28, dtype=torch.bfloat16, device="cuda").normal_()
    b = torch.empty_like(a)
    return 2 * a.nbytes / _median_seconds(lambda: b.copy_(a))


def matmul_rate(n: int = 8192) -> float:
    """Floating-point operations a second of an n^3 product in bf16, on random data (zeros would draw less power)."""
    a, b = (torch.empty(n, n, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
    c = torch.empty_like(a)
    return 2 * n**3 / _median_seconds(lambda: torch.mm(a, b, out=c))
