"""Attention over all keys from attention over parts of them: the step of ring attention and of split keys.

lse = log Σ exp lse_i    w_i = exp(lse_i - lse)    o = Σ w_i o_i    mu = Σ w_i mu_i
t_o = Σ w_i [t_o_i + (mu_i - mu) o_i]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.ops.protocol import checks


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention of the same queries over disjoint parts of the keys.

    Args:
        outs: the output over each part, (..., N, Dv), of one dtype.
        lses: the log-sum-exp over each part, (..., N), as `scaled_dot_product_attention(..., return_lse=True)` gives
            it; -inf where a query sees none of the part's keys.

    Returns:
        (out, lse) over all keys, in the dtypes given; differentiable in either mode.

    Equivalent to:
        scaled_dot_product_attention(q, torch.cat(k_parts, -2), torch.cat(v_parts, -2), return_lse=True)
    """
    _check([("outs", outs), ("lses", lses)])
    weights, lse = _weights(lses)
    return _weighted(weights, outs).to(outs[0].dtype), lse


def merge_attention_jvp(
    outs: Sequence[Tensor], t_outs: Sequence[Tensor], lses: Sequence[Tensor], t_lses: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge attention and its tangent over disjoint parts of the keys: (out, t_out, lse, t_lse).

    Arguments are lists over the parts of what `attention_jvp(..., return_lse=True)` returns.

    Equivalent to:
        attention_jvp(q, torch.cat(k_parts, -2), torch.cat(v_parts, -2), ..., return_lse=True)
    """
    _check([("outs", outs), ("t_outs", t_outs), ("lses", lses), ("t_lses", t_lses)])
    weights, lse = _weights(lses)
    mu = sum((w * t for w, t in zip(weights[1:], t_lses[1:])), weights[0] * t_lses[0])
    moved = [t_o + (t - mu).unsqueeze(-1) * o for o, t_o, t in zip(outs, t_outs, t_lses)]
    return _weighted(weights, outs).to(outs[0].dtype), _weighted(weights, moved).to(t_outs[0].dtype), lse, mu


def _weights(lses: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return each part's share of the softmax, and the log-sum-exp over all; shares are zero where no key is seen."""
    dead = [x == float("-inf") for x in lses]
    top = torch.stack([x.detach() for x in lses]).amax(0)
    top = top.masked_fill(top == float("-inf"), 0.0)
    # A dead part must not meet exp' at -inf: its derivative, 0 times infinity, would be NaN.
    parts = [torch.exp(x.masked_fill(d, 0.0) - top.masked_fill(d, 0.0)).masked_fill(d, 0.0) for x, d in zip(lses, dead)]
    total = sum(parts[1:], parts[0])
    nothing = total == 0
    lse = (top + total.masked_fill(nothing, 1.0).log()).masked_fill(nothing, float("-inf"))
    return [x / total.masked_fill(nothing, 1.0) for x in parts], lse


def _weighted(weights: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    terms = [w.unsqueeze(-1) * x for w, x in zip(weights, parts)]
    return sum(terms[1:], terms[0])


def _check(named: Sequence[tuple[str, Sequence[Tensor]]]) -> None:
    (_, outs), count = named[0], len(named[0][1])
    if not count:
        raise ValueError("outs: expected at least one part, got none")
    checks.check_tensor("outs[0]", outs[0])
    for name, parts in named:
        if len(parts) != count:
            raise ValueError(f"{name}: expected {count} parts as outs, got {len(parts)}")
        shape = outs[0].shape[:-1] if "lse" in name else outs[0].shape
        for i, x in enumerate(parts):
            checks.check_tensor(f"{name}[{i}]", x)
            if x.shape != shape:
                raise ValueError(f"{name}[{i}]: expected shape {tuple(shape)}, got {tuple(x.shape)}")
            if x.dtype != parts[0].dtype:
                raise TypeError(f"{name}[{i}]: expected {parts[0].dtype} as {name}[0], got {x.dtype}")
