"""Flow matching: regress the instantaneous velocity."""

from __future__ import annotations

from torch import Tensor

from fastdistill.objectives.checks import check_batch
from fastdistill.objectives.identities import evaluate
from fastdistill.objectives.metric import Weighting, WeightOfTime, squared, weigh, weight_of_time
from fastdistill.objectives.objective import Objective
from fastdistill.objectives.rows import Metrics, measure
from fastdistill.objectives.settings import Instantaneous
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
    weighting: Weighting | None = None,
    weight: WeightOfTime = None,
) -> tuple[Tensor, Metrics]:
    """Return the loss E w(t) ||u(x_t, t, t) - v_hat||^2, averaged over rows and elements, and its metrics.

    For each t the minimiser is the marginal velocity v = E[v_hat | x_t], so that any w > 0 keeps the optimum of a
    network of unlimited capacity; w only spends capacity and gradient variance across noise levels.

    Args:
        net: called as net(x, t=t, s=t, y=y).
        x0, x1: data and noise, (B, ...), alike in shape.
        t: (B,) in [0, 1]; y: (B,) int64 labels, or None.
        weighting: a learned log-variance, see `metric.weigh`.
        weight: w(t): a name of `metric.WEIGHTS`, which explains them, or a function of t, elementwise; None is 1.

    Returns:
        The scalar loss, and detached: `loss`, `raw_error` (mean square, unweighted), "rows".

    Raises:
        ValueError: an argument whose shape doesn't fit, an unknown weight, or, on the CPU, a time outside [0, 1].

    Equivalent to: meanflow with s = t in all rows and p = 0, but averaged over elements.
    Source: Lipman et al. 2023, arXiv:2210.02747, theorem 2 (conditional flow matching).
    """
    check_batch(x0, x1, t, y=y)
    residual = evaluate(net, path.interpolate(x0, x1, t), t, t, y) - path.velocity(x0, x1, t)
    error, w = squared(residual, "mean"), weight_of_time(weight, path, t)
    loss = weigh(error if w is None else w * error, weighting, t, t).mean()
    return loss, measure(loss, residual, t, t)


METHOD = Objective(
    flow_matching,
    "fm",
    ("t",),
    tangent="none",
    formula="w(t) ‖u(x_t, t, t) − v̂‖²",
    sources=("Lipman et al. 2023, arXiv:2210.02747, theorem 2",),
    reduction="mean over elements; s = t in all rows",
    sampler="euler",
    summary="Flow matching: the network learns the instantaneous velocity, and sampling integrates it.",
    place=1,
    settings=Instantaneous,
    recipes={
        "ring": {"method": {"times": {"law": "uniform"}}},
        "digits": {"method": {"times": {"law": "logit_normal", "mean": -0.4, "std": 1.0}}},
    },
)
