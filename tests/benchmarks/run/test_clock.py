"""Test clocks: what counts as a call's time, memory, and how running out of memory looks."""

from __future__ import annotations

import pytest
import torch

from fastdistill.benchmarks.ops.memory import free_bytes
from fastdistill.benchmarks.run.clock import CpuClock, CudaClock, clock_for, is_out_of_memory, still_works
from tests.benchmarks.toy import CPU, Time


def test_a_sample_is_the_time_of_one_call() -> None:
    """Check that neither the warm-up nor what happens between the samples counts."""
    time = Time()
    seconds = iter([50.0, 3.0, 1.0, 2.0])

    def run() -> tuple[torch.Tensor, ...]:
        time.now += next(seconds)
        return ()

    clock = CpuClock(time)
    timed = clock.warm_up(run)
    assert timed.seconds == timed.host_seconds == 3.0
    assert clock.sample(timed) == 1.0
    time.now += 1000.0
    assert clock.sample(timed) == 2.0


def test_the_clock_of_a_cpu_says_what_it_counts() -> None:
    """Check that one thread has CPU time, to which waiting adds nothing, and several have wall time."""
    assert clock_for(CPU).name == "CPU time of the process"
    torch.set_num_threads(2)
    try:
        assert clock_for(CPU).name == "wall time"
    finally:
        torch.set_num_threads(1)


def test_peak_memory_includes_what_is_prepared() -> None:
    """Check that a backward is charged for the graph that it needs, and that inputs are not."""
    x = torch.ones(1000)

    def prepare():  # type: ignore[no-untyped-def]
        held = x + 1
        return lambda: (held * 2,)

    assert CpuClock(Time()).peak_bytes(prepare) == 8000


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace what a clock needs of `torch.cuda`, and log the order of its calls; events are 5 ms apart."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 5.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: log.append("reset"))
    return log


class Flushed:
    """Stand for what lies in the cache."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def zero_(self) -> None:
        """Note that the cache was overwritten."""
        self.log.append("flush")


def test_events_enclose_the_call_and_nothing_else(gpu: list[str]) -> None:
    """Check that the cache is flushed before the first event, and that the time between events is in seconds."""
    clock = CudaClock(Flushed(gpu))  # type: ignore[arg-type]

    def run() -> tuple[torch.Tensor, ...]:
        gpu.append("run")
        return ()

    timed = clock.warm_up(run)
    assert timed.seconds == 0.005 and timed.flushes >= 1 and timed.host_seconds >= 0
    gpu.clear()
    assert clock.sample(timed._replace(flushes=2)) == 0.005
    assert gpu == ["flush", "flush", "event", "run", "event", "wait"]


def test_a_slow_host_is_hidden_behind_more_flushes(gpu: list[str]) -> None:
    """Check that each flush hides about a tenth of a millisecond, and that their number is bounded."""
    time = Time()
    clock = CudaClock(Flushed(gpu), timer=time)  # type: ignore[arg-type]

    def taking(seconds: float) -> int:
        def run() -> tuple[torch.Tensor, ...]:
            time.now += seconds
            return ()

        return clock.warm_up(run).flushes

    assert [taking(seconds) for seconds in (0.0, 0.001, 0.02, 100.0)] == [1, 17, 336, 336]


def test_memory_by_the_allocator_is_beyond_what_was_there(gpu: list[str]) -> None:
    """Check that memory counts from before the preparation to after the run."""
    clock = CudaClock(Flushed(gpu))  # type: ignore[arg-type]

    def prepare():  # type: ignore[no-untyped-def]
        gpu.append("prepare")
        return lambda: gpu.append("run") or ()

    assert clock.peak_bytes(prepare) == 250
    assert [step for step in gpu if step != "wait"] == ["reset", "prepare", "run"]


def test_out_of_memory_has_many_faces() -> None:
    """Check that a wrong shape is none of them."""
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_this_machine_has_memory_and_lives() -> None:
    """Check what this machine reports, if it reports it."""
    free = free_bytes(CPU)
    assert free is None or free > 2**20
    assert still_works(CPU)


def test_a_level_of_forward_ad_that_was_never_left_is_noticed() -> None:
    """Check the level that a compiler's error leaves behind: from then on every other jvp fails."""
    torch.autograd.forward_ad.enter_dual_level()
    try:
        assert not still_works(CPU)
    finally:
        torch.autograd.forward_ad.exit_dual_level()
    assert still_works(CPU)
