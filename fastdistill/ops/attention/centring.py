"""Pre-centring: attention without the common mode of its keys and values, which drops out of the softmax anyway.

Attention of (q, k - k̄, v - v̄) is that of (q, k, v) but for v̄ in the output of every query that sees a key, and
scale q·k̄ in its log-sum-exp, for any k̄ and v̄. With k̄ and v̄ the means over the tokens of a key head, 16-bit keys and
values, and the products of 16-bit operands, lose nothing to a common offset. All of it is linear in k and v, so
tangents are treated alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Means(NamedTuple):
    """Means that were subtracted, (..., Hkv, 1, dim) in float32 or float64; None where nothing was."""

    k: Tensor | None
    v: Tensor | None

    def restore(self, out: Tensor, lse: Tensor) -> Tensor:
        """Put the mean of the values back where a query sees a key: out (..., H, N, Dv), lse (..., H, N)."""
        if self.v is None:
            return out
        live = (lse.detach() > float("-inf")).unsqueeze(-1)
        mean = _per_query_head(self.v, out)
        return torch.where(live, (out + mean).to(out.dtype), out)

    def logits(self, q: Tensor, scale: float) -> Tensor | None:
        """Return what the mean of the keys adds to every logit of a query: (..., H, N)."""
        if self.k is None:
            return None
        mean = _per_query_head(self.k, q)
        return scale * (q.to(mean.dtype) * mean).sum(-1)


NO_MEANS = Means(None, None)


def centred(k: Any, v: Any, tokens: int = -2, live: Tensor | None = None) -> tuple[Any, Any, Means]:
    """Subtract from keys and values (or their tangents) their means over the dimension `tokens`; dtypes stay.

    live: which tokens count, a bool that broadcasts; the others become zero, or what is left without the mean.
    """
    k, k_mean = _centred(k, tokens, live)
    v, v_mean = _centred(v, tokens, live)
    return k, v, Means(k_mean, v_mean)


def _centred(x: Tensor | None, tokens: int, live: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if x is None or x.dim() < 3 or x.shape[tokens] == 0:  # nothing to centre, or for the op itself to refuse
        return x, None
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if live is None:
        mean = wide.mean(tokens, keepdim=True)
    else:
        wide = torch.where(live, wide, 0.0)
        mean = wide.sum(tokens, keepdim=True) / live.sum().clamp(min=1)
    return (wide - mean).to(x.dtype), mean.transpose(tokens, -2)


def _per_query_head(mean: Tensor, like: Tensor) -> Tensor:
    group = like.shape[-3] // mean.shape[-3]
    return mean if group == 1 else mean.repeat_interleave(group, dim=-3)


def shifted(statistic: Tensor, lse: Tensor, *terms: Tensor | None) -> Tensor:
    """Add to a log-sum-exp or its tangent what the means add to a query's logits, where the query sees a key."""
    given = [x for x in terms if x is not None]
    return torch.where(lse.detach() > float("-inf"), sum(given, statistic), statistic) if given else statistic
