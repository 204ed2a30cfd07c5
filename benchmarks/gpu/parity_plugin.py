"""Report the tests of a process of `fastdistill.benchmarks.gpu.parity`, as a plugin of pytest."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from fastdistill.benchmarks.run.clock import still_works

LOST = 70  # The exit status of a process whose GPU does nothing any more.
LONGEST = 12000  # The number of characters of a traceback that are kept.


def pytest_runtest_logstart(nodeid: str) -> None:
    """Report that a test begins."""
    _say({"test": nodeid})


def pytest_runtest_logreport(report: Any) -> None:
    """Report that a test has ended, or failed before or after its body."""
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
    """Return the results of a process's tests by id, and the test that runs now; of two results a failure counts."""
    found: dict[str, dict[str, Any]] = {}
    running = None
    # The last line may be half written.
    lines = said.read_text(encoding="utf-8").split("\n")[:-1] if said.exists() else []
    for line in map(json.loads, lines):
        test = line.pop("test")
        if not line:
            running = test
            continue
        running = None if running == test else running
        if test not in found or found[test]["outcome"] == "passed":
            found[test] = line
    return found, running
