"""Test which records belong into one picture, and along what its curves run."""

from __future__ import annotations

from typing import Any

import pytest

from fastdistill.benchmarks.report.records import Key, Record
from fastdistill.benchmarks.report.series import gather, in_order, throughput_of


def row(shape: dict[str, Any], median: float | None = 1.0, provider: str = "ours", **more: Any) -> Record:
    """Return a record of ours, by default of attention; its case is its shape."""
    kind = {"ours": "ours", "floor": "floor"}.get(provider, "peer")
    key = Key(more.get("suite", "s"), more.get("op", "attention"), str(shape), "float32", "forward", provider)
    info = {"shape": shape, "flops": 200.0, "bytes": 2.0, "tflops": 3.0, "gbs": 4.0, **more}
    return Record(key, kind, "ok" if median else "oom", info, median)


def square(n: int, d: int = 64, batch: int = 1, model: str = "lengths", **more: Any) -> dict[str, Any]:
    """Return the shape of a self-attention."""
    return {"batch": batch, "heads": 2, "n": n, "m": n, "d": d, "model": model, **more}


def test_a_curve_runs_along_n_and_fills_its_batch() -> None:
    """Check that keys follow queries, the batch may shrink, and names of sizes don't part what belongs together."""
    rows = [row(square(n, batch=4096 // n, model=f"DiT-XL/2-{n}px")) for n in (256, 1024, 4096)]
    (series,) = gather(rows)
    assert (series.length, series.title) == ("n", "attention, DiT-XL/2, heads 2, head dim 64, float32")
    (curve,) = series.panels["forward"]
    assert list(curve.records) == [256, 1024, 4096]


def test_another_head_dim_or_other_keys_are_another_picture() -> None:
    """Check that there are three: two head dims, and cross-attention to a text."""
    shapes = [square(n, d) for d in (64, 128) for n in (32, 64)] + [square(n) | {"m": 77} for n in (32, 64)]
    titles = [series.title for series in gather(map(row, shapes))]
    assert titles == [
        "attention, lengths, heads 2, head dim 64, float32",
        "attention, lengths, heads 2, head dim 128, float32",
        "attention, lengths, heads 2, keys 77, head dim 64, float32",
    ]


def test_what_has_one_length_runs_along_its_head_dim_or_its_channels() -> None:
    """Check the sweep over D beside the sweep over N that it meets in one shape, and norms of several widths."""
    sweep = [square(n) for n in (256, 4096)] + [square(4096, d, 8, "head dims") for d in (32, 64, 96)]
    norms = [{"batch": 2, "n": 64, "width": width, "model": f"m{width}"} for width in (384, 768)]
    found = gather([*map(row, sweep), *(row(shape, op="rms_norm") for shape in norms)])
    assert [(series.op, series.length) for series in found] == [
        ("attention", "n"),
        ("attention", "d"),
        ("rms_norm", "width"),
    ]
    assert list(found[1].panels["forward"][0].records) == [32, 64, 96]


def test_a_single_shape_makes_no_picture() -> None:
    """Check that two shapes of which only one was timed make none either."""
    assert gather([row(square(256))]) == []
    assert gather([row(square(256)), row(square(512), median=None)]) == []


def test_what_ran_out_of_memory_stays_in_its_curve() -> None:
    """Check that the record keeps its status, at its length."""
    rows = [row(square(n), provider=name) for n in (256, 512) for name in ("floor", "ours")]
    rows += [row(square(256), provider="peer"), row(square(512), None, "peer")]
    (series,) = gather(rows)
    curves = {curve.provider: curve for curve in series.panels["forward"]}
    assert list(curves) == ["ours", "peer", "floor"]
    assert curves["peer"].records[512].status == "oom"


@pytest.mark.parametrize(
    ("info", "unit"),
    [
        ({}, "TFLOP/s"),
        ({"tflops": 0.01}, "GFLOP/s"),
        ({"flops": 4.0}, "GB/s"),
        ({"flops": None, "bytes": None}, "calls/s"),
    ],
)
def test_a_throughput_has_the_unit_of_what_limits_it(info: dict[str, Any], unit: str) -> None:
    """Check work bound by arithmetic, by moving data, and by neither as far as known."""
    one = row(square(256), median=0.5, **info)
    throughput = throughput_of([one])
    assert throughput.unit == unit
    assert throughput.of(one) == {"TFLOP/s": 3.0, "GFLOP/s": 10.0, "GB/s": 4.0, "calls/s": 2.0}[unit]


def test_rows_stand_from_ours_to_floors_and_from_fast_to_slow() -> None:
    """Check that records without a time stand last of their kind."""
    names = {"floor": 1.0, "b": None, "a": 5.0, "c": 2.0, "ours": 9.0}
    rows = [row(square(256), median, name) for name, median in names.items()]
    assert [x.key.provider for x in in_order(rows)] == ["ours", "c", "a", "b", "floor"]
