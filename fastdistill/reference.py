"""Gather the specifications of all ops: plain PyTorch, differentiable in both modes, what tests hold to be true.

Each stands in the room of its op, `fastdistill/ops/<op>/reference.py`; this gathers them under their names.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import FunctionType
from typing import Any

from fastdistill import ops


def _gathered() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for room in pkgutil.iter_modules(ops.__path__):
        if room.ispkg and room.name != "protocol":
            module = importlib.import_module(f"fastdistill.ops.{room.name}.reference")
            found |= {
                name: value
                for name, value in vars(module).items()
                if isinstance(value, FunctionType) and value.__module__ == module.__name__ and name[0] != "_"
            }
    return found


def __getattr__(name: str) -> Any:
    raise AttributeError(f"reference: expected one of {', '.join(__all__)}, got {name!r}")


globals().update(_gathered())
__all__ = sorted(_gathered())
