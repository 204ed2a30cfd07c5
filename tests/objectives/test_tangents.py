"""Tier 2: each method's tangent and gradient are the same by forward mode, central differences and double backward.

The other two ways are drivers with the convention of `fastdistill.jvp`, handed to the objective in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import objectives
from fastdistill.jvp import jvp
from fastdistill.objectives import Guidance, adapters
from fastdistill.paths import LINEAR, Cosine, Path, TrigFlow
from tests.objectives.cases import ROWS, WIDTH, Jvp, SmallNet, draw_times
from tests.objectives.collected import EULERIAN, LAGRANGIAN, TAUGHT

THROUGH = ["esd", "lsd", "tvm"]  # gradients flow through the tangent


def dense(primals: Any, tangents: Any) -> list[Tensor]:
    """Return tangents as tensors: numbers broadcast, None is zero."""
    return [
        tangent if isinstance(tangent, Tensor) else torch.full_like(primal, tangent or 0.0)
        for primal, tangent in zip(primals, tangents, strict=True)
    ]


def forward_mode(fn: Any, primals: Any, tangents: Any, tangent_grad: bool = False) -> tuple[Tensor, Tensor]:
    """Call PyTorch's own forward mode."""
    u, du = torch.func.jvp(fn, tuple(primals), tuple(dense(primals, tangents)))[:2]
    return u, du if tangent_grad else du.detach()


def central_difference(fn: Any, primals: Any, tangents: Any, tangent_grad: bool = False) -> tuple[Tensor, Tensor]:
    """Differentiate by central differences of fourth order, differentiable by the network's weights."""
    directions, step = dense(primals, tangents), 3e-4

    def at(distance: float) -> Tensor:
        return fn(*(primal + distance * direction for primal, direction in zip(primals, directions, strict=True)))

    du = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
    return fn(*primals), du if tangent_grad else du.detach()


def double_backward(fn: Any, primals: Any, tangents: Any, tangent_grad: bool = False) -> tuple[Tensor, Tensor]:
    """Differentiate (z, fn) by a cotangent z: reverse mode twice."""
    with torch.enable_grad():  # also where an objective wants no gradient of the tangent
        points = [primal.detach().requires_grad_() for primal in primals]
        u = fn(*points)
        z = torch.zeros_like(u, requires_grad=True)
        pulled = torch.autograd.grad(u, points, z, create_graph=True)
        total = sum((part * direction).sum() for part, direction in zip(pulled, dense(primals, tangents), strict=True))
        (du,) = torch.autograd.grad(total, z, create_graph=True)
    return u, du if tangent_grad else du.detach()


def without_gradient(fn: Any, primals: Any, tangents: Any, tangent_grad: bool = False) -> tuple[Tensor, Tensor]:
    """Lose the gradient of the tangent."""
    u, du = jvp(fn, primals, tangents)
    return u, du


def evaluate(name: str, driver: Jvp, path: Path = LINEAR, wrap: Callable[..., Any] = lambda net: net) -> list[Tensor]:
    """Return the tangent that the objective saw, then the gradient of its loss by each weight."""
    torch.manual_seed(3)
    student, teacher, objective, times = SmallNet(), SmallNet(), objectives.get(name), draw_times()
    x0, x1 = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    seen: list[Tensor] = []

    def recording(*arguments: Any, **options: Any) -> Any:
        out = driver(*arguments, **options)
        seen.append(out[1].detach())
        return out

    options: dict[str, Any] = TAUGHT[name] | {"teacher": teacher}
    if "guidance" in objective.takes:
        options["guidance"] = Guidance(1.5, null=3)
    if name == "rcm":
        options["score_gradient"] = x1.sin()
    inputs = [times[key] for key in objective.times]
    y = torch.arange(ROWS) % 4
    loss, _ = objective.function(wrap(student), x0, x1, *inputs, y=y, path=path, jvp=recording, **options)
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    return [torch.cat(seen), *torch.autograd.grad(loss, weights)]


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the largest relative difference."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("driver", [forward_mode, central_difference, double_backward])
@pytest.mark.parametrize("name", EULERIAN + LAGRANGIAN)
def test_tangent_and_gradient_agree_with_other_ways_to_differentiate(name: str, driver: Jvp) -> None:
    """Check what was measured: 1e-14, and 3e-12 for differences, of fourth order in a step of 3e-4."""
    bound = 1e-9 if driver is central_difference else 1e-11
    assert worst(evaluate(name, jvp, Cosine()), evaluate(name, driver, Cosine())) < bound


@pytest.mark.parametrize("name", THROUGH)
def test_gradient_through_the_tangent_matters(name: str) -> None:
    """Check that dropping it changes the gradient; the tangent itself is the same."""
    ours, theirs = evaluate(name, without_gradient), evaluate(name, double_backward)
    assert worst(ours[:1], theirs[:1]) < 1e-11
    assert worst(ours[1:], theirs[1:]) > 0.05


@pytest.mark.parametrize("name", [name for name in EULERIAN + LAGRANGIAN if name not in THROUGH])
def test_the_other_methods_hold_their_tangent_fixed(name: str) -> None:
    """Check that a driver that keeps its graph gives the same gradient: the objective itself detaches what it gets."""

    def keeping(fn: Any, primals: Any, tangents: Any) -> tuple[Tensor, Tensor]:
        return forward_mode(fn, primals, tangents, tangent_grad=True)

    assert worst(evaluate(name, keeping), evaluate(name, jvp)) < 1e-11


ADAPTERS: dict[str, Callable[..., Any]] = {
    "gap": lambda net: adapters.gap_conditioned(lambda x, t, h, y: net(x, t=t, s=t - h, y=y)),
    "reversed": adapters.reversed_time,
    "scaled": lambda net: adapters.scaled_time(net, 3.0),
    "x0": lambda net: adapters.predicts(net, "x0", TrigFlow()),
    "score": lambda net: adapters.predicts(net, "score", TrigFlow()),
    "trigflow": lambda net: adapters.trigflow(net, TrigFlow()),
    "on-path": lambda net: adapters.on_path(net, LINEAR, TrigFlow()),
}


@pytest.mark.parametrize("name", ["meanflow", "scm", "lsd"])
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_tangents_pass_through_adapters(adapter: Callable[..., Any], name: str) -> None:
    """Check that the conversion is inside what is differentiated, so that the three ways agree again."""
    ours = evaluate(name, jvp, TrigFlow(), adapter)
    assert worst(ours, evaluate(name, central_difference, TrigFlow(), adapter)) < 1e-7
    assert worst(ours, evaluate(name, double_backward, TrigFlow(), adapter)) < 1e-9
