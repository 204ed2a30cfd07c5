"""Say of LayerNorm, RMSNorm and their modulated forms what their tests and benchmarks have to know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastdistill.ops.norm import functions, reference
from fastdistill.ops.protocol import torch_functions as F
from fastdistill.ops.protocol.cases import DITS, LIGHTNING, WANS, PublicOp, Sizes, per_element

TOKENS = ("B", "N", "C")
COMPILED = tuple({"B": 2, "N": 8192, "C": width} for width in (384, 1152, 4096, 8192))
TINY = {"B": 2, "N": 2, "C": 3}


def _normalized(sizes: Sizes) -> Mapping[str, Any]:
    return {"normalized_shape": (sizes["C"],)}


def _ada_layer_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps) * (1 + scale) + shift


def _ada_rms_norm(
    x: Tensor, scale: Tensor, shift: Tensor | None = None, weight: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    y = F.rms_norm(x, x.shape[-1:], weight, eps) * (1 + scale)
    return y if shift is None else y + shift


CASES = (
    PublicOp(
        name="layer_norm",
        op=functions.layer_norm,
        pair=functions.layer_norm_jvp,
        reference=reference.layer_norm,
        native=F.layer_norm,
        tensors={"input": TOKENS, "weight": ("C",), "bias": ("C",)},
        outputs={"y": TOKENS},
        tiny={**TINY, "B": 1},
        optional=("weight", "bias"),
        usual=("weight", "bias"),
        parameters=("weight", "bias"),
        options=({}, {"eps": 0.1}),
        constants=_normalized,
        pair_names={"input": "x"},
        flops=per_element(TOKENS, 7, 9, 11, 30),
        models=DITS,
        compiled=COMPILED,
    ),
    PublicOp(
        name="rms_norm",
        op=functions.rms_norm,
        pair=functions.rms_norm_jvp,
        reference=reference.rms_norm,
        native=F.rms_norm,
        tensors={"input": TOKENS, "weight": ("C",)},
        outputs={"y": TOKENS},
        tiny={**TINY, "B": 1},
        optional=("weight",),
        usual=("weight",),
        parameters=("weight",),
        options=({}, {"eps": 0.1}),
        variants={"": {"eps": 1e-6}},
        constants=_normalized,
        pair_names={"input": "x"},
        flops=per_element(TOKENS, 5, 8, 9, 25),
        models=WANS,
    ),
    PublicOp(
        name="ada_layer_norm",
        op=functions.ada_layer_norm,
        pair=functions.ada_layer_norm_jvp,
        reference=reference.ada_layer_norm,
        native=_ada_layer_norm,
        tensors={"x": TOKENS, "scale": ("B", 1, "C"), "shift": ("B", 1, "C"), "weight": ("C",), "bias": ("C",)},
        outputs={"y": TOKENS},
        tiny=TINY,
        optional=("weight", "bias"),
        options=({"shapes": {"shift": (1, 2, 3)}}, {"eps": 0.1}),
        flops=per_element(TOKENS, 9, 13, 13, 36),
        models=DITS,
        compiled=COMPILED,
    ),
    PublicOp(
        name="ada_rms_norm",
        op=functions.ada_rms_norm,
        pair=functions.ada_rms_norm_jvp,
        reference=reference.ada_rms_norm,
        native=_ada_rms_norm,
        tensors={"x": TOKENS, "scale": ("B", 1, "C"), "shift": ("B", 1, "C"), "weight": ("C",)},
        outputs={"y": TOKENS},
        tiny=TINY,
        optional=("shift", "weight"),
        usual=("shift",),
        options=({"shapes": {"shift": (1, 2, 3)}}, {"eps": 0.1}),
        flops=per_element(TOKENS, 7, 12, 11, 31),
        models=LIGHTNING,
    ),
)
