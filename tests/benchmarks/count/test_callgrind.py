"""Test the counting of instructions with a stand-in for valgrind, which the machine that runs the tests may lack."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fastdistill.benchmarks.count import callgrind
from fastdistill.benchmarks.report import regressions
from fastdistill.benchmarks.report.records import load


def test_counts_are_written_for_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that the file has an entry for each problem and mode, which the metric `instructions` reads."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    for name in ("PATH", "PYTHONHASHSEED", "OMP_NUM_THREADS"):  # These are set for the processes that count.
        monkeypatch.setenv(name, "1")
    asked = ["--problems", "silu", "rms_norm", "--modes", "forward", "--out"]
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    assert callgrind.main([*asked, str(old)], counter=lambda name, mode: 1000 + len(name)) == 0
    assert callgrind.main([*asked, str(new)], counter=lambda name, mode: 1004 if name == "silu" else 1050) == 0
    assert "1,004 instructions" in capsys.readouterr().out
    assert {row.key.op: row.number("instructions") for row in load(old).records} == {"silu": 1004, "rms_norm": 1008}
    assert regressions.main([str(old), str(new), "--metric", "instructions", "--ratio", "1.02"]) == 1
    text = capsys.readouterr().out
    assert "rms_norm, small, float32, forward: fastdistill torch: instructions 1,008 -> 1,050" in text
    assert "2 records of ours compared, 1 over 1.02" in text


def test_without_valgrind_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that the command prints one message and returns status 2."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert callgrind.main(["--problems", "silu"]) == 2
    assert "there is no valgrind here" in capsys.readouterr().err


def test_the_timer_is_asked_for_one_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the timer's statement runs as it stands, and that the count is that of one call."""
    calls = 0

    class Stats:
        def counts(self) -> int:
            return 3 * 777 + 1

    class Timer:
        def __init__(self, statement: str, setup: str) -> None:
            self.code = f"{setup}\n{statement}"

        def collect_callgrind(self, number: int, collect_baseline: bool) -> Stats:
            nonlocal calls
            calls += number
            exec(self.code, {})
            return Stats()

    monkeypatch.setattr(callgrind, "Timer", Timer)
    assert callgrind.instructions("silu", "forward + mixed") == 777
    assert calls == callgrind.CALLS
