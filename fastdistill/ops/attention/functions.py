"""Scaled dot-product attention whose primal and tangent run as one kernel.

    S = scale q kᵀ + mask      P = softmax S      o = P v
    T = scale (t_q kᵀ + q t_kᵀ) + t_mask          t_o = P∘(T - mu) v + P t_v,   mu = rowsum(P∘T)

Derivation, backward passes and operation counts: kernels/README.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.attention import arguments, centring
from fastdistill.ops.attention.op import ATTENTION, UNLIMITED, choose, triton_problem, unfit_for_triton
from fastdistill.ops.protocol import checks, context, dispatch
from fastdistill.ops.protocol import torch_functions as F
from fastdistill.ops.protocol.dual_op import Tensors
from fastdistill.ops.protocol.pair import paired


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] = UNLIMITED,
    align: str = "upper_left",
    return_lse: bool = False,
    centre: bool = False,
    impl: str = "auto",
) -> Any:
    """Apply PyTorch's attention, differentiable in forward mode with O(N·D) memory.

    Under `torch.func.jvp`, `torch.autograd.forward_ad` or `fastdistill.jvp`, primal and tangent come from one fused
    pass, and no (N, M) matrix is stored, forward, backward, or in the tangent of a gradient that keeps no graph. (Two
    things do need one: the gradient of a float mask, and other second derivatives.) Without tangents it is PyTorch's
    own op, where that can do what is asked. On a CPU 16-bit calls that may need a gradient are ours too, because
    PyTorch's kernel there loses accuracy with large logits. On a GPU `impl="auto"` without tangents stays PyTorch's
    kernel, whose 16-bit gradients come from a rounded output; `impl="triton"` keeps what rounding took.

    Args:
        query: (..., N, D), at least two dimensions, the third from the end being the heads H; float64, float32,
            bfloat16 or float16.
        key, value: (..., M, D) and (..., M, Dv). Batch dimensions and heads of all three broadcast; with `enable_gqa`
            the heads of key and of value may be any two divisors of H.
        attn_mask: broadcastable to (..., H, N, M): bool (True = attend), or of float32 or query's dtype, added to the
            logits. A query that may attend to no key gets an output and a tangent of zero.
        dropout_p: must be 0.0 where a tangent flows.
        is_causal: query i attends to keys j <= i (see `align`), of those that `attn_mask` leaves.
        scale: factor of the logits, 1/sqrt(D) by default.
        window_size: (left, right): query i attends to keys from i - left to i + right; -1 is no limit. A side of the
            work outside the window is not done. Combines with `attn_mask` and `is_causal`.
        align: where the diagonal of `is_causal` and `window_size` lies if N != M. "upper_left": query 0 meets key 0,
            as in PyTorch. "lower_right": the last query meets the last key, as in FlashAttention.
        return_lse: also return the log-sum-exp of each query's logits, whose tangent is their mean tangent mu. With it
            parts over different keys can be merged: `fastdistill.ops.merge_attention`.
        centre: subtract from key and value, and their tangents, their means over the tokens, in float32, and put them
            back afterwards. Exact in real numbers; in 16 bits it removes the rounding error of a common mode, for a
            pass over key and value each way and another rounding of the output.
        impl: "auto" | "torch" | "triton". An explicit choice never falls back: it runs, or it raises. float32 matrix
            products of "triton" are exact unless `torch.set_float32_matmul_precision` allows TF32.

    Returns:
        (..., H, N, Dv) in query's dtype; with `return_lse` a pair of it and (..., H, N) in float32 (or float64), which
        is -inf where a query attends to no key.

    Raises:
        ValueError, TypeError: an argument that doesn't fit, by its name.
        NotImplementedError: a tangent of a tangent, unless `impl="torch"`.

    Equivalent to:
        F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    """
    means = centring.NO_MEANS
    to = None if centre else arguments.plain_layout(query, key, value, attn_mask, (enable_gqa, is_causal))
    if to is not None:
        q, k, v, mask = query, key, value, None
    else:
        q, k, v, mask, to, means = _prepared(query, key, value, attn_mask, is_causal, enable_gqa, centre)
    band = arguments.band(window_size, is_causal, align, q.shape[-2] == k.shape[-2])
    dispatch.check_impl(impl, q.device)
    primals = (q, k, v, mask)
    if dropout_p != 0.0:
        ours_alone = band not in ((*UNLIMITED, False), (-1, 0, False)) or return_lse or centre or impl != "auto"
        if ours_alone or _is_dual(primals):
            raise ValueError(
                "dropout_p: expected 0.0 under forward AD or with an explicit impl, window_size, align, return_lse or "
                f"centre, got {dropout_p}"
            )
        return _with_dropout(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    factor = arguments.scale_of(q, scale)
    attrs = (*band, factor, return_lse or centre, context.may_need_grad(primals), impl)
    out, lse = ATTENTION(primals, attrs, context.tangent_grad())
    assert out is not None
    if lse is None:
        return to.unfolded(out)
    out = to.unfolded(means.restore(out, lse))
    return (out, to.unfolded(centring.shifted(lse, lse, means.logits(q, factor)))) if return_lse else out


def _prepared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
    centre: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, arguments.Layout, centring.Means]:
    """Check any arguments, and return those of the op, their layout and the means that centring took off."""
    for name, x in zip(arguments.NAMES, (query, key, value)):
        checks.check_tensor(name, x)
    if not centre:  # or else the means are taken first
        query, key, value = arguments.lowered(query, key, value)
    to = arguments.layout(query, key, value, enable_gqa)
    q, k, v, means = to.queries(query), to.keys(key), to.keys(value), centring.NO_MEANS
    if centre:
        k, v, means = centring.centred(k, v)
        q, k, v = arguments.lowered(q, k, v)
    mask = arguments.lowered(q, attn_mask)[1]
    arguments.check_padded(q, k, v, mask, to, is_causal)
    return q, k, v, to.mask(mask), to, means


def _with_dropout(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, **more: Any
) -> Tensor:
    """Call PyTorch's own op, which takes dropout; it takes a mask or is_causal, so both become one mask."""
    if not isinstance(dropout_p, int | float) or not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: expected a probability, from 0 to 1, got {dropout_p!r}")
    if is_causal and mask is not None:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))
        is_causal = False
    query, key, value, mask = arguments.lowered(query, key, value, mask)
    with context.without_autocast(query.device):
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal, **more)


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None = None,
    t_k: Tensor | None = None,
    t_v: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    t_attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window_size: tuple[int, int] = UNLIMITED,
    align: str = "upper_left",
    return_lse: bool = False,
    centre: bool = False,
    tangent_grad: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Compute attention and its directional derivative, with the tangents given beside their primals.

    Arguments as in `scaled_dot_product_attention`; each tangent has its primal's shape, and None stands for zero: its
    loads and matrix products are skipped. With `tangent_grad=False` gradients flow through the primal outputs only; the
    tangents carry no graph and nothing is saved for them. Autocast doesn't reach explicit tangents, so it leaves all
    arguments as they are.

    Returns:
        (out, t_out), both (..., H, N, Dv); with `return_lse` (out, t_out, lse, t_lse), the latter two (..., H, N).

    Equivalent to:
        torch.func.jvp(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, ...), (q, k, v), (t_q, t_k, t_v))
    """
    names = ("q", "k", "v")
    for name, x in zip(names, (q, k, v)):
        checks.check_tensor(name, x)
    to = arguments.layout(q, k, v, enable_gqa, names)
    arguments.check_padded(q, k, v, attn_mask, to, is_causal, names)
    band = arguments.band(window_size, is_causal, align, q.shape[-2] == k.shape[-2])
    named = [("q", q, t_q), ("k", k, t_k), ("v", v, t_v), ("attn_mask", attn_mask, t_attn_mask)]
    t_q, t_k, t_v, t_mask = checks.checked_tangents(named, tangent_grad)
    dispatch.check_impl(impl, q.device)
    q, k, v, mask = to.queries(q), to.keys(k), to.keys(v), to.mask(attn_mask)
    t_q, t_k, t_v, t_mask = to.queries(t_q), to.keys(t_k), to.keys(t_v), to.mask(t_mask)
    means = t_means = centring.NO_MEANS
    if centre:
        (k, v, means), (t_k, t_v, t_means) = centring.centred(k, v), centring.centred(t_k, t_v)
    factor = arguments.scale_of(q, scale)
    primals, tangents = (q, k, v, mask), (t_q, t_k, t_v, t_mask)
    attrs = (*band, factor, return_lse, context.may_need_grad((*primals, *tangents)), impl)
    (out, t_out), (lse, t_lse) = ATTENTION.pair(paired(primals, tangents), attrs, tangent_grad)
    out, t_out = to.unfolded(means.restore(out, lse)), to.unfolded(t_means.restore(t_out, lse))
    if not return_lse:
        return out, t_out
    terms = [t_means.logits(q, factor), None if t_q is None else means.logits(t_q, factor)]
    if not tangent_grad:
        terms = [x if x is None else x.detach() for x in terms]
    t_lse = centring.shifted(t_lse, lse, *terms)
    return out, t_out, to.unfolded(centring.shifted(lse, lse, means.logits(q, factor))), to.unfolded(t_lse)


def _is_dual(tensors: Tensors) -> bool:
    unpack = torch.autograd.forward_ad.unpack_dual
    return any(x is not None and unpack(x).tangent is not None for x in tensors)


def explain(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *, enable_gqa: bool = False, impl: str = "auto"
) -> str:
    """Explain which implementation `scaled_dot_product_attention` takes for these arguments, and why.

    Raises:
        ValueError, TypeError: arguments that the op itself would refuse.
    """
    names = ("q", "k", "v")
    for name, x in zip(names, (q, k, v)):
        checks.check_tensor(name, x)
    to = arguments.layout(q, k, v, enable_gqa, names)
    arguments.check_padded(q, k, v, attn_mask, to, False, names)
    dispatch.check_impl(impl, q.device)
    chosen = choose(q, v, impl)
    if impl == "triton" and (problem := unfit_for_triton(q, v)):
        raise ValueError(f"impl='triton' cannot run: {problem}")
    reason = "asked for by name" if impl != "auto" else triton_problem(q, v) or "the fastest that can run"
    shape = f"B={math.prod(to.lead[:-1])} H={to.heads} N={q.shape[-2]} M={k.shape[-2]} D={q.shape[-1]}"
    plain = "" if impl != "auto" else "; without tangents, torch.nn.functional.scaled_dot_product_attention"
    return f"attention {shape} {q.dtype} on {q.device}: {chosen} ({reason}){plain}"
