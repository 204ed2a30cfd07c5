"""Improved MeanFlow: the tangent's direction is predicted, by the network itself or by a head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.jvp import jvp
from fastdistill.objectives import Guidance, improved_meanflow, meanflow
from tests.objectives.cases import ROWS, WIDTH, SmallNet, assert_same_gradient, gradients, random_batch
from tests.objectives.descent import Case, diagonal, share

TAUGHT = {"improved_meanflow": {}}
FROM_DATA = {"improved_meanflow": {}}
DESCENT = {
    "improved meanflow": Case("improved_meanflow", lambda g, d: 2 * WIDTH * d**2 * 3 * d**2 / 1e-2),
    "improved meanflow, diagonal": Case("improved_meanflow", lambda g, d: 2 * WIDTH * share(g) / 1e-2, diagonal),
}


def test_it_is_meanflow_along_the_networks_own_velocity() -> None:
    """Check that the two residuals are the same sum; only the direction of the jvp differs."""
    net, (x0, x1, times) = SmallNet(), random_batch()
    t, s = times["t"], times["s"]
    own = net((1 - t)[:, None] * x0 + t[:, None] * x1, t, t).detach()[t != s]

    def along_own(fn: Any, primals: Any, tangents: Any) -> Any:
        return jvp(fn, primals, (own, 1.0, None))

    ours, _ = improved_meanflow(net, x0, x1, t, s)
    theirs, _ = meanflow(net, x0, x1, t, s, jvp=along_own)
    assert_same_gradient(ours, theirs, net)
    assert meanflow(net, x0, x1, t, s)[0] != ours


def test_head_gives_the_direction_and_is_trained_beside() -> None:
    net, head, (x0, x1, times) = SmallNet(), SmallNet(), random_batch()
    t, s = times["t"], times["s"]
    loss, metrics = improved_meanflow(net, x0, x1, t, s, velocity_head=head, p=0.0)
    error = (head((1 - t)[:, None] * x0 + t[:, None] * x1, t, t) - (x1 - x0)).square()
    torch.testing.assert_close(metrics["head_error"], error.mean().detach())
    assert_same_gradient(loss, error.sum(1).mean(), head)
    plain, _ = improved_meanflow(net, x0, x1, t, s, p=0.0)
    assert (gradients(loss, net) - gradients(plain, net)).norm() > 1e-3, "the head's direction is another"


def test_head_gives_the_estimates_of_guidance_too() -> None:
    """Check the target v_hat + (1 - 1 / scale) (v_y - v_null) when one label moves nothing but the head."""
    net, (x0, x1, times), y = SmallNet(), random_batch(), torch.arange(ROWS) % 3
    t = times["t"]

    def head(x: Tensor, t: Tensor, s: Tensor, y: Tensor) -> Tensor:
        return x * y[:, None]

    _, metrics = improved_meanflow(net, x0, x1, t, t, y=y, velocity_head=head, guidance=Guidance.improved(4.0, null=3))
    x = (1 - t)[:, None] * x0 + t[:, None] * x1
    w = x1 - x0 + 0.75 * (y - 3)[:, None] * x
    torch.testing.assert_close(metrics["raw_error"], (net(x, t, t, y) - w).square().mean().detach())
    torch.testing.assert_close(metrics["head_error"], (y[:, None] * x - w).square().mean())


def test_scales_by_row_condition_direction_and_tangent() -> None:
    """Check that the network is always told the scale of the very row."""
    (x0, x1, times), y = random_batch(), torch.arange(ROWS) % 3
    inner, scale = SmallNet(), 1 + torch.arange(ROWS, dtype=torch.float64)

    def net(x: Tensor, t: Tensor, s: Tensor, y: Tensor, g: Tensor) -> Tensor:
        rows = [round(value.item()) - 1 for value in g]
        assert all(int(label) in (row % 3, 3) for label, row in zip(y, rows, strict=True))
        return inner(x, t, s, y) * g[:, None].log1p()

    loss, _ = improved_meanflow(net, x0, x1, times["t"], times["s"], y=y, guidance=Guidance.improved(scale, null=3))
    assert loss.isfinite()


def test_no_label_is_asked_at_the_scale_one() -> None:
    """Check it by the head, in the guidance of the target; the rows' own scales go with their labels."""
    (x0, x1, times), y = random_batch(), torch.arange(ROWS) % 3
    inner, scale = SmallNet(), 1.5 + torch.rand(ROWS, dtype=torch.float64)
    asked: list[Tensor] = []

    def head(x: Tensor, t: Tensor, s: Tensor, y: Tensor, g: Tensor) -> Tensor:
        asked.extend((g[y == 3], g[y != 3]))
        return inner(x, t, s, y)

    def net(x: Tensor, t: Tensor, s: Tensor, y: Tensor, g: Tensor) -> Tensor:
        return inner(x, t, s, y)

    guidance = Guidance.improved(scale, null=3)
    improved_meanflow(net, x0, x1, times["t"], times["s"], y=y, velocity_head=head, guidance=guidance)
    without, labelled = torch.cat(asked[::2]), torch.cat(asked[1::2])
    assert len(without) == ROWS and (without == 1).all()
    assert (labelled > 1).all()


@pytest.mark.parametrize("guided", [False, True])
def test_the_tangent_of_a_dropped_row_runs_along_the_velocity_of_its_label(guided: bool) -> None:
    """Check that its target is v_hat, its network is asked without a label, and only the direction knows it."""
    net, (x0, x1, times), labels = SmallNet(), random_batch(), torch.arange(ROWS) % 3
    t, s, y = times["t"], times["s"], torch.where(torch.arange(ROWS) % 2 == 0, 3, labels)
    guidance = Guidance.improved(2.0, null=3) if guided else None
    directions: list[Tensor] = []

    def listening(fn: Any, primals: Any, tangents: Any) -> Any:
        directions.append(tangents[0])
        return jvp(fn, primals, tangents)

    options: dict[str, Any] = {"y": y, "guidance": guidance, "jvp": listening}
    loss, _ = improved_meanflow(net, x0, x1, t, s, undropped=labels, **options)
    x, apart = (1 - t)[:, None] * x0 + t[:, None] * x1, t != s
    torch.testing.assert_close(directions[0], net(x, t, t, labels)[apart].detach())
    other, _ = improved_meanflow(net, x0, x1, t, s, **options)
    torch.testing.assert_close(directions[1], net(x, t, t, y)[apart].detach())
    assert loss != other
    same, _ = improved_meanflow(net, x0, x1, t, s, undropped=y, **options)
    assert same == other


def test_labels_before_the_drop_of_another_shape_are_refused() -> None:
    (x0, x1, times), y = random_batch(), torch.arange(ROWS) % 3
    with pytest.raises(ValueError, match=r"^undropped: expected the shape of y, \(48,\), got shape \(3,\)"):
        improved_meanflow(SmallNet(), x0, x1, times["t"], times["s"], y=y, undropped=y[:3])
    with pytest.raises(ValueError, match=r"^undropped: expected None without y, got shape"):
        improved_meanflow(SmallNet(), x0, x1, times["t"], times["s"], undropped=y)
