"""Say of the embedding of times what its tests and benchmarks have to know."""

from __future__ import annotations

from fastdistill.ops.protocol.cases import PublicOp, per_element
from fastdistill.ops.time_embedding import functions, reference

CASES = (
    PublicOp(
        name="timestep_embedding",
        op=functions.timestep_embedding,
        pair=functions.timestep_embedding_jvp,
        reference=reference.timestep_embedding,
        native=reference.timestep_embedding,
        tensors={"t": ("B",)},
        outputs={"y": ("B", "C")},
        tiny={"B": 2, "C": 5},
        options=({"max_period": 100.0}, {}),
        launched=(),
        constants=lambda sizes: {"dim": sizes["C"]},
        flops=per_element(("B", "C"), 2, 2, 3, 8),
        triton=False,
    ),
)
