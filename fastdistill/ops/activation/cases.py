"""Say of GELU, SiLU and their gated forms what their tests and benchmarks have to know."""

from __future__ import annotations

from torch import Tensor

from fastdistill.ops.activation import functions, reference
from fastdistill.ops.protocol import torch_functions as F
from fastdistill.ops.protocol.cases import DITS, LIGHTNING, PublicOp, per_element

HIDDEN = ("B", "N", "F")
TINY = {"B": 1, "N": 2, "F": 3}
COMPILED = ({"B": 2, "N": 8192, "F": 4608},)


def _silu(x: Tensor, inplace: bool = False) -> Tensor:
    """Return the formula; it writes over nothing, so that `inplace` changes nothing."""
    return reference.silu(x)


CASES = (
    PublicOp(
        name="gelu",
        op=functions.gelu,
        pair=functions.gelu_jvp,
        reference=reference.gelu,
        native=F.gelu,
        tensors={"input": HIDDEN},
        outputs={"y": HIDDEN},
        tiny=TINY,
        options=({}, {"approximate": "tanh"}),
        variants={"": {}, "tanh": {"approximate": "tanh"}},
        launched=("", "tanh"),
        pair_names={"input": "x"},
        flops=per_element(HIDDEN, 9, 14, 14, 30),
        models=DITS,
        compiled=COMPILED,
    ),
    PublicOp(
        name="silu",
        op=functions.silu,
        pair=functions.silu_jvp,
        reference=_silu,
        native=F.silu,
        tensors={"input": HIDDEN},
        outputs={"y": HIDDEN},
        tiny=TINY,
        options=({"inplace": False},),
        pair_names={"input": "x"},
        op_only=("inplace",),
        flops=per_element(HIDDEN, 4, 5, 6, 16),
    ),
    PublicOp(
        name="swiglu",
        op=functions.swiglu,
        pair=functions.swiglu_jvp,
        reference=reference.swiglu,
        native=lambda gate, up: F.silu(gate) * up,
        tensors={"gate": HIDDEN, "up": HIDDEN},
        outputs={"y": HIDDEN},
        tiny=TINY,
        flops=per_element(HIDDEN, 5, 9, 9, 24),
        models=LIGHTNING,
        compiled=COMPILED,
    ),
    PublicOp(
        name="geglu",
        op=functions.geglu,
        pair=functions.geglu_jvp,
        reference=reference.geglu,
        native=lambda gate, up, approximate="none": F.gelu(gate, approximate=approximate) * up,
        tensors={"gate": HIDDEN, "up": HIDDEN},
        outputs={"y": HIDDEN},
        tiny=TINY,
        options=({}, {"approximate": "tanh"}),
        flops=per_element(HIDDEN, 10, 18, 18, 38),
    ),
)
