"""Clocks: what counts as a call's time, memory, and what running out of it looks like."""

from __future__ import annotations

import pytest
import torch

from fastdistill.benchmarks.ops.memory import free_bytes
from fastdistill.benchmarks.run.clock import CpuClock, CudaClock, clock_for, is_out_of_memory, still_works
from tests.benchmarks.toy import CPU, Time


def test_a_sample_is_the_time_of_one_call() -> None:
    """Neither the warm-up nor what happens between the samples."""
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
    """One thread: CPU time, which waiting adds nothing to. Several: wall time."""
    assert clock_for(CPU).name == "CPU time of the process"
    torch.set_num_threads(2)
    try:
        assert clock_for(CPU).name == "wall time"
    finally:
        torch.set_num_threads(1)


def test_peak_memory_includes_what_is_prepared() -> None:
    """A backward is charged for the graph that it needs, and inputs are not."""
    x = torch.ones(1000)

    def prepare():  # type: ignore[no-untyped-def]
        held = x + 1
        return lambda: (held * 2,)

    assert CpuClock(Time()).peak_bytes(prepare) == 8000


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As much of `torch.cuda` as a clock needs, and a log of its order of doing; an event is 5 ms after the last."""
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
    """Stands for what lies in the cache."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def zero_(self) -> None:
        """Overwritten."""
        self.log.append("flush")


def test_events_enclose_the_call_and_nothing_else(gpu: list[str]) -> None:
    """The cache is flushed before the first event; the time is theirs, in seconds."""
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
    """Of about a tenth of a millisecond each; not without end."""
    time = Time()
    clock = CudaClock(Flushed(gpu), timer=time)  # type: ignore[arg-type]

    def taking(seconds: float) -> int:
        def run() -> tuple[torch.Tensor, ...]:
            time.now += seconds
            return ()

        return clock.warm_up(run).flushes

    assert [taking(seconds) for seconds in (0.0, 0.001, 0.02, 100.0)] == [1, 17, 336, 336]


def test_memory_by_the_allocator_is_beyond_what_was_there(gpu: list[str]) -> None:
    """From before the preparation to after the run."""
    clock = CudaClock(Flushed(gpu))  # type: ignore[arg-type]

    def prepare():  # type: ignore[no-untyped-def]
        gpu.append("prepare")
        return lambda: gpu.append("run") or ()

    assert clock.peak_bytes(prepare) == 250
    assert [step for step in gpu if step != "wait"] == ["reset", "prepare", "run"]


def test_out_of_memory_has_many_faces() -> None:
    """And a wrong shape is none of them."""
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_this_machine_has_memory_and_lives() -> None:
    """As far as it says so."""
    free = free_bytes(CPU)
    assert free is None or free > 2**20
    assert still_works(CPU)


def test_a_level_of_forward_ad_that_was_never_left_is_noticed() -> None:
    """As a compiler's error leaves it behind: from then on every other jvp fails."""
    torch.autograd.forward_ad.enter_dual_level()
    try:
        assert not still_works(CPU)
    finally:
        torch.autograd.forward_ad.exit_dual_level()
    assert still_works(CPU)
