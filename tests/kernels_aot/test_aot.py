"""The kernels' machine code, for GPUs that are not there: `pytest tests/kernels_aot`, without TRITON_INTERPRET.

A few of the shipped configs, at some seconds each; `python benchmarks/aot_table.py` does them all.
"""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import aot_table
from benchmarks.aot_table import Case
from fastdistill.kernels import configs


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    ("d", "kind"),
    [(64, configs.MOVING), (72, configs.MOVING), (128, configs.MASKED)],
    ids=["D64-moving", "D72-moving", "D128-masked"],
)
def test_attention_fits(arch: int, d: int, kind: str) -> None:
    """No spills, within shared and tensor memory, on tensor cores; and no stub in place of a kernel."""
    row = aot_table.measure(Case(arch, torch.bfloat16, d, kind))
    assert not aot_table.problems(row)


def test_hopper_gets_its_own_matmuls() -> None:
    """wgmma, and not the instruction of the generation before, which 9.0 runs at about half the rate."""
    kernel = aot_table.compile_case(Case(90, torch.bfloat16, 64, configs.STILL))
    assert "wgmma.mma_async" in kernel.asm["ptx"] and "mma.sync" not in kernel.asm["ptx"]


def test_rows_of_72_are_loaded_many_bytes_at_a_time() -> None:
    """Or 8, where a thread's share of the narrow part is no more; element by element it would be 2."""
    kernel = aot_table.compile_case(Case(90, torch.bfloat16, 72, configs.MOVING))
    copies = re.findall(r"cp\.async\.\w+\.shared\.global[^;]*, (0x\w+|\d+)", kernel.asm["ptx"])
    assert {int(size, 0) for size in copies} == {8, 16}
    assert not re.search(r"ld\.global(?:\.\w+)*\.b16", kernel.asm["ptx"])


def test_float32_fits() -> None:
    """On the ordinary cores."""
    assert not aot_table.problems(aot_table.measure(Case(90, torch.float32, 64, configs.MASKED)))


@pytest.mark.parametrize("width", [1152, 8192])
def test_norm_fits(width: int) -> None:
    """Whole rows stay in registers."""
    assert not aot_table.problems(aot_table.measure(Case(90, torch.bfloat16, width, "norm")))


def test_a_config_that_spills_is_found() -> None:
    """128 rows on four warps leave each thread too many accumulators."""
    row = aot_table.measure(Case(90, torch.bfloat16, 64, configs.MOVING), configs.Config(128, 64, 4, 2))
    assert any("register spills" in line for line in aot_table.problems(row))
