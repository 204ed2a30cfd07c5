"""Check the gate: over a ratio it fails and names the records, and it refuses what can't be compared."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastdistill.benchmarks.report.records import load
from fastdistill.benchmarks.report.regressions import find_regressions, main
from tests.benchmarks.report import made_up

ROOT = Path(__file__).parents[3]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Write the file to compare with."""
    return made_up.written(tmp_path / "old.json", made_up.document())


def told(old: Path, table: Any, status: int, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Return what the comparison prints, after checking its status."""
    new = made_up.written(old.with_name("new.json"), table)
    assert main([str(old), str(new), *options]) == status
    output = capsys.readouterr()
    return output.out + output.err


def test_the_same_passes(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check every metric that is in the file."""
    for metric in ("median", "peak_memory"):
        text = told(old, made_up.document(), 0, capsys, "--metric", metric)
        assert "15 records of ours compared, 0 over 1.05" in text


def test_a_slower_row_fails_by_name(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check one record of ours that is 8 % slower: over 1.05 and under 1.1."""
    table = made_up.document()
    entry = table["benchmarks"][0]
    entry["stats"]["median"] *= 1.08
    text = told(old, table, 1, capsys)
    assert "scaling: attention, N256-D64, bfloat16, forward: ours triton: median 1.063 ms -> 1.148 ms, 1.080x" in text
    assert "15 records of ours compared, 1 over 1.05" in text
    assert "0 over 1.1" in told(old, table, 0, capsys, "--ratio", "1.1")


def test_a_faster_row_is_told_and_passes(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check all of ours when they are twice as fast."""
    text = told(old, made_up.document(speed=2.0), 0, capsys)
    assert text.count("0.500x") == 15 and "Better by as much" in text


def test_memory_is_compared_by_itself(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check a record that takes a tenth more memory in the same time."""
    table = made_up.document()
    table["benchmarks"][0]["extra_info"]["peak_memory_bytes"] *= 1.1
    assert "0 over" in told(old, table, 0, capsys)
    assert "peak_memory 603,979,776 -> 664,377,754, 1.100x" in told(old, table, 1, capsys, "--metric", "peak_memory")


def test_peers_fail_nothing(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that a slower peer, which tells about the machine, fails nothing."""
    table = made_up.document()
    for entry in table["benchmarks"]:
        entry["stats"]["median"] *= 1 if entry["extra_info"]["kind"] == "ours" else 1.2
    text = told(old, table, 0, capsys)
    assert "Peers and floors that moved" in text and text.count("1.200x") == 29


@pytest.mark.parametrize("status", ["failed parity", "oom", "error"])
def test_a_row_that_is_lost_fails(old: Path, status: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Check a record that had a time, and now is wrong or doesn't run."""
    table = made_up.document()
    info = table["benchmarks"].pop(0)["extra_info"]
    table["not_timed"].append(info | {"status": status, "reason": "because"})
    assert f"median was 1.063 ms, now {status}: because" in told(old, table, 1, capsys)


def test_rows_of_one_file_are_listed(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check a record that went, one that came, and one that is no longer available."""
    table = made_up.document()
    entry = table["benchmarks"].pop(0)
    table["benchmarks"].append(made_up.timed("ours triton", 512))
    info = table["benchmarks"].pop(0)["extra_info"]
    table["not_timed"].append(info | {"status": "unavailable", "reason": "not installed"})
    text = told(old, table, 0, capsys)
    before, after = text.split("Only in NEW:")
    assert f"  scaling: attention, {entry['extra_info']['case']}, bfloat16, forward: ours triton" in before
    assert "in the other: unavailable: not installed" in before
    assert "N512-D64" in after


def test_other_devices_are_refused_unless_told(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check for status 2 and both names; with the option they are compared."""
    table = made_up.document(gpu="Other GPU")
    text = told(old, table, 2, capsys)
    assert f"on {made_up.GPU}" in text and "on Other GPU" in text and "--across-devices" in text
    assert "15 records of ours compared" in told(old, table, 0, capsys, "--across-devices")


def test_counts_are_the_same_on_every_device(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that counts of different devices are compared, because the code alone decides them."""
    tables = [made_up.document(), made_up.document(gpu="Other GPU")]
    for table, moved in zip(tables, (100, 101)):
        table["benchmarks"][0]["extra_info"]["bytes_moved"] = moved
    made_up.written(old, tables[0])
    options = ("--metric", "bytes_moved", "--ratio", "1")
    assert "bytes_moved 100 -> 101, 1.010x" in told(old, tables[1], 1, capsys, *options)


def test_nothing_in_common_is_no_success(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check records without the metric, and files without records of ours."""
    assert "nothing was compared" in told(old, made_up.document(), 2, capsys, "--metric", "instructions")
    table = made_up.document()
    table["benchmarks"] = [x for x in table["benchmarks"] if x["extra_info"]["kind"] != "ours"]
    assert "nothing was compared" in told(old, table, 2, capsys)


def test_from_nothing_to_something_is_worse(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that a count that grows from zero fails, although it has no finite ratio."""
    tables = [made_up.document(), made_up.document()]
    for table, flops in zip(tables, (0, 1)):
        table["benchmarks"][0]["extra_info"]["matmul_flops"] = flops
    made_up.written(old, tables[0])
    assert "matmul_flops 0 -> 1, infx" in told(old, tables[1], 1, capsys, "--metric", "matmul_flops")


def test_a_damaged_file_has_status_2(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that there is one message, without a traceback."""
    text = told(old, [], 2, capsys)
    assert text.startswith("regressions: ") and "new.json: expected an object" in text and text.count("\n") == 1


@pytest.mark.parametrize(("ratio", "metric"), [(0.9, "median"), (float("nan"), "median"), (1.1, "speed")])
def test_a_ratio_or_metric_that_there_isnt_is_refused(old: Path, ratio: float, metric: str) -> None:
    """Check that the message names the argument."""
    with pytest.raises(ValueError, match=r"^(ratio|metric): expected"):
        find_regressions(load(old), load(old), ratio=ratio, metric=metric)


def test_it_runs_as_a_command(old: Path) -> None:
    """Run `python -m fastdistill.benchmarks.report.regressions`, as the documentation has it."""
    command = [sys.executable, "-m", "fastdistill.benchmarks.report.regressions", str(old), str(old)]
    paths = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=paths)
    assert done.returncode == 0, done.stderr
    assert "0 over 1.05" in done.stdout
