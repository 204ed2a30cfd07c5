"""Distribution matching distillation: move samples by the difference of two scores, the teacher's and their own.

The samples' own score comes from a second network, `fake`, which has an optimizer of its own and is trained beside the
generator: see `fastdistill.objectives.critic`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.objectives.checks import check_batch
from fastdistill.objectives.critic import Discriminator, gan_generator_loss
from fastdistill.objectives.objective import INDEPENDENT, Objective
from fastdistill.objectives.scores import ScoreMethod, generator_input, simulate
from fastdistill.objectives.settings import Context, GuidanceSettings
from fastdistill.objectives.velocity import Guidance, target_velocity
from fastdistill.paths import LINEAR, Path, convert, expand_time
from fastdistill.samplers import Net
from fastdistill.settings import settings
from fastdistill.times import KarrasLevel, TimeSampler


def dmd(
    net: Net,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    *,
    teacher: Net,
    fake: Net,
    y: Tensor | None = None,
    path: Path = LINEAR,
    guidance: Guidance | None = None,
    levels: TimeSampler | None = None,
    gan: Discriminator | None = None,
    gan_weight: float = 3e-3,
    backward_simulation: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Return (1/2) ||G - [G - delta]||^2 on samples G = f(x_t, t, 0), whose gradient by G is delta, and its metrics.

    delta is that of `dmd_gradient`. DMD2 is this with `gan` and, for several steps, `backward_simulation`.

    Args:
        net: the generator, called as net(x, t=t, s=0, y=y); 1 step: t = 1 in all rows.
        x0, x1: data and noise, (B, ...), alike in shape. x0 matters only where t < 1 without backward simulation: at
            t = 1 the generator starts from `path.prior(x1)`, as samplers do, on every path.
        t: (B,), the times at which the generator starts.
        teacher, fake: networks of instantaneous velocities; no gradient reaches them.
        y: (B,) int64 labels, or None.
        guidance: classifier-free guidance of the teacher.
        levels: law of tau, the time at which the scores are compared; None is KarrasLevel(path), DMD2's.
        gan: a discriminator of states at tau; its loss is added, times `gan_weight`. Train it by `gan_critic_loss`.
        backward_simulation: the generator's own falling times, 1 first and 0 left out. Its inputs at t are then what
            it makes itself on the way from noise, without gradient, as in sampling.
        generator: of all noise; None is the global one.

    Returns:
        The scalar loss, averaged over rows and elements, and detached scalars: `loss`, `raw_error` (mean square of
        both data predictions' difference: 0 where the laws agree), with `gan` also `gan_loss`, and "terms", the loss's
        two parts with their graph. The value of the loss says little: it has no minimum at a match of single samples.

    Raises:
        ValueError: an argument whose shape doesn't fit, a network that is None, a path with coupled pairs, or t off the
            generator's times.

    Source: Yin et al. 2024 (DMD), arXiv:2311.18828, equations 7 and 8; DMD2, arXiv:2405.14867, sections 4.2 to 4.5.
    """
    check_batch(x0, x1, t, y=y)
    if backward_simulation is None:
        x = generator_input(path, x0, x1, t)
    else:
        x = simulate(net, x1, t, backward_simulation, y=y, path=path, generator=generator)
    samples = x - expand_time(t, x) * net(x, t=t, s=torch.zeros_like(t), y=y)
    tau = (levels or KarrasLevel(path))(len(x), generator, x.device).to(t.dtype)
    noise = _noise(x1, generator)
    delta, difference = _gradient(samples, noise, tau, teacher, fake, y, path, guidance)
    loss = surrogate(samples, delta)
    raw = difference.square()
    metrics: dict[str, Any] = {"raw_error": raw.mean()}
    if gan is not None:
        adversarial = gan_generator_loss(gan, samples, noise, tau, y=y, path=path)
        metrics["gan_loss"] = adversarial.detach()
        metrics["terms"] = {"score": loss, "gan": gan_weight * adversarial}
        loss = loss + metrics["terms"]["gan"]
    rows = {"t": t.detach(), "s": torch.zeros_like(t), "raw_error": raw.flatten(1).mean(1)}
    return loss, {"loss": loss.detach(), **metrics, "rows": rows}


def dmd_gradient(
    samples: Tensor,
    noise: Tensor,
    tau: Tensor,
    *,
    teacher: Net,
    fake: Net,
    y: Tensor | None = None,
    path: Path = LINEAR,
    guidance: Guidance | None = None,
) -> Tensor:
    """Return delta = (x0_fake - x0_teacher) / mean |G - x0_teacher| on samples G, detached, of their shape.

    Both are data predictions at x_tau, G noised to tau; the mean is over the elements of a row. x0_fake - x0_teacher
    is beta^2 / alpha times the difference of the scores of the samples and of the data; on the linear path
    tau (v_teacher - v_fake). Pass it to `surrogate` for a loss with this gradient.

    Args:
        samples, noise: (B, ...), the noise of unit variance. tau: (B,), the times at which the scores are compared.

    Source: Yin et al. 2024 (DMD), arXiv:2311.18828, equations 7 and 8.
    """
    return _gradient(samples, noise, tau, teacher, fake, y, path, guidance)[0]


def surrogate(samples: Tensor, delta: Tensor) -> Tensor:
    """Return (1/2) ||G - [G - delta]||^2, a mean over rows and elements, whose gradient by G is delta / numel."""
    return 0.5 * (samples - (samples - delta).detach()).square().mean()


@torch.no_grad()
@torch.no_grad()
def _gradient(
    samples: Tensor,
    noise: Tensor,
    tau: Tensor,
    teacher: Net,
    fake: Net,
    y: Tensor | None,
    path: Path,
    guidance: Guidance | None,
) -> tuple[Tensor, Tensor]:
    """Return delta, and the difference that it normalises."""
    for name, network in (("teacher", teacher), ("fake", fake)):
        if network is None:
            raise ValueError(f"{name}: expected a network, which matching of scores needs, got None")
    x = path.interpolate(samples, noise, tau)
    v_teacher = target_velocity(teacher, x, x, tau, y=y, teacher=teacher, guidance=guidance)
    v_fake = fake(x, t=tau, s=tau, y=y).to(x.dtype)
    real, own = (convert(path, x, tau, v, "v", "x0") for v in (v_teacher, v_fake))
    scale = (samples - real).abs().flatten(1).mean(1).clamp_min(torch.finfo(x.dtype).tiny ** 0.5)
    return (own - real) / expand_time(scale, x), own - real


def _noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=torch.float32).to(like)


@settings
class DMD(ScoreMethod):
    """Settings of distribution matching's training."""

    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance of the teacher."""

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return (self.draw_starts(context, context.generator),)


METHOD = Objective(
    dmd,
    "score",
    ("t",),
    tangent="none; gradient through the samples alone",
    formula="½ ‖G − [G − δ]‖², G = f(x_t, t, 0), x_1 noise alone, "
    "δ = (x̂0_fake − x̂0_teacher)/mean |G − x̂0_teacher| at x_τ; "
    "DMD2: + λ softplus(−D(x_τ)), x_t from the generator's own steps",
    sources=("Yin et al. 2024, arXiv:2311.18828, equations 7 and 8", "Yin et al. 2024 (DMD2), arXiv:2405.14867"),
    reduction="mean over elements; s = 0 in all rows",
    exponent=None,
    sampler="consistency",
    needs=frozenset({"teacher", "fake"}),
    paths=INDEPENDENT,
    summary="Distribution matching: samples move by the difference of two scores, the teacher's and their own.",
    place=18,
    settings=DMD,
    recipes={
        "ring": {
            "method": {"critic": {"updates": 5, "lr": 0.001}},
            "teacher": "runs/ring-flow",
            "init_from_teacher": True,
            "optim": {"lr": 0.0005},
        },
        "digits": {
            "method": {"critic": {"updates": 5, "lr": 0.0005}},
            "teacher": "runs/digits-flow",
            "init_from_teacher": False,
            "optim": {"lr": 0.0002},
        },
    },
)
