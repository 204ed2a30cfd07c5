"""LayerNorm or RMSNorm, affine map and modulation, with the tangent of it all, reading each element once.

README.md derives the formulas under "Norms", in the symbols used here.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST_ROW = 8192


class Strided(NamedTuple):
    """A (B, T, C) tensor as the kernel receives it."""

    ptr: Any
    stride_b: int
    stride_c: int
    stride_t: int


class StridedRow(NamedTuple):
    """A (B, 1, C) tensor, loaded once for all rows of a program. The kernel tells it by its length."""

    ptr: Any
    stride_b: int
    stride_c: int


Source = Strided | StridedRow


class Inputs(NamedTuple):
    """What the kernel reads. None is left out: a factor of one, an addend of zero, a tangent of zero."""

    x: Source
    t_x: Source | None
    weight: Source | None
    t_weight: Source | None
    bias: Source | None
    t_bias: Source | None
    scale: Source | None
    t_scale: Source | None
    shift: Source | None
    t_shift: Source | None


class Outputs(NamedTuple):
    """What the kernel writes, contiguous. None is not wanted."""

    y: Tensor
    t_y: Tensor | None
    mean: Tensor | None
    rstd: Tensor


class Launch(NamedTuple):
    """`_norm_kernel[grid](*args, **options)`."""

    grid: tuple[int]
    args: tuple[Any, ...]
    options: dict[str, Any]


def norm_forward(
    x: Tensor,
    t_x: Tensor | None,
    weight: Tensor | None,
    t_weight: Tensor | None,
    bias: Tensor | None,
    t_bias: Tensor | None,
    scale: Tensor | None,
    t_scale: Tensor | None,
    shift: Tensor | None,
    t_shift: Tensor | None,
    *,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Normalised, affine, modulated x and its tangent: (y, t_y, mean, rstd).

    x (B, T, C) in float32, bfloat16 or float16, any strides, C up to 8192; weight, bias (C,) or None; scale, shift
    (B or 1, T or 1, C) or None. Tangents have their primal's shape; None is zero and costs nothing. Dtypes may differ;
    all is computed in float32. y, t_y (B, T, C) are contiguous and of x's dtype; mean, rstd (B, T) are float32. t_y is
    None without any tangent, mean is None for RMSNorm.

    Equivalent to: torch.func.jvp of y = (norm(x) * weight + bias) * (1 + scale) + shift.
    Raises TypeError for another dtype of x, ValueError for a wider x or a tangent without its primal.
    """
    named = {"weight": (weight, t_weight), "bias": (bias, t_bias), "scale": (scale, t_scale), "shift": (shift, t_shift)}
    _check(x, named)
    any_tangent = t_x is not None or any(t is not None for _, t in named.values())
    outputs = allocate(x, any_tangent, rms)
    if x.numel():
        launch = plan(x, [x, t_x, *(z for pair in named.values() for z in pair)], outputs, eps, rms)
        _norm_kernel[launch.grid](*launch.args, **launch.options)
    return outputs


def allocate(x: Tensor, any_tangent: bool, rms: bool) -> Outputs:
    """Uninitialised outputs: the kernel writes every element."""
    return Outputs(
        y=torch.empty(x.shape, dtype=x.dtype, device=x.device),
        t_y=torch.empty(x.shape, dtype=x.dtype, device=x.device) if any_tangent else None,
        mean=None if rms else torch.empty(x.shape[:2], dtype=torch.float32, device=x.device),
        rstd=torch.empty(x.shape[:2], dtype=torch.float32, device=x.device),
    )


def plan(x: Tensor, inputs: list[Tensor | None], outputs: Outputs, eps: float, rms: bool) -> Launch:
    """How to launch the kernel on `inputs`, in the order of `Inputs`. Runs nothing: one can also just compile it."""
    batch, length, width = x.shape
    config = configs.norm_config(length, width)
    return Launch(
        grid=(batch * triton.cdiv(length, config.rows),),
        args=(Inputs._make(map(_strided, inputs)), outputs, length, eps),
        options={
            "C": width,
            "RMS": rms,
            "ROWS": config.rows,
            "BLOCK_C": config.block_c,
            "num_warps": config.num_warps,
            "enable_fp_fusion": True,
        },
    )


def _check(x: Tensor, named: dict[str, tuple[Tensor | None, Tensor | None]]) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float32, bfloat16 or float16 for the Triton kernel, got {x.dtype}")
    if x.shape[-1] > WIDEST_ROW:
        raise ValueError(f"x: expected at most {WIDEST_ROW} channels for the Triton kernel, got {x.shape[-1]}")
    for name, (primal, tangent) in named.items():
        if primal is None and tangent is not None:
            raise ValueError(f"t_{name}: expected None without a {name}, got a tensor")


def _strided(x: Tensor | None) -> Source | None:
    if x is None:
        return None
    x = x.expand(1, 1, -1) if x.dim() == 1 else x
    stride_b, stride_t, stride_c = x.stride()
    row = StridedRow(x, 0 if x.shape[0] == 1 else stride_b, stride_c)
    return row if x.shape[1] == 1 else Strided(*row, stride_t)


@triton.jit
def _norm_kernel(
    IN, OUT, T, eps, C: tl.constexpr, RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """One program: ROWS rows of one sample."""
    tiles_t = tl.cdiv(T, ROWS)
    pid = tl.program_id(0)
    b = (pid // tiles_t).to(tl.int64)
    offs_t = (pid % tiles_t) * ROWS + tl.arange(0, ROWS)
    offs_c = tl.arange(0, BLOCK_C)
    live = (offs_t < T)[:, None] & (offs_c < C)[None, :]

    rows = b * T + offs_t
    x = _load(IN.x, b, offs_t, offs_c, live, C)  # (ROWS, BLOCK_C)
    if not RMS:
        mean = tl.sum(x, 1) / C
        tl.store(OUT.mean + rows, mean, mask=offs_t < T)
        x = tl.where(live, x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / C + eps)
    tl.store(OUT.rstd + rows, rstd, mask=offs_t < T)
    y = x * rstd[:, None]  # (ROWS, BLOCK_C)
    t_y = None
    if IN.t_x is not None:
        t_x = _load(IN.t_x, b, offs_t, offs_c, live, C)  # (ROWS, BLOCK_C)
        if not RMS:
            t_x = tl.where(live, t_x - (tl.sum(t_x, 1) / C)[:, None], 0.0)
        a = tl.sum(y * t_x, 1) / C
        t_y = (t_x - y * a[:, None]) * rstd[:, None]

    y, t_y = _times(y, t_y, IN.weight, IN.t_weight, 0.0, b, offs_t, offs_c, live, C)
    y, t_y = _plus(y, t_y, IN.bias, IN.t_bias, b, offs_t, offs_c, live, C)
    y, t_y = _times(y, t_y, IN.scale, IN.t_scale, 1.0, b, offs_t, offs_c, live, C)
    y, t_y = _plus(y, t_y, IN.shift, IN.t_shift, b, offs_t, offs_c, live, C)

    ptrs = rows[:, None] * C + offs_c[None, :]
    tl.store(OUT.y + ptrs, y.to(OUT.y.dtype.element_ty), mask=live)
    if OUT.t_y is not None:
        tl.store(OUT.t_y + ptrs, t_y.to(OUT.t_y.dtype.element_ty), mask=live)


@triton.jit
def _load(x, b, offs_t, offs_c, live, C: tl.constexpr):
    """(ROWS, BLOCK_C), or (1, BLOCK_C) where all rows are the same, in float32 and zero beyond the edges."""
    ptrs = x.ptr + b * x.stride_b + offs_c[None, :] * x.stride_c
    if len(x) == 3:
        tile = tl.load(ptrs, mask=(offs_c < C)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs + offs_t.to(tl.int64)[:, None] * x.stride_t, mask=live, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def _times(y, t_y, FACTOR, T_FACTOR, PLUS: tl.constexpr, b, offs_t, offs_c, live, C: tl.constexpr):
    """Product rule with factor + PLUS."""
    if FACTOR is not None:
        factor = _load(FACTOR, b, offs_t, offs_c, live, C) + PLUS
        if t_y is not None:
            t_y = t_y * factor
        if T_FACTOR is not None:
            t_y = _sum(t_y, y * _load(T_FACTOR, b, offs_t, offs_c, live, C))
        y = y * factor
    return y, t_y


@triton.jit
def _plus(y, t_y, ADDEND, T_ADDEND, b, offs_t, offs_c, live, C: tl.constexpr):
    """Sum rule."""
    if ADDEND is not None:
        y = y + _load(ADDEND, b, offs_t, offs_c, live, C)
        if T_ADDEND is not None:
            t_y = _sum(t_y, tl.broadcast_to(_load(T_ADDEND, b, offs_t, offs_c, live, C), y.shape))
    return y, t_y


@triton.jit
def _sum(x, y):
    """x + y, where x of None is zero."""
    if x is None:
        return y
    else:
        return x + y
