"""Compile the memory-bound ops' part of the table: their costliest calls at the sizes of real models.

A case is a kernel's name, the dtype of the rows, and d: the channels of a row, or of a head. Every tensor has a
tangent, and the backward computes all gradients. Norms are modulated and have no parameters, as in a DiT. A gated norm
has a float32 residual stream beside rows of that dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastdistill.kernels import activation, norm, norm_backward, qk_norm_rope
from fastdistill.kernels.calls import Launch
from fastdistill.kernels.configs import NormConfig
from fastdistill.kernels.norm_rows import Inputs
from fastdistill.tune import Case

BATCH, LENGTH, HEADS = 2, 8192, 16
ROWS = (384, 1152, 4096, 8192)
SIZES = {
    "gated_norm": ROWS,
    "norm_backward": ROWS,
    "gated_norm_backward": ROWS,
    "swiglu": (4608,),
    "swiglu_backward": (4608,),
    "gelu_tanh": (4608,),
    "gelu_tanh_backward": (4608,),
    "qk_norm_rope": (64, 72, 128),
    "qk_norm_rope_backward": (64, 72, 128),
}
# Maps a family to its files; the forward of a gated norm belongs to the norms.
FAMILIES = {
    "norm_backward": ("norm_backward.py", "norm_rows.py"),
    "activation": ("activation.py",),
    "qk_norm_rope": ("qk_norm_rope.py", "rope_rows.py"),
}


def family(kernel: str) -> str:
    """Return which of `FAMILIES` has a kernel, or "norm"."""
    if kernel == "gated_norm":
        return "norm"
    if "norm_backward" in kernel:
        return "norm_backward"
    return "qk_norm_rope" if kernel.startswith("qk") else "activation"


def cases() -> Iterator[tuple[Case, NormConfig]]:
    """Yield every case, and the config of its first launch."""
    for kernel, sizes in SIZES.items():
        for d in sizes:
            case = Case(kernel, torch.bfloat16, d, "", "none", LENGTH)
            options = launches(case)[0][1].options
            width = options.get("BLOCK_C") or 2 * options["HALF"]
            yield case, NormConfig(options["ROWS"], width, options["num_warps"])


def compiled(case: Case) -> list[Any]:
    """Compile the kernels of a case, for the architecture for which Triton compiles now."""
    return [kernel.warmup(*launch.args, grid=launch.grid, **launch.options) for kernel, launch in launches(case)]


def launches(case: Case) -> list[tuple[Any, Launch]]:
    """Return the kernels of a case and how they are launched, one or two."""
    if "qk" in case.kernel:
        return [_rope(case)]
    return _norm(case) if "norm" in case.kernel else [_activation(case)]


def _norm(case: Case) -> list[tuple[Any, Launch]]:
    gated = case.kernel.startswith("gated")
    rows, stream = (_empty(BATCH, LENGTH, case.d, dtype=dtype) for dtype in (case.dtype, torch.float32))
    modulation = _empty(BATCH, 1, case.d)
    named = dict.fromkeys(("scale", "shift"), modulation)
    named |= {"x": stream, "h": rows, "gate": modulation} if gated else {"x": rows}
    inputs = Inputs(**named, **{f"t_{name}": x for name, x in named.items()})
    if not case.kernel.endswith("backward"):
        outputs = norm.allocate(inputs.x, True, False, case.dtype, gated)
        return [(norm._norm_kernel, norm.plan(inputs.x, inputs, outputs, 1e-6, False))]
    cotangents = norm_backward.Cotangents(rows, rows, *((stream, stream) if gated else ()))
    row = _empty(BATCH, LENGTH)
    wanted = [*named, *(f"t_{name}" for name in named)]
    task = norm_backward.plan(cotangents, inputs, row, row, False, wanted)
    return [(norm_backward._backward_kernel, launch) for launch in task.launches]


def _activation(case: Case) -> tuple[Any, Launch]:
    gated, backward = case.kernel.startswith("swiglu"), case.kernel.endswith("backward")
    x, up = _empty(BATCH, LENGTH, 2 * case.d, dtype=case.dtype).chunk(2, -1)
    y, other = _empty(BATCH, LENGTH, case.d, dtype=case.dtype), up if gated else None
    inputs = activation.Inputs(x, x, other, other, *((y, y) if backward else ()))
    of_up = y if gated else None
    outputs = activation.Gradients(y, of_up, y, of_up) if backward else activation.Outputs(y, y)
    kind = "silu" if gated else "gelu_tanh"
    return activation.kernel_of(outputs), activation.plan(inputs, outputs, kind)


def _rope(case: Case) -> tuple[Any, Launch]:
    packed = _empty(BATCH, LENGTH, 3, HEADS, case.d, dtype=case.dtype).permute(2, 0, 3, 1, 4)
    weight, angles = _empty(case.d), _empty(1, LENGTH, case.d // 2)
    q, k = ((x, x, weight, weight, None, None) for x in packed[:2])
    if case.kernel.endswith("backward"):
        dy, needs = _empty(BATCH, HEADS, LENGTH, case.d, dtype=case.dtype), (True,) * 4 + (False,) * 2
        launch = qk_norm_rope.plan_backward(
            (*q, dy, dy), (*k, dy, dy), angles, angles, needs, needs, "rms", 1e-6, False
        )
        return qk_norm_rope._backward_kernel, launch
    out_q, out_k = (qk_norm_rope.Outputs(torch.empty_like(x), torch.empty_like(x)) for x in packed[:2])
    return qk_norm_rope._forward_kernel, qk_norm_rope.plan(q, k, angles, angles, out_q, out_k, "rms", 1e-6, False)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
