"""Samplers against exact flows: their order of convergence, exact jumps, and guidance."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastdistill.eval.exact import Gaussian
from fastdistill.samplers import average_velocity, conditional_pair, euler, guided, heun


@pytest.fixture
def law() -> Gaussian:
    factor = torch.randn(4, 4, dtype=torch.float64)
    return Gaussian(torch.randn(4, dtype=torch.float64), factor @ factor.T / 4 + 0.1 * torch.eye(4).double())


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(16, 4, dtype=torch.float64)


def exact_samples(law: Gaussian, noise: Tensor) -> Tensor:
    return law.flow_map(noise, torch.ones(len(noise)).double(), torch.zeros(len(noise)).double())


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


class LabelField:
    """v(x, t, y) = (1 + y) x + t, counting its calls."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        assert torch.equal(t, s)
        self.rows.append(len(x))
        slope = torch.full((len(x),), 4.0) if y is None else 1.0 + y
        return slope[:, None] * x + t[:, None]


def test_guidance_extrapolates_from_no_label_to_the_label() -> None:
    net, x, t, y = LabelField(), torch.randn(3, 2), torch.rand(3), torch.tensor([0, 1, 2])
    v = guided(net, y, scale=2.5, null=3)(x, t)
    v_label, v_null = net(x, t, t, y), net(x, t, t, None)
    torch.testing.assert_close(v, v_null + 2.5 * (v_label - v_null))
    torch.testing.assert_close(conditional_pair(net, x, t, y, 3), (v_label, v_null))
    assert net.rows[0] == 6


def test_guidance_at_scale_one_is_the_plain_velocity_at_one_evaluation() -> None:
    net, x, t, y = LabelField(), torch.randn(3, 2), torch.rand(3), torch.tensor([0, 1, 2])
    assert torch.equal(guided(net, y)(x, t), net(x, t, t, y))
    assert torch.equal(guided(net)(x, t), net(x, t, t, None))
    assert net.rows == [3, 3, 3, 3]


def test_bad_arguments_are_refused_by_name() -> None:
    samplers: tuple[Callable[..., Tensor], ...] = (euler, heun, average_velocity)
    for sampler in samplers:
        with pytest.raises(ValueError, match=r"^steps: expected at least 1, got 0"):
            sampler(LabelField(), torch.randn(3, 2), 0)
    with pytest.raises(ValueError, match=r"^y, null: expected labels"):
        guided(LabelField(), scale=2.0, null=3)
    with pytest.raises(ValueError, match=r"^y, null: expected labels"):
        guided(LabelField(), torch.tensor([0]), scale=2.0)
