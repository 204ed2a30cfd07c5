"""Randomness of a run: streams of random numbers by seed and step, and what is drawn from them.

Everything random that a training step consumes (which rows, times, noise, dropped labels) is a pure function of
`(seed, stream, step)`: nothing has to be saved to resume exactly, and a step can be replayed alone.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator_at(seed: int, stream: str, step: int = 0) -> torch.Generator:
    """Return a CPU generator that depends on its arguments only; streams are independent of each other.

    The three are hashed because torch's CPU generator keeps 32 bits of its seed: neighbouring steps must not collide.
    """
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def epoch_rows(total: int, seed: int, step: int, size: int) -> Tensor:
    """Return row numbers (size,) of the batch at this step of an endless series of seeded permutations of `total`."""
    rows: list[Tensor] = []
    position, end = step * size, (step + 1) * size
    while position < end:
        epoch, offset = divmod(position, total)
        order = torch.randperm(total, generator=generator_at(seed, "epoch", epoch))
        rows.append(order[offset : offset + end - position])
        position += len(rows[-1])
    return torch.cat(rows)


def drop_labels(y: Tensor, share: float, null: int, generator: torch.Generator) -> Tensor:
    """Replace each label by `null` ("no label") with probability `share`: the training of classifier-free guidance."""
    return torch.where(torch.rand(y.shape, generator=generator) < share, null, y)
