"""Define a small MLP flow map for points in the plane, tiny images laid flat, tests, and examples."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill.nn import full_precision, sinusoids

# The angular frequencies are 1 .. 8: smooth in t, so that du/dt stays moderate.
TIME_FEATURES = 8
MAX_FREQUENCY = 8.0


class MLP(nn.Module):
    """Compute u(x, t, s, y) by Linear and SiLU layers on x laid flat and on sinusoids of t and of t - s.

    It is too small to gain from 16 bits, so autocast doesn't touch it.

    Args:
        dim: numbers in a sample: 2 for a point in the plane, 64 for an image of 8 x 8 pixels.
        width: width of the hidden layers.
        depth: number of hidden layers.
        num_classes: labels 0 .. num_classes - 1; `num_classes` itself is "no label". With 0 labels are ignored.
        guidance: take a guidance scale as input, g.

    Attributes:
        config: the arguments above: ``MLP(**net.config)`` has the same architecture.

    Raises:
        ValueError: an argument breaks these rules; the message names it.
    """

    def __init__(
        self, *, dim: int = 2, width: int = 96, depth: int = 3, num_classes: int = 0, guidance: bool = False
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"dim": dim, "width": width, "depth": depth}
        for name, value in self.config.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes: expected an integer from 0 up, got {num_classes!r}")
        self.config |= {"num_classes": num_classes, "guidance": guidance}
        self.dim, self.num_classes = dim, num_classes
        self.in_layer = nn.Linear(dim + 2 * TIME_FEATURES, width)
        self.hidden_layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.out_layer = nn.Linear(width, dim)
        self.y_embedder = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.g_embedder = nn.Linear(TIME_FEATURES, width) if guidance else None

    @property
    def last_layer(self) -> nn.Module:
        """Return the layer with which `forward` ends; another one of its shape gives the trunk another output."""
        return self.out_layer

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        y: Tensor | None = None,
        *,
        g: Tensor | None = None,
        last_layer: nn.Module | None = None,
    ) -> Tensor:
        """Return the average velocity from t to s at x.

        Args:
            x: (B, ...), with `dim` numbers in each sample.
            t: (B,) in [0, 1], the time to start from.
            s: (B,) in [0, t], the time to reach.
            y: (B,) int64 in [0, num_classes], or None for "no label"; ignored by a network without classes.
            g: (B,) guidance scales > 0, for a network with `guidance`; None means 1, no guidance.
            last_layer: replaces the network's own, e.g. by an auxiliary head in training; None keeps its own.

        Returns:
            u, of x's shape.

        Raises:
            ValueError: a shape breaks these rules, or g is given without `guidance`; the message names the argument.
        """
        if x.dim() < 2 or x.shape[1:].numel() != self.dim:
            raise ValueError(f"x: expected (B, {self.dim}), got {tuple(x.shape)}")
        for name, time in (("t", t), ("s", s)):
            if time.shape != x.shape[:1]:
                raise ValueError(f"{name}: expected ({x.shape[0]},), one for each point, got {tuple(time.shape)}")
        times = [sinusoids(time, TIME_FEATURES, MAX_FREQUENCY).to(x.dtype) for time in (t, t - s)]
        with full_precision(x.device):
            h = self.in_layer(torch.cat([x.flatten(1), *times], dim=-1))
            if self.y_embedder is not None:
                h = h + self.y_embedder(torch.full(t.shape, self.num_classes, device=t.device) if y is None else y)
            if self.g_embedder is not None:
                scale = guidance_time(g, t)
                h = h + self.g_embedder(sinusoids(scale, TIME_FEATURES, MAX_FREQUENCY).to(x.dtype))
            elif g is not None:
                raise ValueError("g: this network takes no guidance scale; make it with guidance=True")
            h = F.silu(h)
            for layer in self.hidden_layers:
                h = F.silu(layer(h))
            return (self.last_layer if last_layer is None else last_layer)(h).view_as(x)


def guidance_time(g: Tensor | None, like: Tensor) -> Tensor:
    """Return the number by which a time embedding takes a guidance scale: 1 / g, (B,), which varies where g is small.

    A missing scale counts as 1.
    """
    return torch.ones_like(like) if g is None else g.to(like).reciprocal()
