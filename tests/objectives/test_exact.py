"""Tier 0: at the exact solution of Gaussian data, on every path, each method has no residual and no gradient."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import objectives
from fastdistill.eval.exact import Gaussian
from fastdistill.jvp import jvp
from fastdistill.objectives import Autoguidance, Guidance
from fastdistill.paths import EDM, FM, ICFM, LINEAR, VE, Cosine, Linear, Path, TrigFlow
from tests.objectives.cases import EXACT, ROWS, WIDTH, Gate, GuidedGaussians, draw_times
from tests.objectives.collected import FROM_DATA, TAUGHT

# The straight and the two trigonometric paths, one that starts away from the data, and one whose data never fade.
PATHS = [
    pytest.param(path, id=type(path).__name__)
    for path in (Linear(), Cosine(), TrigFlow(), FM(0.1), EDM(0.01, 4.0, 3.0), ICFM())
]


def keywords_on(path: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords: on a path that doesn't start at the data, sCM's form is the average velocity's."""
    starts_elsewhere = isinstance(path, FM | EDM)
    return options | ({"parameterization": "average"} if starts_elsewhere and name in ("scm", "rcm") else {})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", TAUGHT)
def test_residual_and_gradient_vanish_with_the_exact_teacher(name: str, path: Path) -> None:
    residual, gradient = Gate(name, path, taught=True, options=keywords_on(path, name, TAUGHT[name]))()
    assert residual < EXACT
    assert gradient < EXACT


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FROM_DATA)
def test_residual_and_gradient_vanish_from_data_in_one_point(name: str, path: Path) -> None:
    """Check it there because the conditional velocity is the marginal one: the loss has its minimum for every row."""
    residual, gradient = Gate(name, path, taught=False, options=keywords_on(path, name, FROM_DATA[name]))()
    assert residual < EXACT
    assert gradient < EXACT


@pytest.mark.parametrize("name", ["scm", "rcm"])
def test_the_average_velocitys_form_agrees_that_the_exact_solution_is_one(name: str) -> None:
    """Check it where sCM's own form fits, and on a path that starts away from the data, where it doesn't."""
    for path in (LINEAR, Cosine(), TrigFlow(), VE(0.01, 4.0)):
        assert max(Gate(name, path, taught=True, options={"parameterization": "average"})()) < EXACT


@pytest.mark.parametrize("name", [name for name in TAUGHT if "c" in objectives.get(name).options])
def test_weights_and_normalisation_do_not_move_the_solution_of_a_target_without_noise(name: str) -> None:
    """Check it as the teacher's velocity is a function of x_t. With data's noise they do: test_noisy_weights.py."""
    others = {"scm": {"c": None}, "rcm": {"c": None}, "ayf_emd": {"c": None}, "ayf_lmd": {"c": None}}
    options = TAUGHT[name] | others.get(name, {"c": 10.0})
    assert max(Gate(name, Cosine(), taught=True, options=options)()) < EXACT


@pytest.mark.parametrize("through", ["time", "tangent", "nothing"])
@pytest.mark.parametrize("path", PATHS)
def test_esd_is_exact_whatever_its_gradient_flows_through(path: Path, through: str) -> None:
    assert max(Gate("esd", path, taught=True, options={"through": through})()) < EXACT


@pytest.mark.parametrize("path", PATHS)
def test_shortcuts_finest_halves_are_exact_to_first_order_in_their_length(path: Path) -> None:
    """Check that they are steps along the velocity; halves longer than the finest are as exact as the map."""
    gate, errors = Gate("shortcut", path, taught=True), []
    for finest in (64, 128):
        gate.times["delta"] = torch.full((ROWS,), 1 / finest, dtype=torch.float64)
        errors.append(gate(finest=finest)[0])
        assert max(gate(finest=2 * finest)) < EXACT
    assert 1.6 < errors[0] / errors[1] < 2.4


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_alpha_flow_is_exact_where_the_flow_is_straight(alpha: float) -> None:
    """Check that its step along w is then the flow's; elsewhere the error is of first order in alpha."""
    assert max(Gate("alpha_flow", LINEAR, taught=False, options={"alpha": alpha})()) < EXACT


def test_alpha_flow_converges_to_the_exact_solution_at_first_order() -> None:
    gate = Gate("alpha_flow", Cosine(), taught=True)
    errors = [gate(alpha=alpha)[0] for alpha in (0.02, 0.01)]
    assert 1.9 < errors[0] / errors[1] < 2.1


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_consistency_distillation_is_as_exact_as_its_solver(solver: str, order: int) -> None:
    """Check that the raw error is one of the map over t - r, so of the solver's order."""
    gate = Gate("consistency", LINEAR, taught=True)
    errors = []
    for gap in (0.02, 0.01):
        gate.times["r"] = gate.times["t"] - gap
        errors.append(gate(solver=solver)[0])
    assert 0.9 * 2**order < errors[0] / errors[1] < 1.1 * 2**order


@pytest.mark.parametrize("path", [EDM(0.01, 4.0, 3.0), VE(0.05, 4.0)], ids=lambda path: type(path).__name__)
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("euler_in_time", 1), ("heun_in_time", 2)])
def test_both_kinds_of_steps_are_of_their_order_where_the_noise_level_is_finite(
    solver: str, order: int, path: Path
) -> None:
    """Check steps in the noise level and in time, which are two different steps there."""
    gate = Gate("consistency", path, taught=True)
    errors = {}
    for name in (solver, solver.removesuffix("_in_time")):
        errors[name] = []
        for gap in (0.02, 0.01):
            gate.times["r"] = gate.times["t"] - gap
            errors[name].append(gate(solver=name)[0])
    assert 0.85 * 2**order < errors[solver][0] / errors[solver][1] < 1.15 * 2**order
    assert (len(errors) == 1) == (solver in ("euler", "heun"))
    assert len({tuple(found) for found in errors.values()}) == len(errors)


# From data with noise the statement is one of expectations: unless a row is weighed by its error, the gradient vanishes


@pytest.mark.parametrize("path", [pytest.param(path, id=type(path).__name__) for path in (Linear(), TrigFlow())])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flow_matching", {}),
        ("flow_matching", {"weight": "edm"}),
        ("meanflow", {"p": 0.0}),
        ("improved_meanflow", {"p": 0.0}),
        ("scm", {"c": None}),
        ("scm", {"c": None, "parameterization": "average"}),
        ("rcm", {"c": None}),
        ("tvm", {}),
        ("esd", {}),
        ("lsd", {}),
        ("psd", {}),
        ("shortcut", {}),
    ],
)
def test_expected_gradient_from_data_vanishes(name: str, options: dict[str, Any], path: Path) -> None:
    """Check that the gradient is linear in v_hat, whose mean is v, by means that are a Gaussian's expectations.

    Half of the methods regress v_hat on their diagonal only: there every row is on it. A weight of the row's own error
    (p > 0, a normalised tangent) makes the gradient another function of v_hat and moves the solution, which the
    symmetry of a Gaussian would hide here: test_noisy_weights.py.
    """
    law, x0, x1 = whitened(path)
    objective = objectives.get(name)
    t = torch.full((len(x0),), 0.7, dtype=torch.float64)
    s = t.clone() if name in ("esd", "lsd", "psd") else 0.3 * t
    times = {"t": t, "s": s, "delta": 0 * t}
    if name == "rcm":
        options = options | {"score_gradient": torch.zeros_like(x1)}

    def gradient(factor: float) -> float:
        slope = torch.zeros(WIDTH, WIDTH, dtype=torch.float64, requires_grad=True)
        net = lambda x, t, s, y=None: factor * law.average_velocity(x, t, s) + x @ slope  # noqa: E731
        loss, _ = objective.function(net, x0, x1, *(times[name] for name in objective.times), path=path, **options)
        return torch.autograd.grad(loss, slope)[0].abs().max().item()

    assert gradient(1.0) < EXACT
    assert gradient(1.1) > 1e-3


def whitened(path: Path) -> tuple[Gaussian, Tensor, Tensor]:
    """Return a Gaussian law and (x0, x1) whose joint sample mean and covariance are exactly the law's."""
    raw = torch.randn(400, 2 * WIDTH, dtype=torch.float64)
    raw = raw - raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(raw.T @ raw / len(raw))).T
    mean, factor = torch.randn(WIDTH, dtype=torch.float64), torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    return Gaussian(mean, factor @ factor.T, path), mean + white[:, :WIDTH] @ factor.T, white[:, WIDTH:]


# Guidance is inside the one velocity


UNGUIDED = {"guidance": None, "weak_teacher": None}
# The solver of consistency is as exact as its order.
GUIDED = [name for name in TAUGHT if "guidance" in objectives.get(name).takes and name != "consistency"]


def guided_gate(
    name: str, kind: str, by_row: bool, plain_tangent: bool = False, gap: float = 0.0
) -> tuple[float, float]:
    """Return residual and gradient at the exact guided solution, guided by labels or by a weak teacher.

    With `plain_tangent`, the planted error: the tangent runs along the teacher's unguided velocity. `gap` is t - r of
    discrete consistency.
    """
    path, objective, times = Cosine(), objectives.get(name), draw_times()
    student = GuidedGaussians([0.3, 1.5, 4.0, 0.8], 2.0, path=path)
    x0, x1 = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    y, plain = torch.arange(ROWS) % 3, student.unguided()
    scale: Tensor | float = 1 + 2 * torch.rand(ROWS, dtype=torch.float64) if by_row else 2.0
    options: dict[str, Any] = {"y": y, "path": path, "teacher": plain}
    if kind == "labels":
        options["guidance"] = Guidance(scale, null=3)
    else:
        options["guidance"] = Autoguidance(scale)
        options["weak_teacher"] = lambda x, t, s, y: plain(x, t, s, torch.full_like(y, 3))
    options |= TAUGHT[name] | ({"score_gradient": torch.zeros_like(x1)} if name == "rcm" else {})
    if plain_tangent:

        def along_plain(fn: Any, primals: Any, tangents: Any, **more: Any) -> Any:
            x, t, _ = primals
            if tangents[0] is None:
                return jvp(fn, primals, tangents, **more)
            labels = y if len(x) == ROWS else y[times["s"] < times["t"]]  # some methods pass the rows with s != t only
            return jvp(fn, primals, (plain(x, t, t, labels), *tangents[1:]), **more)

        options["jvp"] = along_plain
    theta = torch.zeros(1, dtype=torch.float64, requires_grad=True)

    def net(x: Tensor, t: Tensor, s: Tensor, y: Tensor, g: Tensor | None = None) -> Tensor:
        assert (g is not None) == by_row, "the scale reaches the network where it differs by row, and only there"
        return student(x, t, s, y, g) + theta * x.sin()

    if gap:
        times["r"] = times["t"] - gap
    inputs = [times[key] for key in objective.times]
    loss, metrics = objective.function(net, x0, x1, *inputs, **options)
    gradient = torch.autograd.grad(loss, theta)[0].abs().item()
    return (metrics["raw_error"] + metrics.get("anchor_error", 0)).sqrt().item(), gradient


@pytest.mark.parametrize("by_row", [False, True], ids=["one-scale", "scale-by-row"])
@pytest.mark.parametrize("kind", ["labels", "weak"])
@pytest.mark.parametrize("name", GUIDED)
def test_guided_solution_is_exact(name: str, kind: str, by_row: bool) -> None:
    assert max(guided_gate(name, kind, by_row)) < EXACT


@pytest.mark.parametrize("by_row", [False, True], ids=["one-scale", "scale-by-row"])
@pytest.mark.parametrize("kind", ["labels", "weak"])
def test_guided_consistency_distillation_is_as_exact_as_its_solver(
    kind: str, by_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check Heun's order along the guided flow; planted: a step along the plain one, which no small gap mends."""

    def residual(gap: float) -> float:
        torch.manual_seed(0)
        return guided_gate("consistency", kind, by_row, gap=gap)[0]

    assert 3.6 < residual(0.02) / residual(0.01) < 4.4
    module = importlib.import_module("fastdistill.objectives.consistency")  # the package's name is the function
    right = module.target_velocity
    monkeypatch.setattr(module, "target_velocity", lambda *args, **given: right(*args, **given | UNGUIDED))
    assert residual(0.01) > 0.05


@pytest.mark.parametrize("name", [name for name in GUIDED if objectives.get(name).identity == "eulerian"])
def test_guidance_in_the_target_only_is_found(name: str) -> None:
    """Check a tangent along the teacher's plain velocity, as it is in code that guides its target alone."""
    residual, gradient = guided_gate(name, "labels", False, plain_tangent=True)
    assert residual > 0.05
    assert gradient > 1e-4
