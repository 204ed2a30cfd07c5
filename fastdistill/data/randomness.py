"""Provide the randomness of a run: streams of random numbers by seed and step, and rows and labels drawn from them.

A training step consumes random rows, times, noise and dropped labels. Each is a pure function of
`(seed, stream, step)`, so that a run resumes exactly without any saved state, and a step can be replayed alone.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator_at(seed: int, stream: str, step: int = 0) -> torch.Generator:
    """Return a CPU generator that depends on nothing but its arguments; streams are independent of each other.

    The arguments are hashed because torch's CPU generator keeps only 32 bits of its seed, and neighbouring steps must
    not collide.
    """
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def epoch_rows(total: int, seed: int, step: int, size: int) -> Tensor:
    """Return the row numbers (size,) of a step's batch.

    The batches cut an endless series of permutations of `total` rows; each permutation is an epoch, drawn from `seed`.
    """
    rows: list[Tensor] = []
    position, end = step * size, (step + 1) * size
    while position < end:
        epoch, offset = divmod(position, total)
        order = torch.randperm(total, generator=generator_at(seed, "epoch", epoch))
        rows.append(order[offset : offset + end - position])
        position += len(rows[-1])
    return torch.cat(rows)


def drop_labels(y: Tensor, share: float, null: int, generator: torch.Generator) -> Tensor:
    """Replace each label by `null` ("no label") with probability `share`, to train for classifier-free guidance."""
    return torch.where(torch.rand(y.shape, generator=generator) < share, null, y)
