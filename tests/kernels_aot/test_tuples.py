"""Test tuples in compiled kernels: Triton 3.6 needs help with them (`kernels/triton36.py`), later versions none."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton.compiler.code_generator import CodeGenerator

from fastdistill.benchmarks.compile.aot_table import compiling_for
from fastdistill.kernels import triton36


class Row(NamedTuple):
    """Hold a pointer and a stride."""

    ptr: Any
    stride: int


class Rows(NamedTuple):
    """Hold an absent member before one that is there."""

    absent: Row | None
    there: Row
    flag: Any


@triton.jit
def _absent_or(x, y):
    if x is None:
        return None, y
    else:
        return x, y


@triton.jit
def _kernel(ROWS, OUT, steps, WIDTH: tl.constexpr):
    """Use nested constants (a stride of 1) in a loop and a branch, None as a result, and a tuple with a None."""
    offs = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for step in tl.range(0, steps):
        total += tl.load(ROWS.there.ptr + (offs + step) * ROWS.there.stride)
    absent, total = _absent_or(ROWS.absent, total)
    if absent is None:
        total += len(ROWS)
    if steps > 3:
        total += tl.load(ROWS.there.ptr + offs * ROWS.there.stride)
    tl.store(OUT + offs, total)


@pytest.mark.parametrize("arch", [80, 90])
def test_tuples_with_absent_members_compile(arch: int) -> None:
    """Check on any Triton that the stride is known to be 1, so that loads are wide, and that nothing is forgotten."""
    x = torch.empty(1024, device="meta")
    _kernel.device_caches.clear()
    with compiling_for(arch):
        kernel = _kernel.warmup(Rows(None, Row(x, 1), None), x, 5, WIDTH=512, grid=(1,), enable_fp_fusion=True)
    assert "ld.global.v4" in kernel.asm["ptx"] and kernel.asm["cubin"]


def test_a_later_triton_is_left_alone() -> None:
    """Check that exactly what the version needs is patched, and only once."""
    before = CodeGenerator.visit_Return
    triton36.mend("3.9.0")
    assert CodeGenerator.visit_Return is before
    mended = hasattr(before, "__wrapped__")
    assert mended == triton.__version__.startswith("3.6.")


def test_descriptors_in_tuples_are_found_and_laid_flat() -> None:
    signature = {"a": ("*bf16", ("tensordesc<bf16[1]>", "constexpr")), "b": "i32", "c": ("i32",)}
    nested = tuple(signature.values())
    assert triton36._nests_descriptors(signature)
    assert not triton36._nests_descriptors({"a": "tensordesc<bf16[1]>", "b": ("i32", ("*bf16",))})
    flat = list(triton36._leaves(((1, (2, None)), 3, (4,)), nested))
    assert flat == [1, 2, None, 3, 4]
    assert list(triton36._leaves(nested, nested)) == ["*bf16", "tensordesc<bf16[1]>", "constexpr", "i32", "i32"]
