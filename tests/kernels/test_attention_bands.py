"""Test by brute force which query meets which key."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistill import reference
from fastdistill.kernels import attention_bands
from tests.kernels.device import DEVICE

BLOCK, STEP = 4, 2
FAR = attention_bands.UNLIMITED.value


@triton.jit
def _visible_kernel(CASES, OUT, cases, BLOCK: tl.constexpr, STEP: tl.constexpr):
    case = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    live = case < cases
    start, low = tl.load(CASES + 4 * case, mask=live), tl.load(CASES + 4 * case + 1, mask=live)
    high, length = tl.load(CASES + 4 * case + 2, mask=live), tl.load(CASES + 4 * case + 3, mask=live)
    bounds = attention_bands.visible(start, low, high, length, BLOCK, STEP)
    for i in tl.static_range(4):
        tl.store(OUT + 4 * case + i, bounds[i], mask=live)


def test_visible_tiles_are_those_that_a_band_meets() -> None:
    """Check all small cases: nothing seen lies outside, and tiles that are called whole are whole.

    The seen tiles are all that are visited, except for bands that a row's first or last key leaves empty.
    """
    sides = [*range(-6, 7), -FAR, FAR]
    cases = [
        (start, low, high, length)
        for start, low, high, length in itertools.product(range(0, 9, BLOCK), sides, sides, range(8))
        if low <= high + 1
    ]
    given = torch.tensor(cases, dtype=torch.int32, device=DEVICE)
    bounds = torch.empty_like(given)
    _visible_kernel[(triton.cdiv(len(cases), 1024),)](given, bounds, len(cases), BLOCK=BLOCK, STEP=STEP)
    for (start, low, high, length), (begin, whole_begin, whole_end, end) in zip(cases, bounds.tolist()):
        case = (start, low, high, length)
        sees = [{j for j in range(length) if i + low <= j <= i + high} for i in range(start, start + BLOCK)]
        union, common = set.union(*sees), set.intersection(*sees)
        assert begin % STEP == 0 and all(begin <= j < end for j in union), case
        whole = set(range(whole_begin, whole_end))
        assert whole_begin % STEP == 0 and whole <= common, case
        tiles = [set(range(tile, tile + STEP)) for tile in range(begin, end, STEP)]
        if common:  # The ends cut off no row's band.
            assert all(tile & union for tile in tiles), case
            assert all(tile <= whole for tile in tiles if tile <= common), case


def mask_of(kind: str, seen: Tensor) -> Tensor:
    """Return a bool mask, or a float mask that hides the same."""
    if kind == "bool":
        return seen
    return torch.zeros(seen.shape, device=DEVICE).masked_fill(~seen, -torch.inf)


def live_lists(mask: Tensor, block_row: int, block_col: int) -> dict[tuple[int, ...], list[int]]:
    """Return the live tiles of each row of tiles, for all samples and heads, read as the kernels do."""
    tiles = attention_bands.live_tiles(mask, block_row, block_col)
    batch, heads, n, _ = mask.shape
    live, before = tiles.live.flatten(0, 2).tolist(), tiles.before.flatten(0, 2).tolist()
    found = {}
    for b, h, row in itertools.product(range(batch), range(heads), range(triton.cdiv(n, block_row))):
        line = b * tiles.stride_b + h * tiles.stride_h + row * tiles.stride_row
        listed = live[line][: before[line][-1]]
        assert len(live[line]) == tiles.width and len(before[line]) == tiles.width + 1
        assert before[line] == [sum(j < tile for j in listed) for tile in range(tiles.width + 1)]
        found[b, h, row] = listed
    return found


@pytest.mark.parametrize(
    "shape", [(2, 3, 10, 13), (2, 1, 10, 13), (1, 3, 1, 13), (2, 1, 10, 1), (1, 1, 8, 12)], ids=str
)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_live_tiles_are_those_with_a_key_to_see(shape: tuple[int, ...], kind: str) -> None:
    """Check their order, in every layout of a broadcast mask, with ragged ends."""
    seen = torch.rand(shape, device=DEVICE) > 0.85
    full = seen.expand(2, 3, shape[2] if shape[2] > 1 else 10, shape[3] if shape[3] > 1 else 13)
    found = live_lists(mask_of(kind, seen).expand(full.shape), 4, 3)
    for (b, h, row), listed in found.items():
        rows = full[b, h, 4 * row : 4 * row + 4]
        assert listed == [j for j in range(triton.cdiv(full.shape[3], 3)) if rows[:, 3 * j : 3 * j + 3].any()]


def test_a_padding_mask_has_one_list_a_sample() -> None:
    """Check that it has one, however many heads and queries share it."""
    tiles = attention_bands.live_tiles(torch.ones(2, 1, 1, 64, dtype=torch.bool).expand(2, 8, 512, 64), 32, 32)
    assert tiles.live.shape == (2, 1, 1, 2) and (tiles.stride_h, tiles.stride_row) == (0, 0)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 1), (0, -1), (20, 20), (9, 9), (8, 8)], ids=str)
def test_a_limit_that_no_query_reaches_is_none(window: tuple[int, int]) -> None:
    """Check that it then costs nothing and can't overflow, and that the band stays the same."""
    for n, m in ((5, 9), (9, 5)):
        q, k = torch.empty(1, 4, n, 8), torch.empty(1, 2, m, 8)
        problem = attention_bands.problem_of(q, k, window, None)
        assert problem[:5] == (4, 2, n, m, n)
        sides: Any = tuple(-1 if side is None else side for side in (problem.left, problem.right))
        for lower_right in (False, True):
            assert torch.equal(reference.band(n, m, sides, lower_right), reference.band(n, m, window, lower_right))
    assert attention_bands.problem_of(q, k, (10**12, 10**12), None)[5:7] == (None, None)
