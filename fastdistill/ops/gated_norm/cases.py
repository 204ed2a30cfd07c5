"""Say of the gated residual with its norm what its tests and benchmarks have to know."""

from __future__ import annotations

from torch import Tensor

from fastdistill.ops.gated_norm import functions, reference
from fastdistill.ops.protocol import torch_functions as F
from fastdistill.ops.protocol.cases import DITS, PublicOp, per_element

TOKENS, SAMPLE = ("B", "N", "C"), ("B", 1, "C")


def _native(
    x: Tensor,
    gate: Tensor | None,
    h: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    r = x + (h if gate is None else gate * h)
    norm = F.rms_norm(r, r.shape[-1:], weight, eps) if rms else F.layer_norm(r, r.shape[-1:], weight, bias, eps)
    y = norm if scale is None else norm * (1 + scale)
    return r.to(x.dtype), (y if shift is None else y + shift).to(h.dtype)


CASES = (
    PublicOp(
        name="gated_residual_ada_norm",
        op=functions.gated_residual_ada_norm,
        pair=functions.gated_residual_ada_norm_jvp,
        reference=reference.gated_residual_ada_norm,
        native=_native,
        tensors={
            "x": TOKENS,
            "gate": SAMPLE,
            "h": TOKENS,
            "scale": SAMPLE,
            "shift": SAMPLE,
            "weight": ("C",),
            "bias": ("C",),
        },
        outputs={"r": TOKENS, "y": TOKENS},
        tiny={"B": 2, "N": 2, "C": 3},
        optional=("gate", "scale", "shift", "weight", "bias"),
        usual=("gate", "scale", "shift"),
        options=({"shapes": {"shift": (1, 2, 3)}}, {"rms": True}, {"rms": True, "eps": 0.1}),
        flops=per_element(TOKENS, 11, 16, 17, 44),
        models=DITS,
        wide=("x",),
        compiled=tuple({"B": 2, "N": 8192, "C": width} for width in (384, 1152, 4096, 8192)),
    ),
)
