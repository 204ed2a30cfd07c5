"""A small MLP flow map for points in the plane: the eight-Gaussian ring, tests, and examples."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill.nn import full_precision, sinusoids

# Angular frequencies 1 .. 8: smooth in t, so that du/dt stays moderate.
TIME_FEATURES = 8
MAX_FREQUENCY = 8.0


class MLP(nn.Module):
    """u(x, t, s) for points: Linear and SiLU layers on x and sinusoids of t and of t - s.

    It is too small to gain from 16 bits, so autocast doesn't touch it.

    Args:
        dim: of a point.
        width: of the hidden layers.
        depth: how many hidden layers.

    Attributes:
        config: the arguments above: ``MLP(**net.config)`` has the same architecture.

    Raises:
        ValueError: an argument that is no positive integer, by name.
    """

    def __init__(self, *, dim: int = 2, width: int = 96, depth: int = 3) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"dim": dim, "width": width, "depth": depth}
        for name, value in self.config.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        self.dim = dim
        self.in_layer = nn.Linear(dim + 2 * TIME_FEATURES, width)
        self.hidden_layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.out_layer = nn.Linear(width, dim)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        """The average velocity from t to s at x.

        Args:
            x: (B, dim).
            t: (B,) in [0, 1], from.
            s: (B,) in [0, t], to.
            y: ignored: points have no labels. Accepted so that every network is called alike.

        Returns:
            u: (B, dim).

        Raises:
            ValueError: a shape outside these rules, naming the argument.
        """
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x: expected (B, {self.dim}), got {tuple(x.shape)}")
        for name, time in (("t", t), ("s", s)):
            if time.shape != x.shape[:1]:
                raise ValueError(f"{name}: expected ({x.shape[0]},), one for each point, got {tuple(time.shape)}")
        times = [sinusoids(time, TIME_FEATURES, MAX_FREQUENCY).to(x.dtype) for time in (t, t - s)]
        with full_precision(x.device):
            h = F.silu(self.in_layer(torch.cat([x, *times], dim=-1)))
            for layer in self.hidden_layers:
                h = F.silu(layer(h))
            return self.out_layer(h)
