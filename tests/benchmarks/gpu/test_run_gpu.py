"""Test the script for a GPU machine without a GPU: its pieces, at tiny shapes, up to the file that is committed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from fastdistill.benchmarks.ops.suites import SUITES
from fastdistill.benchmarks.run.bench import Request, wanted

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "benchmarks" / "run_gpu.sh"


def run(piece: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script with tiny shapes, and with a budget that suffices on any machine."""
    environment = {**os.environ, "SMOKE": "1", "PYTHON": sys.executable, "BUDGET": "1000000", **variables}
    return subprocess.run([SCRIPT, *piece.split()], env=environment, capture_output=True, text=True)


def test_a_suite_and_the_merged_file(tmp_path: Path) -> None:
    """Check the suites that compile nothing; the merged file is named after the machine and the given commit."""
    out, results = tmp_path / "out", tmp_path / "results"
    variables = {"OUT": str(out), "RESULTS": str(results), "COMMIT": "0123456789ab"}
    done = run("block", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("] block/") == 3
    assert "compiled" not in (out / "block.json").read_text()
    merged = run("merge", **variables)
    assert merged.returncode == 0, merged.stdout + merged.stderr
    (path,) = results.iterdir()
    content = json.loads(path.read_text())
    assert path.name.endswith("_0123456.json") and content["commit_info"]["id"] == "0123456789ab"
    assert {x["extra_info"]["suite"] for x in content["benchmarks"]} == {"block"}


def test_the_pieces_for_a_quarter_of_an_hour(tmp_path: Path) -> None:
    """Check that each step leaves its file, at most eight in all, and that the second goes on where the first ended."""
    variables = {"OUT": str(tmp_path / "out"), "COMMIT": "0123456789ab", "JOBS": "1"}
    done = run("first", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "out" / "first.log").read_text()
    steps = ["parity", "tuning", "dit", "launches"]
    assert [line.split("] ")[1].split(",")[0] for line in log.splitlines() if ", until " in line] == steps
    parity = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert parity["counts"] == {"passed": len(parity["tests"])} and parity["commit"] == "0123456789ab"
    assert json.loads((tmp_path / "out" / "dit.json").read_text())["benchmarks"]
    second = run("second", **variables)
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"{len(parity['tests'])} of them there already" in second.stdout
    expected = {"first.log", "second.log", "parity.json", "dit.json", "norms.json", "launches.json", "launches.md"}
    # On a GPU there is tuned.json too, which makes eight.
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected


def test_it_says_what_it_does() -> None:
    """Check that the script without a piece prints its pieces and variables, and that what it calls exists."""
    done = run("")
    assert done.returncode == 2
    words = (
        "first",
        "second",
        "parity",
        "tune",
        "compiled",
        "merge",
        "OUT",
        "WHEELS",
        "CONFIGS",
        "BUDGET",
        "SMOKE",
        *SUITES,
    )
    assert all(word in done.stdout for word in words)
    text = SCRIPT.read_text()
    folders = re.findall(r"tests/\w+", text)
    assert folders and all((ROOT / folder).is_dir() for folder in folders)
    (suites,) = re.findall(r'^SUITES="(.*)"$', text, re.MULTILINE)
    assert suites.split() == list(SUITES)
    assert f"    {' | '.join(SUITES)})" in text


def test_an_unknown_piece_is_refused() -> None:
    """Check that an unknown piece is refused like a missing one."""
    assert run("everything").returncode == 2


def test_the_compiled_piece_takes_some_cases_of_each_suite() -> None:
    """Check that the cases, at half a minute each, are few enough for ten minutes."""
    calls = re.findall(r"bench (\w+) --providers compiled --cases '(.*?)'", SCRIPT.read_text())
    assert [suite for suite, _ in calls] == ["dit", "block", "norms", "step"]
    chosen = [wanted(Request([suite], pattern=pattern), torch.device("cuda")) for suite, pattern in calls]
    assert all(chosen) and sum(map(len, chosen)) <= 40
