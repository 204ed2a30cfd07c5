"""Attention and its tangent in one pass over the keys: two matmuls for o, up to four more for t_o.

README.md derives the recurrences under "Attention", in the symbols used here.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .tiles import (
    Strided,
    add_dot,
    add_dot_transposed,
    add_scaled_rows,
    load_rows,
    scale_rows,
    store_rows,
    stride_unit,
    strided,
    zeros,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.0e38)  # below every logit but -inf
LIVE = tl.constexpr(0.5)  # a query that sees a key has a rowsum E of 1 or more, any other one of 0

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST_HEAD = 256


class Inputs(NamedTuple):
    """What the kernel reads: (B, H, N or M, D) each, masks (B, H, N, M). None is a structural zero."""

    q: Strided
    k: Strided
    v: Strided
    t_q: Strided | None
    t_k: Strided | None
    t_v: Strided | None
    mask: Strided | None
    t_mask: Strided | None


class Outputs(NamedTuple):
    """What the kernel writes, contiguous. None is not wanted."""

    o: Tensor
    t_o: Tensor | None
    lse: Tensor
    mu: Tensor | None
    o_acc: Tensor | None
    t_o_acc: Tensor | None


class Launch(NamedTuple):
    """`_attention_kernel[grid](*args, **options)`."""

    grid: tuple[int]
    args: tuple[Any, ...]
    options: dict[str, Any]


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
    attn_mask: Tensor | None,
    t_attn_mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    tangent_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Softmax attention and its tangent: (o, t_o, lse, mu, o_acc, t_o_acc).

    q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) in float32, bfloat16 or float16, any strides, D and Dv up to
    256, Hkv dividing H. Tangents have their primal's shape and dtype; None is a zero whose loads and matmuls are left
    out. attn_mask: None, bool (True = attend) or float, expanded to (B, H, N, M); t_attn_mask belongs to a float one.
    is_causal: query i sees key j <= i.

    o, t_o (B, H, N, Dv) are contiguous, in q's dtype; lse and its tangent mu (B, H, N) are float32. o_acc and t_o_acc
    are o and t_o before rounding, for tangent_grad in 16 bits only. Without any tangent all but o and lse are None. A
    query that sees no key has o = t_o = 0, lse = -inf, mu = 0.

    Equivalent to: torch.func.jvp of softmax(scale * q @ k.mT + attn_mask) @ v.
    Raises TypeError for another dtype; ValueError for a wider head or a t_attn_mask without a float attn_mask.
    """
    _check(q, v, attn_mask, t_attn_mask)
    any_tangent = any(t is not None for t in (t_q, t_k, t_v, t_attn_mask))
    outputs = allocate(q, v, any_tangent, keep_acc=any_tangent and tangent_grad and q.dtype != torch.float32)
    if outputs.lse.numel():
        launch = plan(q, k, v, t_q, t_k, t_v, attn_mask, t_attn_mask, outputs, is_causal=is_causal, scale=scale)
        _attention_kernel[launch.grid](*launch.args, **launch.options)
    return outputs


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
    attn_mask: Tensor | None,
    t_attn_mask: Tensor | None,
    outputs: Outputs,
    *,
    is_causal: bool,
    scale: float,
    config: configs.Config | None = None,
) -> Launch:
    """How to launch the kernel, by default with the shipped config. Runs nothing: one can also just compile it."""
    (batch, heads, n, d), m, d_v = q.shape, k.shape[2], v.shape[3]
    if scale <= 0:  # the kernel takes row maxima before it scales
        sign = -1.0 if scale < 0 else 0.0
        q, t_q, scale = q * sign, None if t_q is None else t_q * sign, -scale or 1.0
    if config is None:
        moving = any(t is not None for t in (t_q, t_k, t_attn_mask))
        masked = attn_mask is not None or is_causal
        kind = (configs.MASKED if masked else configs.MOVING) if moving else configs.STILL
        config = configs.attention_config(configs.arch_of(q.device), q.dtype, max(d, d_v), kind)
    unit = stride_unit(q, k, v, t_q, t_k, t_v)
    inputs = [strided(x, unit) for x in (q, k, v, t_q, t_k, t_v)] + [strided(x) for x in (attn_mask, t_attn_mask)]
    return Launch(
        grid=(triton.cdiv(n, config.block_n) * batch * heads,),
        args=(Inputs._make(inputs), outputs, (heads, heads // k.shape[1], n, m), scale),
        options={
            "D": d,
            "D_V": d_v,
            "IS_CAUSAL": is_causal,
            "UNIT": unit,
            "BLOCK_N": config.block_n,
            "BLOCK_M": config.block_m,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": True,
        },
    )


def _check(q: Tensor, v: Tensor, attn_mask: Tensor | None, t_attn_mask: Tensor | None) -> None:
    if q.dtype not in DTYPES:
        raise TypeError(f"q: expected float32, bfloat16 or float16 for the Triton kernel, got {q.dtype}")
    for name, x in (("q", q), ("v", v)):
        if not 1 <= x.shape[-1] <= WIDEST_HEAD:
            raise ValueError(f"{name}: expected a head dim from 1 to {WIDEST_HEAD}, got {x.shape[-1]}")
    if t_attn_mask is not None and (attn_mask is None or attn_mask.dtype == torch.bool):
        got = "none" if attn_mask is None else "a bool one"
        raise ValueError(f"t_attn_mask: expected a float attn_mask beside it, got {got}")


def allocate(q: Tensor, v: Tensor, any_tangent: bool, keep_acc: bool) -> Outputs:
    """Uninitialised outputs: the kernel writes every element."""
    rows, shape = q.shape[:3], (*q.shape[:3], v.shape[3])

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    return Outputs(
        o=empty(shape, q.dtype),
        t_o=empty(shape, q.dtype) if any_tangent else None,
        lse=empty(rows, torch.float32),
        mu=empty(rows, torch.float32) if any_tangent else None,
        o_acc=empty(shape, torch.float32) if keep_acc else None,
        t_o_acc=empty(shape, torch.float32) if keep_acc else None,
    )


@triton.jit
def _attention_kernel(
    IN, OUT, shape, scale,
    D: tl.constexpr, D_V: tl.constexpr, IS_CAUSAL: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N queries of one head against all the keys they see."""
    heads, group, N, M = shape
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    pid_bh = pid // tiles_n
    b, h = pid_bh // heads, pid_bh % heads
    start_n = (pid % tiles_n) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    live_n = offs_n < N
    q = load_rows(IN.q, b, h, offs_n, live_n, D, UNIT)  # (BLOCK_N, D)
    t_q = None
    if IN.t_q is not None:
        t_q = load_rows(IN.t_q, b, h, offs_n, live_n, D, UNIT)  # (BLOCK_N, D)

    m, e_sum, e_dot, h_dot, rho, o, a = _sweep(
        q, t_q, IN, b, h, h // group, start_n, live_n, M, scale, D, D_V, IS_CAUSAL, UNIT, BLOCK_N, BLOCK_M
    )

    inverse = 1 / tl.maximum(e_dot, LIVE)
    lse = tl.where(e_sum < LIVE, float("-inf"), (m + tl.log2(tl.maximum(e_sum, LIVE))) * LN_2)
    first_row = pid_bh.to(tl.int64) * N + start_n
    rows = first_row + tl.arange(0, BLOCK_N)
    o = scale_rows(o, inverse)
    store_rows(OUT.o, first_row, live_n, o, D_V)
    tl.store(OUT.lse + rows, lse, mask=live_n)
    if OUT.o_acc is not None:
        store_rows(OUT.o_acc, first_row, live_n, o, D_V)
    if OUT.t_o is not None:
        t_o = add_scaled_rows(scale_rows(a, inverse), -h_dot * inverse, o)
        store_rows(OUT.t_o, first_row, live_n, t_o, D_V)
        tl.store(OUT.mu + rows, rho, mask=live_n)
        if OUT.t_o_acc is not None:
            store_rows(OUT.t_o_acc, first_row, live_n, t_o, D_V)


@triton.jit
def _sweep(
    q, t_q, IN, b, h, h_kv, start_n, live_n, M, scale,
    D: tl.constexpr, D_V: tl.constexpr, IS_CAUSAL: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """All keys, tile by tile. The loop is written in the order that keeps the fewest registers alive."""
    MOVES_S: tl.constexpr = (IN.t_q is not None) or (IN.t_k is not None) or (IN.t_mask is not None)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    # A mask aside, these queries see all keys before `full`, which ends a tile, and none from `stop` on.
    stop, full = M, M // BLOCK_M * BLOCK_M
    if IS_CAUSAL:
        stop, full = tl.minimum(M, start_n + BLOCK_N), tl.minimum(M, start_n + 1) // BLOCK_M * BLOCK_M

    m = tl.full([BLOCK_N], LOWEST, tl.float32)
    e_sum = tl.zeros([BLOCK_N], tl.float32)
    e_dot = tl.zeros([BLOCK_N], tl.float32)
    h_dot = tl.zeros([BLOCK_N], tl.float32)
    rho = tl.zeros([BLOCK_N], tl.float32)
    o = zeros(BLOCK_N, D_V)  # (BLOCK_N, D_V) f32
    a = zeros(BLOCK_N, D_V)  # (BLOCK_N, D_V) f32
    for start_m in tl.range(0, stop, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        live_m = offs_m < M
        k = load_rows(IN.k, b, h_kv, offs_m, live_m, D, UNIT)  # (BLOCK_M, D)
        s = add_dot_transposed(tl.zeros((BLOCK_N, BLOCK_M), tl.float32), q, k)  # (BLOCK_N, BLOCK_M) f32
        unit = scale * LOG2_E
        if IN.mask is not None:
            s = _add_mask(s * unit, IN.mask, b, h, offs_n, live_n, offs_m, live_m)
            unit = 1.0
        if start_m >= full:
            seen = live_m[None, :]
            if IS_CAUSAL:
                seen = seen & (offs_m[None, :] <= offs_n[:, None])
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * unit)
        e = tl.exp2(s * unit - m_new[:, None])  # (BLOCK_N, BLOCK_M) f32
        decay = tl.exp2(m - m_new)
        m = m_new
        e_low = e.to(q[0].dtype)
        e_sum = e_sum * decay + tl.sum(e, 1)

        if MOVES_S:
            t = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)  # (BLOCK_N, BLOCK_M) f32
            if IN.t_q is not None:
                t = add_dot_transposed(t, t_q, k)
            if IN.t_k is not None:
                t_k = load_rows(IN.t_k, b, h_kv, offs_m, live_m, D, UNIT)  # (BLOCK_M, D)
                t = add_dot_transposed(t, q, t_k)
            t_unit = scale
            if IN.t_mask is not None:
                t = t * scale + _load_mask(IN.t_mask, b, h, offs_n, live_n, offs_m, live_m).to(tl.float32)
                t_unit = 1.0
            z = t * t_unit - rho[:, None]
            step = tl.sum(e * z, 1) / tl.maximum(e_sum, LIVE)
            rho += step
            h_low = (e * (z - step[:, None])).to(q[0].dtype)  # (BLOCK_N, BLOCK_M)
            h_dot = (h_dot - step * e_dot) * decay + tl.sum(h_low.to(tl.float32), 1)
            a = add_scaled_rows(scale_rows(a, decay), -step * decay, o)
        elif IN.t_v is not None:
            a = scale_rows(a, decay)

        e_dot = e_dot * decay + tl.sum(e_low.to(tl.float32), 1)
        v = load_rows(IN.v, b, h_kv, offs_m, live_m, D_V, UNIT)  # (BLOCK_M, D_V)
        o = add_dot(scale_rows(o, decay), e_low, v)
        if MOVES_S:
            a = add_dot(a, h_low, v)
        if IN.t_v is not None:
            t_v = load_rows(IN.t_v, b, h_kv, offs_m, live_m, D_V, UNIT)  # (BLOCK_M, D_V)
            a = add_dot(a, e_low, t_v)
    return m, e_sum, e_dot, h_dot, rho, o, a


@triton.jit
def _add_mask(s, MASK, b, h, offs_n, live_n, offs_m, live_m):
    """s, in units of log 2, under a mask: -inf where a bool one is False, or with a float one added."""
    mask = _load_mask(MASK, b, h, offs_n, live_n, offs_m, live_m)
    if MASK.ptr.dtype.element_ty == tl.int1:
        return tl.where(mask, s, float("-inf"))
    else:
        # A row of finfo.min is not dead, all its keys weigh the same: the change of units must not make it -inf.
        bias = tl.maximum(mask.to(tl.float32), LOWEST / 2) * LOG2_E
        return s + tl.where(mask == float("-inf"), float("-inf"), bias)


@triton.jit
def _load_mask(MASK, b, h, offs_n, live_n, offs_m, live_m):
    """(BLOCK_N, BLOCK_M) of a mask, zero beyond its edges."""
    head = b.to(tl.int64) * MASK.stride_b + h.to(tl.int64) * MASK.stride_h
    ptrs = MASK.ptr + head + offs_n.to(tl.int64)[:, None] * MASK.stride_n + offs_m.to(tl.int64)[None, :] * MASK.stride_d
    return tl.load(ptrs, mask=live_n[:, None] & live_m[None, :], other=0)
