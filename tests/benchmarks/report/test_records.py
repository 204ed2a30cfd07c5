"""Check that benchmark files are read whole, or refused with the place that is wrong."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdistill.benchmarks.report import records
from fastdistill.benchmarks.report.records import DamagedResults, by_device, load
from fastdistill.benchmarks.run.result_file import ResultFile, entries
from tests.benchmarks import toy
from tests.benchmarks.report import made_up


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Write a made-up file."""
    return made_up.written(tmp_path / "made-up.json", made_up.document())


def test_a_file_is_read_whole(path: Path) -> None:
    """Check every timed record, every other one, and what the file says of its machine."""
    table, results = made_up.document(), load(path)
    assert len(results.records) == len(table["benchmarks"]) + len(table["not_timed"])
    assert results.device == made_up.GPU
    assert results.commit == "0123456789abcdef"
    assert results.ceilings == {"tflops": 700.0, "gbs": 2900.0}
    by_status = {status: [row for row in results.records if row.status == status] for status in records.STATUSES}
    assert all(row.median and not row.reason for row in by_status["ok"])
    assert all(row.median is None and row.reason for row in by_status["oom"])
    assert len(by_status["failed parity"]) == len(made_up.LENGTHS)
    assert results.records[0].sizes() == {"batch": 128, "heads": 16, "n": 256, "m": 256, "d": 64}
    assert results.records[0].number("sm_clock_mhz") == 1755 and results.records[0].number("nothing") is None


def test_rows_that_were_not_timed_may_be_whole_entries(path: Path) -> None:
    """Check entries as the bench writes them: with a name, a group, and `extra_info` in its place."""
    table = made_up.document()
    table["not_timed"] = [{"name": "x", "group": "g", "extra_info": info} for info in table["not_timed"]]
    assert load(made_up.written(path, table)).records == load(made_up.written(path, made_up.document())).records


def test_what_the_bench_writes_is_read(tmp_path: Path) -> None:
    """Check the real writer on a toy op: one result that passed, and one that did not, with its reason."""
    time = toy.Time()
    providers = [time.takes(toy.right(), [1.0]), toy.wrong()]
    outcomes = toy.bench(time).run(toy.op_of(*providers), toy.CASE, providers)
    path = tmp_path / "toy.json"
    ResultFile(path, {"processor": "C", "threads": 1}, {"id": "0123"}).add(*entries(toy.CASE, outcomes, "cpu"))
    results = load(path)
    assert (results.device, results.commit) == ("C, 1 thread", "0123")
    assert {row.key.provider: (row.status, row.median is not None) for row in results.records} == {
        "right": ("ok", True),
        "wrong": ("failed parity", False),
    }
    assert "t_y" in next(row.reason for row in results.records if row.status != "ok")


@pytest.mark.parametrize(
    ("machine", "device"),
    [
        ({"gpu": {"name": "H9"}, "processor": "C"}, "H9"),
        ({"gpu": "H9"}, "H9"),
        ({"gpu": None, "processor": "C", "threads": 1}, "C, 1 thread"),
        ({"cpu": {"brand_raw": "C"}, "threads": 2}, "C, 2 threads"),
        ({}, "unknown device"),
    ],
)
def test_a_device_has_one_name(path: Path, machine: dict[str, Any], device: str) -> None:
    """Check that it is the GPU's name, or the processor's with its threads, because threads change its times."""
    table = made_up.document() | {"machine_info": machine}
    assert load(made_up.written(path, table)).device == device


def test_without_ceilings_there_are_none(path: Path) -> None:
    """Check ceilings that are absent, and that are absent in part."""
    for given, expected in ((None, {}), ({"matmul_tflops": 3.0, "copy_gbs": None}, {"tflops": 3.0})):
        assert load(made_up.written(path, made_up.document(ceilings=given))).ceilings == expected


def test_files_of_a_device_are_joined_and_the_newest_row_wins(tmp_path: Path) -> None:
    """Check that two runs on one GPU and one on another give two machines, and that the later times count."""
    tables = [made_up.document(), made_up.document(speed=2.0), made_up.document(gpu="Other GPU")]
    tables[1]["datetime"] = "2026-11-26T12:00:00"
    files = [load(made_up.written(tmp_path / f"{i}.json", table)) for i, table in enumerate(tables)]
    machines = {machine.device: machine for machine in by_device([files[1], files[2], files[0]])}
    first, other = machines[made_up.GPU], machines["Other GPU"]
    assert first.repeated == len(files[0].records) == len(first.records) and other.repeated == 0
    key = files[0].records[0].key
    assert first.records[key].median == files[1].records[0].median != files[0].records[0].median


def spoil(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Return a made-up file with one thing changed."""
    table = copy.deepcopy(made_up.document())
    change(table)
    return table


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ([], "expected an object with 'benchmarks', got list"),
        ({"results": []}, "no 'benchmarks' in it"),
        (spoil(lambda t: t.update(benchmarks={})), "benchmarks: expected a list, got dict"),
        (spoil(lambda t: t.update(machine_info=[1])), "machine_info: expected an object, got list"),
        (spoil(lambda t: t["benchmarks"].insert(1, 7)), r"benchmarks\[1\]: expected an object, got int"),
        (spoil(lambda t: t["benchmarks"][2].pop("stats")), r"benchmarks\[2\]: no 'stats'"),
        (spoil(lambda t: t["benchmarks"][2]["stats"].update(median=0)), "stats.median: expected a positive number"),
        (spoil(lambda t: t["benchmarks"][2]["stats"].update(median=float("nan"))), "got nan"),
        (spoil(lambda t: t["benchmarks"][0].pop("extra_info")), r"benchmarks\[0\]: no 'extra_info'"),
        (spoil(lambda t: t["benchmarks"][0]["extra_info"].pop("mode")), "extra_info has no mode"),
        (spoil(lambda t: t["not_timed"][0].update(status="fine")), "status: expected one of .*, got 'fine'"),
        (spoil(lambda t: t["not_timed"][0].update(kind="theirs")), "kind: expected one of .*, got 'theirs'"),
        (spoil(lambda t: t["benchmarks"].append(t["benchmarks"][0])), "twice in the file: scaling: attention, N256"),
    ],
)
def test_a_damaged_file_is_refused_by_place(path: Path, table: Any, complaint: str) -> None:
    """Check that the message names the file, the place, and what is wrong."""
    with pytest.raises(DamagedResults, match=f"{re.escape(str(path))}: .*{complaint}"):
        load(made_up.written(path, table))


def test_a_file_that_is_cut_short_or_missing_is_refused(path: Path) -> None:
    """Check that each gives one message."""
    path.write_text(path.read_text(encoding="utf-8")[:1000], encoding="utf-8")
    with pytest.raises(DamagedResults, match="not JSON"):
        load(path)
    with pytest.raises(DamagedResults, match="can't be read: No such file"):
        load(path.with_name("absent.json"))
