"""Train rCM: continuous consistency with a score term on the network's own samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from fastdistill.jvp import jvp as fused_jvp
from fastdistill.objectives.checks import check_present
from fastdistill.objectives.continuous import ContinuousConsistency, Tangent, regress
from fastdistill.objectives.dmd import dmd_gradient
from fastdistill.objectives.identities import Jvp, flow_map
from fastdistill.objectives.metric import Weighting, squared
from fastdistill.objectives.objective import FROM_DATA, Objective, of_normalised
from fastdistill.objectives.rows import Metrics
from fastdistill.objectives.scores import CriticSettings, ScoreMethod
from fastdistill.objectives.settings import ArctanTimes, Context, FakeLevels, Levels, Run, SameLevels, ShiftedLevels
from fastdistill.objectives.velocity import Autoguidance, Guidance, scale_rows
from fastdistill.paths import LINEAR, Path
from fastdistill.samplers import Learnt, Net
from fastdistill.settings import Bounds, ConfigError, settings

ScoreGradient = Tensor | Callable[[Tensor, Tensor | None], Tensor]


def rcm(
    net: Net,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    *,
    y: Tensor | None = None,
    path: Path = LINEAR,
    teacher: Net | None = None,
    weak_teacher: Net | None = None,
    guidance: Guidance | Autoguidance | None = None,
    weighting: Weighting | None = None,
    warmup: float = 1.0,
    parameterization: str = "velocity",
    c: float | None = 0.1,
    score_gradient: ScoreGradient | None = None,
    score_weight: float = 0.02,
    jvp: Jvp = fused_jvp,
) -> tuple[Tensor, Metrics]:
    """Return ||F - [F + g / (||g|| + c)]||^2 + score_weight ||G - [G - delta]||^2 / 2 at G = f(beta(1) x1, 1, 0).

    The first term is that of `scm` but for its warm-up, see `warm_up`. In the second, of one-step samples G, delta is a
    direction that raises the divergence from the data's law, such as DMD's difference of the fake and the real
    prediction: consistency covers all modes, the score term sharpens them. Both are averaged over elements and rows.

    Args:
        score_gradient: needed: delta of the shape of x1, or score_gradient(G, y) -> delta, called without gradient.
        score_weight: of the second term. The authors' weights, 100 and 1 of sums of squares without a half, are 0.02.
            0 leaves the term out, and makes no samples.
        weighting: a learned log-variance of the first term; the authors have none. At its optimum it divides that
            term by its own error, so that the second one is left with next to no share of the gradient.
        The other arguments are those of `scm`.

    Returns:
        The loss and the metrics of `scm`; with a score_weight also `score_loss`, the second term unweighted, and
        "terms", the loss's two parts with their graph.

    Raises:
        ValueError: no score_gradient, or one of another shape; a negative score_weight; and as `scm`.

    Equivalent to: at warmup 1 scm(...) + score_weight dmd(...), which own their networks.
    Source: Zheng et al. 2025 (rCM), arXiv:2510.08431, equations 4 and 6 and algorithm 1, which makes its samples in a
        random number of the student's own steps; weights and warm-up are those of the authors' code.
    """
    check_present("score_gradient", score_gradient, "rcm", "a tensor like x1 or score_gradient(samples, y)")
    if not 0 <= score_weight < float("inf"):
        raise ValueError(f"score_weight: expected a finite number >= 0, got {score_weight}")
    loss, metrics = regress(
        warm_up, net, x0, x1, t, y=y, path=path, teacher=teacher, weak_teacher=weak_teacher, guidance=guidance,
        weighting=weighting, warmup=warmup, parameterization=parameterization, c=c, jvp=jvp,
    )  # fmt: skip
    if score_weight == 0:
        return loss, metrics
    one = torch.ones_like(t)
    samples = flow_map(net, path.prior(x1), one, torch.zeros_like(t), y, scale_rows(guidance))
    with torch.no_grad():
        delta = score_gradient(samples.detach(), y) if callable(score_gradient) else score_gradient
    assert delta is not None
    if delta.shape != x1.shape:
        raise ValueError(f"score_gradient: expected shape {tuple(x1.shape)}, got {tuple(delta.shape)}")
    score_loss = 0.5 * squared(samples - (samples - delta).detach(), "mean").mean()
    terms = {"distillation": loss, "score": score_weight * score_loss}
    loss = loss + terms["score"]
    return loss, metrics | {"loss": loss.detach(), "score_loss": score_loss.detach(), "terms": terms}


def warm_up(tangent: Tangent, warmup: float) -> Tensor:
    """Return g = sqrt(1 - r^2 (1 - k^2)) pull + k (r turn + carried), which at r = 1 is k D_w f / W.

    On the circle it is -cos sqrt(1 - r^2 sin^2) (F - w) - cos sin (r x + dF/dt), where sCM has
    -cos^2 (F - w) - r cos sin (x + dF/dt): the network's own derivative enters whole at every r. On the linear path,
    and with the parameterization "average", where k = 1 and nothing turns, it is the whole derivative at every r.

    Source: the authors' code of rCM, https://github.com/NVlabs/rcm, in the student's step of consistency.
    """
    k, r = tangent.k, warmup
    return (1 - r**2 * (1 - k**2)).sqrt() * tangent.pull + k * (r * tangent.turn + tangent.carried)


@settings
class ConsistentCriticSettings(CriticSettings):
    """Settings of the critic with rCM's defaults: four updates, as of its five steps one is the student's."""

    updates: Annotated[int, Bounds(ge=1)] = 4
    """Its updates in each training step, that is, for each update of the generator."""
    levels: Levels = ShiftedLevels()
    """The law of the noise levels at which the scores are compared. Two numbers: times uniform between them."""
    fake_levels: FakeLevels = SameLevels()
    """The law at which the second network is trained; same: that of `levels`."""


@settings
class RCM(ContinuousConsistency, ScoreMethod):
    """Settings of rCM's training."""

    times: ArctanTimes = ArctanTimes(mean=-0.8, std=1.6)
    """The law of the training times t."""
    tangent_warmup: Annotated[int, Bounds(ge=0)] = 1000
    """Steps of the tangent's warm-up; only after them do scores take part, and does the second network train."""
    learned_weight: bool = False
    """Weigh the times by a learned variance; the authors don't, as next to it the score term has no say."""
    critic: ConsistentCriticSettings = ConsistentCriticSettings()
    """The second network and its training."""
    score_weight: Annotated[float, Bounds(ge=0)] = 0.02
    """Of the score term, by means; the authors' weights, 100 and 1 of sums without a half, are 0.02."""

    learns: ClassVar[tuple[Learnt, ...]] = ("end",)

    @property
    def starts(self) -> int:
        return self.tangent_warmup

    def has_learnt(self, steps: int) -> bool:
        return True  # its continuous consistency knows all times

    def check(self, run: Run) -> None:
        super().check(run)
        if self.generator_times != (1.0,):
            raise ConfigError("method.generator_times: rcm makes its samples in one step, so expected [1]")
        if self.critic.gan:
            raise ConfigError("method.critic.gan: rcm has no discriminator; expected False, or method.name dmd")

    def keywords(self, context: Context) -> dict[str, Any]:
        given = super().keywords(context) | {"score_gradient": partial(self.score_gradient, context)}
        return given | ({"score_weight": 0.0} if context.step < self.starts else {})

    def score_gradient(self, context: Context, samples: Tensor, y: Tensor | None) -> Tensor:
        """Return the direction in which samples (B, ...) leave the data's law, by the teacher's score and their own."""
        assert context.critic is not None and context.teacher is not None
        noise = torch.randn(samples.shape, generator=context.generator).to(samples)
        tau = self.critic.levels.sampler(context.path)(len(samples), context.generator, samples.device)
        guidance = self.guidance.build(context)
        return dmd_gradient(
            samples,
            noise,
            tau,
            teacher=context.teacher,
            fake=context.critic.fake,
            y=y,
            path=context.path,
            guidance=guidance if isinstance(guidance, Guidance) else None,
        )


METHOD = Objective(
    rcm,
    "eulerian",
    ("t",),
    tangent="as scm, another warm-up",
    formula="‖F − [F + ĝ]‖² + λ ½ ‖G − [G − δ]‖², ĝ = g/(‖g‖+c), G = f(x_1, 1, 0), δ = score_gradient(G); linear "
    "path: g = (w − F) − t D_w F; trigonometric: g = −cos √(1 − r² sin²) (F − w) − cos sin (r x + dF/dt)",
    sources=("Zheng et al. 2025, arXiv:2510.08431, section 4.1, algorithm 1; weights and warm-up of its code",),
    reduction="mean over elements, the tangent's norm over their sum; s = 0 in all rows; λ = 0.02 is the authors' "
    "100 and 1 of sums without a half",
    exponent=of_normalised,
    sampler="consistency",
    needs=frozenset({"score_gradient"}),
    paths=FROM_DATA,
    anywhere=("parameterization", "average"),
    summary="rCM: continuous consistency, which covers all modes, and scores of one-step samples, which sharpen them.",
    place=19,
    settings=RCM,
    recipes={
        "ring": {"method": {"tangent_warmup": 500, "times": {"mean": -0.8, "std": 1.6}}, "teacher": "runs/ring-flow"},
        "digits": {
            "method": {"tangent_warmup": 1000, "times": {"mean": -0.8, "std": 1.6}},
            "teacher": "runs/digits-flow",
        },
    },
)
