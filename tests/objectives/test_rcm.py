"""rCM: sCM plus a score gradient on the network's own one-step samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.objectives import dmd_gradient, rcm, scm
from fastdistill.paths import TrigFlow
from tests.objectives.cases import ROWS, WIDTH, SmallNet, assert_same_gradient, exact_net, gaussian_law, random_batch


def test_it_is_the_weighted_sum_of_both_terms() -> None:
    """The second's gradient by the samples is delta; its samples start from the path's noise."""
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
    """With DMD's gradient of exact velocities: fake is the samples' own law, here the data's."""
    law, (_, x1, times) = gaussian_law(TrigFlow(1.0)), random_batch()
    net, tau = exact_net(law), times["t"]
    options: dict[str, Any] = {"teacher": net, "path": law.path}

    def score(samples: Tensor, y: Tensor | None) -> Tensor:
        return dmd_gradient(samples, x1, tau, fake=net, **options)

    loss, metrics = rcm(net, x1, x1, tau, score_gradient=score, **options)
    assert loss < 1e-20
    assert metrics["score_loss"] < 1e-20
