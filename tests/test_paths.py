"""Test paths against autograd in float64: their ends, derivatives, velocity, and conversions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp

from fastdistill import paths
from fastdistill.eval.exact import Gaussian as GaussianData
from fastdistill.eval.exact import GaussianMixture
from fastdistill.jvp import jvp as fused_jvp
from fastdistill.paths import EDM, FM, ICFM, OTCFM, VE, VPSI, Cosine, Linear, Path, TrigFlow

USER = paths.Gaussian(lambda t: (1 - t).square() * (1 + 0.3 * t), lambda t: t * (2 - t).sqrt())
ALL = {
    "linear": Linear(),
    "cosine": Cosine(),
    "vp_si": VPSI(0.2),
    "fm": FM(0.1),
    "icfm": ICFM(0.3),
    "ot_cfm": OTCFM(0.3),
    "gaussian": USER,
    "trig": TrigFlow(0.5),
    "edm": EDM(),
    "ve": VE(),
}
NAMES = pytest.mark.parametrize("path", [pytest.param(path, id=name) for name, path in ALL.items()])
INDEPENDENT = {name: path for name, path in ALL.items() if path.coupling == "independent"}
PAIRS = pytest.mark.parametrize("path", [pytest.param(path, id=name) for name, path in INDEPENDENT.items()])
TIMES = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)


@pytest.fixture
def ends() -> tuple[Tensor, Tensor]:
    return torch.randn(7, 3, 2, dtype=torch.float64), torch.randn(7, 3, 2, dtype=torch.float64)


def relative(value: Tensor, truth: Tensor) -> float:
    return ((value - truth).abs().max() / truth.abs().max().clamp_min(1)).item()


def test_every_name_has_a_path_here() -> None:
    assert set(ALL) == set(paths.PATHS)
    assert all(type(path) is paths.PATHS[name] for name, path in ALL.items())


@pytest.mark.parametrize(
    "path",
    [Linear(), Cosine(), ICFM(), OTCFM(), VPSI(), FM(0), TrigFlow(1.0), USER],
    ids=lambda path: type(path).__name__,
)
def test_path_starts_at_the_data_and_ends_at_the_noise(path: Path, ends: tuple[Tensor, Tensor]) -> None:
    x0, x1 = ends
    zero, one = torch.zeros(7, dtype=torch.float64), torch.ones(7, dtype=torch.float64)
    torch.testing.assert_close(path.interpolate(x0, x1, zero), x0, rtol=0, atol=1e-15)
    torch.testing.assert_close(path.interpolate(x0, x1, one), x1, rtol=0, atol=1e-15)
    torch.testing.assert_close(path.prior(x1), x1, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("path", "start", "end"),
    [
        (FM(0.1), (1, 0.1), (0, 1)),
        (ICFM(0.3), (1, 0.3), (0, math.sqrt(1.09))),
        (TrigFlow(0.5), (1, 0), (0, 0.5)),
        (EDM(0.002, 80), (1, 0.002), (1, 80)),
        (VE(0.01, 50), (1, 0.01), (1, 50)),
    ],
)
def test_ends_of_the_paths_that_have_others(path: Path, start: tuple[float, float], end: tuple[float, float]) -> None:
    for t, (alpha, beta) in ((0.0, start), (1.0, end)):
        time = torch.tensor(t, dtype=torch.float64)
        assert abs(path.alpha(time).item() - alpha) < 1e-12
        assert abs(path.beta(time).item() - beta) < 1e-12 * max(beta, 1)
    assert abs(path.prior(torch.ones(1, 1).double()).item() - end[1]) < 1e-12 * max(end[1], 1)


def derivative_error(path: Path) -> float:
    """Return how far d_alpha and d_beta are from autograd's derivatives."""
    one = torch.ones_like(TIMES)
    pairs = ((path.alpha, path.d_alpha), (path.beta, path.d_beta))
    return max(relative(rate(TIMES), jvp(value, (TIMES,), (one,))[1]) for value, rate in pairs)


def velocity_error(path: Path, ends: tuple[Tensor, Tensor]) -> float:
    """Return how far the velocity is from the state's time derivative, at fixed noise where the path adds some."""
    x0, x1 = ends
    fixed = {"noise": torch.randn_like(x0)} if path.stochastic else {}
    dx_dt = jvp(lambda t: path.interpolate(x0, x1, t, **fixed), (TIMES,), (torch.ones_like(TIMES),))[1]
    return relative(path.velocity(x0, x1, TIMES), dx_dt)


@NAMES
def test_schedule_derivatives_are_those_of_autograd(path: Path) -> None:
    assert derivative_error(path) < 1e-13


@NAMES
def test_velocity_is_the_time_derivative_of_the_state(path: Path, ends: tuple[Tensor, Tensor]) -> None:
    assert velocity_error(path, ends) < 1e-13


@NAMES
@pytest.mark.parametrize("rate", ["d_alpha", "d_beta"])
def test_a_wrong_derivative_is_seen(path: Path, rate: str, ends: tuple[Tensor, Tensor]) -> None:
    """Check that the tests above can fail: each schedule is off by a percent or two of the path's scale."""
    right = getattr(type(path), rate)
    wrong = {rate: lambda self, t: 1.02 * right(self, t) + 0.01}
    mutant = type("Mutant", (type(path),), wrong)
    planted = object.__new__(mutant)
    planted.__dict__.update(path.__dict__)
    assert derivative_error(planted) > 1e-4
    if not hasattr(path, "pair"):  # A noised path takes its velocity from its pair.
        assert velocity_error(planted, ends) > 1e-5


@PAIRS
def test_velocity_from_data_and_state_agrees_and_the_form_with_noise_for_state_does_not(
    path: Path, ends: tuple[Tensor, Tensor]
) -> None:
    """Check v = (d_alpha - d_beta alpha / beta) x0 + (d_beta / beta) x_t; a common misprint has x1 for x_t."""
    x0, x1 = ends
    t = TIMES[:, None, None]
    x, v = path.alpha(t) * x0 + path.beta(t) * x1, path.d_alpha(t) * x0 + path.d_beta(t) * x1
    rate = path.d_beta(t) / path.beta(t)
    from_data = (path.d_alpha(t) - rate * path.alpha(t)) * x0
    assert relative(from_data + rate * x, v) < 1e-13
    assert (from_data + rate * x1 - v).abs().max() > 0.5


def test_rows_of_the_table() -> None:
    """Check flow matching's row by the state and by the noise, and the moments of the rows with noise on top."""
    x0, x1 = torch.randn(2, 7, 3, dtype=torch.float64)
    path, t = FM(0.1), TIMES[:, None]
    x = path.interpolate(x0, x1, TIMES)
    by_state = (0.9 * x - x0) / (0.1 + 0.9 * t)
    assert relative(path.velocity(x0, x1, TIMES), by_state) < 1e-13
    assert relative(path.velocity(x0, x1, TIMES), 0.9 * x1 - x0) < 1e-13
    misprint = (x1 - 0.9 * x) / (1 - 0.1 + 0.1 * t)
    assert relative(misprint, by_state) > 0.1
    count = 100_000
    point, fixed = torch.full((count, 1), 0.7), torch.full((count, 1), -0.4)
    for noised, mean in ((ICFM(0.3), 0.7 * 0.75 - 0.4 * 0.25), (VPSI(0.3), 0.7 * math.cos(math.pi / 8))):
        other = fixed if isinstance(noised, ICFM) else 0 * fixed
        draws = noised.interpolate(point, other, torch.full((count,), 0.25))
        assert abs(draws.mean().item() - mean) < 5 * 0.3 / count**0.5
        assert abs(draws.std().item() - 0.3) < 5 * 0.3 / (2 * count) ** 0.5


def test_noise_on_top_is_the_callers_or_the_global_generators() -> None:
    x0, x1 = torch.randn(2, 7, 3)
    t, noise = TIMES.float(), torch.randn(7, 3)
    plain = Linear().interpolate(x0, x1, t)
    torch.testing.assert_close(ICFM(0.5).interpolate(x0, x1, t, noise=noise), plain + 0.5 * noise)
    torch.manual_seed(3)
    first = ICFM(0.5).interpolate(x0, x1, t)
    assert not torch.equal(first, ICFM(0.5).interpolate(x0, x1, t))
    torch.manual_seed(3)
    assert torch.equal(first, ICFM(0.5).interpolate(x0, x1, t))
    assert ICFM(0.5).stochastic
    assert not any(path.stochastic for path in (ICFM(), OTCFM(), VPSI(), Linear(), EDM()))
    assert torch.equal(ICFM().interpolate(x0, x1, t), plain)


def test_marginal_velocity_of_a_noised_pair_is_that_of_its_schedule() -> None:
    """Regress x1 - x0 on x_t for Gaussian data: slope and intercept are those of the exact velocity."""
    path, count = ICFM(0.4), 400_000
    data = GaussianData(torch.tensor([0.5]).double(), torch.tensor([[0.3]]).double(), path)
    x0, x1 = data.sample(count), torch.randn(count, 1, dtype=torch.float64)
    t = torch.tensor(0.6, dtype=torch.float64)
    x, v = path.interpolate(x0, x1, t), path.velocity(x0, x1, t)
    slope = ((x - x.mean()) * (v - v.mean())).mean() / x.var()
    exact = data.velocity(torch.tensor([[0.0], [1.0]]).double(), t)
    assert abs(slope - (exact[1] - exact[0])).item() < 0.01
    assert abs(v.mean() - slope * x.mean() - exact[0]).item() < 0.01


@NAMES
def test_slopes_are_accurate_at_every_distance(path: Path) -> None:
    """Compare with the derivative's mean by a fine rule; at 1e-9 a difference would have lost eight digits."""
    t = TIMES
    nodes = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    for gap in (0.0, 1e-9, 1e-3, 0.04):
        found = path.slopes(t, t - gap)
        for mean, rate in zip(found, (path.d_alpha, path.d_beta)):
            truth = rate(t[:, None] - gap * nodes).mean(1)
            assert relative(mean, truth) < (1e-13 if gap < 1e-6 else 1e-7)
    t = TIMES[3:]
    for mean, value in zip(path.slopes(t, t - 0.3), (path.alpha, path.beta)):
        assert relative(mean, (value(t) - value(t - 0.3)) / 0.3) < 1e-13


@PAIRS
def test_slopes_have_the_derivatives_of_the_quotient(path: Path) -> None:
    """Check forward mode through slopes, near and far, as an objective's tangent uses it."""
    t = TIMES[2:]
    one = torch.ones_like(t)
    for gap in (0.02, 0.04, 0.15):
        s = t - gap
        for index, value in enumerate((path.alpha, path.beta)):
            found = jvp(lambda t: path.slopes(t, s)[index], (t,), (one,))[1]  # noqa: B023
            truth = jvp(lambda t: (value(t) - value(s)) / (t - s), (t,), (one,))[1]  # noqa: B023
            assert relative(found, truth) < 1e-9


@PAIRS
@pytest.mark.parametrize("source", paths.PREDICTIONS)
@pytest.mark.parametrize("target", paths.PREDICTIONS)
def test_predictions_convert_into_each_other(path: Path, source: str, target: str, ends: tuple[Tensor, Tensor]) -> None:
    """Check all predictions of one pair; the score is that of N(alpha x0, beta^2 I) by autograd."""
    x0, x1 = ends
    t = TIMES[:, None, None]
    x = path.alpha(t) * x0 + path.beta(t) * x1
    known = {
        "x0": x0,
        "x1": x1,
        "v": path.d_alpha(t) * x0 + path.d_beta(t) * x1,
        "score": grad(lambda x: (-((x - path.alpha(t) * x0) / path.beta(t)).square() / 2).sum())(x),
    }
    found = paths.convert(path, x, TIMES, known[source], source, target)
    assert relative(found, known[target]) < 1e-9


@PAIRS
def test_conversions_hold_for_a_mixture_whose_score_is_autograds(path: Path) -> None:
    mixture = GaussianMixture(torch.tensor([[-1.0, 0.3], [0.8, -0.5]]).double(), 0.4, path)
    x = torch.randn(7, 2, dtype=torch.float64) * path.beta(TIMES)[:, None]
    alpha, variance = path.alpha(TIMES), (0.4 * path.alpha(TIMES)).square() + path.beta(TIMES).square()

    def log_density(x: Tensor) -> Tensor:
        offsets = x[:, None] - alpha[:, None, None] * mixture.means
        return (-offsets.square().sum(2) / (2 * variance[:, None])).logsumexp(1).sum()

    assert relative(mixture.score(x, TIMES), grad(log_density)(x)) < 1e-9
    data, score = mixture.data(x, TIMES), mixture.score(x, TIMES)
    tweedie = (x + path.beta(TIMES).square()[:, None] * score) / alpha[:, None]
    assert relative(data, tweedie) < 1e-9


@NAMES
def test_time_is_the_inverse_of_the_noise_level(path: Path) -> None:
    """Check its derivative too, through which adapters differentiate."""
    one = torch.ones_like(TIMES)
    t, rate = jvp(lambda t: path.time_at(path.angle(t)), (TIMES,), (one,))
    assert (t - TIMES).abs().max() < 1e-12
    assert (rate - one).abs().max() < 1e-8
    by_default = Path.time_at(path, path.angle(TIMES))
    assert (by_default - TIMES).abs().max() < 1e-12


def test_noise_levels_beyond_a_path_give_its_nearer_end() -> None:
    quarter = 0.5 * math.pi
    for path in (EDM(), VE(), EDM(0.0, 10.0, 1.0)):
        ends = path.time_at(torch.tensor([0.0, quarter], dtype=torch.float64))
        assert ends.tolist() == [0.0, 1.0]
    assert FM(0.1).time_at(torch.tensor([0.0, quarter]).double()).tolist() == pytest.approx([0.0, 1.0])
    by_bisection = Path.time_at(EDM(), torch.tensor([0.0, quarter], dtype=torch.float64))
    assert (by_bisection - torch.tensor([0.0, 1.0])).abs().max() < 1e-12


@pytest.mark.parametrize("target", [pytest.param(path, id=name) for name, path in INDEPENDENT.items()])
@pytest.mark.parametrize(
    "source", [Linear(), TrigFlow(0.5), EDM(0.002, 200.0), USER, ICFM(0.01)], ids=lambda path: type(path).__name__
)
def test_a_flow_carried_to_another_path_is_the_flow_of_the_same_data_there(source: Path, target: Path) -> None:
    """Compare velocity and average velocity with the closed forms on the target's path, far, near and at s = t."""
    mean, covariance = torch.tensor([0.4, -1.0]).double(), torch.tensor([[0.5, 0.2], [0.2, 0.3]]).double()
    on_source, on_target = (GaussianData(mean, covariance, path) for path in (source, target))
    t = torch.tensor([0.3, 0.5, 0.7, 0.7], dtype=torch.float64)
    s = torch.tensor([0.1, 0.4, 0.699, 0.7], dtype=torch.float64)
    x = torch.randn(4, 2, dtype=torch.float64) * target.beta(t)[:, None]
    v = paths.carry_velocity(on_source.velocity, source, target)(x, t)
    assert relative(v, on_target.velocity(x, t)) < 1e-9
    u = paths.carry_average_velocity(on_source.average_velocity, source, target)(x, t, s)
    assert relative(u, on_target.average_velocity(x, t, s)) < 1e-7


def test_a_carried_flow_without_its_change_of_time_or_scale_is_another() -> None:
    """Check that the test above can fail: leave out the rate of time, or the derivative of the factor."""
    data = GaussianData(torch.tensor([0.4]).double(), torch.tensor([[0.5]]).double())
    target = GaussianData(data.mean, torch.tensor([[0.5]]).double(), Cosine())
    t, x = torch.tensor([0.3], dtype=torch.float64), torch.tensor([[0.8]], dtype=torch.float64)
    time, factor = paths.rescale(Cosine(), Linear(), t)
    unscaled = data.velocity(x, time)
    no_time = data.velocity(factor * x, time) / factor
    for mutant in (unscaled, no_time):
        assert relative(mutant, target.velocity(x, t)) > 0.05


@pytest.mark.parametrize("driver", [jvp, fused_jvp], ids=["torch", "fused"])
def test_paths_differentiate_inside_a_driver_of_forward_mode(driver: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Check that an adapter may read rates of a user's schedule, and bisect times, in the function that it wraps."""
    x, one = torch.randn(7, 2, dtype=torch.float64), torch.ones_like(TIMES)

    def adapter(t: Tensor) -> Tensor:
        v = paths.convert(USER, x, t, x, "x0", "v")
        return v + USER.time_at(Linear().angle(t))[:, None]

    found = driver(adapter, (TIMES,), (one,))[1]
    step = 1e-5
    truth = (adapter(TIMES + step) - adapter(TIMES - step)) / (2 * step)
    assert relative(found, truth) < 1e-7
    with torch.no_grad():
        assert relative(driver(adapter, (TIMES,), (one,))[1], truth) < 1e-7


@pytest.mark.parametrize("shape", [(7,), (7, 2), (7, 1, 8, 8)])
def test_one_time_a_row_broadcasts_over_any_trailing_shape(shape: tuple[int, ...]) -> None:
    x0, x1 = torch.randn(shape), torch.randn(shape)
    t = torch.linspace(0, 1, 7)
    x = Linear().interpolate(x0, x1, t)
    assert x.shape == shape
    for i in range(7):
        torch.testing.assert_close(x[i], (1 - t[i]) * x0[i] + t[i] * x1[i])


def test_edm_levels_are_the_papers() -> None:
    """Check table 1: sigma_i = (80^(1/7) + i/(N-1) (0.002^(1/7) - 80^(1/7)))^7, and the inverse."""
    i = torch.arange(18, dtype=torch.float64)
    sigma = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert relative(EDM().beta(1 - i / 17), sigma) < 1e-13
    assert (EDM().time_of(sigma) - (1 - i / 17)).abs().max() < 1e-12
    assert (VE().time_of(VE().beta(TIMES)) - TIMES).abs().max() < 1e-12
    assert (EDM(0.0, 10.0, 1.0).beta(TIMES) - 10 * TIMES).abs().max() < 1e-13


def test_paths_are_made_by_name_and_bad_ones_refused() -> None:
    assert paths.get("fm", sigma=0.2) == FM(0.2)
    assert paths.get("linear") == paths.LINEAR
    made = paths.get("gaussian", alpha=lambda t: 1 - t, beta=lambda t: t)
    assert torch.equal(made.d_beta(TIMES), torch.ones_like(TIMES))
    assert torch.equal(made.d_alpha(TIMES), -torch.ones_like(TIMES))
    with pytest.raises(ValueError, match=r"^path: expected one of linear, .* got 'straight'"):
        paths.get("straight")
    with pytest.raises(ValueError, match=r"^path linear: expected no options; unknown: \['sigma'\]"):
        paths.get("linear", sigma=1)
    with pytest.raises(ValueError, match=r"^path gaussian: .* missing: \['alpha', 'beta'\]"):
        paths.get("gaussian")


def line(t: Tensor) -> Tensor:
    return t


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FM(-0.1), r"^sigma: .* in \[0, 1\], got -0.1"),
        (lambda: FM(1.5), r"^sigma: "),
        (lambda: ICFM(math.nan), r"^sigma: .* got nan"),
        (lambda: TrigFlow(0.0), r"^sigma_data: "),
        (lambda: EDM(sigma_min=2.0, sigma_max=1.0), r"^sigma_max: "),
        (lambda: EDM(sigma_min=1.0, sigma_max=1.0), r"^sigma_max: expected more"),
        (lambda: EDM(rho=0.5), r"^rho: "),
        (lambda: VE(sigma_min=0.0), r"^sigma_min: "),
        (lambda: VE(sigma_min=1.0, sigma_max=1.0), r"^sigma_max: expected more"),
        (lambda: paths.Gaussian(1.0, line), r"^alpha: expected a function of t, got float"),
        (lambda: paths.Gaussian(line, lambda t: t.sum()), r"^beta: expected finite values of the shape of t"),
        (lambda: paths.Gaussian(line, lambda t: t.log() / 0), r"^beta: expected finite"),
        (lambda: paths.Gaussian(line, lambda t: -t), r"^beta: expected > 0"),
        (lambda: paths.Gaussian(line, line, d_beta=lambda t: 2 * t), r"^d_beta: expected the derivative of beta, off"),
        (lambda: paths.convert(Linear(), TIMES, TIMES, TIMES, "eps", "v"), r"^source: .* got 'eps'"),
        (lambda: paths.convert(Linear(), TIMES, TIMES, TIMES, "v", "eps"), r"^target: .* got 'eps'"),
        (lambda: paths.convert(OTCFM(), TIMES, TIMES, TIMES, "v", "score"), r"^path: .* got OTCFM, coupled by"),
        (lambda: paths.rescale(Linear(), OTCFM(), TIMES), r"^path: .* got OTCFM"),
    ],
)
def test_bad_arguments_are_refused_by_name(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
