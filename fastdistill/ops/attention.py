"""Scaled dot-product attention whose primal and tangent run as one kernel.

    S = scale q kᵀ + mask      P = softmax S      o = P v
    T = scale (t_q kᵀ + q t_kᵀ) + t_mask          t_o = P∘(T - mu) v + P t_v,   mu = rowsum(P∘T)

Derivation, backward passes and operation counts: kernels/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.ops import _choice, _dense
from fastdistill.ops._dual import DualOp, Spec, Tensors

MAX_TRITON_HEAD_DIM = 256


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
    impl: str = "auto",
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, differentiable in forward mode with O(N·D) memory.

    Under `torch.func.jvp`, `torch.autograd.forward_ad` or `fastdistill.jvp`, primal and tangent come from one fused
    pass, and no (N, M) matrix is stored, forward or backward. (Two things do need one: the gradient of a float mask,
    and second derivatives.) Without tangents it is PyTorch's own op.

    Args:
        query: (..., H, N, D), at least three dimensions, float64, float32, bfloat16 or float16.
        key: (..., H, M, D), its batch dimensions those of query, or (..., Hkv, M, D) with `enable_gqa` and H a multiple
            of Hkv.
        value: (..., H, M, Dv), or (..., Hkv, M, Dv).
        attn_mask: broadcastable to (..., H, N, M): bool (True = attend), or float, added to the logits. A query that
            may attend to no key gets an output and a tangent of zero.
        dropout_p: must be 0.0 where a tangent flows.
        is_causal: query i attends to keys j <= i, aligned top-left, as in PyTorch; excludes `attn_mask`.
        scale: factor of the logits, 1/sqrt(D) by default.
        impl: "auto" | "torch" | "triton". An explicit choice never falls back: its forward runs, or it raises. (The
            backward of "triton" is the torch implementation's, so far.)

    Returns:
        (..., H, N, Dv) in query's dtype.

    Equivalent to:
        F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        _choice.check_tensor(name, x)
    if (dtype := _choice.autocast_dtype(query.device)) is not None:
        query, key, value, attn_mask = (_lowered(x, dtype) for x in (query, key, value, attn_mask))
    lead = query.shape[:-3]
    primals = _checked(query, key, value, attn_mask, is_causal, enable_gqa)
    _choice.check_impl(impl, query.device)
    if dropout_p != 0.0:
        if impl != "auto" or _is_dual(primals):
            raise ValueError(f"dropout_p: expected 0.0 under forward AD or with an explicit impl, got {dropout_p}")
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    attrs = (is_causal, _scale(query, scale), impl)
    out = ATTENTION(primals, attrs, _choice.tangent_grad())
    return out.reshape(*lead, *out.shape[1:])


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
    tangent_grad: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention and its directional derivative, with the tangents given beside their primals.

    Shapes and dtypes as in `scaled_dot_product_attention`; each tangent has its primal's shape, and None stands for
    zero: its loads and matrix products are skipped. With `tangent_grad=False` gradients flow through `out` only;
    `t_out` carries no graph and nothing is saved for it.

    Returns:
        (out, t_out), both (..., H, N, Dv).

    Equivalent to:
        torch.func.jvp(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, ...), (q, k, v), (t_q, t_k, t_v))
    """
    primals = _checked(q, k, v, attn_mask, is_causal, enable_gqa)
    named = [("q", q, t_q), ("k", k, t_k), ("v", v, t_v), ("attn_mask", attn_mask, t_attn_mask)]
    tangents = _choice.checked_tangents(named, tangent_grad)
    _choice.check_impl(impl, q.device)
    lead = q.shape[:-3]
    tangents = [*map(_four_dims, tangents[:3]), _mask_four_dims(tangents[3], q)]
    out, t_out = ATTENTION.pair(primals, tangents, (is_causal, _scale(q, scale), impl), tangent_grad)
    return out.reshape(*lead, *out.shape[1:]), t_out.reshape(*lead, *t_out.shape[1:])


def _checked(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The arguments, refused by name where they don't fit together, folded to four dimensions."""
    for name, x in (("query", q), ("key", k), ("value", v)):
        _choice.check_tensor(name, x)
        if x.dim() < 3 or x.dim() != q.dim():
            raise ValueError(f"{name}: expected (..., H, length, dim) with as many dimensions as query, got {x.shape}")
        if x.shape[:-3] != q.shape[:-3]:
            raise ValueError(f"{name}: expected batch dimensions {tuple(q.shape[:-3])} as query, got {tuple(x.shape)}")
        _choice.check_like(name, x, "query", q)
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"key: expected head dim {q.shape[-1]} as query, got {k.shape[-1]}")
    if v.shape[-3:-1] != k.shape[-3:-1]:
        raise ValueError(
            f"value: expected heads and length {tuple(k.shape[-3:-1])} as key, got {tuple(v.shape[-3:-1])}"
        )
    heads, kv_heads = q.shape[-3], k.shape[-3]
    if not heads or not kv_heads:
        raise ValueError(f"query, key: expected at least one head, got {heads} and {kv_heads}")
    if heads != kv_heads and (not enable_gqa or heads % kv_heads):
        hint = f"a divisor of {heads}" if enable_gqa else f"{heads} as query (or enable_gqa=True)"
        raise ValueError(f"key: expected {hint} heads, got {kv_heads}")
    if attn_mask is not None:
        _check_mask(attn_mask, q, k, is_causal)
    return (*map(_four_dims, (q, k, v)), _mask_four_dims(attn_mask, q))


def _check_mask(mask: Tensor, q: Tensor, k: Tensor, is_causal: bool) -> None:
    if is_causal:
        raise ValueError("attn_mask: expected None with is_causal=True, got a tensor; merge the two masks")
    if mask.dtype != torch.bool and mask.dtype != q.dtype:
        raise TypeError(f"attn_mask: expected torch.bool or {q.dtype} as query, got {mask.dtype}")
    _choice.check_like("attn_mask", mask, "query", q, dtype=False)
    full = (*q.shape[:-1], k.shape[-2])
    try:
        fits = torch.broadcast_shapes(mask.shape, full) == torch.Size(full)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {full}, got {tuple(mask.shape)}")


def _four_dims(x: Tensor | None) -> Any:
    if x is None or x.dim() == 4:
        return x
    return x.unsqueeze(0) if x.dim() == 3 else x.flatten(0, -4)


def _mask_four_dims(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask as (B|1, H|1, N|1, M|1); its batch dimensions are expanded only where several have to be merged."""
    if mask is None:
        return None
    mask = mask.reshape((1,) * max(q.dim() - mask.dim(), 4 - mask.dim(), 0) + tuple(mask.shape))
    if q.dim() <= 4:
        return mask
    lead = mask.shape[:-3]
    return mask.flatten(0, -4) if lead.numel() == 1 else mask.expand(*q.shape[:-3], *mask.shape[-3:]).flatten(0, -4)


def _lowered(x: Any, dtype: torch.dtype) -> Any:
    """What autocast makes of an argument: float64 and masks of bool stay."""
    return x if x is None or not x.is_floating_point() or x.dtype == torch.float64 else x.to(dtype)


def _scale(q: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)


def _is_dual(tensors: Tensors) -> bool:
    unpack = torch.autograd.forward_ad.unpack_dual
    return any(x is not None and unpack(x).tangent is not None for x in tensors)


def explain(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *, enable_gqa: bool = False, impl: str = "auto"
) -> str:
    """Which implementation `scaled_dot_product_attention` takes for these arguments, and why.

    Raises:
        ValueError, TypeError: arguments that the op itself would refuse.
    """
    _checked(q, k, v, attn_mask, False, enable_gqa)
    _choice.check_impl(impl, q.device)
    chosen = choose(q, v, impl)
    reason = "asked for by name" if impl != "auto" else _triton_problem(q, v) or "the fastest that can run"
    shape = f"B={q.shape[:-3].numel()} H={q.shape[-3]} N={q.shape[-2]} M={k.shape[-2]} D={q.shape[-1]}"
    plain = "" if impl != "auto" else "; without tangents, torch.nn.functional.scaled_dot_product_attention"
    return f"attention {shape} {q.dtype} on {q.device}: {chosen} ({reason}){plain}"


def choose(q: Tensor, v: Tensor, impl: str) -> str:
    """The implementation that runs under forward AD: "torch" or "triton"."""
    if impl != "auto":
        return impl
    return "triton" if _triton_problem(q, v) is None else "torch"


def _triton_problem(q: Tensor, v: Tensor) -> str | None:
    if q.device.type != "cuda":
        return f"no triton: tensors are on {q.device.type!r}"
    if q.dtype == torch.float64:
        return "no triton: float64"
    if (widest := max(q.shape[-1], v.shape[-1])) > MAX_TRITON_HEAD_DIM:
        return f"no triton: head dim {widest} > {MAX_TRITON_HEAD_DIM}"
    problem = _choice.triton_problem(q.device)
    return problem and f"no triton: {problem}"


def _expanded(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(*q.shape[:3], k.shape[2])


def _forward(
    primals: Tensors, tangents: Tensors, attrs: Sequence[Any], tangent_grad: bool
) -> tuple[Tensor, Tensor | None, Tensors]:
    q, k, v, mask = primals
    t_q, t_k, t_v, t_mask = tangents
    is_causal, scale, impl = attrs
    assert q is not None and k is not None and v is not None
    o, t_o, *residuals = _choice.implementation("attention", choose(q, v, impl)).attention_forward(
        q, k, v, t_q, t_k, t_v, _expanded(mask, q, k), _expanded(t_mask, q, k),
        is_causal=is_causal, scale=scale, tangent_grad=tangent_grad and any(t is not None for t in tangents),
    )  # fmt: skip
    return o, t_o, residuals


def _backward(
    dout: Tensor,
    dt_out: Tensor | None,
    primals: Tensors,
    tangents: Tensors,
    out: Tensor,
    t_out: Tensor | None,
    residuals: Tensors,
    attrs: Sequence[Any],
    needs: Sequence[bool],
) -> Tensors:
    q, k, v, mask = primals
    assert q is not None and k is not None and v is not None
    is_causal, scale, _ = attrs
    lse, mu, o_acc, t_o_acc = residuals
    grads = list(
        _choice.implementation("attention", "torch").attention_backward(
            dout, dt_out, q, k, v, *tangents[:3], _expanded(mask, q, k), _expanded(tangents[3], q, k),
            out if o_acc is None else o_acc, t_out if t_o_acc is None else t_o_acc, lse, mu,
            is_causal=is_causal, scale=scale, needs=tuple(needs),
        )
    )  # fmt: skip
    for i in (3, 7):
        if mask is not None and grads[i] is not None:
            grads[i] = grads[i].sum_to_size(mask.shape)
    return grads


def _math(primals: Any, tangents: Any, attrs: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    return _dense.attention_dual(primals, tangents, attrs[0], attrs[1])


def _math_backward(
    do: Tensor | None, dt_o: Tensor | None, primals: Any, tangents: Any, attrs: Sequence[Any], needs: list[bool]
) -> Tensors:
    return _dense.attention_dual_backward(do, dt_o, primals, tangents, attrs[0], attrs[1], needs)


def _native(primals: Tensors, attrs: Sequence[Any]) -> Tensor | None:
    """PyTorch's own op, where no implementation was asked for by name."""
    q, k, v, mask = primals
    is_causal, scale, impl = attrs
    if impl != "auto":
        return None
    assert q is not None and k is not None and v is not None
    gqa = q.shape[1] != k.shape[1]
    mask = mask if mask is None else mask.expand(*q.shape[:3], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=gqa)


def _specs(
    primals: Tensors, tangents: Tensors, attrs: Sequence[Any], tangent_grad: bool
) -> tuple[Spec, Sequence[Spec]]:
    q, _, v, _ = primals
    assert q is not None and v is not None
    shape = (*q.shape[:3], v.shape[-1])
    statistic = torch.float64 if q.dtype == torch.float64 else torch.float32
    moving = any(t is not None for t in tangents)
    low = tangent_grad and moving and q.dtype in (torch.bfloat16, torch.float16)
    row = (tuple(q.shape[:3]), statistic)
    accumulated = (shape, torch.float32)
    return (shape, q.dtype), [
        row, row if moving else None, accumulated if low else None, accumulated if low else None
    ]  # fmt: skip


ATTENTION = DualOp(
    name="attention",
    primals=("q", "k", "v", "attn_mask?"),
    attrs="bool is_causal, float scale, str impl",
    residuals=("lse", "mu", "o_acc", "t_o_acc"),
    forward=_forward,
    backward=_backward,
    math=_math,
    math_backward=_math_backward,
    native=_native,
    specs=_specs,
    broadcastable=frozenset({"attn_mask"}),
)
