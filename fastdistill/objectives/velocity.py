"""The one velocity w that a recipe follows: its target and its tangent direction alike.

Guidance belongs in here and nowhere else: a recipe that guides its target but not its tangent has another solution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdistill.paths import expand_time
from fastdistill.samplers import Net, conditional_pair


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance inside the target.

    From data, with the student u itself, as MeanFlow writes it:
        w = omega v_hat + kappa u(x, t, t, y) + (1 - omega - kappa) u(x, t, t, null)
    whose fixed point is guidance at `scale` = omega / (1 - kappa); a larger kappa at the same scale takes less of the
    noisy v_hat and more of the student's own estimate. From a teacher v, directly:
        w = v(x, t, null) + scale (v(x, t, y) - v(x, t, null))
    Rows with t outside `interval` (closed) are not guided, and rows whose label was dropped (y = null) can't be.

    Args:
        omega, kappa: MeanFlow's letters; omega > 0 and 0 <= kappa < 1.
        null: the label that stands for "no label", i.e. the number of classes.
        interval: the times [t_a, t_b] that are guided.

    Source: Geng et al. 2025 (MeanFlow), arXiv:2505.13447, section 4.2 and the appendix on improved CFG; the interval:
    Kynkäänniemi et al. 2024, arXiv:2404.07724.
    """

    omega: float
    null: int
    kappa: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not self.omega > 0:
            raise ValueError(f"omega: expected > 0, got {self.omega}")
        if not 0 <= self.kappa < 1:
            raise ValueError(f"kappa: expected in [0, 1), got {self.kappa}")
        if not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(f"interval: expected 0 <= t_a <= t_b <= 1, got {self.interval}")
        if self.null < 0:
            raise ValueError(f"null: expected the number of classes, got {self.null}")

    @property
    def scale(self) -> float:
        """The effective guidance scale, omega / (1 - kappa); 1 is no guidance."""
        return self.omega / (1 - self.kappa)


@torch.no_grad()
def target_velocity(
    net: Net,
    x: Tensor,
    v_hat: Tensor,
    t: Tensor,
    *,
    y: Tensor | None = None,
    teacher: Net | None = None,
    guidance: Guidance | None = None,
) -> Tensor:
    """The velocity w at (x, t), shape and dtype of x, without gradient.

    Args:
        net: the student; evaluated only for guidance from data.
        x, v_hat: (B, ...), the state and its conditional velocity, which stands for the marginal one without a teacher.
        t, y: (B,).
        teacher: a network whose instantaneous velocity replaces v_hat.
    """
    if guidance is None:
        return v_hat if teacher is None else teacher(x, t=t, s=t, y=y).to(x.dtype)
    if y is None:
        raise ValueError("y: expected labels for guidance, got None")
    source = net if teacher is None else teacher
    v_label, v_null = (v.to(x.dtype) for v in conditional_pair(source, x, t, y, guidance.null))
    if teacher is None:
        plain = v_hat
        w = guidance.omega * v_hat + guidance.kappa * v_label + (1 - guidance.omega - guidance.kappa) * v_null
    else:
        plain = v_label
        w = v_null + guidance.scale * (v_label - v_null)
    low, high = guidance.interval
    guided = (t >= low) & (t <= high) & (y != guidance.null)
    return torch.where(expand_time(guided, x), w, plain)
