"""Attention over packed sequences of different lengths, with its tangent, without padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.attention import arguments, centring
from fastdistill.ops.attention.op import UNLIMITED, VARLEN
from fastdistill.ops.protocol import checks, context, dispatch
from fastdistill.ops.protocol.pair import paired


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = UNLIMITED,
    enable_gqa: bool = False,
    align: str = "lower_right",
    return_lse: bool = False,
    centre: bool = False,
    impl: str = "auto",
) -> Any:
    """Apply PyTorch's `varlen_attn`, differentiable in forward mode, on any device and in any dtype.

    Args:
        query: packed sequences, (tokens, H, D).
        key: (tokens of the keys, H, D), or (..., Hkv, D) with `enable_gqa` and H a multiple of Hkv.
        value: (tokens of the keys, H or Hkv, Dv).
        cu_seq_q: int32 or int64, (sequences + 1,): sequence z has the queries cu_seq_q[z] to cu_seq_q[z + 1] - 1.
            Tokens outside all sequences get an output of zero.
        cu_seq_k: the same for keys and values; None is cu_seq_q.
        max_q: length of the longest sequence of queries, or more. A sequence that is longer raises: a ValueError on a
            CPU, a device-side assertion on a GPU, which nobody waits for.
        max_k: the same for keys.
        scale: factor of the logits, 1/sqrt(D) by default.
        window_size: (left, right), -1 is no limit: (-1, 0) is causal. See `scaled_dot_product_attention`.
        align: "lower_right", as in PyTorch's own and in FlashAttention: a sequence's last query meets its last key; or
            "upper_left".
        return_lse: also return the log-sum-exp, whose tangent is the mean tangent of the logits.
        centre: see `scaled_dot_product_attention`; the means are over all tokens that are in a sequence.
        impl: "auto" | "torch" | "triton"; an explicit choice never falls back.

    Returns:
        (tokens, H, Dv) in query's dtype; with `return_lse` a pair of it and (H, tokens) in float32.

    Equivalent to:
        scaled_dot_product_attention of each sequence by itself, results concatenated
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        checks.check_tensor(name, x)
    means = centring.NO_MEANS
    if centre:
        arguments.checked_bounds(cu_seq_q, cu_seq_k, query)
        cu = cu_seq_q if cu_seq_k is None else cu_seq_k
        index = torch.arange(len(key), device=key.device)[:, None, None]
        live = (index >= cu[0]) & (index < cu[-1])
        key, value, means = centring.centred(key, value, tokens=-3, live=live)
    query, key, value = arguments.lowered(query, key, value)
    primals = arguments.checked_packed(query, key, value, cu_seq_q, cu_seq_k, (max_q, max_k), enable_gqa)
    grad = context.may_need_grad(primals)
    attrs = _attrs(query, max_q, max_k, scale, window_size, align, return_lse or centre, grad, impl)
    out, lse = VARLEN(primals, attrs, context.tangent_grad())
    assert out is not None
    if lse is not None:
        out = means.restore(out, lse)
        lse = centring.shifted(lse, lse, means.logits(primals[0], arguments.scale_of(query, scale)))
    return (_tokens(out), lse[0]) if lse is not None and return_lse else _tokens(out)


def varlen_attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    t_q: Tensor | None = None,
    t_k: Tensor | None = None,
    t_v: Tensor | None = None,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = UNLIMITED,
    enable_gqa: bool = False,
    align: str = "lower_right",
    return_lse: bool = False,
    tangent_grad: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Compute attention over packed sequences and its directional derivative; a tangent of None is zero.

    Arguments as in `varlen_attention`, `tangent_grad` as in `attention_jvp`; as there, dtypes stay under autocast.

    Returns:
        (out, t_out), both (tokens, H, Dv); with `return_lse` (out, t_out, lse, t_lse), the latter two (H, tokens).

    Equivalent to:
        attention_jvp of each sequence by itself, results concatenated
    """
    names = ("q", "k", "v")
    primals = arguments.checked_packed(q, k, v, cu_seq_q, cu_seq_k, (max_q, max_k), enable_gqa, names)
    given = checks.checked_tangents([("q", q, t_q), ("k", k, t_k), ("v", v, t_v)], tangent_grad)
    tangents = [None if t is None else t.transpose(0, 1).unsqueeze(0) for t in given]
    grad = context.may_need_grad((*primals, *tangents))
    attrs = _attrs(q, max_q, max_k, scale, window_size, align, return_lse, grad, impl)
    inputs = paired(primals, [*tangents, None, None])
    (out, t_out), (lse, t_lse) = VARLEN.pair(inputs, attrs, tangent_grad)
    results = (_tokens(out), _tokens(t_out))
    return (*results, lse[0], t_lse[0]) if return_lse else results


def _attrs(
    q: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
    window_size: Any,
    align: str,
    with_lse: bool,
    grad: bool,
    impl: str,
) -> tuple[Any, ...]:
    dispatch.check_impl(impl, q.device)
    band = arguments.band(window_size, False, align, square=False)
    return (max_q, max_k, *band, arguments.scale_of(q, scale), with_lse, grad, impl)


def _tokens(x: Tensor) -> Tensor:
    """Return (1, H, tokens, dim) as (tokens, H, dim)."""
    return x[0].transpose(0, 1)
