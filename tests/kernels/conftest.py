"""The kernels' values, on a GPU or interpreted on the CPU: `pytest tests/kernels`, in a process of its own."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.device import INTERPRETED

if INTERPRETED:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# What kernels do, and not only what comes out, is seen in the interpreter alone.
collect_ignore = [] if INTERPRETED else ["test_attention_work.py", "test_attention_backward_work.py"]


def _bf16_to_fp32(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


def _fp32_to_bf16(x: np.ndarray) -> np.ndarray:
    """To nearest even, like a GPU; NaN stays NaN."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


@pytest.fixture(autouse=INTERPRETED)
def matmuls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape (rows, summed, columns) of each `tl.dot` of a test.

    It also mends bfloat16, which the interpreter holds as bit patterns: its `tl.dot` multiplies these as integers, and
    its rounding from float32 is not to nearest even.
    """
    shapes: list[tuple[int, ...]] = []
    create_dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *args: object) -> TensorHandle:
        shapes.append((*a.data.shape, b.data.shape[1]))
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(_bf16_to_fp32(x.data), tl.float32) for x in (a, b))
        return create_dot(self, a, b, *args)

    def cast_impl(self: InterpreterBuilder, x: TensorHandle, dtype: tl.dtype) -> TensorHandle:
        if (x.dtype.scalar, dtype.scalar) == (tl.float32, tl.bfloat16):
            return TensorHandle(_fp32_to_bf16(np.asarray(x.data)), tl.bfloat16)
        return cast(self, x, dtype)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    return shapes
