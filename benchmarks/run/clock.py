"""Time single calls and measure memory: GPUs by their events, CPUs by a timer, behind one interface.

A clock first warms a run up, which estimates the time of a call. After that it takes one sample at a time, so that runs
of several providers can take turns.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastdistill.benchmarks.ops.timed_op import Run
from fastdistill.testing import MemoryRecorder

L2_FLUSH_BYTES = 1 << 28  # Several times the L2 cache of any GPU.
BYTES_PER_SECOND = 3e12  # A rough estimate of how fast memory is overwritten; only the number of flushes depends on it.


class Timed(NamedTuple):
    """Store a warm run: `seconds` estimates a call, and `host_seconds` is the time of its launch on the host."""

    run: Run
    seconds: float
    host_seconds: float
    flushes: int = 1


class Clock(Protocol):
    """Describe the interface of a clock: it times runs, and measures their memory, on one kind of device."""

    name: str

    def warm_up(self, run: Run) -> Timed:
        """Call a run until all one-time work, such as compilation, is done."""

    def sample(self, timed: Timed) -> float:
        """Time one call; return seconds."""

    def peak_bytes(self, prepare: Callable[[], Run]) -> int | None:
        """Return the peak memory of preparing and running together, beyond what was allocated before."""


class CpuClock:
    """Time calls by a timer of the host.

    Args:
        timer: returns seconds. By default it is the CPU time of this process if torch has one thread, because other
            processes disturb that least; with more threads it is the wall time.
    """

    def __init__(self, timer: Callable[[], float] | None = None) -> None:
        alone = torch.get_num_threads() == 1
        self.timer = timer or (time.process_time if alone else time.perf_counter)
        self.name = "timer" if timer else "CPU time of the process" if alone else "wall time"

    def warm_up(self, run: Run) -> Timed:
        """Call a run twice; the second call gives the time."""
        run()
        started = self.timer()
        run()
        seconds = self.timer() - started
        return Timed(run, seconds, seconds)

    def sample(self, timed: Timed) -> float:
        """Time one call by the timer; return seconds."""
        started = self.timer()
        timed.run()
        return self.timer() - started

    def peak_bytes(self, prepare: Callable[[], Run]) -> int | None:
        """Return the peak memory of tensors; memory that a kernel allocates inside itself is not seen."""
        with MemoryRecorder() as recorder:
            results = prepare()()
        del results
        return recorder.peak


class CudaClock:
    """Time calls by CUDA events, with inputs that are no longer in the L2 cache.

    The cache is overwritten for as long as the host takes to launch the call, so that the time of the launch doesn't
    count.

    Args:
        flushed: the tensor that is overwritten, several times as large as the cache.
        timer: returns seconds; it measures the time of the launch.
    """

    name = "CUDA events, cold L2 cache"

    def __init__(self, flushed: Tensor | None = None, timer: Callable[[], float] = time.perf_counter) -> None:
        self._timer = timer
        self._flushed = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda") if flushed is None else flushed

    def warm_up(self, run: Run) -> Timed:
        """Call a run until it can be timed, and measure the time that the host takes to launch it."""
        run()
        torch.cuda.synchronize()
        started = self._timer()
        run()
        host_seconds = self._timer() - started
        flushes = 1 + int(min(host_seconds, 0.02) * 1.5 * BYTES_PER_SECOND / L2_FLUSH_BYTES)
        torch.cuda.synchronize()
        timed = Timed(run, 0.0, host_seconds, flushes)
        return timed._replace(seconds=self.sample(timed))

    def sample(self, timed: Timed) -> float:
        """Time one call by CUDA events, after overwriting the cache; return seconds."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(timed.flushes):
            self._flushed.zero_()
        start.record()
        timed.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def peak_bytes(self, prepare: Callable[[], Run]) -> int | None:
        """Return the peak memory by the records of torch's allocator."""
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = prepare()()
        torch.cuda.synchronize()
        del results
        return torch.cuda.max_memory_allocated() - before


def clock_for(device: torch.device) -> Clock:
    """Return the clock that fits a device."""
    return CudaClock() if device.type == "cuda" else CpuClock()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that an allocation failed, on a GPU, in torch's CPU allocator, or in Python."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))


def still_works(device: torch.device) -> bool:
    """Return whether this process can go on after an error.

    After an illegal access a GPU runs nothing until another process starts. After some errors in the compiler, torch
    2.13 stays in the level of forward AD that it was in, and refuses every other.
    """
    try:
        x = torch.ones(2, device=device)
        t_x = torch.func.jvp(torch.sin, (x,), (x,))[1]
        return abs(float(t_x[0]) - math.cos(1)) < 1e-5
    except RuntimeError:
        return False


def empty_cache(device: torch.device) -> None:
    """Return to the GPU the memory that torch's allocator keeps for later."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
