"""Check integrators and jumps of the map against exact flows: order of convergence, grids of times, and solver."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastdistill import samplers
from fastdistill.eval.exact import Gaussian
from fastdistill.paths import Path
from fastdistill.samplers import adaptive, average_velocity, euler, heun
from tests.samplers.fields import EVERY_PATH, exact_net, exact_samples, on


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_error_falls_at_the_order_of_the_sampler(
    sampler: Callable[..., Tensor], order: int, law: Gaussian, noise: Tensor
) -> None:
    truth = exact_samples(law, noise)
    errors = [(sampler(law.velocity, noise, steps) - truth).norm().item() for steps in (128, 256)]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.1, errors


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_jumps_of_the_exact_average_velocity_are_exact_for_any_number_of_steps(
    steps: int, law: Gaussian, noise: Tensor
) -> None:
    samples = average_velocity(lambda x, t, s, y: law.average_velocity(x, t, s), noise, steps)
    assert (samples - exact_samples(law, noise)).abs().max() < 1e-12


def test_jumps_of_the_instantaneous_velocity_are_euler_steps(law: Gaussian, noise: Tensor) -> None:
    jumps = average_velocity(lambda x, t, s, y: law.velocity(x, t), noise, 5)
    assert torch.equal(jumps, euler(law.velocity, noise, 5))


@pytest.mark.parametrize(("sampler", "per_step"), [(euler, 1), (heun, 2)])
def test_samplers_walk_from_one_to_zero_in_equal_steps(sampler: Callable[..., Tensor], per_step: int) -> None:
    seen: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (3,)
        assert t.dtype == torch.float32
        seen.append(t[0].item())
        return torch.zeros_like(x)

    sampler(velocity, torch.randn(3, 1, 8, 8, dtype=torch.bfloat16), 4)
    starts, ends = [1.0, 0.75, 0.5, 0.25], [0.75, 0.5, 0.25, 0.0]
    assert seen == (starts if per_step == 1 else [t for pair in zip(starts, ends, strict=True) for t in pair])


def test_average_velocity_passes_labels_and_both_times() -> None:
    calls: list[tuple[float, float]] = []
    labels = torch.tensor([0, 1, 2])

    def net(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is labels
        calls.append((t[0].item(), s[0].item()))
        return torch.zeros_like(x)

    average_velocity(net, torch.randn(3, 2), 2, labels)
    assert calls == [(1.0, 0.5), (0.5, 0.0)]


@EVERY_PATH
def test_integrators_reach_the_exact_end_on_every_path(path: Path) -> None:
    law, x1 = on(path), torch.randn(16, 2, dtype=torch.float64)
    truth = exact_samples(law, path.prior(x1))
    assert (samplers.sample("average_velocity", exact_net(law), x1, 3, path=path) - truth).abs().max() < 1e-11
    assert (samplers.sample("heun", exact_net(law), x1, 200, path=path) - truth).abs().max() < 5e-3
    fine = samplers.sample("adaptive", exact_net(law), x1, path=path, rtol=1e-9, atol=1e-9)
    assert (fine - truth).abs().max() < 1e-6


def test_adaptive_keeps_shape_dtype_and_the_callers_ends(law: Gaussian, noise: Tensor) -> None:
    calls: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        assert x.shape == (16, 2, 2)
        assert x.dtype == t.dtype == torch.float32
        assert not torch.is_grad_enabled()
        calls.append(t[0].item())
        return law.velocity(x.flatten(1).double(), t.double()).reshape(x.shape).float()

    x = adaptive(velocity, noise.float().reshape(16, 2, 2), [0.9, 0.5, 0.2], method="DOP853", rtol=1e-6, atol=1e-6)
    assert x.dtype == torch.float32
    assert (calls[0], min(calls)) == pytest.approx((0.9, 0.2))
    truth = law.flow_map(noise, torch.full((16,), 0.9).double(), torch.full((16,), 0.2).double())
    assert (x.flatten(1) - truth).abs().max() < 1e-4


def test_adaptive_refuses_what_it_would_do_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 1)
    with pytest.raises(ValueError, match=r"^x: expected float32 or float64, got torch.bfloat16"):
        adaptive(lambda x, t: x, x.bfloat16())
    with pytest.raises(ValueError, match=r"^x: expected no gradient"):
        adaptive(lambda x, t: x, x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"^adaptive: expected the solver to reach the end, got: "):
        adaptive(lambda x, t: -(x**4) / t[:, None].clamp_min(1e-30) ** 3, 3 * x.double(), rtol=1e-10, atol=1e-12)
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with pytest.raises(ImportError, match=r"^adaptive: expected scipy.* pip install scipy"):
        adaptive(lambda x, t: x, x)


@pytest.mark.parametrize("sampler", [euler, heun])
def test_a_grid_of_times_is_walked_as_given(sampler: Callable[..., Tensor], law: Gaussian, noise: Tensor) -> None:
    uniform = sampler(law.velocity, noise, 4)
    assert torch.equal(uniform, sampler(law.velocity, noise, [1, 0.75, 0.5, 0.25, 0]))
    halves = sampler(law.velocity, sampler(law.velocity, noise, [1.0, 0.75]), [0.75, 0.5, 0.25, 0.0])
    torch.testing.assert_close(uniform, halves)
    assert not torch.allclose(uniform, sampler(law.velocity, noise, [1.0, 0.9, 0.5, 0.25, 0.0]))
