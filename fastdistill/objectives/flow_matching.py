"""Flow matching: regress the instantaneous velocity."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastdistill.objectives.checks import check_batch
from fastdistill.paths import LINEAR, Path
from fastdistill.samplers import Net


def flow_matching(
    net: Net,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    *,
    y: Tensor | None = None,
    path: Path = LINEAR,
    weight: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss E w(t) ||u(x_t, t, t) - v_hat||^2, averaged over rows and elements, and its metrics.

    For each t the minimiser is the marginal velocity v = E[v_hat | x_t], so that any w > 0 keeps the optimum of a
    network of unlimited capacity; w only spends capacity and gradient variance across noise levels.

    Args:
        net: called as net(x, t=t, s=t, y=y).
        x0, x1: data and noise, (B, ...), alike in shape.
        t: (B,) in [0, 1]; y: (B,) int64 labels, or None.
        weight: w(t), elementwise; None is 1.

    Returns:
        The scalar loss, and detached scalars: `loss`, `raw_error` (mean square, unweighted).

    Raises:
        ValueError: an argument whose shape doesn't fit, or, on the CPU, a time outside [0, 1].

    Source: Lipman et al. 2023, arXiv:2210.02747, theorem 2 (conditional flow matching).
    """
    check_batch(x0, x1, t, y=y)
    u = net(path.interpolate(x0, x1, t), t=t, s=t, y=y)
    error = (u - path.velocity(x0, x1, t)).square().flatten(1).mean(1)
    loss = error.mean() if weight is None else (weight(t) * error).mean()
    return loss, {"loss": loss.detach(), "raw_error": error.detach().mean()}
