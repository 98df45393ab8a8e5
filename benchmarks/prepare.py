"""What comes before timing, in processes of its own: the contract of every op, and compiling all there is to compile.

Both take host time and not the GPU's. Compiled code reaches the process that times through the compilers' caches on
disk. Nothing runs beside the timing: all processes have ended by then.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.peers import Peer, peers_of
from benchmarks.work import make_inputs, own_copy, works
from fusedlm.testing import check, checks
from fusedlm.testing.cases import CASES

LONG = 10.0  # seconds; who waits for a job that takes longer is told


@dataclass(frozen=True)
class Job:
    """Part of an op's preparation.

    kind: "contract" (one dtype, at one of the small shapes), "check" (the contract at one shape that is timed) or
    "compile" (every variant at one such shape). shape: its number in the case's shapes, or in its bench.
    """

    kind: str
    op: str
    dtype: torch.dtype | None = None
    shape: int = 0


def run_job(job: Job, device: str = "cuda") -> float:
    """Seconds it took. Raises AssertionError where the contract is broken."""
    start = time.perf_counter()
    case = CASES[job.op]
    where = torch.device(device)
    if job.kind == "contract":
        assert job.dtype is not None
        dtypes = (job.dtype,) if job.dtype == case.bench_dtype else (case.bench_dtype, job.dtype)
        for shape, options in checks(case, dtypes=dtypes):  # strides in the first dtype alone
            mine = shape is case.shapes[job.shape] or (shape is case.empty and job.shape == 0)
            if options["dtype"] == job.dtype and mine:
                check(case, shape, device=where, **options)
    elif job.kind == "check":
        check(case, case.checked(case.bench[job.shape]), dtype=case.bench_dtype, device=where)
    else:
        assert job.kind == "compile", job.kind
        made = make_inputs(case, case.bench[job.shape], 0, where)
        peers = {"fusedlm": Peer(case.timed or case.op), **peers_of(case, case.bench[job.shape])}
        for name, peer in peers.items():
            for direction, work in works(case, peer.function, [own_copy(made)]).items():
                if peer.does(direction):
                    begin = time.perf_counter()
                    work(0)
                    if time.perf_counter() - begin > LONG:
                        print(f"{job.op}, shape {job.shape}: {name}, {direction} {time.perf_counter() - begin:.0f} s")
    if where.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # for the other processes
    return time.perf_counter() - start


def jobs_of(op: str, shapes: Sequence[int], *, quick: bool, compiled: Sequence[int]) -> list[Job]:
    """All of an op's jobs, the longest first. compiled: the shapes at which peers will be timed and not remembered."""
    case = CASES[op]
    jobs = [Job("compile", op, shape=i) for i in compiled]
    if not quick:
        for dtype in dict.fromkeys((case.bench_dtype, torch.float32)):
            jobs += [Job("contract", op, dtype, i) for i in range(len(case.shapes))]
    return jobs + [Job("check", op, shape=i) for i in shapes]


def begin_process(count: Any, gpus: Sequence[str]) -> None:
    """How every process begins. count: shared by them all, how many have begun; they take the GPUs in turn."""
    import torch._inductor.config

    if gpus:
        with count.get_lock():
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[count.value % len(gpus)]  # it counts: CUDA has not begun
            count.value += 1

    torch._inductor.config.compile_threads = 1  # the processes are many already


def _lacks_memory(error: RuntimeError) -> bool:
    return "out of memory" in str(error) or "ALLOC_FAILED" in str(error)  # torch's, and the libraries'


@dataclass(frozen=True)
class Prepared:
    """What came of the jobs.

    seconds: of those that did what they should. refused: ops whose contract is broken, or that do not compile, with why
    in a line: they are not timed.
    """

    seconds: dict[Job, float]
    refused: dict[str, str]


def prepare(
    jobs: Sequence[Job],
    *,
    processes: int | None = None,
    gpus: Sequence[str] = (),
    do: Callable[[Job], float] = run_job,
) -> Prepared:
    """Do all jobs. processes: 0 does them in this one; as many as suit the machine where None is given.

    gpus: names of alike GPUs that CUDA_VISIBLE_DEVICES takes, over which the processes are spread; none: they all use
    those that this process does.

    A kernel that faults leaves its process without a GPU, and one that crashes takes the others' processes along: what
    failed so may be another op's fault and is done again, each job in a process of its own. Jobs that find no memory
    beside the others are done again last, one at a time.
    """
    if processes is None:
        processes = min(len(jobs), max((os.cpu_count() or 4) - 2, 1), 12)
    prepared = Prepared({}, {})
    faulty: list[Job] = []
    hungry: list[Job] = []

    def finish(job: Job, result: Callable[[], float]) -> None:
        try:
            prepared.seconds[job] = result()
            if prepared.seconds[job] > LONG:
                print(f"{job.kind} of {job.op}, shape {job.shape}: {prepared.seconds[job]:.0f} s", flush=True)
        except Exception as error:  # whatever is wrong with one op, the others are measured
            prepared.refused.setdefault(job.op, str(error).strip().split("\n")[0] or type(error).__name__)

    if processes == 0:
        for job in jobs:
            finish(job, lambda job=job: do(job))  # type: ignore[misc]
        return prepared
    context = multiprocessing.get_context("spawn")  # a process that has used the GPU cannot be forked
    begin = begin_process, (context.Value("i", 0), gpus)

    def alone(job: Job) -> float:
        with ProcessPoolExecutor(1, context, *begin) as pool:
            return pool.submit(do, job).result()

    def gather(futures: dict[Future[float], Job], *, again: bool) -> None:
        for future in as_completed(futures):
            error = future.exception()
            if isinstance(error, RuntimeError) and _lacks_memory(error):
                hungry.append(futures[future])
            elif isinstance(error, RuntimeError) and again:
                faulty.append(futures[future])
            else:
                finish(futures[future], future.result)

    with ProcessPoolExecutor(processes, context, *begin) as pool:
        gather({pool.submit(do, job): job for job in jobs}, again=True)
    with ThreadPoolExecutor(processes) as threads:  # each waits for a process
        gather({threads.submit(alone, job): job for job in faulty}, again=False)
    if hungry:
        names = ", ".join(f"{job.kind} of {job.op}" for job in hungry)
        print(f"for lack of memory, again and one at a time: {names}", flush=True)
    for job in hungry:
        finish(job, lambda job=job: alone(job))  # type: ignore[misc]
    return prepared
