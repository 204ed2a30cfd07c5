"""Triton's interpreter holds bfloat16 as bit patterns and, up to 3.9, gets them wrong in two places: mended here.

- `tl.dot` multiplies the bit patterns, as integers.
- Casts drop bits from float32 instead of rounding to nearest even as a GPU does, and lose the smallest numbers on the
  way back.
The kernels compute with bfloat16 nowhere else: what they load becomes float32, or goes into `tl.dot`. float8 is no
dtype of theirs.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from functools import wraps
from typing import Any

import triton
import triton.language as tl


def mend() -> None:
    """Patch the interpreter if TRITON_INTERPRET asks for it, once; what it does in other dtypes stays as it is."""
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    if hasattr(cast_impl, "__wrapped__"):
        return

    @wraps(create_dot)
    def dot_of_values(self, a, b, *rest: Any):
        a, b = (TensorHandle(_values(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return create_dot(self, a, b, *rest)

    @wraps(cast_impl)
    def cast_of_values(self, x, dtype):
        source, target = x.dtype.scalar, dtype.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return cast_impl(self, x, dtype)
        if source == tl.bfloat16:
            x = TensorHandle(_values(x.data), tl.float32)
            return x if target == tl.float32 else cast_impl(self, x, dtype)
        if source != tl.float32:
            x = cast_impl(self, x, tl.float32)
        return TensorHandle(_rounded(x.data), tl.bfloat16)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = dot_of_values, cast_of_values


def _values(bits: Any) -> Any:
    """Return the float32 numbers that bfloat16 patterns stand for; both are NumPy arrays."""
    return (bits.astype("uint32") << 16).view("float32")


def _rounded(x: Any) -> Any:
    """Return the bfloat16 patterns of float32 numbers, to nearest even; NaN stays NaN."""
    bits = x.view("uint32")
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return (nearest * (x == x) + 0x7FC0 * (x != x)).astype("uint16")
