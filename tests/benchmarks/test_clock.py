"""Clocks: what counts as a call's time, memory, and what running out of it looks like."""

from __future__ import annotations

import pytest
import torch

from fastdistill.benchmarks.clock import CpuClock, clock_for, free_bytes, is_out_of_memory, still_works
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
