"""Test the parity gate: every wrong result gets a verdict with its error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastdistill.benchmarks.ops.timed_op import FLOOR, Provider, Run, TimedCase
from fastdistill.benchmarks.run.gate import ERROR, FAILED, OK, Gate, worst
from tests.benchmarks.toy import CASE, CPU, op_of, right, wrong


def returning(run: Run, kind: str = "peer") -> Provider:
    """Return a provider whose run is this one, whatever the inputs."""
    return Provider("planted", kind, lambda case, data: run)


def test_what_is_right_passes_with_its_errors() -> None:
    """Check that output and tangent are both compared, and that the errors are kept."""
    provider = right()
    verdict = Gate(CPU).judge(op_of(provider), provider, CASE)
    assert verdict.status == OK and verdict.reason is None
    assert set(verdict.errors) == {"y", "t_y"}
    assert all(verdict.errors[name] <= verdict.allowed[name] < 1e-5 for name in verdict.errors)


@pytest.mark.parametrize("mode", ["forward", "mixed"])
def test_a_tangent_a_thousandth_off_fails(mode: str) -> None:
    """Check that the verdict names the tangent and has its error; the output alone would have passed."""
    provider = wrong()
    verdict = Gate(CPU).judge(op_of(provider), provider, replace(CASE, mode=mode))
    assert verdict.status == FAILED
    assert verdict.reason is not None and "t_y: error" in verdict.reason
    assert 1e-4 < verdict.errors["t_y"] < 1e-2 and verdict.errors["y"] < 1e-6


def test_a_backward_falls_with_its_forward() -> None:
    """Check that a backward with right gradients fails if the forward's tangent, which it needs first, is wrong."""
    provider = wrong()
    verdict = Gate(CPU).judge(op_of(provider), provider, replace(CASE, mode="primal"))
    assert verdict.status == FAILED
    assert verdict.reason is not None and verdict.reason.startswith("its forward: t_y: error")


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ((torch.full((4,), float("nan")), torch.zeros(4)), "y: error inf"),
        ((torch.zeros(5), torch.zeros(4)), "y: error inf"),
        ((torch.zeros(4),), "its results are y instead of y, t_y"),
        ((), "its results are none instead of y, t_y"),
    ],
    ids=["not finite", "shape", "no tangent", "nothing"],
)
def test_other_ways_of_being_wrong(planted: tuple[torch.Tensor, ...], words: str) -> None:
    """Check that none of them passes, and that none raises."""
    provider = returning(lambda: planted)
    verdict = Gate(CPU).judge(op_of(provider), provider, CASE)
    assert verdict.status == FAILED and verdict.reason is not None and words in verdict.reason


def test_a_floor_may_leave_the_tangent_out() -> None:
    """Check that what a floor does return has to be right."""
    floor = right("floor", FLOOR)
    assert Gate(CPU).judge(op_of(floor), floor, CASE).status == OK
    off = returning(lambda: (torch.zeros(4),), FLOOR)
    assert Gate(CPU).judge(op_of(off), off, CASE).status == FAILED
    empty = returning(tuple, FLOOR)
    assert Gate(CPU).judge(op_of(empty), empty, CASE).status == FAILED


def test_what_raises_is_an_error_and_not_the_end() -> None:
    """Check that the reason is the first line of the message."""

    def explode() -> tuple[torch.Tensor, ...]:
        raise AssertionError("only 64\nand a long explanation")

    verdict = Gate(CPU).judge(op_of(returning(explode)), returning(explode), CASE)
    assert (verdict.status, verdict.reason) == (ERROR, "AssertionError: only 64")


def test_one_judgement_serves_all_cases_of_the_same_small_form() -> None:
    """Check that cases share a judgement; otherwise a suite would mostly check."""
    calls: list[str] = []
    provider = right()

    def counted(case: TimedCase, data: object) -> Run:
        calls.append(case.name)
        return provider.prepare(case, data)

    gate, counting = Gate(CPU), replace(provider, prepare=counted)
    for name in ("a", "b"):
        gate.judge(op_of(counting), counting, replace(CASE, name=name))
    assert calls == ["a"]
    gate.judge(op_of(counting), counting, CASE.resized(n=5))
    assert len(calls) == 1
    gate.judge(op_of(counting), counting, CASE.resized(n=3))
    assert len(calls) == 2


def test_worst_tells_tangents_from_outputs() -> None:
    """Check that `dt_q` counts as the gradient of a tangent, that `dq` doesn't, and that infinity has no number."""
    errors = {"dq": 1.0, "dk": 2.0, "dt_q": 3.0, "t_o": 4.0}
    assert (worst(errors, tangents=False), worst(errors, tangents=True)) == (2.0, 4.0)
    assert worst({"o": float("inf")}, tangents=False) is None
    assert worst({}, tangents=True) is None
