"""Test samplers against exact flows: their order of convergence, exact jumps, renoising, grids and guidance."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import samplers
from fastdistill.eval.exact import Gaussian
from fastdistill.paths import EDM, FM, ICFM, LINEAR, OTCFM, VE, Cosine, Path, TrigFlow
from fastdistill.samplers import adaptive, average_velocity, conditional_pair, consistency, euler, gamma, guided, heun

PATHS = [LINEAR, Cosine(), FM(0.1), ICFM(0.2), TrigFlow(0.5), EDM(0.05, 20.0), VE(0.05, 20.0)]
EVERY_PATH = pytest.mark.parametrize("path", [pytest.param(path, id=type(path).__name__) for path in PATHS])


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
    """Compute v(x, t, y) = (1 + y) x + t, and count the calls."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        assert torch.equal(t, s)
        self.rows.append(len(x))
        slope = torch.full((len(x),), 4.0) if y is None else 1.0 + y
        return slope[:, None] * x + t[:, None]


def on(path: Path) -> Gaussian:
    """Return a law on a path."""
    return Gaussian(torch.tensor([0.7, -0.4]).double(), torch.tensor([[0.6, 0.2], [0.2, 0.3]]).double(), path)


def exact_net(law: Gaussian) -> Callable[..., Tensor]:
    """Return a law's flow map as a network."""
    return lambda x, t, s, y=None: law.average_velocity(x, t, s)


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


@EVERY_PATH
@pytest.mark.parametrize("steps", [1, 3, [1.0, 0.6, 0.1, 0.0]])
def test_gamma_extremes_are_the_flow_map_and_consistency(path: Path, steps: samplers.Steps) -> None:
    """Check that what lies between is neither."""
    law, x1 = on(path), torch.randn(32, 2, dtype=torch.float64)
    x, net = path.prior(x1), exact_net(law)

    def draw(amount: float) -> Tensor:
        return gamma(net, x, steps, gamma=amount, path=path, generator=torch.Generator().manual_seed(7))

    assert torch.equal(draw(0.0), average_velocity(net, x, steps))
    renoised = consistency(net, x, steps, path=path, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(draw(1.0), renoised, rtol=1e-10, atol=1e-10)
    if steps != 1:
        assert (draw(0.5) - draw(0.0)).abs().max() > 0.01
        assert (draw(0.5) - draw(1.0)).abs().max() > 0.01


@EVERY_PATH
@pytest.mark.parametrize("amount", [0.4, 0.9, 1.0])
def test_renoising_leaves_the_law_as_it_is(path: Path, amount: float) -> None:
    """Check that a jump of any gamma from exact samples at t = 0.8 ends in samples of p_s: mean and covariance.

    The ends are s = 0.5 and 0. A planted error in the amount of noise is seen.
    """
    law, count = on(path), 60_000
    t = torch.tensor(0.8, dtype=torch.float64)
    x = path.alpha(t) * law.sample(count) + path.beta(t) * torch.randn(count, 2, dtype=torch.float64)
    for s, wrong in ((0.5, 1.3), (0.0, None)):
        end = torch.tensor(s, dtype=torch.float64)
        covariance = path.alpha(end).square() * law.covariance + path.beta(end).square() * torch.eye(2)
        root = torch.linalg.inv(torch.linalg.cholesky(covariance))

        def off(x: Tensor, end: Tensor = end, root: Tensor = root) -> float:
            white = (x - path.alpha(end) * law.mean) @ root.T
            return max(white.mean(0).abs().max().item(), (white.T.cov() - torch.eye(2)).abs().max().item())

        moved = gamma(exact_net(law), x, [0.8, s], gamma=amount, path=path)
        assert off(moved) < 0.04
        if wrong is not None:
            extra = path.beta(end) * math.sqrt(wrong**2 - 1) * amount
            assert off(moved + extra * torch.randn_like(moved)) > 0.04


def test_consistency_on_the_linear_path_is_the_papers_loop() -> None:
    """Compare with x0 = f(x, t, 0); x = (1 - s) x0 + s noise, with fresh noise each time."""
    law, x = on(LINEAR), torch.randn(8, 2, dtype=torch.float64)
    seen: list[float] = []

    def net(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        seen.extend((t[0].item(), s[0].item()))
        return law.average_velocity(x, t, s)

    found = consistency(net, x, 3, generator=torch.Generator().manual_seed(1))
    assert seen == pytest.approx([1, 0, 2 / 3, 0, 1 / 3, 0])
    generator = torch.Generator().manual_seed(1)
    for t, s in ((1, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0)):
        x0 = x - t * law.average_velocity(x, torch.full((8,), t).double(), torch.zeros(8).double())
        x = x0 if s == 0 else (1 - s) * x0 + s * torch.randn(8, 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(found, x)


def test_gamma_on_the_linear_path_is_the_papers_formula() -> None:
    """Check r/(1-r) = (1 - gamma^2)^(1/2) s/(1-s); x_s = ((1-s)/(1-r)) f(x_t, t, r) + gamma s noise."""
    law, x = on(LINEAR), torch.randn(8, 2, dtype=torch.float64)
    odds = math.sqrt(1 - 0.36) * 0.3 / 0.7
    r = odds / (1 + odds)
    f = law.flow_map(x, torch.full((8,), 0.9).double(), torch.full((8,), r).double())
    noise = torch.randn(8, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = gamma(exact_net(law), x, [0.9, 0.3], gamma=0.6, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(found, 0.7 / (1 - r) * f + 0.6 * 0.3 * noise)


class GuidedField:
    """Take guidance as an input: u = g x."""

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None, *, g: Tensor) -> Tensor:
        assert g.shape == x.shape[:1]
        return g[:, None] * x


@pytest.mark.parametrize("name", ["euler", "heun", "average_velocity", "consistency", "gamma", "adaptive"])
def test_guidance_as_an_input_reaches_the_network(name: str) -> None:
    x = torch.ones(3, 2, dtype=torch.float64)
    options: dict[str, Any] = {"gamma": 0.5} if name == "gamma" else {}
    one = samplers.sample(name, GuidedField(), x, 1, g=0.25, **options)
    rows = samplers.sample(name, GuidedField(), x, 1, g=torch.tensor([0.25, 0.5, 0.0]), **options)
    torch.testing.assert_close(rows[0], one[0], rtol=1e-5, atol=0)
    assert len(set(rows[:, 0].tolist())) == 3
    torch.testing.assert_close(rows[2], x[2])
    with pytest.raises(ValueError, match=r"^g: expected a number or shape \(3,\), got \(2,\)"):
        samplers.sample(name, GuidedField(), x, 1, g=torch.ones(2), **options)


def test_sampling_by_name_starts_from_the_paths_prior_and_guides_where_it_can() -> None:
    path, net, x, y = EDM(0.1, 10.0), LabelField(), torch.randn(3, 2), torch.tensor([0, 1, 2])
    found = samplers.sample("euler", net, x, 2, y, path=path, scale=2.0, null=3)
    assert torch.equal(found, euler(guided(net, y, 2.0, 3), 10 * x, 2))
    with pytest.raises(ValueError, match=r"^sampler: expected one of euler, .* got 'ddim'"):
        samplers.sample("ddim", net, x)


def test_fresh_noise_is_refused_on_a_path_with_coupled_pairs() -> None:
    """Check that x_s given x0, which isn't alpha x0 plus independent noise, is refused; one jump needs none."""
    path, x1 = OTCFM(), torch.randn(3, 2)
    options: dict[str, Any]
    for name, options in (("consistency", {}), ("gamma", {"gamma": 0.5})):
        with pytest.raises(ValueError, match=r"^path: fresh noise expects .* got OTCFM, coupled by optimal_transport"):
            samplers.sample(name, lambda x, t, s, y: x, x1, 2, path=path, **options)
        one = samplers.sample(name, lambda x, t, s, y: 0.25 * x, x1, 1, path=path, **options)
        torch.testing.assert_close(one, 0.75 * x1)


@pytest.mark.parametrize("name", ["average_velocity", "consistency", "gamma"])
def test_guidance_of_a_map_extrapolates_its_jumps(name: str) -> None:
    """Check f_null + scale (f_y - f_null) at the sampler's ends, with two evaluations in one call a step."""
    y, x1, rows = torch.tensor([0, 1, 2]), torch.randn(3, 2), []

    def net(x: Tensor, t: Tensor, s: Tensor, y: Tensor) -> Tensor:
        rows.append(len(x))
        return (0.1 + 0.2 * y)[:, None] * x + s[:, None]

    options: dict[str, Any] = {"gamma": 0.5} if name == "gamma" else {}

    def draw(net: samplers.Net, **guidance: Any) -> Tensor:
        seeded = torch.Generator().manual_seed(3)
        return samplers.sample(name, net, x1, 2, y, generator=seeded, **guidance, **options)

    def by_hand(x: Tensor, t: Tensor, s: Tensor, y: Tensor) -> Tensor:
        ends = [x - (t - s)[:, None] * net(x, t, s, label) for label in (y, torch.full_like(y, 3))]
        return (x - ends[1] - 2.5 * (ends[0] - ends[1])) / (t - s)[:, None]

    found = draw(net, scale=2.5, null=3)
    assert rows == [6, 6]
    torch.testing.assert_close(found, draw(by_hand))
    assert torch.equal(draw(net, scale=1.0, null=3), draw(net))
    assert (found - draw(net)).abs().min() > 1e-4
    with pytest.raises(ValueError, match=r"^y, null: expected labels .* at scale 2.5"):
        samplers.sample(name, net, x1, scale=2.5, null=3, **options)
    with pytest.raises(ValueError, match=r"^scale: expected 1 for a network that takes guidance as an input"):
        samplers.sample(name, net, x1, 1, y, scale=2.5, null=3, g=2.0, **options)


def test_guidance_extrapolates_from_no_label_to_the_label() -> None:
    net, x, t, y = LabelField(), torch.randn(3, 2), torch.rand(3), torch.tensor([0, 1, 2])
    v = guided(net, y, scale=2.5, null=3)(x, t)
    v_label, v_null = net(x, t, t, y), net(x, t, t, None)
    torch.testing.assert_close(v, v_null + 2.5 * (v_label - v_null))
    torch.testing.assert_close(conditional_pair(net, x, t, t, y, 3), (v_label, v_null))
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
        for times in ([1.0], [0.5, 0.5], [0.5, 1.0], [1.5, 0.0], [1.0, -0.1], [math.nan, 0.0]):
            with pytest.raises(ValueError, match=r"^steps: expected two or more falling times in \[0, 1\], got"):
                sampler(LabelField(), torch.randn(3, 2), times)
    with pytest.raises(ValueError, match=r"^steps: expected times that end at 0, got 0.5"):
        consistency(LabelField(), torch.randn(3, 2), [1.0, 0.5])
    for amount in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"^gamma: expected in \[0, 1\]"):
            gamma(LabelField(), torch.randn(3, 2), gamma=amount)
    with pytest.raises(ValueError, match=r"^scale: expected 1 for a network that takes guidance"):
        guided(LabelField(), torch.tensor([0]), scale=2.0, null=3, g=2.0)
    with pytest.raises(ValueError, match=r"^y, null: expected labels"):
        guided(LabelField(), scale=2.0, null=3)
    with pytest.raises(ValueError, match=r"^y, null: expected labels"):
        guided(LabelField(), torch.tensor([0]), scale=2.0)
