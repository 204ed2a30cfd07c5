"""Say of the L2 norm what its tests and benchmarks have to know."""

from __future__ import annotations

from fastdistill.ops.l2_norm import functions, reference
from fastdistill.ops.protocol.cases import DITS, PublicOp, per_element

ROWS = ("B", "N", "C")
CASES = (
    PublicOp(
        name="l2_norm",
        op=functions.l2_norm,
        pair=functions.l2_norm_jvp,
        reference=reference.l2_norm,
        native=reference.l2_norm,
        tensors={"x": ROWS},
        outputs={"y": ROWS},
        tiny={"B": 1, "N": 2, "C": 3},
        options=({}, {"eps": 0.1}),
        flops=per_element(ROWS, 4, 5, 6, 16),
        models=DITS,
        compiled=({"B": 2, "N": 8192, "C": 1152},),
    ),
)
