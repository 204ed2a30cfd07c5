"""Answer what users ask when a run looks wrong: where the error is, whether terms agree, and what broke first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.objectives.settings import Batch, MethodSettings

SHOWN_ROWS = 5


def measure(
    rows: Mapping[str, Tensor] | None, terms: Mapping[str, Tensor], net: nn.Module, bins: int, gradients: bool
) -> dict[str, Tensor]:
    """Return the diagnostics of one step, as scalars by name.

    Args:
        rows: per-row detached tensors, (B,) each: `t`, `s`, `raw_error` and perhaps `tangent_norm`; None: no bins.
        terms: the parts of a composed loss, scalars with their graph.
        net: whose parameters the gradients are taken by.
        bins: of either time.
        gradients: whether to take them. The graph stays, so that the step goes on as if nothing had been asked.
    """
    found = bin_by_times(rows, bins) if rows is not None else {}
    if gradients and len(terms) > 1:
        found |= gradient_cosines(terms, net)
    return found


def bin_by_times(rows: Mapping[str, Tensor], bins: int) -> dict[str, Tensor]:
    """Return the mean of each quantity over the rows in each bin of (t, s), e.g. `raw_error/t.50-.75/s.00-.25`."""
    t, s = (rows[name].float().cpu() for name in ("t", "s"))
    cell = _bin_of(t, bins) * bins + _bin_of(s, bins)
    count = torch.bincount(cell, minlength=bins**2)
    found = {}
    for quantity, values in rows.items():
        if quantity in ("t", "s"):
            continue
        total = torch.zeros(bins**2).index_add_(0, cell, values.float().cpu())
        for place in count.nonzero().flatten().tolist():
            found[f"{quantity}/{bin_name(place, bins)}"] = total[place] / count[place]
    return found


def bin_name(place: int, bins: int) -> str:
    """Name a bin by its number, such as `t.50-.75/s.00-.25`."""

    def span(index: int) -> str:
        low, high = (f"{edge / bins:.2f}".removeprefix("0") for edge in (index, index + 1))
        return f"{low}-{high}"

    return f"t{span(place // bins)}/s{span(place % bins)}"


def gradient_cosines(terms: Mapping[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Return the cosine between the gradients of each two terms, and each gradient's norm.

    Near 1 the terms agree, near 0 they have nothing to do with each other, below 0 they fight: then weigh one less.
    """
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    gradients = {}
    for name, term in terms.items():
        parts = torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(weight) if part is None else part for weight, part in zip(weights, parts)]
        gradients[name] = torch.cat([part.flatten().float() for part in flat])
    found = {f"gradient_norm/{name}": gradient.norm() for name, gradient in gradients.items()}
    names = list(gradients)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            cosine = torch.cosine_similarity(gradients[first], gradients[second], dim=0)
            found[f"gradient_cosine/{first}/{second}"] = cosine
    return found


def attribute(
    batch: Batch,
    metrics: Mapping[str, Tensor],
    rows: Mapping[str, Tensor] | None,
    terms: Mapping[str, Tensor],
    net: nn.Module,
    bins: int,
) -> str:
    """Say where a step first stopped being finite: inputs, terms, rows with their times, parameters.

    Args:
        batch: of the step; metrics, rows, terms: of its loss. Gradients are those that `net` holds, not yet clipped.
    """
    found = []
    for name, value in (("x0", batch.x0), ("x1", batch.x1)):
        if broken := _broken_rows(value.flatten(1).isfinite().all(1)):
            found.append(f"the batch's {name} isn't finite in {broken}")
    broken_terms = [name for name, value in (terms or metrics).items() if name != "loss" and not _finite(value)]
    if broken_terms:
        found.append(f"not finite: {', '.join(broken_terms)}")
    if rows is not None:
        for quantity, values in rows.items():
            good = values.isfinite()
            if not bool(good.all()):
                found.append(f"{quantity} isn't finite in {_broken_rows(good)}, {_times_of(rows, ~good, bins)}")
    for what, tensors in (("weight", _weights(net)), ("gradient", _gradients(net))):
        broken_names = [name for name, value in tensors if not _finite(value)]
        if broken_names:
            found.append(f"first {what} that isn't finite: {broken_names[0]} ({len(broken_names)} in all)")
    return "; ".join(found) if found else "each part is finite by itself: the sum overflowed"


def why_flat(method: MethodSettings) -> str | None:
    """Say why this method's loss tells little, for whoever watches it; None where it tells enough."""
    if method.learned_weight:
        return (
            "the loss is weighted by a learned variance, exp(-w) e + w: it falls below zero, and says how well the "
            "error is foreseen. Watch raw_error."
        )
    return method.why_flat()


def why_no_cosines(method: MethodSettings, terms: Mapping[str, Tensor]) -> str | None:
    """Say why no cosine of gradients is written, for whoever asked for one; None where there is one."""
    if len(terms) > 1:
        return None
    return (
        f"diagnostics.gradients: the loss of {method.name} is a single term here, so there are no two gradients to "
        "compare; the norm of its own is grad_norm."
    )


def _bin_of(t: Tensor, bins: int) -> Tensor:
    return (t.nan_to_num(0.0) * bins).long().clamp(0, bins - 1)


def _finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def _weights(net: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return net.named_parameters()


def _gradients(net: nn.Module) -> Iterable[tuple[str, Any]]:
    return [(name, weight.grad) for name, weight in net.named_parameters() if weight.grad is not None]


def _broken_rows(good: Tensor) -> str:
    """Name the broken rows, `rows 3, 7 (2 of 128)`, or nothing where all are good."""
    broken = (~good).nonzero().flatten().tolist()
    if not broken:
        return ""
    shown = ", ".join(map(str, broken[:SHOWN_ROWS])) + ", ..." * (len(broken) > SHOWN_ROWS)
    return f"row{'s' * (len(broken) > 1)} {shown} ({len(broken)} of {len(good)})"


def _times_of(rows: Mapping[str, Tensor], broken: Tensor, bins: int) -> str:
    """Name the bins of (t, s) in which the broken rows lie."""
    t, s = (rows[name].float().cpu()[broken.cpu()] for name in ("t", "s"))
    places = (_bin_of(t, bins) * bins + _bin_of(s, bins)).unique().tolist()
    named = ", ".join(bin_name(place, bins) for place in places[:SHOWN_ROWS])
    return f"at times in {named}" + ", ..." * (len(places) > SHOWN_ROWS)
