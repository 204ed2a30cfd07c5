"""LayerNorm or RMSNorm, affine map and modulation, with the tangent of it all, reading each element once.

README.md derives the formulas under "Norms", in the symbols used here.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import FUSION, Launch, Pairs
from .norm_backward import norm_backward
from .norm_rows import Inputs, check, inputs_of, load_rows, plus, store_rows, strided, times

__all__ = ["Outputs", "allocate", "norm_backward", "norm_forward", "plan", "run"]


class Outputs(NamedTuple):
    """Outputs that the kernel writes, contiguous. None is not wanted."""

    y: Tensor
    t_y: Tensor | None
    mean: Tensor | None
    rstd: Tensor
    r: Tensor | None = None
    t_r: Tensor | None = None


def norm_forward(
    inputs: Pairs, *, eps: float, rms: bool
) -> tuple[list[tuple[Tensor, Tensor | None]], tuple[Tensor | None, Tensor]]:
    """Return the normalised, affine, modulated x and its tangent: (((y, t_y),), (mean, rstd)).

    Args:
        inputs: (primal, tangent) of x (B, T, C) in float32, bfloat16 or float16, of any strides, C up to 8192; of
            weight and bias (C,); and of scale and shift (B or 1, T or 1, C). All but x may be None. Tangents have their
            primal's shape; None is zero and costs nothing. Dtypes may differ.
        eps: added to the variance.
        rms: RMSNorm, which takes no mean.

    Returns:
        y, t_y (B, T, C), contiguous and of x's dtype; mean, rstd (B, T) in float32, as all of the computation. t_y is
        None without any tangent, mean is None for RMSNorm.

    Equivalent to:
        torch.func.jvp of y = (norm(x) * weight + bias) * (1 + scale) + shift

    Raises:
        TypeError: another dtype of x. ValueError: a wider x, or a tangent without its primal.
    """
    outputs = run(inputs_of(inputs), inputs[0][0].dtype, eps, rms)
    return [(outputs.y, outputs.t_y)], (outputs.mean, outputs.rstd)


def run(inputs: Inputs, dtype: torch.dtype, eps: float, rms: bool) -> Outputs:
    """Run the kernel; y and t_y get that dtype."""
    named = inputs._asdict()
    check({name: (named[name], named[f"t_{name}"]) for name in named if not name.startswith("t_")})
    moving = any(value is not None for name, value in named.items() if name.startswith("t_"))
    outputs = allocate(inputs.x, moving, rms, dtype, inputs.h is not None)
    if inputs.x.numel():
        launch = plan(inputs, outputs, eps, rms)
        _norm_kernel[launch.grid](*launch.args, **launch.options)
    return outputs


def allocate(x: Tensor, moving: bool, rms: bool, dtype: torch.dtype | None = None, residual: bool = False) -> Outputs:
    """Return outputs of which the kernel writes every element: y of that dtype, with r where there is a residual."""

    def rows(of: torch.dtype, wanted: bool) -> Tensor | None:
        return torch.empty(x.shape, dtype=of, device=x.device) if wanted else None

    return Outputs(
        y=torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device),
        t_y=rows(dtype or x.dtype, moving),
        mean=None if rms else torch.empty(x.shape[:2], dtype=torch.float32, device=x.device),
        rstd=torch.empty(x.shape[:2], dtype=torch.float32, device=x.device),
        r=rows(x.dtype, residual),
        t_r=rows(x.dtype, residual and moving),
    )


def plan(inputs: Inputs, outputs: Outputs, eps: float, rms: bool) -> Launch:
    """Return how to launch the kernel. Runs nothing: one can also just compile it."""
    x = inputs.x
    batch, length, width = x.shape
    config = configs.norm_config(length, width)
    return Launch(
        grid=(batch * triton.cdiv(length, config.rows),),
        args=(Inputs(*map(strided, inputs)), outputs, length, eps),
        options={
            "C": width,
            "RMS": rms,
            "ROWS": config.rows,
            "BLOCK_C": config.block_c,
            "num_warps": config.num_warps,
            **FUSION,
        },
    )


@triton.jit
def _norm_kernel(
    IN, OUT, T, eps, C: tl.constexpr, RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Normalise ROWS rows of one sample; this is one program."""
    tiles_t = tl.cdiv(T, ROWS)
    pid = tl.program_id(0)
    b = (pid // tiles_t).to(tl.int64)
    offs_t = (pid % tiles_t) * ROWS + tl.arange(0, ROWS)
    offs_c = tl.arange(0, BLOCK_C)
    live = (offs_t < T)[:, None] & (offs_c < C)[None, :]

    rows = b * T + offs_t
    x, t_x = load_rows(IN, b, offs_t, offs_c, live, C)  # (ROWS, BLOCK_C)
    store_rows(OUT.r, rows, offs_c, live, x, C)
    store_rows(OUT.t_r, rows, offs_c, live, t_x, C)
    if not RMS:
        mean = tl.sum(x, 1) / C
        x = tl.where(live, x - mean[:, None], 0.0)
        # A large mean leaves its own rounding in every entry, which may be no small part of a tiny spread.
        rest = tl.sum(x, 1) / C
        x = tl.where(live, x - rest[:, None], 0.0)
        tl.store(OUT.mean + rows, mean + rest, mask=offs_t < T)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / C + eps)
    tl.store(OUT.rstd + rows, rstd, mask=offs_t < T)
    y = x * rstd[:, None]  # (ROWS, BLOCK_C)
    t_y = None
    if t_x is not None:
        if not RMS:
            t_x = tl.where(live, t_x - (tl.sum(t_x, 1) / C)[:, None], 0.0)
        a = tl.sum(y * t_x, 1) / C
        t_y = (t_x - y * a[:, None]) * rstd[:, None]

    y, t_y = times(y, t_y, IN.weight, IN.t_weight, 0.0, b, offs_t, offs_c, live, C)
    y, t_y = plus(y, t_y, IN.bias, IN.t_bias, b, offs_t, offs_c, live, C)
    y, t_y = times(y, t_y, IN.scale, IN.t_scale, 1.0, b, offs_t, offs_c, live, C)
    y, t_y = plus(y, t_y, IN.shift, IN.t_shift, b, offs_t, offs_c, live, C)
    store_rows(OUT.y, rows, offs_c, live, y, C)
    store_rows(OUT.t_y, rows, offs_c, live, t_y, C)
