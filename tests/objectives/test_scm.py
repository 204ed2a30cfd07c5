"""Check sCM against its paper's formula on TrigFlow, the hand-written one on the linear path, and in its limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdistill.objectives import adapters, ayf_emd, scm
from fastdistill.paths import Cosine, TrigFlow
from tests.objectives.cases import ROWS, Gate, SmallNet, assert_same_gradient, random_batch
from tests.objectives.descent import Case


def scm_on_the_circle(gate: Gate, d: Tensor) -> Tensor:
    """Return the slope: F is off by t^3 / beta, g by -k D_w(t phi) / W = -3 t^2 k / W; k = beta' / W."""
    path, t = gate.path, gate.times["t"]
    beta, rise = path.beta(t), path.d_beta(t)
    turning = path.alpha(t) * rise - beta * path.d_alpha(t)
    return 2 * (t**3 / beta) * (3 * t**2 * rise / turning**2) / 0.1


TAUGHT = {"scm": {}}
FROM_DATA = {"scm": {}}
DESCENT = {
    "scm": Case("scm", lambda g, d: 2 * d**2 * 3 * d**2 / 0.1),
    "scm on the circle": Case("scm", scm_on_the_circle, path=Cosine()),
    "scm from data": Case("scm", lambda g, d: 2 * d**2 * 3 * d**2 / 0.1, taught=False),
}


STD = 0.5


def paper(net: nn.Module, x0: Tensor, z: Tensor, angle: Tensor, warmup: float, c: float | None) -> Tensor:
    """Compute Lu and Song's loss from data, in their letters: F(x / sigma_d, t), t an angle, z of deviation sigma_d."""
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    x, dx_dt = cos * x0 + sin * z, cos * z - sin * x0
    f, df_dt = torch.func.jvp(
        lambda x, t: net(x / STD, t, 0 * t), (x.detach(), angle), (dx_dt, torch.ones_like(angle))
    )[:2]
    g = -(cos**2) * (STD * f - dx_dt) - warmup * cos * sin * (x + STD * df_dt)
    g = g.detach() / STD  # in units of F
    if c is not None:
        g = g / (g.norm(dim=1, keepdim=True) + c)
    return (f - (f + g).detach()).square().mean()


@pytest.mark.parametrize("c", [None, 0.2])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
def test_it_is_the_papers_loss_on_trigflow(warmup: float, c: float | None) -> None:
    """Check it with the F-network adapted; the noise is sigma_d x1 and the time pi t / 2."""
    net, (x0, x1, times) = SmallNet(), random_batch()
    path = TrigFlow(STD)
    ours, _ = scm(adapters.trigflow(net, path), x0, x1, times["t"], path=path, warmup=warmup, c=c)
    theirs = paper(net, x0, STD * x1, 0.5 * math.pi * times["t"], warmup, c)
    torch.testing.assert_close(ours, theirs)
    assert_same_gradient(ours, theirs, net)


@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
def test_on_the_linear_path_it_is_the_average_velocitys_residual_to_the_data(warmup: float) -> None:
    """Check that both forms agree there, and with AYF-EMD at s = 0, which sums over elements."""
    net, teacher, (x0, x1, times) = SmallNet(), SmallNet(), random_batch()
    options: dict[str, Any] = {"teacher": teacher, "warmup": warmup, "c": 0.1}
    losses = [scm(net, x0, x1, times["t"], parameterization=form, **options)[0] for form in ("velocity", "average")]
    torch.testing.assert_close(*losses)
    emd, _ = ayf_emd(net, x0, x1, times["t"], 0 * times["t"], **options)
    assert_same_gradient(3 * losses[0], emd, net)


def test_normalised_rows_pull_with_less_than_one() -> None:
    """Check that each row's gradient by F is bounded by 2 / elements, whatever the error."""
    net, (x0, x1, times) = SmallNet(), random_batch()
    big, _ = scm(net, 1e3 * x0, 1e3 * x1, times["t"])
    assert big < 1 / 3
    free, _ = scm(net, 1e3 * x0, 1e3 * x1, times["t"], c=None)
    assert free > 1e3


def test_raw_error_is_that_of_the_whole_tangent_during_warm_up() -> None:
    """Check it, so that it can be compared between steps."""
    net, (x0, x1, times) = SmallNet(), random_batch()
    early, late = (scm(net, x0, x1, times["t"], path=TrigFlow(), warmup=r)[1] for r in (0.0, 1.0))
    assert early["raw_error"] == late["raw_error"]
    assert early["loss"] != late["loss"]
    assert early["rows"]["s"].equal(torch.zeros(ROWS, dtype=torch.float64))
