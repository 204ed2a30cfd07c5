"""Tier 1: each gate of tier 0 fails on planted errors, in its residual and in its gradient.

Errors are planted through what a caller hands in (jvp, network, target, teacher, solver, path), never in the source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastdistill.paths import FM, LINEAR, Cosine, Linear, Path, TrigFlow, expand_time
from fastdistill.samplers import Net
from tests.objectives.cases import (
    EULERIAN_MUTANTS,
    EXACT,
    LAGRANGIAN_MUTANTS,
    Gate,
    Jvp,
    instantaneous,
    other_way,
    reversed_time,
    reversed_velocity,
    too_far,
)
from tests.objectives.collected import EULERIAN, FROM_DATA, LAGRANGIAN, TAUGHT

# What a planted error leaves at the least, over three seeds: residuals of 0.03 and gradients of 1e-4.
RESIDUAL, GRADIENT = 0.01, 2e-5
PATHS = [pytest.param(path, id=type(path).__name__) for path in (Linear(), Cosine())]


def assert_found(residual: float, gradient: float) -> None:
    """Assert that both are far above the bound of tier 0."""
    assert residual > RESIDUAL
    assert gradient > GRADIENT


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mutant", EULERIAN_MUTANTS)
@pytest.mark.parametrize("name", EULERIAN)
def test_a_wrong_tangent_of_the_start_is_found(name: str, mutant: Jvp, path: Path) -> None:
    """Check the methods whose tangent is (w, 1, 0)."""
    assert_found(*Gate(name, path, taught=True, options=TAUGHT[name])(jvp=mutant))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mutant", LAGRANGIAN_MUTANTS)
@pytest.mark.parametrize("name", LAGRANGIAN)
def test_a_wrong_tangent_of_the_end_is_found(name: str, mutant: Jvp, path: Path) -> None:
    """Check the methods whose tangent is (0, 0, 1)."""
    assert_found(*Gate(name, path, taught=True, options=TAUGHT[name])(jvp=mutant))


NETWORKS = [instantaneous, other_way, reversed_velocity, too_far, reversed_time]
VELOCITIES = [reversed_velocity, too_far, reversed_time]  # what is wrong at s = t, too
Mutant = Callable[[Net], Net]


@pytest.mark.parametrize("mutant", NETWORKS)
@pytest.mark.parametrize("name", TAUGHT)
def test_a_wrong_student_is_found_with_the_exact_teacher(name: str, mutant: Mutant) -> None:
    """Check all methods that take one; the bootstrapping ones have rows with s = t, too."""
    gate = Gate(name, Cosine(), taught=True, options=TAUGHT[name])
    assert_found(*gate(mutant(gate.net)))


@pytest.mark.parametrize("mutant", [instantaneous, reversed_velocity, too_far])
@pytest.mark.parametrize("name", FROM_DATA)
def test_a_wrong_student_is_found_from_data(name: str, mutant: Mutant) -> None:
    """Check all but flow matching, which never looks at s."""
    gate = Gate(name, Cosine(), taught=False, options=FROM_DATA[name])
    if name == "flow_matching" and mutant is instantaneous:
        assert max(gate(mutant(gate.net))) < EXACT
    else:
        assert_found(*gate(mutant(gate.net)))


@pytest.mark.parametrize("mutant", VELOCITIES)
@pytest.mark.parametrize("name", [name for name in TAUGHT if name != "consistency"])
def test_a_wrong_teacher_is_found(name: str, mutant: Mutant) -> None:
    """Check it with the exact student; consistency has its solver in the next test."""
    gate = Gate(name, Cosine(), taught=True, options=TAUGHT[name])
    assert_found(*gate(teacher=mutant(gate.net)))


@pytest.mark.parametrize("error", ["stays", "wrong way", "full step"])
def test_a_wrong_solver_is_found(error: str) -> None:
    """Check consistency distillation."""
    gate = Gate("consistency", Cosine(), taught=True)

    def solver(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        step = {"stays": 0 * t, "wrong way": r - t, "full step": t}[error]
        return x - expand_time(step, x) * gate.law.average_velocity(x, t, r)

    assert_found(*gate(solver=solver))


@pytest.mark.parametrize("mutant", NETWORKS)
@pytest.mark.parametrize("name", ["consistency", "shortcut", "psd"])
def test_a_wrong_target_is_found(name: str, mutant: Mutant) -> None:
    """Check what stands on the stopped side of methods that compare two evaluations."""
    gate = Gate(name, Cosine(), taught=True, options=TAUGHT[name])
    assert_found(*gate(target=mutant(gate.net)))


@pytest.mark.parametrize("mutant", VELOCITIES)
@pytest.mark.parametrize("name", ["ect", "alpha_flow"])
def test_a_wrong_target_is_found_from_data(name: str, mutant: Mutant) -> None:
    """Check it on the straight path, where alpha-Flow is exact at any alpha."""
    gate = Gate(name, LINEAR, taught=False, options=FROM_DATA[name] | ({"alpha": 0.5} if name == "alpha_flow" else {}))
    assert max(gate()) < EXACT
    assert_found(*gate(target=mutant(gate.net)))


@pytest.mark.parametrize("mutant", VELOCITIES)
@pytest.mark.parametrize("name", ["esd", "lsd", "tvm"])
def test_a_wrong_velocity_of_the_target_is_found(name: str, mutant: Mutant) -> None:
    """Check the methods whose target gives the velocity."""
    gate = Gate(name, Cosine(), taught=True)
    assert_found(*gate(target=mutant(gate.net)))


# The velocities of a path


@dataclass(frozen=True)
class SeedGaussian(TrigFlow):
    """Path of the seed's row "Gaussian": (d_alpha - d_beta alpha / beta) x0 + (d_beta / beta) x1, x_t's place lost."""

    def velocity(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        t = expand_time(t, x0)
        rate = self.d_beta(t) / self.beta(t)
        return (self.d_alpha(t) - rate * self.alpha(t)) * x0 + rate * x1


@dataclass(frozen=True)
class SeedFM(FM):
    """Path of the seed's row "FM", (x1 - (1 - sigma) x_t) / (1 - sigma + sigma t), where t rises to the data x1."""

    def velocity(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        state, time = self.interpolate(x0, x1, t), expand_time(t, x0)
        return (x1 - (1 - self.sigma) * state) / (1 - self.sigma + self.sigma * time)


@dataclass(frozen=True)
class Backwards(Linear):
    """Path with velocity x0 - x1: from noise to data while t rises."""

    def velocity(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        return x0 - x1


WRONG_PATHS = [
    pytest.param(SeedGaussian(1.0), TrigFlow(1.0), id="seed-gaussian"),
    pytest.param(SeedFM(0.1), FM(0.1), id="seed-fm"),
    pytest.param(Backwards(), LINEAR, id="backwards"),
]


@pytest.mark.parametrize(("wrong", "right"), WRONG_PATHS)
@pytest.mark.parametrize("name", ["flow_matching", "meanflow", "improved_meanflow", "alpha_flow", "facm", "tvm"])
def test_a_wrong_velocity_of_the_path_is_found(name: str, wrong: Path, right: Path) -> None:
    """Check the methods that follow v_hat; consistency training follows states only."""
    gate = Gate(name, right, taught=False, options=FROM_DATA[name])
    assert max(gate()) < EXACT
    assert_found(*gate(path=wrong))


@pytest.mark.parametrize("name", ["scm", "rcm"])
def test_a_wrong_velocity_is_found_by_continuous_consistency_where_the_map_is_not_constant(name: str) -> None:
    """Check that all of one point's states lead to it by any velocity, unless the path ends in noise around it."""
    gate = Gate(name, FM(0.1), taught=False, options={"parameterization": "average"})
    assert max(gate()) < EXACT
    assert_found(*gate(path=SeedFM(0.1)))


@dataclass(frozen=True)
class OwnNoise(FM):
    """States that don't share their noise."""

    def interpolate(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        return super().interpolate(x0, torch.randn_like(x1), t)


@pytest.mark.parametrize("name", ["consistency", "ect"])
def test_noise_that_is_not_shared_is_found(name: str) -> None:
    """Check it on a path that ends in noise around the point, so that each noise has an end of its own."""
    gate = Gate(name, FM(0.5), taught=False, options=FROM_DATA[name])
    assert max(gate()) < EXACT
    assert_found(*gate(path=OwnNoise(0.5)))
