"""How long a call takes, how much memory, and what the machine can do at most. Times are in microseconds."""

import ctypes
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from oxiscan.testing import peak_memory

from .machine import sm_clock_mhz
from .records import Measured

Call = Callable[[], Any]

FLUSH_BYTES = 256 * 2**20
#: Below this a kernel is timed by replaying a graph of many.
SHORT_US = 30.0
#: How often the host's time is taken on a core before the next one: the first time there its caches are cold.
LOOPS_A_CORE = 3


class Effort(NamedTuple):
    """How often things are repeated."""

    #: About how long the calls behind one figure take together, and the most of them.
    microseconds: float
    calls: int
    #: For the host's time: loops to take the fastest of, and calls in a loop.
    host_loops: int
    host_calls: int

    def repeats(self, us: float) -> int:
        """How often to repeat a call of `us`."""
        return max(5, min(self.calls, int(self.microseconds / us)))


FULL = Effort(300_000, 100, 96, 50)
QUICK = Effort(50_000, 10, 5, 20)


class Timing(NamedTuple):
    us: float
    #: Kernels, fills and copies on the GPU in one call; None on the CPU.
    launches: int | None
    #: "profiler": the sum of a call's kernel times; "graph": a graph of many calls, gaps between them included; "wall".
    method: str


class Ceilings(NamedTuple):
    """What the machine does at most, measured in this run."""

    #: Bytes read plus bytes written by a copy.
    copy_gb_s: float
    matmul_tflops: float
    sm_clock_mhz: float | None
    #: A GPU's multiprocessors.
    processors: int | None

    def measured(self) -> Measured:
        """The fields of a record."""
        return {"copy_gb_s": self.copy_gb_s, "matmul_tflops": self.matmul_tflops, "sm_clock_mhz": self.sm_clock_mhz}

    def floor_us(self, moved: int, exponentials: int) -> float:
        """The least time that moves these bytes and takes these exponentials, 16 per clock and multiprocessor."""
        floor = moved / (self.copy_gb_s * 1e3)
        if self.processors is None or self.sm_clock_mhz is None:
            return floor
        return max(floor, exponentials / (16 * self.processors * self.sm_clock_mhz))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed_us(call: Call, device: torch.device) -> float:
    """From the begin of one call to its end, on the GPU by events."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e6


def warm_us(call: Call, device: torch.device) -> float:
    """`elapsed_us` after calls that compile, tune and allocate."""
    for _ in range(3):
        call()
    return elapsed_us(call, device)


def median_us(call: Call, device: torch.device, effort: Effort) -> float:
    """Median over calls of `elapsed_us`."""
    repeats = effort.repeats(warm_us(call, device))
    return statistics.median(elapsed_us(call, device) for _ in range(repeats))


def ceilings(device: torch.device, effort: Effort) -> Ceilings:
    """A copy of 1 GiB and a product of bf16 matrices of 8192^2; smaller ones in float32 on the CPU.

    The clock is the copy's: most ops are as bound by memory as that.
    """
    cuda = device.type == "cuda"
    nbytes, size, dtype = (2**30, 8192, torch.bfloat16) if cuda else (2**26, 1024, torch.float32)
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    copy_us = median_us(lambda: target.copy_(source), device, effort)
    matmul_us = median_us(lambda: a @ b, device, effort)
    return Ceilings(
        copy_gb_s=2 * nbytes / copy_us / 1e3,
        matmul_tflops=2 * size**3 / matmul_us / 1e6,
        sm_clock_mhz=sm_clock_mhz(device, lambda: target.copy_(source)),
        processors=torch.cuda.get_device_properties(device).multi_processor_count if cuda else None,
    )


def gpu_events(call: Call) -> list[FunctionEvent]:
    """What the GPU did for a call, in order: kernels, fills, copies."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return sorted(events, key=lambda event: event.time_range.start)


class KernelTimer:
    """Sums of GPU kernel times, each call after a flush of the L2 cache.

    The flush fills a buffer. It also tells calls apart in what the profiler saw, whichever thread launched their
    kernels: the buffer has a dtype that no op fills, so the kernel that fills it has a name of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.empty(FLUSH_BYTES // 16, dtype=torch.complex128, device=device)
        kernels = [event.name for event in gpu_events(self.fill)]
        if len(kernels) != 1:
            raise RuntimeError(f"profiler: saw {kernels or 'nothing'} of a flush; expected one kernel")
        (self.flush,) = kernels

    def fill(self) -> None:
        """Put other data into the L2 cache. Not with zeros: those could come from a fill that is no kernel."""
        self.buffer.fill_(1)

    def measure(self, call: Call, repeats: int) -> Timing:
        """Medians over calls."""

        def flushed() -> None:
            for _ in range(repeats):
                self.fill()
                call()

        calls: list[list[float]] = []
        for event in gpu_events(flushed):
            if event.name == self.flush:
                calls.append([])
            elif calls:
                calls[-1].append(event.time_range.elapsed_us())
        if len(calls) != repeats or not all(calls):
            seen = f"{sum(map(bool, calls))} calls with kernels after {len(calls)} flushes"
            raise RuntimeError(f"profiler: saw {seen}; expected {repeats} of each")
        us = statistics.median(sum(kernels) for kernels in calls)
        return Timing(us, statistics.mode(len(kernels) for kernels in calls), "profiler")


def replay_us(prepare: Callable[[], Call], nbytes: int, device: torch.device, effort: Effort) -> float:
    """Time of a call within a graph of calls that go round sets of arguments, none of them in the L2 cache any more.

    Args:
        prepare: makes a call with arguments of its own, which take `nbytes`.
    """
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    sets = min(max(2, math.ceil(3 * cache / nbytes)), 1000)
    rounds = math.ceil(100 / sets)
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        calls = [prepare() for _ in range(sets)]
        for call in calls:
            call()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph, stream=stream):
        for call in calls * rounds:
            call()
    return median_us(graph.replay, device, effort) / (sets * rounds)


def run_on(cores: Iterable[int]) -> None:
    """Let this process's threads, autograd's among them, run on these cores alone."""
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread), cores)


@contextmanager
def kept_affinity() -> Iterator[list[int]]:
    """The cores that this thread may run on, which all may run on at the end; none where a system does not say."""
    if not hasattr(os, "sched_setaffinity"):
        yield []
        return
    cores = os.sched_getaffinity(0)
    try:
        yield sorted(cores)
    finally:
        run_on(cores)


def host_us(call: Call, device: torch.device, effort: Effort) -> float:
    """How long the host is busy with a call, in the fastest of loops that do not wait for the GPU.

    Not the median: whatever else runs on the machine only adds, on shared cores up to twice the time. With a GPU, where
    one thread is busy at a time, loops go round the cores: those that others leave alone change within seconds.
    """
    warm_us(call, device)
    samples = []
    with kept_affinity() as cores:
        for loop in range(effort.host_loops):
            if device.type == "cuda" and cores:
                run_on({cores[loop // LOOPS_A_CORE % len(cores)]})
            synchronize(device)
            started = time.perf_counter()
            for _ in range(effort.host_calls):
                call()
            samples.append((time.perf_counter() - started) / effort.host_calls * 1e6)
        synchronize(device)
    return min(samples)


def peak_bytes(call: Call, device: torch.device) -> int:
    """Memory at the peak of a call above what is held before it, results included."""
    if device.type == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # what is freed and kept would be used again unseen
        return peak_memory(call)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()  # kept, as a caller would
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak
