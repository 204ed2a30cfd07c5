"""Test how the columns of rows are cut into parts: every head dim, held whole or streamed."""

from __future__ import annotations

import itertools

import pytest

from fastdistill.kernels.tiles import column_parts


@pytest.mark.parametrize("stream", [0, 16, 64])
def test_parts_cover_every_width(stream: int) -> None:
    """Check that there is no gap, that parts are powers of two, and that less than the last part reaches beyond."""
    for width in range(1, 257):
        parts = column_parts(width, stream)
        assert [first for first, _ in parts] == list(itertools.accumulate([0, *(part for _, part in parts[:-1])]))
        assert all(part >= 16 and part & (part - 1) == 0 for _, part in parts)
        assert parts[-1][0] < width <= sum(parts[-1])


def test_parts_held_are_few_and_waste_little() -> None:
    """Check for at most three; of the widths that models have none is padded by more than an eighth, 72 to 80."""
    assert all(len(column_parts(width)) <= 3 for width in range(1, 257))
    for width in (16, 32, 48, 64, 72, 80, 96, 112, 128, 160, 192, 256):
        assert sum(part for _, part in column_parts(width)) <= 1.125 * width, width
    assert column_parts(72) == ((0, 64), (64, 16))


def test_parts_streamed_are_all_alike() -> None:
    """Check that all have the asked width, so that one loop serves all."""
    assert column_parts(72, 32) == ((0, 32), (32, 32), (64, 32)) and column_parts(64, 16)[-1] == (48, 16)
