"""Test the suites: what is in them, and that every op passes its own gate at the smallest size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import objectives
from fastdistill.benchmarks.ops.common_providers import WRITTEN_OUT
from fastdistill.benchmarks.ops.step import loss_of, measured_objectives, takes_jvp
from fastdistill.benchmarks.ops.suites import OPS, SUITES, WHAT, cases
from fastdistill.benchmarks.ops.timed_op import FLOOR, MODES, TimedCase
from fastdistill.benchmarks.run.gate import OK, Gate
from tests.benchmarks.toy import CPU

EVERY = [(suite, case) for suite in SUITES for case in cases(suite, "bfloat16")]
QUICK = [(suite, case) for suite in SUITES for case in cases(suite, "float32", quick=True)]

# `--quick` has one of each kind; here is a step of every objective.
(STEP_CASE,) = [case for suite, case in QUICK if suite == "step" and case.shape["objective"] == "meanflow"]
STEPS = [STEP_CASE.resized(objective=name) for name in measured_objectives()]
JUDGED = [case for suite, case in QUICK if suite != "step"] + STEPS


@pytest.mark.parametrize("every", [EVERY, QUICK], ids=["full", "quick"])
def test_cases_are_told_apart_by_their_groups(every: list[tuple[str, TimedCase]]) -> None:
    """Check that groups differ, because a result file tells cases apart by nothing else."""
    groups = [case.group for _, case in every]
    assert len(set(groups)) == len(groups)
    assert all(case.suite == suite and case.op in OPS and case.mode in MODES for suite, case in every)
    assert {suite for suite, _ in every} == set(SUITES) == set(WHAT)


def test_the_shapes_that_users_have() -> None:
    """Check the heads, lengths and head dims of the models after which the suites are named."""
    shapes = {
        (case.suite, *(case.shape.get(name) for name in ("heads", "n", "m", "d")))
        for _, case in EVERY
        if case.op == "attention"
    }
    assert {("dit", 6, 256, 256, 64), ("dit", 16, 4096, 4096, 72), ("dit", 12, 1024, 1024, 64)} <= shapes
    assert {
        ("video", 40, 75600, 75600, 128),
        ("video", 12, 32760, 32760, 128),
        ("video", 40, 75600, 512, 128),
    } <= shapes
    assert {("mmdit", 24, 4429, 4429, 64), ("mmdit", 24, 4608, 4608, 128), ("mmdit", 38, 1357, 1357, 64)} <= shapes
    assert {d for suite, _, _, _, d in shapes if suite == "scaling"} == {32, 40, 64, 72, 80, 96, 112, 128, 256}
    assert max(n for suite, _, n, _, _ in shapes if suite == "scaling") == 131072
    assert {case.op for _, case in EVERY if case.suite == "norms"} == {
        *("layer_norm", "rms_norm", "ada_layer_norm", "ada_rms_norm", "gated_residual_ada_norm", "qk_norm_rope"),
        *("gelu", "gelu_tanh", "swiglu"),
    }


def test_every_objective_has_a_step() -> None:
    """Check every objective with a tangent, by name, so that a new method is measured without a change here."""
    named = {case.shape["objective"] for _, case in EVERY if case.suite == "step"}
    assert named >= {"flow_matching", "meanflow", "scm", "ayf_emd", "tvm"}
    assert named == {name for name, row in objectives.OBJECTIVES.items() if "jvp" in row.takes} | {"flow_matching"}


@pytest.mark.parametrize("case", JUDGED, ids=lambda case: f"{case.group}-{case.shape.get('objective', '')}")
def test_everybody_here_is_judged(case: TimedCase) -> None:
    """Check that ours and the floors pass, and that providers that can't run have said so beforehand."""
    gate, op = Gate(CPU), OPS[case.op]
    verdicts = {
        provider.name: (provider.kind, gate.judge(op, provider, case))
        for provider in op.providers(CPU)
        if provider.absent is None and provider.refuses(case) is None
    }
    assert any(kind == "ours" for kind, _ in verdicts.values())
    must_pass = [verdict for kind, verdict in verdicts.values() if kind in ("ours", FLOOR)]
    must_pass += [verdict for name, (_, verdict) in verdicts.items() if name == WRITTEN_OUT]
    assert all(verdict.status == OK for verdict in must_pass), verdicts
    if case.mode != "step":
        assert verdicts["finite differences"][1].status == "failed parity"


@pytest.mark.parametrize("name", [name for name in OPS if name not in ("block", "step")])
def test_the_last_rows_come_from_their_part_alone(name: str) -> None:
    """Check that the last rows can be computed alone, so that they can be compared with float64 at any size."""
    (case,) = [
        case for suite, case in QUICK if case.op == name and case.mode == "forward" and suite in ("dit", "norms")
    ]
    op = OPS[name]
    case = case.resized(n=300, m=300, batch=2)
    data = op.exact(op.data(case, CPU))
    results = op.plain(case, data)()
    part, rows = op.part(data, results)  # type: ignore[misc]
    for row, expected in zip(rows, op.plain(case, part)(), strict=True):
        assert row.shape == expected.shape and row.shape[-2] == 256
        torch.testing.assert_close(row, expected)


def test_the_small_form_keeps_what_is_awkward() -> None:
    """Check that a length that 32 doesn't divide stays such a length, and that the head dim stays."""
    (case,) = [c for c in cases("mmdit", "bfloat16") if c.name.startswith("SD3-M-1024px") and c.mode == "forward"]
    small = OPS["attention"].small(case)
    assert small.size("n") == 512 - 32 + 4429 % 32 and small.size("d") == 64 and small.size("batch") == 1
    (case,) = [c for c in cases("dit", "bfloat16") if c.name.startswith("DiT-XL/2-1024px") and c.mode == "forward"]
    assert OPS["attention"].small(case).size("n") == 512


def test_operations_are_counted_as_published() -> None:
    """Check 12·B·H·N·M·D for attention with its tangent, 4 without, and 24·C²·N + 4·C·N² for a block's primal."""
    (attention,) = [case for _, case in QUICK if case.group == "dit/attention-quick-float32/forward"]
    op = OPS["attention"]
    data = op.data(attention, CPU)
    b, h, n, d = data.primals[0].shape
    assert op.cost(attention, data, "ours").flops == 12 * b * h * n * n * d
    assert op.cost(attention, data, FLOOR).flops == 4 * b * h * n * n * d
    assert op.cost(attention, data, "ours").bytes == 8 * 4 * b * h * n * d
    (block,) = [case for _, case in QUICK if case.group == "block/block-quick-float32/forward"]
    data = OPS["block"].data(block, CPU)
    b, n, c = data.primals[0].shape
    assert OPS["block"].cost(block, data, FLOOR).flops == b * (24 * c**2 * n + 4 * c * n**2)
    assert OPS["block"].cost(block, data, "ours").flops == b * (48 * c**2 * n + 12 * c * n**2)


def test_a_step_gives_an_objective_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a step passes times, a needed teacher, and the jvp, so that a later method runs too."""
    seen: dict[str, Any] = {}

    def later(
        net: Any, x0: Tensor, x1: Tensor, t: Tensor, s: Tensor, *, y: Tensor, teacher: Any, jvp: Callable[..., Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        seen.update(teacher=teacher, jvp=jvp, s=s)
        return x0.sum(), {}

    row = replace(objectives.OBJECTIVES["ayf_emd"], function=later)
    monkeypatch.setitem(objectives.OBJECTIVES, "later", row)
    (case,) = [c for c in cases("step", "float32") if c.shape["objective"] == "later"]
    case = case.resized(preset="dit-digits", px=8, batch=8)
    batch = OPS["step"].data(case, CPU)
    loss_of("later", batch, jvp=torch.func.jvp)
    assert seen["teacher"] is batch.teacher and seen["jvp"] is torch.func.jvp and seen["s"] is batch.s_far
    assert not any(parameter.requires_grad for parameter in batch.teacher.parameters())
    assert takes_jvp("later") and takes_jvp("meanflow") and not takes_jvp("flow_matching")
    assert (batch.s_far < batch.t).all() and (batch.s[: batch.distinct] < batch.t[: batch.distinct]).all()
    assert (batch.s[batch.distinct :] == batch.t[batch.distinct :]).all()
