"""Choose which implementation of an op runs, and refuse one that cannot."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import torch

IMPLEMENTATIONS = ("auto", "torch", "triton", "cuda")

# Asked once: torch.compile of torch 2.11 can't trace these questions.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def triton_problem(device: torch.device) -> str | None:
    """Return why the Triton kernels can't run on tensors of `device`, or None where they can."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"tensors are on {device.type!r}; Triton needs a CUDA device (or TRITON_INTERPRET=1 to interpret on the CPU)"


@cache
def implementation(family: str, chosen: str) -> Any:
    """Return the module that implements an op family: plain PyTorch, or the Triton kernels, imported when needed."""
    return importlib.import_module(
        f"fastdistill.kernels.{family}" if chosen == "triton" else f"fastdistill.ops.{family}.eager"
    )


@cache
def limit(name: str) -> int:
    """Return one of the kernels' limits by its name in `kernels/limits.py`, which loads no Triton."""
    value: int = getattr(importlib.import_module("fastdistill.kernels.limits"), name)
    return value


def check_impl(impl: str, device: torch.device) -> None:
    """Refuse an unknown implementation, or an explicit one that can't run here: explicit requests never fall back."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}")
    if impl == "cuda":
        raise ValueError("impl='cuda': this version has no CUDA extension; use 'triton', 'torch' or 'auto'")
    if impl == "triton" and (problem := triton_problem(device)):
        raise ValueError(f"impl='triton' cannot run: {problem}")
