"""Split a batch's rows into s != t and s = t, and report what an objective says of each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Metrics = dict[str, Any]  # detached scalars; "rows": detached (B,) tensors; "terms": the loss's parts, with graph
Index = slice | Tensor


def split_rows(t: Tensor, s: Tensor, distinct_rows: int | None) -> tuple[Index, Index]:
    """Return the indices of the rows with s != t and of those with s = t.

    Args:
        distinct_rows: the number of leading rows with s != t, as `fastdistill.times.pair_times` arranges them; the
            others have s = t. None finds them by value, which on a GPU waits for the queue.
    """
    if distinct_rows is None:
        differ = t != s
        return differ.nonzero().squeeze(1), (~differ).nonzero().squeeze(1)
    if not 0 <= distinct_rows <= len(t):
        raise ValueError(f"distinct_rows: expected a number of rows in [0, {len(t)}], got {distinct_rows}")
    return slice(0, distinct_rows), slice(distinct_rows, None)


def pick(rows: Index, *values: Tensor | None) -> tuple[Any, ...]:
    """Return the same rows of each tensor; None stays None."""
    return tuple(None if value is None else value[rows] for value in values)


def mean_square(x: Tensor) -> Tensor:
    """Return the mean square of each row's elements, (B,)."""
    return x.square().flatten(1).mean(1)


def split_terms(errors: Tensor, distinct: int) -> dict[str, Tensor]:
    """Return the two terms whose sum is `errors.mean()`, with their graph: rows with s != t, and their anchor.

    Args:
        errors: (B,), weighted, the `distinct` rows with s != t first.
    """
    return {
        "distillation": errors[:distinct].sum() / len(errors),
        "anchor": errors[distinct:].sum() / len(errors),
    }


def measure(
    loss: Tensor,
    residual: Tensor,
    t: Tensor,
    s: Tensor,
    *,
    tangent: Tensor | None = None,
    distinct: int | None = None,
) -> Metrics:
    """Return the metrics that all objectives share, detached.

    Args:
        residual: (B, ...), before any weight; t and s (B,) in its order.
        tangent: (D, ...), the derivative on the first D <= B rows; None for methods that have none.
        distinct: how many rows have s != t, for methods that split them; None for the others.
    """
    rows = {"t": t.detach(), "s": s.detach(), "raw_error": mean_square(residual.detach())}
    metrics: Metrics = {"loss": loss.detach(), "raw_error": residual.detach().square().mean()}
    if tangent is not None:
        squares = mean_square(tangent.detach().float())
        rows["tangent_norm"] = torch.cat((squares, squares.new_zeros(len(t) - len(squares)))).sqrt()
        metrics["tangent_norm"] = squares.mean().sqrt() if len(squares) else squares.new_zeros(())
    if distinct is not None:
        metrics["distinct_share"] = torch.full((), distinct / len(t), device=t.device)
    return metrics | {"rows": rows}
