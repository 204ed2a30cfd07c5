"""Say of the norm and rotation of queries and keys what their tests and benchmarks have to know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastdistill.ops.protocol import torch_functions as F
from fastdistill.ops.protocol.cases import MMDITS, PublicOp, Sizes, per_element
from fastdistill.ops.qk_norm_rope import functions, reference
from fastdistill.ops.qk_norm_rope.angles import rope_angles

QUERIES, KEYS = ("B", "H", "N", "D"), ("B", "G", "M", "D")


def _angles(sizes: Sizes) -> Mapping[str, Any]:
    cos, sin = rope_angles((max(sizes["N"], sizes["M"]),), sizes["D"])
    return {"cos": cos, "sin": sin}


def _native(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    q_out, k_out = F.rms_norm(q, q.shape[-1:], q_weight, eps), F.rms_norm(k, k.shape[-1:], k_weight, eps)
    turned = (reference.rotary(x, cos, sin, interleaved) for x in (q_out, k_out))
    q_out, k_out = turned
    return q_out.to(q.dtype), k_out.to(k.dtype)


CASES = (
    PublicOp(
        name="qk_norm_rope",
        op=functions.qk_norm_rope,
        pair=functions.qk_norm_rope_jvp,
        reference=reference.qk_norm_rope,
        native=_native,
        tensors={
            "q": QUERIES,
            "k": KEYS,
            **dict.fromkeys(("q_weight", "k_weight", "q_bias", "k_bias"), ("D",)),
        },
        outputs={"q_out": QUERIES, "k_out": KEYS},
        tiny={"B": 1, "H": 2, "G": 1, "N": 4, "M": 3, "D": 4},
        optional=("q_weight", "k_weight", "q_bias", "k_bias"),
        usual=("q_weight", "k_weight"),
        parameters=("q_weight", "k_weight"),
        options=({"norm": "rms"}, {"norm": "layer", "eps": 0.1}, {"norm": "none"}, {"interleaved": True}),
        variants={"": {"interleaved": True}},
        constants=_angles,
        flops=per_element(("B", "H", "N", "D"), 16, 22, 24, 62),
        models=MMDITS,
        compiled=tuple({"B": 2, "N": 8192, "M": 8192, "H": 16, "G": 16, "D": d} for d in (64, 72, 128)),
    ),
)
