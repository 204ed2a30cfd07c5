"""Train what stands beside a generator of DMD: the network of its samples' own score, and a discriminator.

Both learn from samples without gradient, several times for each step of the generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import softplus

from fastdistill.objectives.flow_matching import flow_matching
from fastdistill.paths import LINEAR, Path
from fastdistill.samplers import Net

Discriminator = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # discriminator(x_tau, tau, y) -> logits (B,)


def fake_score_loss(
    fake: Net, samples: Tensor, noise: Tensor, tau: Tensor, *, y: Tensor | None = None, path: Path = LINEAR
) -> tuple[Tensor, dict[str, Any]]:
    """Return the denoising loss of the fake-score network: flow matching on the generator's samples, detached.

    Equivalent to:
        flow_matching(fake, samples.detach(), noise, tau, y=y, path=path)

    Args:
        samples, noise: (B, ...). tau: (B,), of the law that the generator's loss takes.

    Source: Yin et al. 2024 (DMD), arXiv:2311.18828, equation 6, here of the velocity.
    """
    return flow_matching(fake, samples.detach(), noise, tau, y=y, path=path)


def gan_critic_loss(
    gan: Discriminator,
    x0: Tensor,
    samples: Tensor,
    noise: Tensor,
    tau: Tensor,
    *,
    y: Tensor | None = None,
    path: Path = LINEAR,
) -> Tensor:
    """Return the discriminator's loss softplus(D(samples)) + softplus(-D(x0)), both noised alike to tau; a scalar.

    Args:
        x0, samples, noise: (B, ...); no gradient reaches the samples. tau: (B,).

    Source: Goodfellow et al. 2014, arXiv:1406.2661, its value function; noised: DMD2, arXiv:2405.14867, section 4.3.
    """
    false = _logits(gan, path.interpolate(samples.detach(), noise, tau), tau, y)
    true = _logits(gan, path.interpolate(x0, noise, tau), tau, y)
    return (softplus(false) + softplus(-true)).mean()


def gan_generator_loss(
    gan: Discriminator, samples: Tensor, noise: Tensor, tau: Tensor, *, y: Tensor | None = None, path: Path = LINEAR
) -> Tensor:
    """Return the generator's loss softplus(-D(samples)), samples noised to tau; a scalar with gradient by them.

    Source: Goodfellow et al. 2014, arXiv:1406.2661, section 3 (the non-saturating form).
    """
    return softplus(-_logits(gan, path.interpolate(samples, noise, tau), tau, y)).mean()


def _logits(gan: Discriminator, x: Tensor, tau: Tensor, y: Tensor | None) -> Tensor:
    logits = gan(x, tau, y)
    if logits.shape != x.shape[:1]:
        raise ValueError(f"gan: expected logits of shape ({len(x)},), one a row, got {tuple(logits.shape)}")
    return logits
