"""Check rCM: sCM plus a score gradient on the network's own one-step samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.jvp import jvp
from fastdistill.objectives import adapters, dmd_gradient, rcm, scm
from fastdistill.paths import EDM, LINEAR, Path, TrigFlow
from tests.objectives.cases import (
    ROWS,
    WIDTH,
    Gate,
    SmallNet,
    assert_same_gradient,
    exact_net,
    gaussian_law,
    random_batch,
)
from tests.objectives.descent import Case, first


def towards_the_map(gate: Gate, theta: float) -> None:
    """Return rCM's score term, pulled back to where the exact map takes the noise."""
    one = torch.ones(ROWS, dtype=torch.float64)
    exact = gate.law.flow_map(gate.x1, one, 0 * one)
    gate.keywords["score_gradient"] = lambda samples, y: samples - exact


TAUGHT = {"rcm": {}}
FROM_DATA = {"rcm": {}}
DESCENT = {
    "rcm": Case("rcm", lambda g, d: 2 * d**2 * 3 * d**2 / 0.1),
    "rcm, score": Case("rcm", lambda g, d: 0.02 + 0 * d, first, prepare=towards_the_map),
}


def test_it_is_the_weighted_sum_of_both_terms() -> None:
    """Check that the second's gradient by the samples is delta; its samples start from the path's noise."""
    net, (x0, x1, times) = SmallNet(), random_batch()
    path, one, delta = TrigFlow(0.5), torch.ones(ROWS, dtype=torch.float64), torch.randn(ROWS, WIDTH).double()
    ours, metrics = rcm(net, x0, x1, times["t"], path=path, score_gradient=delta, score_weight=0.3)
    base, _ = scm(net, x0, x1, times["t"], path=path)
    samples = 0.5 * x1 - net(0.5 * x1, one, 0 * one)
    assert_same_gradient(ours, base + 0.3 * (samples * delta).mean(), net)
    torch.testing.assert_close(metrics["score_loss"], 0.5 * delta.square().mean())
    torch.testing.assert_close(metrics["loss"], ours.detach())


def test_a_callable_sees_the_samples_without_gradient_and_the_labels() -> None:
    net, (x0, x1, times) = SmallNet(), random_batch()
    seen: list[Any] = []

    def score(samples: Tensor, y: Tensor | None) -> Tensor:
        seen.extend((samples.requires_grad, torch.is_grad_enabled(), y))
        return samples.sin()

    y = torch.arange(ROWS) % 4
    rcm(net, x0, x1, times["t"], y=y, score_gradient=score)
    assert seen == [False, False, y]


def test_both_terms_vanish_at_the_exact_map() -> None:
    """Check DMD's gradient of exact velocities: fake is the samples' own law, here the data's."""
    law, (_, x1, times) = gaussian_law(TrigFlow(1.0)), random_batch()
    net, tau = exact_net(law), times["t"]
    options: dict[str, Any] = {"teacher": net, "path": law.path}

    def score(samples: Tensor, y: Tensor | None) -> Tensor:
        return dmd_gradient(samples, x1, tau, fake=net, **options)

    loss, metrics = rcm(net, x1, x1, tau, score_gradient=score, **options)
    assert loss < 1e-20
    assert metrics["score_loss"] < 1e-20


@pytest.mark.parametrize("warmup", [0.0, 0.25, 1.0])
def test_the_warm_up_is_its_own_on_the_circle(warmup: float) -> None:
    """Check it in the authors' letters: the network's derivative enters whole at every share r of the warm-up."""
    net, (x0, x1, times) = SmallNet(), random_batch()
    path, angle = TrigFlow(1.0), 0.5 * torch.pi * times["t"]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    x, w = cos * x0 + sin * x1, cos * x1 - sin * x0
    f, rate = jvp(lambda x, a: net(x, a, 0 * a), (x, angle), (w, 1.0))
    g = -cos * (1 - (warmup * sin) ** 2).sqrt() * (f - w) - cos * sin * (warmup * x + rate)
    g = (g / (g.norm(dim=1, keepdim=True) + 0.1)).detach()
    theirs = (f - (f + g).detach()).square().mean()
    options: dict[str, Any] = {"path": path, "warmup": warmup, "score_gradient": torch.zeros_like(x1)}
    ours, _ = rcm(adapters.trigflow(net, path), x0, x1, times["t"], score_weight=0.0, **options)
    torch.testing.assert_close(ours, theirs)
    assert_same_gradient(ours, theirs, net)


@pytest.mark.parametrize("path", [LINEAR, TrigFlow(0.5), EDM(0.05, 20.0)], ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("form", ["velocity", "average"])
def test_every_form_is_scms_at_the_end_of_the_warm_up(form: str, path: Path) -> None:
    """Check it also where nothing turns, on the linear path or with the average velocity, at every share of it."""
    if form == "velocity" and isinstance(path, EDM):
        form = "average"
    net, (x0, x1, times) = SmallNet(), random_batch()
    options: dict[str, Any] = {"path": path, "parameterization": form}
    whole, _ = scm(net, x0, x1, times["t"], **options)
    found = {
        r: rcm(net, x0, x1, times["t"], warmup=r, score_gradient=torch.zeros_like(x1), score_weight=0.0, **options)[0]
        for r in (0.3, 1.0)
    }
    assert_same_gradient(found[1.0], whole, net)
    turns = form == "velocity" and path != LINEAR
    assert (abs(found[0.3] - whole) > 1e-4) == turns


def test_without_its_weight_the_score_makes_no_samples() -> None:
    net, (x0, x1, times) = SmallNet(), random_batch()

    def never(samples: Tensor, y: Tensor | None) -> Tensor:
        raise AssertionError("no samples expected")

    loss, metrics = rcm(net, x0, x1, times["t"], score_gradient=never, score_weight=0.0)
    torch.testing.assert_close(loss, scm(net, x0, x1, times["t"])[0])
    assert "score_loss" not in metrics
    assert "terms" not in metrics
