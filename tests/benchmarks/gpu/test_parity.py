"""Test tests in processes that may die: the others are still heard, and the file stays whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdistill.benchmarks.gpu import parity
from fastdistill.benchmarks.gpu.parity_plugin import read

ROOT = Path(__file__).parents[3]
GOOD = """
def test_first():
    assert True

def test_second():
    assert True
"""
HANGS = """
import os, time
from pathlib import Path

def test_short():
    assert True

def test_hangs():
    Path("hanging").write_text(str(os.getpid()))
    time.sleep(10**6)

def test_next():
    assert True
"""
BAD = """
import os, signal, time
from pathlib import Path
import pytest

def test_before():
    assert True

def test_wrong():
    assert 1 + 1 == 3

def test_segfault():
    os.kill(os.getpid(), signal.SIGSEGV)

def test_between():
    assert True

def test_after():
    assert True

@pytest.fixture
def breaks_late():
    yield
    said = Path("parity.json")
    while not (said.exists() and "test_teardown" in said.read_text()):  # so that it passes, and fails afterwards
        time.sleep(0.05)
    raise RuntimeError("torn")

def test_teardown(breaks_late):
    assert True
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the program on the tests of a folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COMMIT": "0123456"}
    command = [sys.executable, "-m", "fastdistill.benchmarks.gpu.parity", "--json", "parity.json", "--jobs", "2"]
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *arguments], env=environment, cwd=folder, stdout=pipe, stderr=pipe, text=True)


def content(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "parity.json").read_text())
    return found


def test_each_death_costs_one_test(tmp_path: Path) -> None:
    """Check that a wrong test and a segmentation fault are noted, all others run, and only missing tests run again."""
    (tmp_path / "test_good.py").write_text(GOOD)
    (tmp_path / "test_bad.py").write_text(BAD)
    program = start(tmp_path, "--patience", "inf", "test_good.py", "test_bad.py")
    printed, errors = program.communicate()
    assert program.returncode == 1, printed + errors
    tests = content(tmp_path)["tests"]
    outcomes = {test.partition("::test_")[2]: result["outcome"] for test, result in tests.items()}
    passed = dict.fromkeys(("first", "second", "before", "between", "after"), "passed")
    assert outcomes == {**passed, "wrong": "failed", "segfault": "crashed", "teardown": "failed"}
    assert "1 + 1" in tests["test_bad.py::test_wrong"]["traceback"]
    assert tests["test_bad.py::test_segfault"]["traceback"].startswith(f"signal {signal.SIGSEGV}")
    assert content(tmp_path)["not_run"] == [] and "crashed: test_bad.py::test_segfault" in printed
    program = start(tmp_path, "test_good.py")
    assert "2 tests, 2 of them there already" in program.communicate()[0]
    assert program.returncode == 0 and len(content(tmp_path)["tests"]) == 8


def test_a_hung_test_costs_one_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a hung test's process is killed once it had too long, while all other processes have all the time."""
    (tmp_path / "test_good.py").write_text(GOOD)
    (tmp_path / "test_hangs.py").write_text(HANGS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def watch(pid: int) -> Callable[[], float]:
        """Give no process any time except the hanging one: a thousand seconds between two looks."""
        seconds, hanging = 0.0, tmp_path / "hanging"

        def had() -> float:
            nonlocal seconds
            seconds += 1000 * (hanging.exists() and hanging.read_text() == str(pid))
            return seconds

        return had

    tests = parity.collected(["test_good.py", "test_hangs.py"])
    found: dict[str, Any] = {"tests": {}}
    parity.run(tests, found, tmp_path / "parity.json", jobs=2, budget=float("inf"), patience=100.0, watch=watch)
    outcomes = {test.partition("::test_")[2]: result["outcome"] for test, result in found["tests"].items()}
    passed = dict.fromkeys(("first", "second", "short", "next"), "passed")
    assert outcomes == {**passed, "hangs": "hung"} and found["not_run"] == []
    assert found["tests"]["test_hangs.py::test_hangs"]["traceback"].startswith("no end")


def test_patience_is_an_option(tmp_path: Path) -> None:
    """Check that the test counts as hung in the end, however slowly its process starts."""
    (tmp_path / "test_hangs.py").write_text("import time\ndef test_hangs():\n    time.sleep(10**6)\n")
    program = start(tmp_path, "--patience", "1", "test_hangs.py")
    printed, errors = program.communicate()
    assert program.returncode == 1, printed + errors
    assert content(tmp_path)["counts"] == {"hung": 1}


def test_what_ended_while_it_was_killed_has_not_hung(tmp_path: Path) -> None:
    """Check that a test's last report counts, and that the tests after it go to another process."""
    (tmp_path / "test_good.py").write_text(GOOD)
    worker = parity.Worker([f"{tmp_path}/test_good.py::test_{name}" for name in ("first", "second")], tmp_path, 0)
    worker.kill()
    spoken = {"test": worker.tests[0], "outcome": "passed", "seconds": 0.1, "traceback": None}
    worker.said.write_text("")

    def kill() -> None:
        worker.said.write_text(json.dumps(spoken) + "\n")

    worker.process.poll, worker.kill = lambda: None, kill  # type: ignore[method-assign]
    found, left = worker.found(patience=-1.0)
    assert {test: result["outcome"] for test, result in found.items()} == {worker.tests[0]: "passed"}
    assert left == worker.tests[1:]


def test_a_file_that_cannot_be_imported_is_an_error(tmp_path: Path) -> None:
    """Check that the run isn't green, even if all other tests pass."""
    (tmp_path / "test_good.py").write_text(GOOD)
    (tmp_path / "test_broken.py").write_text("import nothere\n\ndef test_it():\n    assert True\n")
    program = start(tmp_path, "test_good.py", "test_broken.py")
    errors = program.communicate()[1]
    assert program.returncode == 1 and "can't collect" in errors and "nothere" in errors


def test_what_is_killed_has_left_what_it_knew(tmp_path: Path) -> None:
    """Check that a killed run leaves a whole file, and that a run that is asked to end takes its processes along."""
    (tmp_path / "test_good.py").write_text(GOOD)
    (tmp_path / "test_slow.py").write_text(
        "import os, time\ndef test_slow():\n    open('pid', 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
    )
    program = start(tmp_path, "test_good.py", "test_slow.py")
    while program.poll() is None and not (
        (tmp_path / "pid").exists() and (tmp_path / "parity.json").exists() and len(content(tmp_path)["tests"]) == 2
    ):
        time.sleep(0.2)
    assert len(content(tmp_path)["tests"]) == 2
    program.send_signal(signal.SIGTERM)
    program.communicate()
    assert program.returncode == 143
    assert content(tmp_path)["not_run"] == ["test_slow.py::test_slow"]
    pid = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]


def test_half_a_line_is_not_read(tmp_path: Path) -> None:
    said = tmp_path / "said"
    said.write_text(
        '{"test": "a"}\n{"test": "a", "outcome": "passed", "seconds": 1, "traceback": null}\n{"test": "b"}\n{"te'
    )
    assert read(said) == ({"a": {"outcome": "passed", "seconds": 1, "traceback": None}}, "b")


def test_a_process_gets_tests_of_one_file(tmp_path: Path) -> None:
    """Check that a process gets several tests of one file, or one of the tests that compile most."""
    tests = ["a.py::1", "a.py::2", "a.py::3", "b.py::1", "tests/gpu/c.py::1", "tests/gpu/c.py::2"]
    assert parity.chunks(tests, 2) == [tests[:2], tests[2:3], tests[3:4], tests[4:5], tests[5:]]


def test_the_core_is_there() -> None:
    for path in (*parity.CORE, *parity.ALL):
        file, _, name = path.partition("::")
        assert (ROOT / file).exists()
        assert f"def {name}(" in (ROOT / file).read_text() if name else True
