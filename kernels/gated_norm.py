"""The step between two blocks, r = x + gate∘h and a norm of r, in the norms' own kernels: see `load_rows`.

Each input is read once and each output is written once, in both directions. README.md has the formulas.
"""

from __future__ import annotations

from torch import Tensor

from .norm import run
from .norm_backward import Cotangents, gradients
from .norm_rows import Inputs

NAMES = ("x", "h", "gate", "weight", "bias", "scale", "shift")


def gated_norm_forward(
    x: Tensor,
    t_x: Tensor | None,
    h: Tensor,
    t_h: Tensor | None,
    gate: Tensor | None,
    t_gate: Tensor | None,
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
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor]:
    """r = x + gate∘h and its modulated norm y, with their tangents: (r, t_r, y, t_y, mean, rstd).

    x, h (B, T, C), of dtypes that may differ; the gate as scale and shift, (B or 1, T or 1, C), or None for one. r, t_r
    have x's dtype, y, t_y have h's, and the norm is that of r before its rounding. The rest is as in `norm_forward`.

    Equivalent to: torch.func.jvp of r = x + gate * h; y = (norm(r) * weight + bias) * (1 + scale) + shift.
    """
    of_norm = (weight, t_weight, bias, t_bias, scale, t_scale, shift, t_shift)
    outputs = run(x, [x, t_x, *of_norm, h, t_h, gate, t_gate], h.dtype, eps, rms)
    assert outputs.r is not None
    return outputs.r, outputs.t_r, outputs.y, outputs.t_y, outputs.mean, outputs.rstd


def gated_norm_backward(
    dr: Tensor | None,
    dt_r: Tensor | None,
    dy: Tensor | None,
    dt_y: Tensor | None,
    x: Tensor,
    t_x: Tensor | None,
    h: Tensor,
    t_h: Tensor | None,
    gate: Tensor | None,
    t_gate: Tensor | None,
    weight: Tensor | None,
    t_weight: Tensor | None,
    bias: Tensor | None,
    t_bias: Tensor | None,
    scale: Tensor | None,
    t_scale: Tensor | None,
    shift: Tensor | None,
    t_shift: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    rms: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of <dr, r> + <dt_r, t_r> + <dy, y> + <dt_y, t_y>.

    In the order (x, h, gate, weight, bias, scale, shift), then of their tangents; `needs` says which of the fourteen,
    the others are None. Each has the shape and dtype of its argument. Any cotangent may be None, but not all; without
    dt_r and dt_y no tangent is read. Sums over rows are taken in float32 and in a fixed order.
    """
    if all(d is None for d in (dr, dt_r, dy, dt_y)):
        raise ValueError("dr: expected a tensor where dt_r, dy and dt_y are None, got None")
    inputs = Inputs(
        x, t_x, weight, t_weight, bias, t_bias, scale, t_scale, shift, t_shift, h, t_h, gate, t_gate
    )  # fmt: skip
    names = (*NAMES, *(f"t_{name}" for name in NAMES))
    wanted = [name for name, need in zip(names, needs, strict=True) if need]
    found = gradients(Cotangents(dy, dt_y, dr, dt_r), inputs, mean, rstd, rms, wanted)
    return tuple(found.get(name) for name in names)
