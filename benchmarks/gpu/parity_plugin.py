"""What the tests of a process of `fastdistill.benchmarks.gpu.parity` do to be heard: a plugin of pytest's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from fastdistill.benchmarks.run.clock import still_works

LOST = 70  # the status of a process whose GPU does nothing any more
LONGEST = 12000  # characters of a traceback


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test begins."""
    _say({"test": nodeid})


def pytest_runtest_logreport(report: Any) -> None:
    """A test has ended, or failed before or after its body."""
    if report.when != "call" and report.passed:
        return
    outcome = "failed" if report.failed else "skipped" if report.skipped else "passed"
    said = {"test": report.nodeid, "outcome": outcome, "seconds": round(report.duration, 3)}
    _say({**said, "traceback": None if report.passed else report.longreprtext[-LONGEST:]})
    if report.failed and not still_works(torch.device("cuda" if torch.cuda.is_initialized() else "cpu")):
        os._exit(LOST)


def _say(line: dict[str, Any]) -> None:
    with open(os.environ["FASTDISTILL_PARITY"], "a", encoding="utf-8") as said:
        said.write(json.dumps(line) + "\n")


def read(said: Path) -> tuple[dict[str, dict[str, Any]], str | None]:
    """What came of the tests of a process, by id, and the one that runs now; of two outcomes a failure counts."""
    found: dict[str, dict[str, Any]] = {}
    running = None
    lines = said.read_text(encoding="utf-8").split("\n")[:-1] if said.exists() else []  # the last may be half written
    for line in map(json.loads, lines):
        test = line.pop("test")
        if not line:
            running = test
            continue
        running = None if running == test else running
        if test not in found or found[test]["outcome"] == "passed":
            found[test] = line
    return found, running
