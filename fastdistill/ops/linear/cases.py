"""Say of linear layers what their tests and benchmarks have to know."""

from __future__ import annotations

from fastdistill.ops.linear import functions, reference
from fastdistill.ops.protocol import torch_functions as F
from fastdistill.ops.protocol.cases import PublicOp, Sizes

MATMULS = {"plain": 1, "forward": 2, "primal": 2, "mixed": 4}  # without a tangent of the weight


def _flops(sizes: Sizes, mode: str) -> float:
    return 2.0 * MATMULS[mode] * sizes["B"] * sizes["N"] * sizes["K"] * sizes["O"]


CASES = (
    PublicOp(
        name="linear",
        op=functions.linear,
        pair=functions.linear_jvp,
        reference=reference.linear,
        native=F.linear,
        tensors={"input": ("B", "N", "K"), "weight": ("O", "K"), "bias": ("O",)},
        outputs={"y": ("B", "N", "O")},
        tiny={"B": 1, "N": 2, "K": 3, "O": 2},
        optional=("bias",),
        usual=("bias",),
        parameters=("weight", "bias"),
        variants={"": {}, "few rows": {"sizes": {"N": 2}}, "modulation": {"sizes": {"N": 1, "O": 6912}}},
        launched=("", "modulation"),
        pair_names={"input": "x"},
        flops=_flops,
        triton=False,
    ),
)
