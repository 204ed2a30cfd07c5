"""What autocast asks for, and how ops keep it from their own matmuls."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

AUTOCASTING = frozenset(name for name in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(name))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks for on `device`, or None where it is off or unknown."""
    if device.type in AUTOCASTING and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Ops choose their own precision: inside, autocast doesn't reach their matmuls."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
