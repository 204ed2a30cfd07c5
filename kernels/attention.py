"""Attention and its tangent in one pass over the keys: two matmuls for o, up to four more for t_o.

README.md derives the recurrences under "Attention", in the symbols used here.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .arguments import check, pointers, precision, use_descriptors, with_descriptors
from .attention_backward import attention_backward
from .calls import Launch
from .geometry import Problem, band, first_row, live_between, live_tiles, locate, problem_of, sequences, visible
from .tiles import (
    add_cross,
    add_crosses,
    add_pair,
    add_scaled_rows,
    as_operand,
    at_least,
    load_rows,
    scale_rows,
    store_with_rests,
    zeros,
)

__all__ = ["Outputs", "allocate", "attention_backward", "attention_forward", "plan"]

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.0e38)  # It lies below every logit but -inf.
LIVE = tl.constexpr(0.5)  # A query that sees a key has a rowsum E of 1 or more, any other query one of 0.


class Outputs(NamedTuple):
    """What the kernel writes, contiguous; o_rest and t_o_rest as `rests` says. None is not wanted."""

    o: Tensor
    t_o: Tensor | None
    lse: Tensor
    mu: Tensor | None
    o_rest: Tensor | None
    t_o_rest: Tensor | None


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
    window: tuple[int, int],
    lower_right: bool,
    cu_seqlens: tuple[Tensor, Tensor, int, int] | None,
    scale: float,
    tangent_grad: bool,
    grad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Softmax attention and its tangent: (o, t_o, lse, mu, o_rest, t_o_rest).

    q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) in float32, bfloat16 or float16, any strides, D and Dv up to
    256, Hkv dividing H. Tangents have their primal's shape and dtype; None is a zero whose loads and matmuls are left
    out. attn_mask: None, bool (True = attend) or float, expanded to (B, H, N, M); t_attn_mask belongs to a float one.

    window (left, right): query i sees only the keys from i + shift - left to i + shift + right, -1 being no limit;
    (-1, 0) is causal. shift is 0 or, for lower_right, M - N: the last query then meets the last key.
    cu_seqlens (cu_n, cu_m, max_n, max_m): B = 1, and sequence z of those packed in it has the queries from cu_n[z] to
    cu_n[z + 1] - 1 and the keys from cu_m[z] to cu_m[z + 1] - 1 (int32 tensors), at most max_n and max_m of them.

    o, t_o (B, H, N, Dv) are contiguous, in q's dtype; lse and its tangent mu (B, H, N) are float32. Without any tangent
    t_o and mu are None. In 16 bits o_rest, t_o_rest are what rounding took from o and t_o (see `rests`), for the
    backward: the one with `grad`, the other if `tangent_grad` too. A query that sees no key, or lies in no sequence,
    has o = t_o = 0, lse = -inf, mu = 0.

    Equivalent to: torch.func.jvp of softmax(scale * q @ k.mT + attn_mask) @ v.
    Raises TypeError for another dtype; ValueError for a wider head or a t_attn_mask without a float attn_mask.
    """
    check(q, v, attn_mask, t_attn_mask)
    any_tangent = any(t is not None for t in (t_q, t_k, t_v, t_attn_mask))
    outputs = allocate(q, v, any_tangent, grad, grad and tangent_grad, packed=cu_seqlens is not None)
    if outputs.lse.numel():
        launch = plan(
            q, k, v, t_q, t_k, t_v, attn_mask, t_attn_mask, outputs,
            window=window, lower_right=lower_right, cu_seqlens=cu_seqlens, scale=scale,
        )  # fmt: skip
        with torch.cuda.device_of(q):
            _attention_kernel[launch.grid](*launch.args, **launch.options)
    return outputs


def allocate(
    q: Tensor, v: Tensor, any_tangent: bool, grad: bool = False, tangent_grad: bool = False, packed: bool = False
) -> Outputs:
    """Outputs of which the kernel writes every element; if packed, those of rows in no sequence are there already."""
    rows, shape, rounded = q.shape[:3], (*q.shape[:3], v.shape[3]), q.dtype != torch.float32

    def new(shape: tuple[int, ...], dtype: torch.dtype, value: float = 0.0) -> Tensor:
        if packed:
            return torch.full(shape, value, dtype=dtype, device=q.device)
        return torch.empty(shape, dtype=dtype, device=q.device)

    return Outputs(
        o=new(shape, q.dtype),
        t_o=new(shape, q.dtype) if any_tangent else None,
        lse=new(rows, torch.float32, -math.inf),
        mu=new(rows, torch.float32) if any_tangent else None,
        o_rest=new(shape, q.dtype) if grad and rounded else None,
        t_o_rest=new(shape, q.dtype) if tangent_grad and any_tangent and rounded else None,
    )


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
    window: tuple[int, int],
    lower_right: bool,
    cu_seqlens: tuple[Tensor, Tensor, int, int] | None,
    scale: float,
    config: configs.Config | None = None,
    descriptors: bool | None = None,
) -> Launch:
    """How to launch the kernel, by default with the shipped config. Runs nothing: one can also just compile it.

    descriptors: load rows by TMA, by default where the GPU has it and the tensors allow it.
    """
    if scale <= 0:  # the kernel takes row maxima before it scales
        sign = -1.0 if scale < 0 else 0.0
        q, t_q, scale = q * sign, None if t_q is None else t_q * sign, -scale or 1.0
    if not k.shape[2]:
        attn_mask = t_attn_mask = None
    problem = problem_of(q, k, window, cu_seqlens)
    arch = configs.arch_of(q.device)
    if descriptors is None:
        descriptors = cu_seqlens is None and use_descriptors(arch, q, k, v, t_q, t_k, t_v)
    if config is None:
        config = _config(arch if descriptors else min(arch, 80), q, v, (t_q, t_k, t_v, t_attn_mask), attn_mask, problem)
    inputs, unit = pointers(q, k, v, t_q, t_k, t_v, attn_mask, t_attn_mask)
    if descriptors:
        inputs = with_descriptors(inputs, (q, t_q), (k, v, t_k, t_v), config)
    tiles = None if attn_mask is None else live_tiles(attn_mask, config.block_n, config.block_m)
    return Launch(
        grid=(triton.cdiv(problem.n, config.block_n) * sequences(q, problem) * problem.heads,),
        args=(inputs, outputs, problem, tiles, scale),
        options={
            "D": q.shape[3],
            "D_V": v.shape[3],
            "LOWER_RIGHT": lower_right,
            "UNIT": unit,
            "PRECISION": precision(q.dtype),
            **config.options(),
            "enable_fp_fusion": True,
        },
    )


def _config(
    arch: int, q: Tensor, v: Tensor, tangents: tuple[Tensor | None, ...], attn_mask: Tensor | None, problem: Problem
) -> configs.Config:
    present = "".join(name for name, t in zip(configs.TANGENTS, tangents, strict=True) if t is not None)
    plain = (problem.left, problem.right, problem.cu_n) == (None, None, None)
    kind = "mask" if attn_mask is not None else "none" if plain else "band"
    return configs.attention_config("forward", arch, q.dtype, max(q.shape[3], v.shape[3]), present, kind, problem.n)


@triton.constexpr_function
def lowest_float(dtype: Any) -> float:
    """finfo.min of a mask's dtype, as float32; what is wider or no float has that of float32."""
    return -3.3895313892515355e38 if dtype == tl.bfloat16 else -3.4028234663852886e38


@triton.jit
def _attention_kernel(
    IN, OUT, P, TILES, scale,
    D: tl.constexpr, D_V: tl.constexpr, LOWER_RIGHT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Compute o and t_o of BLOCK_N queries of one head, from all the keys that they see; this is one program."""
    tiles_n = tl.cdiv(P.n, BLOCK_N)
    pid = tl.program_id(0)
    row, pid_zh = pid % tiles_n, pid // tiles_n
    h, start_n = pid_zh % P.heads, row * BLOCK_N
    b, first_n, N, first_m, M = locate(P, pid_zh // P.heads)
    if (P.cu_n is not None) and start_n >= N:
        return
    low, high = band(P, N, M, LOWER_RIGHT)
    q = load_rows(IN.q, b, h, first_n, start_n, N, BLOCK_N, D, UNIT, STREAM)  # (BLOCK_N, D)
    t_q = None
    if IN.t_q is not None:
        t_q = load_rows(IN.t_q, b, h, first_n, start_n, N, BLOCK_N, D, UNIT, STREAM)  # (BLOCK_N, D)

    m, e_sum, e_dot, h_dot, rho, o, a = _sweep(
        q, t_q, IN, P, TILES, (b, h, row, N, first_m, M, low, high), scale,
        D, D_V, UNIT, PRECISION, BLOCK_N, BLOCK_M, STREAM,
    )  # fmt: skip

    inverse = 1 / at_least(e_dot, LIVE)
    lse = (m + tl.log2(at_least(e_sum, LIVE))) * LN_2
    if IN.mask is not None:
        lse = tl.where(lse < LOWEST / 2.1, lowest_float(IN.mask.ptr.dtype.element_ty), lse)  # See `_add_mask`.
    lse = tl.where(e_sum < LIVE, float("-inf"), lse)
    first = first_row(P, b, h, first_n + start_n)
    rows, live_n = first + tl.arange(0, BLOCK_N), start_n + tl.arange(0, BLOCK_N) < N
    # In this order no shipped config spills registers.
    o = scale_rows(o, inverse)
    if OUT.t_o is not None:
        a = add_scaled_rows(scale_rows(a, inverse), -h_dot * inverse, o)  # t_o
    tl.store(OUT.lse + rows, lse, mask=live_n)
    store_with_rests(OUT.o, OUT.o_rest, first, live_n, o, D_V, STREAM)
    if OUT.t_o is not None:
        tl.store(OUT.mu + rows, rho, mask=live_n)
        store_with_rests(OUT.t_o, OUT.t_o_rest, first, live_n, a, D_V, STREAM)


@triton.jit
def _sweep(
    q, t_q, IN, P, TILES, at, scale,
    D: tl.constexpr, D_V: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Pass over all keys that any of the queries sees, tile by tile.

    The loop is written in the order that keeps the fewest registers alive.
    """
    HELD: tl.constexpr = STREAM == 0
    MOVES_S: tl.constexpr = (IN.t_q is not None) or (IN.t_k is not None) or (IN.t_mask is not None)
    b, h, row, N, first_m, M, low, high = at
    h_kv, start_n = h // P.group, row * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    live_n = offs_n < N
    begin, whole_begin, whole_end, end = visible(start_n, low, high, M, BLOCK_N, BLOCK_M)
    listed, first, last = None, begin // BLOCK_M, tl.cdiv(end, BLOCK_M)
    if TILES is not None:
        listed, first, last = live_between(TILES, b, h, row, begin, end, BLOCK_M)

    m = tl.full([BLOCK_N], LOWEST, tl.float32)
    e_sum = tl.zeros([BLOCK_N], tl.float32)
    e_dot = tl.zeros([BLOCK_N], tl.float32)
    h_dot = tl.zeros([BLOCK_N], tl.float32)
    rho = tl.zeros([BLOCK_N], tl.float32)
    o = zeros(BLOCK_N, D_V, STREAM)  # (BLOCK_N, D_V) f32
    a = zeros(BLOCK_N, D_V, STREAM)  # (BLOCK_N, D_V) f32
    for i in tl.range(first, last):
        start_m = i * BLOCK_M
        if listed is not None:
            start_m = tl.load(listed + i) * BLOCK_M
        offs_m = start_m + tl.arange(0, BLOCK_M)
        live_m = offs_m < M
        k = load_rows(IN.k, b, h_kv, first_m, start_m, M, BLOCK_M, D, UNIT, STREAM)  # (BLOCK_M, D)
        zero = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if HELD:
            s = add_cross(zero, q, k, False, PRECISION)  # (BLOCK_N, BLOCK_M) f32
        else:
            t_k = None
            if IN.t_k is not None:
                t_k = load_rows(IN.t_k, b, h_kv, first_m, start_m, M, BLOCK_M, D, UNIT, STREAM)
            s, t = add_crosses(zero, zero, q, k, t_q, t_k, False, PRECISION, D, STREAM)
        unit = scale * LOG2_E
        if IN.mask is not None:
            s = _add_mask(s * unit, IN.mask, b, h, offs_n, live_n, offs_m, live_m)
            unit = 1.0
        if (start_m < whole_begin) | (start_m >= whole_end):
            seen = live_m[None, :]
            if P.left is not None:
                seen = seen & (offs_m[None, :] >= (offs_n + low)[:, None])
            if P.right is not None:
                seen = seen & (offs_m[None, :] <= (offs_n + high)[:, None])
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * unit)
        e = tl.exp2(s * unit - m_new[:, None])  # (BLOCK_N, BLOCK_M) f32
        decay = tl.exp2(m - m_new)
        m = m_new
        e_low = as_operand(e, q, PRECISION)
        e_sum = e_sum * decay + tl.sum(e, 1)

        if MOVES_S:
            if HELD:
                t = zero
                if IN.t_q is not None:
                    t = add_cross(t, t_q, k, False, PRECISION)  # (BLOCK_N, BLOCK_M) f32
                if IN.t_k is not None:
                    t_k = load_rows(IN.t_k, b, h_kv, first_m, start_m, M, BLOCK_M, D, UNIT)  # (BLOCK_M, D)
                    t = add_cross(t, q, t_k, False, PRECISION)
            t_unit = scale
            if IN.t_mask is not None:
                t = t * scale + _load_mask(IN.t_mask, b, h, offs_n, live_n, offs_m, live_m).to(tl.float32)
                t_unit = 1.0
            z = t * t_unit - rho[:, None]
            step = tl.sum(e * z, 1) / at_least(e_sum, LIVE)
            rho += step
            h_low = as_operand(e * (z - step[:, None]), q, PRECISION)  # (BLOCK_N, BLOCK_M)
            h_dot = (h_dot - step * e_dot) * decay + tl.sum(h_low.to(tl.float32), 1)
            a = add_scaled_rows(scale_rows(a, decay), -step * decay, o)
        elif IN.t_v is not None:
            a = scale_rows(a, decay)

        e_dot = e_dot * decay + tl.sum(e_low.to(tl.float32), 1)
        v = load_rows(IN.v, b, h_kv, first_m, start_m, M, BLOCK_M, D_V, UNIT, STREAM)  # (BLOCK_M, D_V)
        o = scale_rows(o, decay)
        if MOVES_S:
            o, a = add_pair(o, a, e_low, h_low, v, None, PRECISION, D_V, STREAM)
        else:
            o, _ = add_pair(o, (), e_low, None, v, None, PRECISION, D_V, STREAM)
        if IN.t_v is not None:
            t_v = load_rows(IN.t_v, b, h_kv, first_m, start_m, M, BLOCK_M, D_V, UNIT, STREAM)  # (BLOCK_M, D_V)
            a, _ = add_pair(a, (), e_low, None, t_v, None, PRECISION, D_V, STREAM)
    return m, e_sum, e_dot, h_dot, rho, o, a


@triton.jit
def _add_mask(s, MASK, b, h, offs_n, live_n, offs_m, live_m):
    """Apply a mask to s, in units of log 2: -inf where a bool mask is False, or a float mask added."""
    mask = _load_mask(MASK, b, h, offs_n, live_n, offs_m, live_m)
    if MASK.ptr.dtype.element_ty == tl.int1:
        return tl.where(mask, s, float("-inf"))
    else:
        # A row of finfo.min is not dead: all its keys weigh the same, and the change of units must not make it -inf. So
        # such a low value counts as LOWEST / 2, until the kernel has an lse, which is finfo.min.
        bias = at_least(mask.to(tl.float32), LOWEST / 2) * LOG2_E
        return s + tl.where(mask == float("-inf"), float("-inf"), bias)


@triton.jit
def _load_mask(MASK, b, h, offs_n, live_n, offs_m, live_m):
    """Load (BLOCK_N, BLOCK_M) of a mask, or (1, BLOCK_M) if all queries share a row; zero beyond its edges."""
    row = MASK.ptr + b.to(tl.int64) * MASK.stride_b + h.to(tl.int64) * MASK.stride_h
    ptrs, live = row + offs_m.to(tl.int64)[None, :] * MASK.stride_d, live_m[None, :]
    if MASK.stride_n is not None:
        ptrs, live = ptrs + offs_n.to(tl.int64)[:, None] * MASK.stride_n, live & live_n[:, None]
    return tl.load(ptrs, mask=live, other=0)
