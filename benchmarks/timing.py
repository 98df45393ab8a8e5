"""Time work on a GPU: replays of a CUDA graph, variants interleaved, medians, inputs that rotate past the L2 cache."""

import statistics
from collections.abc import Callable, Mapping

import torch

Work = Callable[[int], object]  # called with the number of the input set


def capture(work: Work, sets: int, calls: int) -> torch.cuda.CUDAGraph:
    """A graph of `calls` calls that go round the input sets. In a graph the host's pace does not count.

    Needs a current stream that is not the default one, and the same one on which the forward pass of a backward ran.
    """
    for i in range(sets):  # compiles, loads, and creates whatever handles there are
        work(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for i in range(calls):
            work(i % sets)
    return graph


def time_variants(variants: Mapping[str, Work], *, sets: int, calls: int = 10, rounds: int = 9) -> dict[str, float]:
    """Median seconds a call of each variant, measured in turns."""
    graphs = {name: capture(work, sets, calls) for name, work in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds + 1):  # the first round warms up
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e-3 / calls)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def copy_bandwidth() -> float:
    """Bytes a second, read plus written, of a copy between two buffers of 512 MB, by a kernel.

    Timed outside of graphs: in one, a copy becomes a node of its own kind, which is a fifth slower.
    """
    a = torch.empty(2**28, dtype=torch.bfloat16, device="cuda").normal_()
    b = torch.empty_like(a)
    times = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return 2 * a.nbytes / statistics.median(times[1:])
