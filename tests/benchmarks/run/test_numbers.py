"""Test the formats of numbers."""

from __future__ import annotations

import pytest

from fastdistill.benchmarks.run.numbers import errors, number, seconds, size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.5, "2.5 s"),
        (0.0123456, "12.35 ms"),
        (1e-3, "1 ms"),
        (4.2e-5, "42 µs"),
        (4.5e-6, "4.5 µs"),
        (2.0, "2 s"),
        (0.0123, "12.3 ms"),
        (3e-9, "3 ns"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    """Check for four digits and a unit."""
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 KiB"),
        (13824, "13.5 KiB"),
        (2**20, "1 MiB"),
        (5 * 2**20, "5 MiB"),
        (5 * 2**30, "5,120 MiB"),
        (2**34, "16 GiB"),
    ],
)
def test_size(value: int, text: str) -> None:
    """Check units from KiB to GiB."""
    assert size(value) == text


def test_errors() -> None:
    """Check one error, two, one of two, and none."""
    assert errors(1.25e-3) == "1.3e-03"
    assert errors({"output": 1e-7, "tangent": 2e-7}) == "1.0e-07 / 2.0e-07"
    assert errors({"output": 1e-7, "tangent": None}) == "1.0e-07 / –"
    assert errors({"output": None, "tangent": None}) == errors(None) == ""


def test_number() -> None:
    """Check three digits, or all digits before the point, and an empty text for None."""
    assert [number(x) for x in (0.012345, 12.345, 999.6, 123456.0, None)] == ["0.0123", "12.3", "1e+03", "123,456", ""]
