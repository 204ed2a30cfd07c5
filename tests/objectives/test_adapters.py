"""Networks of other conventions, adapted: the exact velocity and flow map from the exact prediction of every kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.eval.exact import Gaussian
from fastdistill.jvp import jvp
from fastdistill.objectives import adapters, facm, meanflow, scm
from fastdistill.paths import EDM, FM, LINEAR, PREDICTIONS, Cosine, Linear, Path, TrigFlow, convert, expand_time
from fastdistill.samplers import Net
from tests.objectives.cases import EXACT, ROWS, WIDTH, draw_times, exact_net, gaussian_law, point_net

PATHS = [pytest.param(path, id=type(path).__name__) for path in (Linear(), Cosine(), TrigFlow(), FM(0.1), EDM())]


def states(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Draw x (ROWS, WIDTH), t and s (ROWS,)."""
    x0, x1 = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    times = draw_times()
    return path.interpolate(x0, x1, times["t"]), times["t"], times["r"]


def away(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference relative to the largest entry."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def predicting(law: Gaussian, prediction: str) -> Net:
    """Return the exact prediction of the law, as a network of (x, t)."""
    return lambda x, t, s, **rest: convert(law.path, x, t, law.velocity(x, t), "v", prediction)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_prediction_becomes_the_velocity_on_the_diagonal(prediction: str, path: Path) -> None:
    law, (x, t, _) = gaussian_law(path), states(path)
    net = adapters.predicts(predicting(law, prediction), prediction, path)
    assert away(net(x, t=t, s=t), law.velocity(x, t)) < 1e-9
    others = [other for other in PREDICTIONS if other != prediction]
    wrong = [adapters.predicts(predicting(law, prediction), other, path)(x, t=t, s=t) for other in others]
    assert min(away(v, law.velocity(x, t)) for v in wrong) > 1e-2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_prediction_of_one_point_becomes_the_exact_flow_map(prediction: str, path: Path) -> None:
    """Check it there because DDIM's step is exact for one point, however long."""
    law, (x, t, s) = gaussian_law(path, point=True), states(path)
    net = adapters.predicts(predicting(law, prediction), prediction, path)
    assert away(net(x, t=t, s=s), point_net(law)(x, t, s)) < 1e-9


@pytest.mark.parametrize("path", PATHS)
def test_edm_network_becomes_the_velocity(path: Path) -> None:
    """Check the raw network, solved from the exact denoiser; sigma = beta / alpha is told by its logarithm."""
    law, (x, t, _), std = gaussian_law(path), states(path), 0.5

    def raw(scaled: Tensor, noise: Tensor, **rest: Any) -> Tensor:
        sigma = (4 * noise).exp()[:, None]
        total = sigma.square() + std**2
        exploding = scaled * total.sqrt()
        data = law.data(exploding * path.alpha(t)[:, None], t)
        return (data - std**2 / total * exploding) * total.sqrt() / (sigma * std)

    assert away(adapters.edm(raw, path, std)(x, t=t, s=t), law.velocity(x, t)) < 1e-9


def test_trigflow_network_is_called_with_angles_and_a_scaled_state() -> None:
    path = TrigFlow(0.5)
    law, (x, t, s) = gaussian_law(path), states(path)

    def net(scaled: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        """Return F = v / sigma_data by angle."""
        return law.velocity(0.5 * scaled, t / (0.5 * math.pi)) / (0.5 * math.pi) / 0.5

    adapted = adapters.trigflow(net, path)
    assert away(adapted(x, t=t, s=t), law.velocity(x, t)) < 1e-12
    jump = x - expand_time(t - s, x) * adapted(x, t=t, s=s)
    angle = expand_time(0.5 * math.pi * (t - s), x)
    expected = angle.cos() * x - angle.sin() * 0.5 * net(x / 0.5, 0.5 * math.pi * t, s)
    assert away(jump, expected) < 1e-12


SAME: dict[str, Callable[[Net], Net]] = {
    "gap": lambda net: adapters.gap_conditioned(lambda x, t, h, **rest: net(x, t=t, s=t - h, **rest)),
    "reversed": lambda net: adapters.reversed_time(lambda x, t, s, **rest: -net(x, t=1 - t, s=1 - s, **rest)),
    "scaled": lambda net: adapters.scaled_time(lambda x, t, s, **rest: net(x, t=t / 1000, s=s / 1000, **rest), 1000.0),
}


@pytest.mark.parametrize("convention", SAME)
def test_meanflow_is_exact_through_an_adapter(convention: str) -> None:
    """Check it for a network with another convention of time, whose tangent follows by the chain rule."""
    law, times = gaussian_law(LINEAR), draw_times()
    net = exact_net(law)
    x0, x1 = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    _, metrics = meanflow(SAME[convention](net), x0, x1, times["t"], times["s"], teacher=net)
    assert metrics["raw_error"].sqrt() < EXACT


def test_a_gap_network_that_is_given_both_times_is_found() -> None:
    """Check a network that wants h = t - s and gets s."""
    law, times = gaussian_law(LINEAR), draw_times()
    net = exact_net(law)
    x0, x1 = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    wrong = lambda x, t, s, y: net(x, t=t, s=t - s, y=y)  # noqa: E731
    _, metrics = meanflow(wrong, x0, x1, times["t"], times["s"], teacher=net)
    assert metrics["raw_error"].sqrt() > 0.05


@pytest.mark.parametrize(("source", "target"), [(LINEAR, TrigFlow()), (TrigFlow(), LINEAR), (Cosine(), EDM())])
def test_network_of_another_path_is_carried_with_its_flow_map(source: Path, target: Path) -> None:
    there, (x, t, s) = gaussian_law(source), states(target)
    here = Gaussian(there.mean, there.covariance, target)
    net = adapters.on_path(exact_net(there), source, target)
    assert away(net(x, t=t, s=s), here.average_velocity(x, t, s)) < 1e-8
    assert away(net(x, t=t, s=t), here.velocity(x, t)) < 1e-8
    assert away(exact_net(there)(x, t=t, s=s), here.average_velocity(x, t, s)) > 1e-2


@pytest.mark.parametrize("parameterization", ["velocity", "average"])
def test_scm_on_one_path_is_exact_with_the_network_of_another(parameterization: str) -> None:
    """Check that a change of time and scale takes the linear path's consistency function to TrigFlow's, and back."""
    for source, target in ((LINEAR, TrigFlow()), (TrigFlow(), LINEAR)):
        there, times = gaussian_law(source), draw_times()
        here = exact_net(Gaussian(there.mean, there.covariance, target))
        x0, x1 = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
        options: dict[str, Any] = {"path": target, "teacher": here, "parameterization": parameterization}
        carried = adapters.on_path(exact_net(there), source, target)
        assert scm(carried, x0, x1, times["t"], **options)[1]["raw_error"].sqrt() < 1e-8
        assert scm(exact_net(there), x0, x1, times["t"], **options)[1]["raw_error"].sqrt() > 0.02


def signed(net: Net) -> Callable[..., Tensor]:
    """Return a network of FACM's one time: (t, 0) at c = t and (t, t) at c = -t."""
    return lambda x, c, **rest: net(x, t=c.abs(), s=torch.where(c > 0, 0.0, c.abs()), **rest)


def test_facm_is_exact_with_a_network_of_one_signed_time() -> None:
    """Check both terms and the gradient; the other sign is found."""
    law, times = gaussian_law(LINEAR), draw_times()
    net = exact_net(law)
    x0, x1 = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    _, metrics = facm(adapters.signed_time(signed(net)), x0, x1, times["t"], teacher=net)
    assert metrics["raw_error"].sqrt() < EXACT and metrics["anchor_error"].sqrt() < EXACT
    wrong = adapters.signed_time(lambda x, c, **rest: signed(net)(x, -c, **rest))
    _, metrics = facm(wrong, x0, x1, times["t"], teacher=net)
    assert metrics["raw_error"].sqrt() > 0.05 and metrics["anchor_error"].sqrt() > 0.05


def test_the_tangent_of_a_signed_time_runs_along_it() -> None:
    """Check (w, 1) at c = t towards the data, and (w, -1) at c = -t, where t and s move together."""
    x, t, _ = states(LINEAR)
    w = torch.randn_like(x)
    only = lambda x, c, y=None: x.sin() * c[:, None].exp() + c[:, None] ** 3  # noqa: E731
    net, along = adapters.signed_time(only), torch.ones_like(t)
    cases = [(t, 0 * t, t, along, None), (t, t, -t, -along, along)]
    for t, s, c, dc, ds in cases:
        u, du = jvp(lambda x, t, s: net(x, t=t, s=s), (x, t, s), (w, 1.0, ds))
        expected, rate = torch.func.jvp(only, (x, c), (w, dc))[:2]
        torch.testing.assert_close(u, expected)
        torch.testing.assert_close(du, rate)


def test_a_signed_time_knows_no_other_end() -> None:
    x, t, s = states(LINEAR)
    with pytest.raises(ValueError, match=r"^s: expected times 0 or t, which a network of one time knows, got 0\.\d+"):
        adapters.signed_time(lambda x, c: x)(x, t=t, s=s)


def test_a_signed_time_serves_each_row_by_itself() -> None:
    """Check it under vmap, where no value can be read; a jvp, where it can, still refuses another end."""
    x, t, s = states(LINEAR)
    net = adapters.signed_time(lambda x, c: x * c)

    def of_row(x: Tensor, t: Tensor) -> Tensor:
        return torch.func.jacfwd(lambda t: net(x, t=t, s=0 * t))(t)

    torch.testing.assert_close(torch.func.vmap(of_row)(x, t), x)
    wide = adapters.signed_time(lambda x, c: x * c[:, None])
    with pytest.raises(ValueError, match=r"^s: expected times 0 or t"):
        jvp(lambda x, t, s: wide(x, t=t, s=s), (x, t, s), (x, 1.0, None))


def test_one_time_and_one_scale_pass_on_the_rest() -> None:
    x, t, s = states(LINEAR)
    y = torch.arange(ROWS)
    only = adapters.one_time(lambda x, t, y: x * t[:, None] + y[:, None])
    torch.testing.assert_close(only(x, t=t, s=s, y=y), x * t[:, None] + y[:, None])
    fixed = adapters.with_scale(lambda x, t, s, y, g: x * g[:, None] + y[:, None], 2.5)
    torch.testing.assert_close(fixed(x, t=t, s=s, y=y), 2.5 * x + y[:, None])
