"""Row errors, weights of t, and what keeps a tangent in bounds: values, gradients, reductions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdistill.objectives import flow_matching
from fastdistill.objectives.metric import (
    WEIGHTS,
    LogVariance,
    adaptive,
    cosine_distance,
    normalise_tangent,
    pseudo_huber,
    row_distance,
    squared,
    weigh,
    weight_of_time,
)
from fastdistill.paths import LINEAR, Cosine, Path, convert


def rows(count: int = 5) -> Tensor:
    return torch.randn(count, 1, 8, 8, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("reduce", "share"), [("sum", 1), ("mean", 64)])
def test_adaptive_weight_reduces_over_elements_and_holds_its_denominator(reduce: str, share: int) -> None:
    delta = rows()
    error = delta.detach().square().sum((1, 2, 3)) / share
    torch.testing.assert_close(adaptive(delta, 0.0, 0.01, reduce).detach(), error)
    value = adaptive(delta, 0.5, 0.01, reduce)
    torch.testing.assert_close(value.detach(), error / (error + 0.01).sqrt())
    (grad,) = torch.autograd.grad(value.sum(), delta)
    torch.testing.assert_close(grad, 2 * delta.detach() / share / (error + 0.01).sqrt()[:, None, None, None])
    with pytest.raises(ValueError, match=r"^reduce: expected one of sum, mean, got 'max'"):
        squared(delta, "max")


def test_pseudo_huber_is_a_square_near_zero_and_a_norm_far_away() -> None:
    delta = rows()
    norm = delta.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(pseudo_huber(1e-4 * delta, 1.0).detach(), 0.5e-8 * norm**2, rtol=1e-6, atol=0)
    torch.testing.assert_close(pseudo_huber(1e4 * delta, 1.0).detach() + 1, 1e4 * norm, rtol=1e-6, atol=0)
    zero = torch.zeros(2, 3, requires_grad=True)
    pseudo_huber(zero, 1e-6).sum().backward()
    assert torch.equal(zero.grad, torch.zeros(2, 3))


def test_distance_by_name_and_by_the_users_network() -> None:
    a, b = rows(), rows()
    torch.testing.assert_close(row_distance(a, b, "l2", 1.0), squared(a - b))
    torch.testing.assert_close(row_distance(a, b, "huber", 0.3), pseudo_huber(a - b, 0.3))
    network = lambda a, b: (a - b).abs().mean((1, 2, 3), keepdim=True)  # noqa: E731
    torch.testing.assert_close(row_distance(a, b, "lpips", 1.0, network), (a - b).abs().mean((1, 2, 3)))
    with pytest.raises(ValueError, match=r"^perceptual: expected one value a row, \(5,\), got shape \(\)"):
        row_distance(a, b, "lpips", 1.0, lambda a, b: (a - b).mean())


def test_cosine_distance_ignores_length() -> None:
    a = rows().detach()
    torch.testing.assert_close(cosine_distance(a, 3 * a), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(cosine_distance(a, -a), torch.full((5,), 2.0, dtype=torch.float64))


def test_normalised_tangent_keeps_its_direction_and_is_below_one() -> None:
    g = torch.randn(4, 7, dtype=torch.float64) * torch.tensor([1e-6, 1.0, 1e3, 0.0]).double()[:, None]
    norm = g.norm(dim=1, keepdim=True)
    torch.testing.assert_close(normalise_tangent(g, 0.1), g / (norm + 0.1))
    assert normalise_tangent(g, 0.1).norm(dim=1).max() < 1
    with pytest.raises(ValueError, match=r"^c: expected a finite number > 0, got 0"):
        normalise_tangent(g, 0.0)


def test_learned_variance_starts_as_no_weight_and_ends_as_the_logarithm_of_the_error() -> None:
    t = torch.rand(256)
    s = t / 2
    error, module = (1 + 9 * t) ** 2, LogVariance()
    torch.testing.assert_close(weigh(error, module, t, s), error)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-2)
    for _ in range(300):
        optimizer.zero_grad()
        weigh(error, module, t, s).mean().backward()
        optimizer.step()
    assert (module(t, s) - error.log()).abs().mean() < 0.3


@pytest.mark.parametrize("path", [LINEAR, Cosine()])
@pytest.mark.parametrize(("weight", "prediction"), [("velocity", "v"), ("data", "x0"), ("noise", "x1")])
def test_weight_of_time_is_the_square_of_its_prediction(weight: str, prediction: str, path: Path) -> None:
    """Check that flow matching under the weight equals the plain mean square of the converted prediction."""
    x0, x1 = torch.randn(2, 32, 4, dtype=torch.float64)
    t = 0.1 + 0.8 * torch.rand(32, dtype=torch.float64)
    x, net = path.interpolate(x0, x1, t), lambda x, t, s, y: x.sin()
    loss, _ = flow_matching(net, x0, x1, t, path=path, weight=weight)
    truth = {"v": path.velocity(x0, x1, t), "x0": x0, "x1": x1}[prediction]
    expected = (convert(path, x, t, x.sin(), "v", prediction) - truth).square().mean()
    torch.testing.assert_close(loss, expected)


def test_other_weights_have_their_formulas() -> None:
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    sigma = t / (1 - t)
    edm = (sigma**2 + 0.25) / (0.5 * sigma) ** 2 * t**2  # EDM's weight of the data's error, (beta / W)^2 = t^2
    torch.testing.assert_close(weight_of_time("edm", LINEAR, t), edm)
    torch.testing.assert_close(weight_of_time("min_snr", LINEAR, t), (1 / sigma**2).clamp(max=5) * t**2)
    assert weight_of_time("velocity", LINEAR, t) is None and weight_of_time(None, LINEAR, t) is None
    torch.testing.assert_close(weight_of_time(lambda t: 1 - t, LINEAR, t), 1 - t)
    angles = Cosine()
    for name in WEIGHTS:
        value = weight_of_time(name, angles, t)
        assert value is None or bool((value > 0).all())
    w = weight_of_time("noise", angles, t)
    torch.testing.assert_close(w, (torch.cos(0.5 * math.pi * t) / (0.5 * math.pi)) ** 2)
