"""Compute the one velocity w that a recipe follows: its target and its tangent direction alike.

Guidance belongs in here and nowhere else: a recipe that guides its target but not its tangent has another solution.
The velocity comes from data (v_hat stands for its mean), from a teacher, or from the student's own diagonal u(x, t, t).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdistill.objectives.identities import evaluate
from fastdistill.paths import expand_time
from fastdistill.samplers import Net

Number = float | Tensor  # a number for all rows, or (B,), one a row


@dataclass(frozen=True, eq=False)
class Guidance:
    """Classifier-free guidance inside the target.

    From data, with the student u itself, as MeanFlow writes it:
        w = omega v_hat + kappa u(x, t, t, y) + (1 - omega - kappa) u(x, t, t, null)
    whose fixed point is guidance at `scale` = omega / (1 - kappa); a larger kappa at the same scale takes less of the
    noisy v_hat and more of the student's own estimate. From a teacher v, directly:
        w = v(x, t, null) + scale (v(x, t, y) - v(x, t, null))
    Rows with t outside `interval` (closed) are not guided, and rows whose label was dropped (y = null) can't be.

    Args:
        omega, kappa: MeanFlow's letters; omega > 0 and 0 <= kappa < 1. As (B,) tensors the rows have scales of their
            own: the student is then called with g = scale (B,), which it has to embed, and without a label with g = 1.
        null: the label that stands for "no label", i.e. the number of classes.
        interval: the times [t_a, t_b] that are guided.

    Source: Geng et al. 2025 (MeanFlow), arXiv:2505.13447, section 4.2 and the appendix on improved CFG; the interval:
    Kynkäänniemi et al. 2024, arXiv:2404.07724.
    """

    omega: Number
    null: int
    kappa: Number = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not _all(self.omega, lambda value: value > 0):
            raise ValueError(f"omega: expected > 0, got {self.omega}")
        if not _all(self.kappa, lambda value: (value >= 0) & (value < 1)):
            raise ValueError(f"kappa: expected in [0, 1), got {self.kappa}")
        _check_interval(self.interval)
        if self.null < 0:
            raise ValueError(f"null: expected the number of classes, got {self.null}")

    @property
    def scale(self) -> Number:
        """Return the effective guidance scale, omega / (1 - kappa); 1 is no guidance."""
        return self.omega / (1 - self.kappa)

    @classmethod
    def improved(cls, scale: Number, null: int, interval: tuple[float, float] = (0.0, 1.0)) -> Guidance:
        """Guide at `scale` >= 1 as improved MeanFlow writes it: w = v_hat + (1 - 1/scale) (u(y) - u(null)).

        Equivalent to: Guidance(omega=1, kappa=1 - 1/scale, ...).
        Source: Geng et al. 2025 (improved MeanFlow), arXiv:2512.02012, section 4.2.
        """
        if not _all(scale, lambda value: value >= 1):
            raise ValueError(f"scale: expected >= 1, got {scale}")
        return cls(omega=1.0 + 0.0 * scale, null=null, kappa=1 - 1 / scale, interval=interval)


@dataclass(frozen=True, eq=False)
class Autoguidance:
    """Guidance of a teacher by a weaker one: w = v_weak + scale (v - v_weak), with or without labels.

    Args:
        scale: the lambda of AYF, >= 0; 1 is no guidance. As a (B,) tensor the rows have scales of their own: the
            student is then called with g = scale (B,), which it has to embed.
        interval: the times [t_a, t_b] that are guided.

    Source: Karras et al. 2024, arXiv:2406.02507; Sabour et al. 2025 (AYF), arXiv:2506.14603, section 3.3.
    """

    scale: Number
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not _all(self.scale, lambda value: value >= 0):
            raise ValueError(f"scale: expected >= 0, got {self.scale}")
        _check_interval(self.interval)


def scale_rows(guidance: Guidance | Autoguidance | None) -> Tensor | None:
    """Return the (B,) scales that the student has to be told as `g`; None where all rows have one scale."""
    scale = None if guidance is None else guidance.scale
    return scale if isinstance(scale, Tensor) and scale.ndim else None


@torch.no_grad()
def target_velocity(
    net: Net,
    x: Tensor,
    v_hat: Tensor | None,
    t: Tensor,
    *,
    y: Tensor | None = None,
    teacher: Net | None = None,
    weak_teacher: Net | None = None,
    guidance: Guidance | Autoguidance | None = None,
) -> Tensor:
    """Return the velocity w at (x, t), shape and dtype of x, without gradient.

    Args:
        net: the student, or its average; evaluated only for guidance from data.
        x, v_hat: (B, ...), the state and its conditional velocity, which stands for the marginal one without a teacher.
        t, y: (B,).
        teacher: a network whose instantaneous velocity replaces v_hat.
        weak_teacher: what `Autoguidance` guides away from.
    """
    _check_sources(y, v_hat, teacher, weak_teacher, guidance)
    if guidance is None:
        return _state(v_hat, x) if teacher is None else teacher(x, t=t, s=t, y=y).to(x.dtype)
    low, high = guidance.interval
    guided = (t >= low) & (t <= high)
    if isinstance(guidance, Autoguidance):
        assert teacher is not None and weak_teacher is not None
        plain, weak = (v(x, t=t, s=t, y=y).to(x.dtype) for v in (teacher, weak_teacher))
        w = weak + _column(guidance.scale, x) * (plain - weak)
    else:
        assert y is not None
        g = scale_rows(guidance) if teacher is None else None
        v_label, v_null = _pair(net if teacher is None else teacher, x, t, y, guidance.null, g)
        if teacher is None:
            plain, omega, kappa = _state(v_hat, x), _column(guidance.omega, x), _column(guidance.kappa, x)
            w = omega * plain + kappa * v_label + (1 - omega - kappa) * v_null
        else:
            plain = v_label
            w = v_null + _column(guidance.scale, x) * (v_label - v_null)
        guided = guided & (y != guidance.null)
    return torch.where(expand_time(guided, x), w, plain)


@torch.no_grad()
def own_velocity(net: Net, x: Tensor, t: Tensor, *, y: Tensor | None = None, g: Tensor | None = None) -> Tensor:
    """Return the network's own instantaneous velocity u(x, t, t), shape and dtype of x, without gradient."""
    return evaluate(net, x, t, t, y, g).to(x.dtype)


def _check_sources(
    y: Tensor | None,
    v_hat: Tensor | None,
    teacher: Net | None,
    weak_teacher: Net | None,
    guidance: Guidance | Autoguidance | None,
) -> None:
    if isinstance(guidance, Autoguidance):
        if teacher is None or weak_teacher is None:
            missing = "teacher" if teacher is None else "weak_teacher"
            raise ValueError(f"{missing}: expected a network for autoguidance, got None")
    elif weak_teacher is not None:
        raise ValueError("weak_teacher: expected guidance=Autoguidance(...) with it, as nothing else uses it")
    elif guidance is not None and y is None:
        raise ValueError("y: expected labels for guidance, got None")
    if teacher is None and v_hat is None:
        raise ValueError("teacher: expected a network, as this velocity can't come from data, got None")


def _pair(net: Net, x: Tensor, t: Tensor, y: Tensor, null: int, g: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the instantaneous velocities with labels y and with no label, by one call on the doubled batch.

    Without a label there is nothing to guide, so that the network is asked at the scale 1 there.
    """
    x2, t2, y2 = torch.cat((x, x)), torch.cat((t, t)), torch.cat((y, torch.full_like(y, null)))
    g2 = None if g is None else torch.cat((g, torch.ones_like(g)))
    v_label, v_null = evaluate(net, x2, t2, t2, y2, g2).to(x.dtype).chunk(2)
    return v_label, v_null


def _state(v_hat: Tensor | None, x: Tensor) -> Tensor:
    assert v_hat is not None
    return v_hat.to(x.dtype)


def _column(value: Number, x: Tensor) -> Number:
    """Return a number, or (B,) values shaped to broadcast against x."""
    return expand_time(value.to(x), x) if isinstance(value, Tensor) else value


def _all(value: Number, fits: object) -> bool:
    """Return whether a number fits, or all of a tensor's do; tensors are read on the CPU only."""
    assert callable(fits)
    if isinstance(value, Tensor):
        return not value.is_cpu or bool(fits(value).all())
    return bool(fits(value))


def _check_interval(interval: tuple[float, float]) -> None:
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"interval: expected 0 <= t_a <= t_b <= 1, got {interval}")
