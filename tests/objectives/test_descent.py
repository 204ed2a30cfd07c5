"""Tier 1, of signs: a network a little beside the exact solution is brought back to it by descent; see descent.py."""

from __future__ import annotations

import sys
from functools import partial

import pytest
from torch import Tensor

from fastdistill import objectives
from fastdistill.jvp import jvp
from fastdistill.objectives.metric import normalise_tangent
from tests.objectives.collected import DESCENT
from tests.objectives.descent import Case, descends, jump

EACH = pytest.mark.parametrize("case", DESCENT.values(), ids=DESCENT)


def some(*names: str) -> pytest.MarkDecorator:
    """Return these cases."""
    return pytest.mark.parametrize("case", [DESCENT[name] for name in names], ids=names)


@EACH
def test_descent_leads_back_to_the_exact_solution(case: Case) -> None:
    assert descends(case, case.gradient)


def test_every_method_has_a_case() -> None:
    assert {case.name for case in DESCENT.values()} == set(objectives.OBJECTIVES)


# Planted errors


@EACH
def test_a_negated_loss_is_found(case: Case) -> None:
    assert not descends(case, lambda theta: -case.gradient(theta))


TWO_EVALUATIONS = some("alpha-flow", "consistency", "consistency from data", "ect", "shortcut", "psd", "imm")


@TWO_EVALUATIONS
def test_a_prediction_swapped_with_its_target_is_found(case: Case) -> None:
    """Check that the gradient is the loss's by the prediction while the target is held, and not the other one."""
    assert descends(case, partial(case.derivative, target=False))
    assert not descends(case, partial(case.derivative, prediction=False))


@some("meanflow", "meanflow from data", "improved meanflow", "esd, through nothing")
def test_a_gradient_through_the_bracket_instead_is_found(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check [u] - (w - d D_w u), where u - [w - d D_w u] is meant."""

    def swapped(u: Tensor, du_dt: Tensor, w: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return u.detach() - (w - (t - s)[:, None] * du_dt)

    module = sys.modules[objectives.get(case.name).function.__module__]
    monkeypatch.setattr(module, "eulerian_residual", swapped)
    assert not descends(case, partial(case.gradient, jvp=partial(jvp, tangent_grad=True)))


@some("scm", "scm on the circle", "rcm", "ayf_emd", "ayf_lmd")
def test_a_pull_the_wrong_way_is_found(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check F - [F - g] for F - [F + g], which is also what swapping both sides makes of it."""
    continuous = case.name in ("scm", "rcm")
    function = objectives.continuous.regress if continuous else objectives.get(case.name).function
    module = sys.modules[function.__module__]
    monkeypatch.setattr(module, "normalise_tangent", lambda g, c: -normalise_tangent(g, c))
    assert not descends(case, case.gradient)


def test_scores_in_each_others_place_are_found() -> None:
    """Check DMD's teacher for its fake."""
    case, (fake, teacher) = DESCENT["dmd"], ("fake", "teacher")

    def gradient(theta: float) -> float:
        keywords = case.gate(theta).keywords
        return case.gradient(theta, fake=keywords[teacher], teacher=keywords[fake])

    assert not descends(case, gradient)


# What ESD stops, its diagonal and (du/dx) v, doesn't move along phi: test_esd holds its gradient.
STOPS_NOTHING_ALONG_PHI = ("esd", "esd, through the tangent")


@some(*(name for name, case in DESCENT.items() if case.direction is jump and name not in STOPS_NOTHING_ALONG_PHI))
def test_a_lost_stop_gradient_is_found(case: Case) -> None:
    """Check that the derivative of the loss's value is another number for every other method."""
    assert not descends(case, case.derivative)
