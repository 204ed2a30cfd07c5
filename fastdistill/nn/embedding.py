"""Embed times and positions in the forward, without storing anything.

So nothing is rounded by ``.bfloat16()``, lost by ``.to_empty()``, or tied to one image size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastdistill import ops
from fastdistill.nn.basic import Linear, SiLU, full_precision


class TimestepEmbedding(nn.Module):
    """Embed a time t in [0, 1] as a vector: sinusoids of t, then Linear, SiLU, Linear.

    DiT feeds 1000 t to frequencies up to 1. Nothing there needs the derivative in t, but du/dt of a flow map does, and
    with frequencies up to 1000 it is huge, noisy, and meaningless in 16 bits. Here t is not scaled and the frequencies
    stop at `max_frequency`. Everything runs in the dtype of the parameters, autocast or not.

    Args:
        width: C of the output.
        features: number of sinusoids (even).
        max_frequency: the highest angular frequency in radians per unit of t.

    Args of forward:
        t: (B,).

    Returns:
        (B, width).
    """

    def __init__(self, width: int, features: int = 256, max_frequency: float = 16.0) -> None:
        super().__init__()
        self.features = features
        self.max_frequency = max_frequency
        self.fc1 = Linear(features, width)
        self.fc2 = Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        with full_precision(t.device):
            embedded = sinusoids(t, self.features, self.max_frequency).to(self.fc1.weight.dtype)
            return self.fc2(ops.silu(self.fc1(embedded)))


class TimestepEmbedder(nn.Module):
    """Embed times as DiT and SiT do, with their state dict (``mlp.0``, ``mlp.2``), in the parameters' dtype.

    DiT calls it with t in [0, 1000], SiT with t in [0, 1]; nothing is scaled here.

    Args:
        hidden_size: C of the output.
        frequency_embedding_size: number of sinusoids.

    Args of forward:
        t: (B,).

    Equivalent to: ``mlp[2](silu(mlp[0](timestep_embedding(t, frequency_embedding_size))))``.
    """

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256) -> None:
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            Linear(frequency_embedding_size, hidden_size), SiLU(), Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        with full_precision(t.device):
            embedded = ops.timestep_embedding(t, self.frequency_embedding_size)
            return self.mlp(embedded.to(self.mlp.get_parameter("0.weight").dtype))


def sinusoids(t: Tensor, features: int, max_frequency: float) -> Tensor:
    """Return cos and sin of t at geometrically spaced angular frequencies from 1 to `max_frequency`.

    Args:
        t: (B,); computed in float32 at least.
        features: even, 4 or more.

    Returns:
        (B, features) float32, or float64 for a float64 t: cosines first.

    Raises:
        ValueError: `features` is odd or below 4.
    """
    if features < 4 or features % 2:
        raise ValueError(f"features: expected an even number from 4 up, got {features}")
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    exponent = torch.linspace(0.0, 1.0, features // 2, device=t.device, dtype=t.dtype)
    angles = t[:, None] * max_frequency**exponent
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_2d(grid: tuple[int, int], width: int, like: Tensor) -> Tensor:
    """Return the fixed 2-D sine-cosine position embedding of MAE and DiT.

    Half of the width encodes the column, half the row; each half is sines, then cosines, at frequencies
    10000^(-i / (width / 4)).

    Args:
        grid: (rows, columns) of tokens; tokens are numbered row by row.
        width: C, a multiple of 4.
        like: a tensor whose device and dtype to take.

    Returns:
        (rows * columns, C).

    Raises:
        ValueError: `width` is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width: expected a multiple of 4, got {width}")
    row_angles, column_angles = _grid_angles(grid, width // 4, like.device)
    parts = [column_angles.sin(), column_angles.cos(), row_angles.sin(), row_angles.cos()]
    return torch.cat(parts, dim=-1).to(like.dtype)


def _grid_angles(grid: tuple[int, int], count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the row and column number of each token times `count` frequencies, both (rows * columns, count) float64.

    float64 costs nothing here, and a float64 network must not inherit float32 positions.
    """
    rows, columns = grid
    exponent = torch.arange(count, device=device, dtype=torch.float64) / count
    frequencies = torch.exp(-math.log(10000.0) * exponent)
    row = torch.arange(rows, device=device, dtype=torch.float64)[:, None] * frequencies
    column = torch.arange(columns, device=device, dtype=torch.float64)[:, None] * frequencies
    return row.repeat_interleave(columns, dim=0), column.repeat(rows, 1)
