"""Say how a kernel is to be launched before it is, so that one can also just compile it, or count.

What all launchers share stands here as well: pairs, and the dtypes that the kernels take.

Importing this mends Triton where a version of it can't do what the kernels need; see `triton36.py`, `interpreter.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import interpreter, triton36

# Here, because every kernel is launched by way of this.
triton36.mend()
interpreter.mend()

FUSION = {"enable_fp_fusion": True}  # x * y + z rounds once, whatever the environment says of Triton's default
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Pairs = Sequence[tuple[Any, Tensor | None]]  # (primal, tangent) of each argument; a tangent of None is zero


class Launch(NamedTuple):
    """Launch of a kernel: `kernel[grid](*args, **options)`."""

    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


def check_dtype(name: str, x: Tensor) -> None:
    """Raise TypeError for a dtype that the kernels cannot take."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16 for the Triton kernel, got {x.dtype}")
