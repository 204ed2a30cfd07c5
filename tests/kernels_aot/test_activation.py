"""Test the activation kernels' machine code, for GPUs that need not be there."""

from __future__ import annotations

import re
import tempfile

import pytest
import torch
from torch import Tensor

from fastdistill.benchmarks.compile import aot_table
from fastdistill.kernels import activation as kernel


def compiled(arch: int, inputs: kernel.Inputs, outputs: kernel.Outputs | kernel.Gradients, kind: str) -> str:
    """Return the machine code."""
    launch, function = kernel.plan(inputs, outputs, kind), kernel.kernel_of(outputs)
    with aot_table.compiling_for(arch):
        function.device_caches.clear()
        binary = function.warmup(*launch.args, grid=launch.grid, **launch.options)
        function.device_caches.clear()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        return aot_table._tool("nvdisasm", "-c", file.name)


def halves(width: int = 4608) -> tuple[Tensor, Tensor]:
    """Return the halves of a packed projection in bfloat16."""
    x, up = torch.empty(8, 256, 2 * width, dtype=torch.bfloat16, device="meta").chunk(2, -1)
    return x, up


@pytest.mark.parametrize(
    ("arch", "kind", "backward"),
    [(80, "silu", True), (90, "silu", False), (90, "gelu", True), (90, "gelu_tanh", True), (100, "silu", True)],
)
def test_halves_of_a_projection_move_16_bytes_at_a_time_and_stay_in_registers(
    arch: int, kind: str, backward: bool
) -> None:
    """Check every load and store, and that nothing spills."""
    (x, up), z = halves(), torch.empty(8, 256, 4608, dtype=torch.bfloat16, device="meta")
    inputs = kernel.Inputs(x, x, up, up, *([z, z] if backward else []))
    code = compiled(arch, inputs, kernel.Gradients(z, z, z, z) if backward else kernel.Outputs(z, z), kind)
    moves = re.findall(r"\b((?:LDG|STG)\.[.\w]+)", code)
    assert len(moves) == sum(v is not None for v in inputs) + (4 if backward else 2)
    assert all(move.startswith(("LDG.E.128", "STG.E.128")) for move in moves)
    assert not re.search(r"\b(?:LDL|STL)\b", code)


@pytest.mark.parametrize("present", [(), ("t_x",), ("up",), ("t_x", "up"), ("up", "t_up"), ("t_x", "up", "t_up")])
def test_every_combination_of_absent_arguments_compiles(present: tuple[str, ...]) -> None:
    """Check the forward and both backwards; the interpreter doesn't notice a type that changes on the way."""
    x, _ = halves(40)
    given = dict.fromkeys(present, x)
    inputs = kernel.Inputs(**{"x": x, "t_x": None, "up": None, "t_up": None, **given})
    z, up = torch.empty_like(x), None if inputs.up is None else x
    moving = "t_x" in present or "t_up" in present
    compiled(90, inputs, kernel.Outputs(z, z if moving else None), "silu")
    compiled(90, inputs._replace(dy=z), kernel.Gradients(z, None, up, None), "gelu")
    compiled(90, inputs._replace(dt_y=z), kernel.Gradients(z, z, up, up), "gelu_tanh")
