"""Specify activations in plain PyTorch, differentiable in both modes: the truth."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def silu(x: Tensor) -> Tensor:
    """Return x logistic(x). Equivalent to: `F.silu(x)`."""
    return x * torch.sigmoid(x)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Return x Phi(x), or its approximation by "tanh". Equivalent to: `F.gelu(x, approximate=approximate)`."""
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up (Shazeer, arXiv:2002.05202)."""
    return silu(gate) * up


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """Return gelu(gate) * up (Shazeer, arXiv:2002.05202)."""
    return gelu(gate, approximate) * up
