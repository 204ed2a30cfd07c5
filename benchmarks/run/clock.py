"""Time of single calls and memory, on a GPU by its events and on a CPU by a clock, behind one interface.

A clock first warms a run up, which says about how long it takes; then it gives one sample at a time, so that runs of
several providers can take turns.
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

L2_FLUSH_BYTES = 1 << 28  # several times the cache of any GPU
BYTES_PER_SECOND = 3e12  # about how fast they are overwritten; only the number of flushes depends on it


class Timed(NamedTuple):
    """A run that is warm. seconds: about what a call takes; host_seconds: what it takes the host to start one."""

    run: Run
    seconds: float
    host_seconds: float
    flushes: int = 1


class Clock(Protocol):
    """How runs are timed on a kind of device."""

    name: str

    def warm_up(self, run: Run) -> Timed:
        """Call it until what is done once is done."""

    def sample(self, timed: Timed) -> float:
        """The time of one call in seconds."""

    def peak_bytes(self, prepare: Callable[[], Run]) -> int | None:
        """The most memory that preparing and running take together, beyond what was there before."""


class CpuClock:
    """The time that a timer shows around a call.

    Args:
        timer: seconds; by default the CPU time of this process if torch has one thread, which other processes disturb
            least, and the wall time else.
    """

    def __init__(self, timer: Callable[[], float] | None = None) -> None:
        alone = torch.get_num_threads() == 1
        self.timer = timer or (time.process_time if alone else time.perf_counter)
        self.name = "timer" if timer else "CPU time of the process" if alone else "wall time"

    def warm_up(self, run: Run) -> Timed:
        """Two calls, the second of which counts."""
        run()
        started = self.timer()
        run()
        seconds = self.timer() - started
        return Timed(run, seconds, seconds)

    def sample(self, timed: Timed) -> float:
        """One call."""
        started = self.timer()
        timed.run()
        return self.timer() - started

    def peak_bytes(self, prepare: Callable[[], Run]) -> int | None:
        """Of tensors; what a kernel allocates inside itself is not seen."""
        with MemoryRecorder() as recorder:
            results = prepare()()
        del results
        return recorder.peak


class CudaClock:
    """CUDA events around a call whose data is no longer in the L2 cache.

    The cache is overwritten for as long as the host takes to launch the call, so that its own time doesn't count.

    Args:
        flushed: what is overwritten, several times as large as the cache.
        timer: seconds, for what the host takes.
    """

    name = "CUDA events, cold L2 cache"

    def __init__(self, flushed: Tensor | None = None, timer: Callable[[], float] = time.perf_counter) -> None:
        self._timer = timer
        self._flushed = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda") if flushed is None else flushed

    def warm_up(self, run: Run) -> Timed:
        """Calls until the last one can be timed, and how long the host takes to launch it."""
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
        """One call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(timed.flushes):
            self._flushed.zero_()
        start.record()
        timed.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def peak_bytes(self, prepare: Callable[[], Run]) -> int | None:
        """By the account of torch's allocator."""
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = prepare()()
        torch.cuda.synchronize()
        del results
        return torch.cuda.max_memory_allocated() - before


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock() if device.type == "cuda" else CpuClock()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU, in torch's allocator for the CPU, or in Python."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))


def still_works(device: torch.device) -> bool:
    """Whether this process can go on after an error.

    After an illegal access a GPU runs nothing until another process starts; after some errors in the compiler torch
    2.13 never leaves the level of forward AD that it was in, and refuses every other.
    """
    try:
        x = torch.ones(2, device=device)
        t_x = torch.func.jvp(torch.sin, (x,), (x,))[1]
        return abs(float(t_x[0]) - math.cos(1)) < 1e-5
    except RuntimeError:
        return False


def empty_cache(device: torch.device) -> None:
    """Give a GPU back what torch keeps of it for later."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
