"""Test timing on a fake clock: turns, quantiles, and providers that can't be timed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastdistill.benchmarks.ops.common_providers import dual_provider
from fastdistill.benchmarks.ops.timed_op import Dual, Provider, Run, Tensors, TimedCase
from fastdistill.benchmarks.run import in_turns
from fastdistill.benchmarks.run.gate import ERROR, FAILED, OK, OOM, UNAVAILABLE, UNSUPPORTED
from fastdistill.benchmarks.run.in_turns import Bench, Limits, ProcessLost, quantile
from fastdistill.benchmarks.run.nvml import Load
from tests.benchmarks.toy import CASE, Time, bench, op_of, right, squares, wrong


def test_rounds_take_turns_and_rotate() -> None:
    """Check that a drifting clock hits all providers alike, and that none always runs first."""
    time = Time()
    providers = [time.takes(right(name), [1.0]) for name in ("a", "b", "c")]
    outcomes = bench(time).run(op_of(*providers), CASE, providers)
    assert time.log[-9:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert all(outcome.samples == [1.0, 1.0, 1.0] and outcome.in_turns for outcome in outcomes)


def test_samples_are_what_the_clock_says() -> None:
    """Check that the gate, the memory and two calls to warm up come first and don't count."""
    time = Time()
    provider = time.takes(right(), [100.0, 100.0, 100.0, 100.0, 1.0, 2.0, 4.0])
    (outcome,) = bench(time).run(op_of(provider), CASE, [provider])
    assert outcome.samples == [1.0, 2.0, 4.0]
    assert not outcome.in_turns
    assert outcome.peak_bytes is not None and outcome.peak_bytes > 0


def test_quantiles() -> None:
    """Check that quantiles lie between the samples, by their ranks."""
    samples = [float(i) for i in range(11)]
    assert [quantile(samples, share) for share in (0.2, 0.5, 0.8)] == [2.0, 5.0, 8.0]
    assert quantile([3.0], 0.2) == 3.0
    assert quantile([1.0, 2.0], 0.5) == 1.5


@pytest.mark.parametrize(
    ("one_round", "rounds"), [(1e-6, 100), (0.1, 10), (0.4, 5), (1.5, 3), (0.0, 100)], ids=lambda x: str(x)
)
def test_the_number_of_rounds(one_round: float, rounds: int) -> None:
    """Check that there are as many rounds as fit into a second, but at least five, and three of very long ones."""
    assert Limits(seconds=1.0, least=5, most=100).rounds(one_round) == rounds


def test_what_fails_the_gate_is_not_timed() -> None:
    """Check that a wrong provider never runs after the gate, and that the others do."""
    time = Time()
    providers = [time.takes(wrong(), [1.0]), time.takes(right(), [1.0])]
    bad, good = bench(time).run(op_of(*providers), CASE, providers)
    assert bad.status == FAILED and bad.samples == [] and bad.verdict.errors["t_y"] > 1e-4
    assert good.status == OK and len(good.samples) == 3
    assert time.log.count("wrong") == 1


def test_what_is_wrong_at_its_size_is_not_timed() -> None:
    """Check a provider that is right on the small form and wrong in the last rows, like an index that overflows."""

    def of_case(case: TimedCase) -> Dual:
        exact = squares()(case)

        def dual(primals: Tensors, tangents: Any, mixed: bool) -> tuple[Tensors, Tensors]:
            (y,), (t_y,) = exact(primals, tangents, mixed)
            return (y,), (torch.cat([t_y[:8], 0 * t_y[8:]]),)

        return dual

    time, large = Time(), CASE.resized(n=16)
    providers = [time.takes(dual_provider("overflowing", "peer", of_case), [1.0]), time.takes(right(), [1.0])]
    op, measuring = op_of(*providers, last=3), bench(time)
    for mode in ("forward", "mixed"):
        bad, good = measuring.run(op, replace(large, mode=mode), providers)
        assert bad.status == FAILED and bad.samples == []
        assert bad.reason is not None and bad.reason.startswith("at this size: t_y: error 1.0e+00")
        assert good.status == OK and good.at_size is (mode == "forward")
    assert time.log.count("overflowing") == 3  # The three calls are for the gate, its memory, and this check.


def test_what_is_absent_or_refuses_does_not_run() -> None:
    """Check that each gives its reason; a predicted lack of memory counts as one."""
    absent = replace(right("absent"), absent="not installed: absent")
    refusing = replace(right("refusing"), refuses=lambda case: "head dim 64 only")
    large = replace(right("large"), refuses=lambda case: "out of memory: about 99 GiB of (N, M) matrices")
    outcomes = bench().run(op_of(), CASE, [absent, refusing, large])
    assert [outcome.status for outcome in outcomes] == [UNAVAILABLE, UNSUPPORTED, OOM]
    assert outcomes[0].reason == "not installed: absent" and not any(outcome.samples for outcome in outcomes)


def failing(error: Exception, call: int) -> Provider:
    """Return a provider that raises in one of its calls; the first call is the gate's."""
    provider, calls = right("failing"), iter(range(1, 1000))

    def prepare(case: TimedCase, data: object) -> Run:
        run = provider.prepare(case, data)

        def sometimes() -> tuple[torch.Tensor, ...]:
            if next(calls) == call:
                raise error
            return run()

        return sometimes

    return replace(provider, prepare=prepare)


@pytest.mark.parametrize("call", [2, 3, 5], ids=["memory", "warm-up", "sample"])
def test_running_out_of_memory_is_recorded(call: int) -> None:
    """Check every place where it can happen; the others keep their times."""
    providers = [failing(torch.OutOfMemoryError("tried to allocate 400.00 GiB"), call), right()]
    lost, good = bench().run(op_of(*providers), CASE, providers)
    assert (lost.status, lost.samples) == (OOM, [])
    assert lost.reason == "OutOfMemoryError: tried to allocate 400.00 GiB"
    assert good.status == OK and len(good.samples) == 3


def test_other_errors_are_told_from_it() -> None:
    """Check the CPU allocator's RuntimeError, which is recognised by its words."""
    for error, status in (
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), OOM),
        (RuntimeError("CUDA error: misaligned address"), ERROR),
        (MemoryError(), OOM),
    ):
        provider = failing(error, 3)
        (outcome,) = bench().run(op_of(provider), CASE, [provider])
        assert outcome.status == status


def test_inputs_that_do_not_fit_are_recorded() -> None:
    """Check that it is recorded for every provider that would have been timed."""

    class Large(type(op_of())):  # type: ignore[misc]
        def data(self, case: TimedCase, device: torch.device) -> object:
            if case.size("n") > 4:
                raise torch.OutOfMemoryError("inputs")
            return super().data(case, device)

    op = Large(**vars(op_of(right())))
    (outcome,) = bench().run(op, CASE.resized(n=8), [right()])
    assert outcome.status == OOM


def test_what_does_not_fit_together_is_timed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that each runs alone, so that none runs out of memory for another's graph."""
    monkeypatch.setattr(in_turns, "free_bytes", lambda device: 20)
    time = Time()
    providers = [time.takes(right(name), [1.0]) for name in ("a", "b")]
    outcomes = bench(time).run(op_of(*providers), CASE, providers)
    assert time.log[-10:] == ["a"] * 5 + ["b"] * 5
    assert not any(outcome.in_turns for outcome in outcomes)


def test_counters_are_read_under_load() -> None:
    """Check that they are read once for each timed provider, with an estimate of the time of a call."""

    class Counting:
        def load_under(self, run: Run, seconds_a_call: float) -> Load:
            run()
            return Load(sm_clock_mhz=1000.0, energy_j=seconds_a_call)

    time = Time()
    provider = time.takes(right(), [2.0])
    measuring = Bench(torch.device("cpu"), bench(time).clock, Counting(), Limits(0.0, 3, 3))  # type: ignore[arg-type]
    (outcome,) = measuring.run(op_of(provider), CASE, [provider])
    assert outcome.load == Load(sm_clock_mhz=1000.0, energy_j=2.0)


def test_a_lost_process_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the error belongs to the provider that caused it; after an illegal access nothing runs on that GPU."""
    monkeypatch.setattr(in_turns, "still_works", lambda device: False)
    provider = failing(RuntimeError("CUDA error: an illegal memory access was encountered"), 3)
    with pytest.raises(ProcessLost, match="failing left nothing working here") as caught:
        bench().run(op_of(provider), CASE, [provider])
    assert caught.value.outcome.status == ERROR
