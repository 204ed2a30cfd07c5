"""IMM: no discrepancy at the exact flow map, and a clear one anywhere else."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.func import grad

from fastdistill import objectives, samplers
from fastdistill.eval.exact import Gaussian
from fastdistill.objectives.imm import imm, imm_weight, mmd2
from fastdistill.paths import EDM, FM, ICFM, LINEAR, OTCFM, Cosine, Path
from fastdistill.samplers import Net
from fastdistill.times import imm_times
from tests.objectives.cases import WIDTH, Gate
from tests.objectives.descent import Case


def in_groups(gate: Gate, theta: float) -> None:
    """Return IMM's times: equal in groups of four, s < r < t."""
    gate.times = {name: value[::4].repeat_interleave(4) for name, value in gate.times.items()}
    gate.times["s"] = 0.5 * gate.times["r"]


def imm_slope(gate: Gate, d: Tensor) -> Tensor:
    """Return the slope: jumps from t and from r end in one point, off by -theta d^3 e and -theta (r - s)^3 e.

    Of -2 k(p_j, q_j) / M^2, k = exp(-|p - q| / (d W)), the derivative by theta through p is 2 d^3 |e| / (d W M^2), with
    theta's sign; the sum over M rows leaves one M. All other pairs add what falls with theta.
    """
    return imm_weight(gate.path, gate.times["t"]) * 2 * d**2 * WIDTH**0.5 / (4 * WIDTH)


DESCENT = {
    "imm": Case("imm", imm_slope, taught=False, prepare=in_groups, order=0),
}


PATHS = [pytest.param(path, id=type(path).__name__) for path in (LINEAR, Cosine(), FM(0.1), ICFM(0.2), EDM(0.05, 5.0))]
ROWS = 600


def law_on(path: Path) -> Gaussian:
    return Gaussian(torch.tensor([1.5, -1.0]).double(), torch.tensor([[0.3, 0.1], [0.1, 0.2]]).double(), path)


def discrepancy(net: Net, path: Path, *, shift: float = 0.0) -> float:
    """Return MMD^2 of one large group from t = 0.9 and from r = 0.4 to s = 0.2, unbiased."""
    x0, x1 = law_on(path).sample(ROWS), torch.randn(ROWS, 2, dtype=torch.float64)
    t, r, s = (torch.full((ROWS,), time, dtype=torch.float64) for time in (0.9, 0.4, 0.2))
    _, metrics = imm(net, x0 + shift, x1, t, r, s, path=path, group=ROWS, statistic="u", sharpness=4.0)
    return metrics["raw_error"].item()


@pytest.mark.parametrize("path", PATHS)
def test_discrepancy_vanishes_at_the_exact_map_and_at_no_mutant(path: Path) -> None:
    law = law_on(path)
    assert abs(discrepancy(lambda x, t, s, y: law.average_velocity(x, t, s), path)) < 6e-3
    assert discrepancy(lambda x, t, s, y: 0 * x, path) > 0.02, "the identity"
    assert discrepancy(lambda x, t, s, y: -law.average_velocity(x, t, s), path) > 0.02, "time runs backwards"
    assert discrepancy(lambda x, t, s, y: law.velocity(x, t), path) > 0.01, "one step of Euler"
    assert discrepancy(lambda x, t, s, y: law.average_velocity(x, t, s), path, shift=1.0) > 0.01, "other data"


def test_discrepancy_is_the_sum_over_pairs() -> None:
    p, q = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    sharpness = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    for g in range(3):

        def k(a: Tensor, b: Tensor, w: Tensor = sharpness[g]) -> float:
            return torch.exp(-w * (a - b).norm() / 5).item()

        pairs = {
            (i, j): k(p[g, i], p[g, j]) + k(q[g, i], q[g, j]) - k(p[g, i], q[g, j]) - k(p[g, j], q[g, i])
            for i, j in itertools.product(range(4), repeat=2)
        }
        every, others = list(pairs.values()), [value for (i, j), value in pairs.items() if i != j]
        assert mmd2(p, q, sharpness, "v")[g].item() == pytest.approx(sum(every) / 16)
        assert mmd2(p, q, sharpness, "u")[g].item() == pytest.approx(sum(others) / 12)


def test_one_statistic_is_unbiased_and_the_other_is_not() -> None:
    """Check many groups of four from one law."""
    p, q = torch.randn(2, 20_000, 4, 2)
    u, v = (mmd2(p, q, torch.ones(20_000), statistic) for statistic in ("u", "v"))  # type: ignore[arg-type]
    assert abs(u.mean().item()) < 5 * u.std().item() / 20_000**0.5
    assert v.min() >= -1e-6
    assert v.mean() > 20 * v.std() / 20_000**0.5


def test_discrepancy_has_a_finite_gradient_where_rows_coincide() -> None:
    p = torch.zeros(1, 3, 2, dtype=torch.float64, requires_grad=True)
    for statistic in ("u", "v"):
        mmd2(p, torch.ones(1, 3, 2).double(), torch.ones(1), statistic).sum().backward()  # type: ignore[arg-type]
        assert p.grad is not None
        assert p.grad.isfinite().all()
        assert (p.grad <= 0).all(), "downhill is towards q"


def test_gradient_flows_through_the_jump_from_t_alone() -> None:
    """Check that the states share data and noise: DDIM's step with the true data is the path itself."""
    law = law_on(LINEAR)
    x0, x1 = law.sample(8), torch.randn(8, 2, dtype=torch.float64)
    t, r, s = (torch.tensor(pair).double().repeat_interleave(4) for pair in ([0.9, 0.5], [0.6, 0.4], [0.1, 0.2]))
    seen: list[tuple[Tensor, Tensor, Tensor, bool]] = []
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def net(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        seen.append((x, t, s, torch.is_grad_enabled()))
        return scale * law.average_velocity(x, t, s)

    loss, metrics = imm(net, x0, x1, t, r, s)
    loss.backward()
    (x_t, first, end, tracked), (x_r, second, other_end, held) = seen
    assert tracked and not held
    torch.testing.assert_close(x_t, LINEAR.interpolate(x0, x1, t))
    torch.testing.assert_close(x_r, LINEAR.interpolate(x0, x1, r))
    assert torch.equal(first, t) and torch.equal(second, r) and torch.equal(end, s) and torch.equal(other_end, s)

    def alone(scale: Tensor, both: bool) -> Tensor:
        ends, goals = ((x - (a - s)[:, None] * scale * law.average_velocity(x, a, s)) for x, a in ((x_t, t), (x_r, r)))
        groups = (2, 4, 2)
        error = mmd2(ends.reshape(groups), (goals if both else goals.detach()).reshape(groups), 1 / (t - s)[::4])
        return (imm_weight(LINEAR, t[::4]) * error).mean()

    torch.testing.assert_close(loss.detach(), alone(scale, False).detach())
    assert scale.grad is not None
    held_gradient, full = (torch.autograd.grad(alone(scale, both), scale)[0] for both in (False, True))
    torch.testing.assert_close(scale.grad, held_gradient)
    assert abs(full - held_gradient) > 1e-3 * abs(held_gradient), "without the stop-gradient it is another"
    assert metrics["rows"]["raw_error"].shape == (8,)
    torch.testing.assert_close(metrics["rows"]["raw_error"].mean(), metrics["raw_error"])


def test_descent_on_the_loss_finds_the_exact_map_of_a_gaussian() -> None:
    """Check one unknown: the factor of the exact average velocity, from 0.2 towards 1."""
    law = law_on(LINEAR)
    generator = torch.Generator().manual_seed(1)
    factor = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([factor], lr=0.05)
    for _ in range(80):
        x0, x1 = law.sample(256), torch.randn(256, 2, dtype=torch.float64)
        t, r, s = (value.double() for value in imm_times(256, 32, k=4, generator=generator))
        loss, _ = imm(lambda x, t, s, y: factor * law.average_velocity(x, t, s), x0, x1, t, r, s, group=32)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(factor.item() - 1) < 0.1


@pytest.mark.parametrize("path", PATHS)
def test_weight_is_the_papers(path: Path) -> None:
    """Check it from the logarithm of the signal-to-noise ratio, with its slope by autograd."""
    t = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)

    def log_ratio(t: Tensor) -> Tensor:
        return 2 * (path.alpha(t) / path.beta(t)).log()

    slope = grad(lambda t: log_ratio(t).sum())(t)
    for a, b in ((1.0, 5.0), (2.0, 4.0)):
        truth = 0.5 * torch.sigmoid(b - log_ratio(t)) * -slope
        truth = truth * path.alpha(t) ** a / (path.alpha(t) ** 2 + path.beta(t) ** 2)
        torch.testing.assert_close(imm_weight(path, t, a, b), truth)
    assert imm_weight(path, torch.tensor([0.0, 1.0]).double()).isfinite().all()


def test_labels_target_and_sharpness_are_passed_on() -> None:
    x0, x1 = torch.randn(2, 4, 3)
    t, r, s = torch.full((4,), 0.8), torch.full((4,), 0.6), torch.full((4,), 0.1)
    labels, called = torch.arange(4), []

    def student(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is labels
        called.append("student")
        return x

    def target(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is labels
        called.append("target")
        return x

    by_number, _ = imm(student, x0, x1, t, r, s, y=labels, target=target, sharpness=1 / 0.7)
    assert called == ["student", "target"]
    by_function, _ = imm(student, x0, x1, t, r, s, y=labels, target=target, sharpness=lambda t, s: 1 / (t - s))
    by_default, _ = imm(student, x0, x1, t, r, s, y=labels, target=target)
    torch.testing.assert_close(by_number, by_function)
    torch.testing.assert_close(by_number, by_default)


def test_registry_describes_it() -> None:
    row = objectives.get("imm")
    assert row.function is imm
    assert row.times == ("t", "r", "s")
    assert row.sampler in samplers.SAMPLERS
    assert row.options["group"] == 4
    assert row.options["statistic"] == "v"


def test_bad_arguments_are_refused_by_name() -> None:
    x0, x1 = torch.randn(2, 4, 3)
    t, r, s = torch.full((4,), 0.8), torch.full((4,), 0.6), torch.full((4,), 0.1)
    uneven = torch.tensor([0.8, 0.8, 0.8, 0.7])

    def net(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        return x

    for arguments, message in (
        ((t, r[:3], s), r"^r: expected shape \(4,\)"),
        ((t, t + 0.1, s), r"^r: expected times with s <= r <= t"),
        ((t, 0.5 * s, s), r"^r: expected times with s <= r <= t"),
        ((uneven, r, s), r"^t: expected equal times within each group of 4"),
        ((0 * t, 0 * r, 0 * s), r"^t: expected times > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            imm(net, x0, x1, *arguments)
    for group in (0, 3):
        with pytest.raises(ValueError, match=rf"^group: expected a divisor of the batch, 4, got {group}"):
            imm(net, x0, x1, t, r, s, group=group)
    with pytest.raises(ValueError, match=r"^group: expected at least 2 rows for the statistic 'u'"):
        imm(net, x0, x1, t, r, s, group=1, statistic="u")
    with pytest.raises(ValueError, match=r"^statistic: expected 'v' or 'u', got 'w'"):
        imm(net, x0, x1, t, r, s, statistic="w")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^path: expected sigma = 0 with coupled pairs, got OTCFM\(sigma=0.1\)"):
        imm(net, x0, x1, t, r, s, path=OTCFM(0.1))
    assert imm(net, x0, x1, t, r, s, path=OTCFM())[0].isfinite()
    with pytest.raises(ValueError, match=r"^a: expected >= 1, got 0.5"):
        imm(net, x0, x1, t, r, s, a=0.5)
