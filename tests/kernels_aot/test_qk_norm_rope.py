"""Test the machine code of the kernels that normalise and turn queries and keys, for GPUs that need not be there."""

from __future__ import annotations

import re
import tempfile

import pytest
import torch

from fastdistill.benchmarks.compile import aot_table
from fastdistill.kernels import qk_norm_rope as kernel


def compiled(direction: str, arch: int, d: int, interleaved: bool) -> tuple[str, str]:
    """Return PTX and machine code for views of a packed bfloat16 projection, with tangents and weights."""
    q, k, _ = torch.empty(2, 64, 3, 16, d, dtype=torch.bfloat16, device="meta").permute(2, 0, 3, 1, 4)
    weight, angles = torch.empty(d, device="meta"), torch.empty(1, 64, d // 2, device="meta")
    inputs = [(q, q), (k, k), (weight, weight), (weight, weight), *[(None, None)] * 2, *[(angles, None)] * 2]
    options = kernel.Options("rms", 1e-6, interleaved)
    if direction == "forward":
        outs = [kernel.Outputs(torch.empty_like(x), torch.empty_like(x)) for x in (q, k)]
        launch = kernel.plan(inputs, outs, options)
        function = kernel._forward_kernel
    else:
        dy = torch.empty(2, 16, 64, d, dtype=torch.bfloat16, device="meta")
        needs = [(True, True)] * 4 + [(False, False)] * 4
        launch = kernel.plan_backward([(dy, dy)] * 2, inputs, needs, options)
        function = kernel._backward_kernel
    with aot_table.compiling_for(arch):
        function.device_caches.clear()
        binary = function.warmup(*launch.args, grid=launch.grid, **launch.options)
        function.device_caches.clear()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        return binary.asm["ptx"], aot_table._tool("nvdisasm", "-c", file.name)


@pytest.mark.parametrize(
    ("direction", "arch", "d", "interleaved"),
    [("forward", 80, 64, True), ("forward", 90, 128, False), ("forward", 100, 72, False), ("backward", 90, 64, False)],
)
def test_rows_come_many_bytes_at_a_time_and_stay_in_registers(
    direction: str, arch: int, d: int, interleaved: bool
) -> None:
    """Check that nothing spills, and that no access is of one 16-bit element."""
    ptx, code = compiled(direction, arch, d, interleaved)
    assert len(code.splitlines()) > aot_table.SMALLEST_KERNEL
    assert not re.search(r"\b(?:LDL|STL)\b", code)
    assert "ld.global.v" in ptx and not re.search(r"(?:ld|st)\.global[.\w:]*\.b16", ptx)
