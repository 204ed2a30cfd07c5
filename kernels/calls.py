"""How a kernel is to be launched, said before it is: so one can also just compile it, or count."""

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
