"""MeanFlow: regress the average velocity u(x_t, t, s), from data or from a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdistill.jvp import jvp as fused_jvp
from fastdistill.objectives.checks import check_batch
from fastdistill.objectives.metric import adaptive
from fastdistill.objectives.velocity import Guidance, target_velocity
from fastdistill.paths import LINEAR, Path, expand_time
from fastdistill.samplers import Net


def meanflow(
    net: Net,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    s: Tensor,
    *,
    y: Tensor | None = None,
    path: Path = LINEAR,
    teacher: Net | None = None,
    guidance: Guidance | None = None,
    p: float = 1.0,
    c: float = 1e-2,
    distinct_rows: int | None = None,
    jvp: Callable[..., Any] = fused_jvp,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss A(p, c) of u - [w - (t - s) du/dt], averaged over rows, and its metrics.

    du/dt is the derivative along the flow, one jvp of u at (x_t, t, s) along (w, 1, 0); the bracket has no gradient.
    Only rows with s != t go through the jvp: elsewhere the residual is u - w, one plain forward.

    Args:
        net: called as net(x, t=t, s=s, y=y).
        x0, x1: data and noise, (B, ...), alike in shape.
        t, s: (B,) with 0 <= s <= t <= 1; y: (B,) int64 labels, or None.
        teacher: a network whose instantaneous velocity u(x, t, t) gives w; None: w is the conditional velocity.
        guidance: classifier-free guidance inside w; see `Guidance` for both forms.
        p, c: the adaptive weight of `adaptive`, on errors summed over the elements of a row.
        distinct_rows: the number of leading rows with s != t, as `fastdistill.times.pair_times` arranges them; the
            others have s = t. None finds them by value, which on a GPU waits for the queue.
        jvp: jvp(fn, primals, tangents) -> (u, du_dt), with None for a zero tangent.

    Returns:
        The scalar loss, and detached scalars: `loss`, `raw_error` (mean square residual; at p = 1 the loss itself
        stays near 1 by design), `tangent_norm` (root mean square of du/dt on distinct rows), `distinct_share`.

    Raises:
        ValueError: an argument whose shape doesn't fit, guidance without labels, or, on the CPU, times out of order.

    Source: Geng et al. 2025, arXiv:2505.13447, algorithm 1 and section 4.
    """
    check_batch(x0, x1, t, s, y)
    x = path.interpolate(x0, x1, t)
    w = target_velocity(net, x, path.velocity(x0, x1, t), t, y=y, teacher=teacher, guidance=guidance)
    far, near = _split_rows(t, s, distinct_rows)
    t_far, t_near = t[far], t[near]
    parts, tangent_norm = [], torch.zeros((), device=x.device)
    if len(t_far):
        y_far = None if y is None else y[far]
        u, du_dt = jvp(lambda x, t, s: net(x, t=t, s=s, y=y_far), (x[far], t_far, s[far]), (w[far], 1.0, None))
        d = expand_time(t_far - s[far], x)
        parts.append(u - (w[far] - d * du_dt).detach())
        tangent_norm = du_dt.detach().float().square().mean().sqrt()
    if len(t_near):
        u = net(x[near], t=t_near, s=t_near, y=None if y is None else y[near])
        parts.append(u - w[near])
    residual = torch.cat(parts)
    loss = adaptive(residual, p, c).mean()
    return loss, {
        "loss": loss.detach(),
        "raw_error": residual.detach().square().mean(),
        "tangent_norm": tangent_norm,
        "distinct_share": torch.full((), len(t_far) / len(t), device=x.device),
    }


def _split_rows(t: Tensor, s: Tensor, distinct_rows: int | None) -> tuple[slice | Tensor, slice | Tensor]:
    """Indices of the rows with s != t and of those with s = t."""
    if distinct_rows is None:
        differ = t != s
        return differ.nonzero().squeeze(1), (~differ).nonzero().squeeze(1)
    if not 0 <= distinct_rows <= len(t):
        raise ValueError(f"distinct_rows: expected a number of rows in [0, {len(t)}], got {distinct_rows}")
    return slice(0, distinct_rows), slice(distinct_rows, None)
