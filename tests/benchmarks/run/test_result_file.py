"""Test result files: pytest-benchmark's format, complete, always whole, and mixed only with their like."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastdistill.benchmarks.gpu import merge
from fastdistill.benchmarks.ops.timed_op import FLOOR, OURS, BenchError
from fastdistill.benchmarks.run import result_file, text_table
from fastdistill.benchmarks.run.result_file import ResultFile, entries, load
from tests.benchmarks.toy import CASE, Time, bench, op_of, right, wrong

MACHINE = {"device": "cuda", "gpu": {"name": "Made-up GPU 80GB"}, "torch": "2.13.0", "processor": "made up"}
COMMIT = {"id": "0123456789abcdef", "dirty": False}
# pytest-benchmark writes these fields of a benchmark, and of its statistics.
KEYS = {"group", "name", "fullname", "params", "param", "extra_info", "options", "stats"}
STATS = {
    *("min", "max", "mean", "stddev", "rounds", "median", "iqr", "q1", "q3", "iqr_outliers", "stddev_outliers"),
    *("outliers", "ld15iqr", "hd15iqr", "ops", "total", "iterations", "data"),
}
INFO = {
    *("suite", "op", "case", "mode", "provider", "kind", "status", "reason", "shape", "dtype", "device", "flops"),
    *("bytes", "tflops", "gbs", "p20_s", "p80_s", "peak_memory_bytes", "error", "allowed_error", "floor_provider"),
    *("ratio_to_floor", "sm_clock_mhz", "throttle", "power_w", "energy_j"),
}


def measured(**takes: list[float]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the entries of a case: `floor` and others that are right, `wrong`, and one that is absent."""
    time = Time()
    providers = [time.takes(right(name, FLOOR if name == "floor" else OURS), s) for name, s in takes.items()]
    providers += [wrong(), replace(right("absent"), absent="not installed: absent")]
    return entries(CASE, bench(time).run(op_of(*providers), CASE, providers), "cpu")


def filled(path: Path | None, **takes: list[float]) -> ResultFile:
    """Return a file with these entries."""
    file = ResultFile(path, MACHINE, COMMIT)
    file.add(*measured(**takes))
    return file


def test_entries_have_all_that_the_format_asks_for() -> None:
    """Check both parts of the file."""
    content = filled(None, fast=[1.0], floor=[0.5]).content
    for entry in content["benchmarks"]:
        assert entry.keys() == KEYS and entry["stats"].keys() == STATS and entry["extra_info"].keys() >= INFO
    assert {x["extra_info"]["provider"]: x["extra_info"]["status"] for x in content["not_timed"]} == {
        "wrong": "failed parity",
        "absent": "unavailable",
    }
    assert all("stats" not in x and x["extra_info"].keys() >= INFO for x in content["not_timed"])
    (info,) = (x["extra_info"] for x in content["not_timed"] if x["extra_info"]["provider"] == "wrong")
    assert info["error"]["tangent"] > 100 * info["allowed_error"]["tangent"]
    assert "t_y: error" in info["reason"]


def test_numbers_follow_from_the_samples() -> None:
    """Check rates by the median, and the ratio to the floor."""
    timed = filled(None, slow=[1.0] * 4 + [2.0, 4.0, 6.0], floor=[0.5]).content["benchmarks"]
    slow, floor = (entry["extra_info"] for entry in timed)
    assert timed[0]["stats"]["median"] == 4.0 and timed[0]["stats"]["data"] == [2.0, 4.0, 6.0]
    assert slow["tflops"] == pytest.approx(8.0 / 4.0 / 1e12)
    assert slow["bytes"] == 4 * 4 * 4 and floor["bytes"] == 2 * 4 * 4
    assert slow["gbs"] == pytest.approx(64 / 4.0 / 1e9)
    assert (slow["p20_s"], slow["p80_s"]) == (pytest.approx(2.8), pytest.approx(5.2))
    assert (slow["floor_provider"], slow["ratio_to_floor"]) == ("floor", 8.0)
    assert floor["ratio_to_floor"] == 1.0


def test_pytest_benchmark_compares_such_files(tmp_path: Path) -> None:
    """Run the command itself, on two of them."""
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, seconds in zip(paths, (0.001, 0.002), strict=True):
        filled(path, fast=[seconds], floor=[0.0005])
    command = [sys.executable, "-m", "pytest_benchmark", "compare", *map(str, paths), "--columns", "median,ops"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"benchmark '{CASE.group}': 4 tests" in done.stdout
    assert "square[square-N4-float32-forward-fast]" in done.stdout
    assert "(2.00)" in done.stdout or "(4.0" in done.stdout


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    """Check that a second run adds its providers, and refers to the floor that was measured before."""
    path = tmp_path / "new folder" / "a.json"
    filled(path, floor=[0.5])
    file = ResultFile(path, MACHINE, COMMIT)
    assert file.statuses(CASE.group) == {"floor": "ok", "wrong": "failed parity", "absent": "unavailable"}
    assert file.statuses("another") == {}
    file.add(*measured(late=[2.0]))
    content = load(path)
    ratios = {x["extra_info"]["provider"]: x["extra_info"]["ratio_to_floor"] for x in content["benchmarks"]}
    assert ratios == {"floor": 1.0, "late": 4.0}
    assert len(content["not_timed"]) == 2
    assert not list(path.parent.glob(".*"))


def test_a_writer_that_is_killed_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the file is written beside it, then moved."""
    path = tmp_path / "a.json"
    file = filled(path, floor=[0.5])
    before = path.read_text()

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(result_file.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        file.add(*measured(late=[2.0]))
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("machine", "commit", "words"),
    [
        (MACHINE, {"id": "f" * 16}, "commit 0123456789abcdef there, ffffffffffffffff here"),
        ({**MACHINE, "gpu": {"name": "Another"}}, COMMIT, "GPU Made-up GPU 80GB there, Another here"),
        ({**MACHINE, "torch": "2.14"}, COMMIT, "torch 2.13.0 there, 2.14 here"),
    ],
)
def test_results_of_another_setting_are_not_mixed_in(
    tmp_path: Path, machine: dict[str, Any], commit: dict[str, Any], words: str
) -> None:
    """Check that files differ by commit, because a curve of two commits would show what neither does."""
    path = tmp_path / "a.json"
    filled(path, floor=[0.5])
    with pytest.raises(BenchError, match=words):
        ResultFile(path, machine, commit)


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"benchmarks": []}'])
def test_another_kind_of_file_is_refused(tmp_path: Path, text: str) -> None:
    """Check that the file stays as it is."""
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(BenchError, match=r"a\.json: expected a result file of `fastdistill bench`"):
        ResultFile(path, MACHINE, COMMIT)
    assert path.read_text() == text


def test_merging(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that several files become one, named after GPU, date and commit; the newer of equal entries counts."""
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    filled(old, a=[1.0], b=[1.0])
    filled(new, b=[2.0])
    assert merge.main([str(new), str(old), "--into", str(tmp_path / "results")]) == 0
    (path,) = (tmp_path / "results").iterdir()
    content = load(path)
    date = content["datetime"][:10].replace("-", "")
    assert path.name == f"made-up-gpu-80gb_{date}_0123456.json"
    assert capsys.readouterr().out.strip() == str(path)
    medians = {x["extra_info"]["provider"]: x["stats"]["median"] for x in content["benchmarks"]}
    assert medians == {"a": 1.0, "b": 2.0}
    assert len(content["not_timed"]) == 2


def test_merging_what_does_not_belong_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check for one message, and that nothing is written."""
    filled(tmp_path / "a.json", a=[1.0])
    other = ResultFile(tmp_path / "b.json", MACHINE, {"id": "f" * 16})
    other.add(*measured(a=[1.0]))
    assert merge.main([str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--into", str(tmp_path / "results")]) == 2
    assert "expected the setting of" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_the_table_shows_failures_and_absences() -> None:
    """Check that they stand beside the times, with their reasons."""
    content = filled(None, fast=[0.001], floor=[0.0005]).content
    text = text_table.text([*content["benchmarks"], *content["not_timed"]])
    (fast,) = (line for line in text.splitlines() if line.startswith("  fast "))
    assert "1 ms" in fast and fast.endswith("2.00")
    assert "  wrong: failed parity: t_y: error" in text
    assert "Not on this machine:\n  absent: not installed: absent" in text
    assert [text_table._or_dash(text_table.size, x) for x in (None, 2**34)] == ["-", "16 GiB"]
