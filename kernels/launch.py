"""Say how a kernel is to be launched before it is, so that one can also just compile it, or count.

Importing this mends Triton where a version of it can't do what the kernels need; see `triton36.py`, `interpreter.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from . import interpreter, triton36

# Here, because every kernel is launched by way of this.
triton36.mend()
interpreter.mend()


class Launch(NamedTuple):
    """`kernel[grid](*args, **options)`."""

    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]
