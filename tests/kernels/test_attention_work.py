"""Test what the kernel leaves out: matmuls with zeros, and unseen tiles. The interpreter counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdistill import reference
from tests.kernels.attention_cases import CAUSAL, inputs, packed_inputs, run

TILE = 32


def live(seen: Tensor) -> Tensor:
    """Return in which tiles of a mask (N, M) there is something to see; N and M are whole tiles."""
    return seen.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE)).any(3).any(1)


@pytest.mark.parametrize(
    ("tangents", "count"),
    [("", 2), ("q", 4), ("k", 4), ("v", 3), ("qv", 5), ("kv", 5), ("qk", 5), ("qkv", 6), ("M", 3)],
)
def test_zero_tangents_cost_no_matmul(tangents: str, count: int, matmuls: list[tuple[int, ...]]) -> None:
    """Count in one tile and part: 2 for o, 1 for each of q, k, v with a tangent, and 1 if the logits move."""
    primals, directions = inputs(tangents, n=32, m=32, d=32)
    if tangents == "M":
        primals["attn_mask"] = directions["attn_mask"] = torch.zeros(1, 1, 32, 32)
    run(primals, directions)
    assert len(matmuls) == count


def test_a_head_dim_of_72_is_computed_as_64_and_16(matmuls: list[tuple[int, ...]]) -> None:
    """Check that the work is 1.11 times as much, and not 1.78 times, as with 128."""
    run(*inputs("", n=32, m=32, d=72))
    assert matmuls == [(32, 64, 32), (32, 16, 32), (32, 32, 64), (32, 32, 16)]


def test_causal_skips_the_tiles_above_the_diagonal(matmuls: list[tuple[int, ...]]) -> None:
    """Count 6 of 9 tiles."""
    run(*inputs("", n=96, m=96, d=16), window=CAUSAL)
    assert len(matmuls) == 2 * 6


@pytest.mark.parametrize("lower_right", [False, True])
@pytest.mark.parametrize("window", [CAUSAL, (0, -1), (20, 10), (40, 40), (0, 0)], ids=str)
def test_tiles_outside_a_band_are_skipped(
    window: tuple[int, int], lower_right: bool, matmuls: list[tuple[int, ...]]
) -> None:
    """Check both sides."""
    run(*inputs("", n=96, m=160, d=16), window=window, lower_right=lower_right)
    assert len(matmuls) == 2 * live(reference.band(96, 160, window, lower_right)).sum()


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("window", [(-1, -1), (50, 40)], ids=str)
def test_tiles_hidden_by_a_mask_are_skipped(kind: str, window: tuple[int, int], matmuls: list[tuple[int, ...]]) -> None:
    """Check blocks of documents, one of which nobody sees; beside a band, what either hides is skipped."""
    document = torch.arange(160) // 40
    seen = (document[:96, None] == document) & (document != 1)
    primals, tangents = inputs("", heads=2, n=96, m=160, d=16)
    primals["attn_mask"] = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    run(primals, tangents, window=window)
    both = live(seen) & live(reference.band(96, 160, window, False))
    assert len(matmuls) == 2 * 2 * int(both.sum()) < 2 * 2 * 15


def test_keys_behind_the_padding_are_skipped(matmuls: list[tuple[int, ...]]) -> None:
    """Check samples of 30 and of 100 keys: 1 and 4 tiles for each tile of queries."""
    primals, tangents = inputs("", batch=2, n=64, m=160, d=16)
    primals["attn_mask"] = (torch.arange(160) < torch.tensor([[30], [100]]))[:, None, None]
    run(primals, tangents)
    assert len(matmuls) == 2 * 2 * (1 + 4)


def test_packed_sequences_cost_what_they_cost_alone(matmuls: list[tuple[int, ...]]) -> None:
    """Check that short ones are not padded to the longest, and that none sees another."""
    primals, _, cu_seqlens = packed_inputs([96, 32, 0, 1], [64, 32, 64, 33], d=16)
    run(primals, {}, cu_seqlens=cu_seqlens)
    assert len(matmuls) == 2 * (3 * 2 + 1 + 0 + 2)
