"""ReFlow: pairs along an exact flow, and a straightness that is 0 for straight flows only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdistill.eval.exact import Gaussian, Ring
from fastdistill.objectives.reflow import coupled_pairs, straightness
from fastdistill.paths import LINEAR, OTCFM, Cosine, Path
from fastdistill.samplers import Net
from tests.objectives.cases import Gate, exact_net
from tests.objectives.descent import Case, diagonal


def coupled_by_the_flow(gate: Gate, theta: float) -> None:
    """Return ReFlow's pairs, and the network that is exact for them: that of the exact transport."""
    gate.x0, gate.x1 = coupled_pairs(gate.net, gate.x1, None, 1, sampler="average_velocity")
    gate.net = exact_net(Gaussian(gate.law.mean, gate.law.covariance, OTCFM()))
    del gate.keywords["teacher"]


DESCENT = {
    "reflow": Case("flow_matching", lambda g, d: 2 + 0 * d, diagonal, prepare=coupled_by_the_flow),
}


MEAN = torch.tensor([0.4, -0.7], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)


def exact(path: Path = LINEAR) -> Net:
    law = Gaussian(MEAN, COVARIANCE, path)
    return lambda x, t, s, y=None: law.average_velocity(x, t, s)


@pytest.mark.parametrize("path", [LINEAR, Cosine()], ids=repr)
def test_pairs_are_the_ends_of_the_flow(path: Path) -> None:
    x1 = torch.randn(32, 2, dtype=torch.float64)
    zero, one = torch.zeros(32, dtype=torch.float64), torch.ones(32, dtype=torch.float64)
    truth = Gaussian(MEAN, COVARIANCE, path).flow_map(x1, one, zero)
    for sampler, steps, error in (("heun", 100, 1e-3), ("average_velocity", 2, 1e-10), ("adaptive", 1, 1e-3)):
        x0, same = coupled_pairs(exact(path), x1, None, steps, sampler=sampler, path=path)
        assert same is x1
        assert (x0 - truth).abs().max() < error
    rough, _ = coupled_pairs(exact(path), x1, None, 2, sampler="euler", path=path)
    assert (rough - truth).abs().max() > 0.01


def test_pairs_belong_to_their_labels_and_guidance_and_hold_no_graph() -> None:
    slope = torch.ones((), requires_grad=True)

    def teacher(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is not None
        return slope * y[:, None].float() * torch.ones_like(x)

    x1, labels = torch.randn(3, 2), torch.tensor([0, 1, 2])
    plain, _ = coupled_pairs(teacher, x1, labels, 4)
    torch.testing.assert_close(plain, x1 - labels[:, None])
    guided, _ = coupled_pairs(teacher, x1, labels, 4, scale=2.0, null=3)
    torch.testing.assert_close(guided, x1 - (3 + 2.0 * (labels[:, None] - 3)))
    assert not plain.requires_grad


def test_straightness_has_its_closed_form_for_a_gaussian_on_a_line() -> None:
    """Check it on the linear path, where v is affine in x, so that S follows from moments; here by quadrature."""
    law = Gaussian(torch.tensor([0.0]).double(), torch.tensor([[0.09]]).double())
    x1 = torch.randn(64, 1, dtype=torch.float64)
    t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    deviation = ((1 - t).square() * 0.09 + t.square()).sqrt()  # x_t = x1 deviation(t)
    slope = (-(1 - t) * 0.09 + t) / deviation
    truth = (slope - (1 - 0.3)).square().mean() * x1.square().mean()
    found = straightness(lambda x, t, s, y: law.velocity(x, t), x1, steps=400)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(truth.item(), rel=1e-3)


def test_straightness_is_zero_for_straight_flows_alone() -> None:
    """Check that under exact transport the flow is straight; of independent pairs, and of the ring, it is not."""
    x1 = torch.randn(256, 2, dtype=torch.float64)
    assert abs(straightness(exact(OTCFM()), x1).item()) < 1e-12
    assert straightness(exact(), x1) > 0.05
    ring = Ring()
    curved = straightness(lambda x, t, s, y: ring.velocity(x, t), x1)
    assert curved > 0.5
    assert straightness(lambda x, t, s, y: 1 + t[:, None] + 0 * x, x1) > 0.1, "straight, but not at constant speed"


def test_one_round_of_reflow_straightens() -> None:
    """Check pairs of an exact Gaussian flow, which are transported: the velocity of their interpolation is straight."""
    x1 = torch.randn(4000, 2, dtype=torch.float64)
    x0, _ = coupled_pairs(exact(), x1, None, 1, sampler="average_velocity")
    before = straightness(exact(), x1).item()

    def fitted(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        """Return flow matching's minimiser among affine functions of x at this t: least squares on the pairs."""
        rows = torch.cat((LINEAR.interpolate(x0, x1, t[0]), torch.ones(len(x0), 1).double()), 1)
        solution = torch.linalg.lstsq(rows, x1 - x0).solution
        return torch.cat((x, torch.ones(len(x), 1).double()), 1) @ solution

    after = straightness(fitted, x1[:500], steps=20).item()
    assert after < 1e-6 < before / 100


def test_bad_samplers_are_refused_by_name() -> None:
    for sampler in ("consistency", "gamma", "ddim"):
        with pytest.raises(ValueError, match=rf"^sampler: expected one of euler, .* got '{sampler}'"):
            coupled_pairs(exact(), torch.randn(2, 2), sampler=sampler)
    with pytest.raises(ValueError, match=r"^steps: expected at least 1, got 0"):
        straightness(exact(), torch.randn(2, 2), steps=0)
