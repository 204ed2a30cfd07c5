"""Run tests in many processes side by side, on a GPU that is lent by the minute; a crash costs the others nothing.

    python -m fastdistill.benchmarks.gpu.parity --json parity.json --budget 120 --jobs 12 --core
    python -m fastdistill.benchmarks.gpu.parity --json parity.json --budget 400            # goes on with all the others

Each process runs a few tests and reports each result. A process that crashes, hangs, or leaves the GPU unusable (after
an illegal access nothing runs any more in that process) ends with the test that did it; another process runs the tests
that are left. A test hangs if it takes more than `--patience` seconds, without those in which its process waits for a
busy processor. The file is whole at every moment and holds each traceback, and a run goes on where the file ends. The
file belongs to a commit: COMMIT, or the repository's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastdistill.benchmarks.gpu.parity_plugin import LOST, read
from fastdistill.benchmarks.gpu.patience import OwnTime
from fastdistill.benchmarks.ops import packages
from fastdistill.benchmarks.run import environment, result_file

PASSED, CRASHED, HUNG = "passed", "crashed", "hung"  # "failed", in pytest's own word, is the fourth outcome.
# The numbers of a benchmark rest on these, the most important first; the rest of tests/kernels can wait.
CORE = (
    "tests/gpu/test_core.py",
    "tests/gpu/test_attention.py",
    "tests/kernels/test_attention_descriptors.py",
    "tests/kernels/test_public_ops.py",
    "tests/kernels/test_norm.py::test_16_bits",
    "tests/kernels/test_norm_backward.py::test_16_bits",
    "tests/kernels/test_gated_norm.py::test_16_bits",
    "tests/kernels/test_gated_norm.py::test_wide_rows_take_their_sums_in_a_second_launch",
    "tests/kernels/test_qk_norm_rope.py::test_every_norm_rotation_and_dtype",
    "tests/kernels/test_activation.py::test_every_member_of_the_family",
)
ALL = ("tests/gpu", "tests/kernels")
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-W", "default", "-m", "not slow")
# Tests a process: more would wait behind one that compiles for long. tests/gpu compiles most, so it gets one each.
CHUNK = 6
PATIENCE = 100.0  # The seconds that one test may take, by `OwnTime`.
Watch = Callable[[int], Callable[[], float]]  # Maps a process's id to a function that returns its own seconds.


class Worker:
    """Run some tests in a process of their own.

    Args:
        tests: ids of the tests, in order.
        folder: folder of the files in which the process reports.
        number: number of the worker, which names these files.
        watch: returns for a process's id a function that returns the process's own seconds.
    """

    def __init__(self, tests: Sequence[str], folder: Path, number: int, watch: Watch = OwnTime) -> None:
        self.tests, self.said, self.output = list(tests), folder / f"{number}.jsonl", folder / f"{number}.out"
        listed = folder / f"{number}.txt"
        listed.write_text("\n".join(tests) + "\n", encoding="utf-8")
        command = [*PYTEST, "-p", "fastdistill.benchmarks.gpu.parity_plugin", f"@{listed}"]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "FASTDISTILL_PARITY": str(self.said)},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._had = watch(self.process.pid)
        self._seen, self._since = -1, 0.0

    def kill(self) -> None:
        """Kill the process and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def found(self, patience: float) -> tuple[dict[str, dict[str, Any]], list[str] | None]:
        """Return the results so far and, once the process has ended, the tests that another process has to run."""
        ended = self.process.poll()
        found, running = read(self.said)
        if ended is None:
            had = self._had()
            if len(found) != self._seen:
                self._seen, self._since = len(found), had
            if had - self._since <= patience:
                return found, None
            self.kill()
            found, running = read(self.said)
        left = [test for test in self.tests if test not in found]
        # In the last case the process ended a moment ago.
        if ended == LOST or not left or (ended is None and len(found) != self._seen):
            return found, left
        # The process died in the test that ran then. If it began no test, or reported none, another process would fare
        # no better.
        lost = [running] if running is not None else left
        how = (
            "no end after so many seconds" if ended is None else f"signal {-ended}" if ended < 0 else f"status {ended}"
        )
        outcome = HUNG if ended is None else CRASHED
        traceback = f"{how}\n{self.output.read_text(encoding='utf-8', errors='replace')[-6000:]}"
        found |= {test: {"outcome": outcome, "seconds": None, "traceback": traceback} for test in lost}
        return found, [test for test in left if test not in lost]


def collected(paths: Sequence[str]) -> list[str]:
    """Return the ids of the tests in these paths, in order.

    Raises:
        SystemExit: pytest can't collect them; the message is pytest's.
    """
    done = subprocess.run([*PYTEST, "--collect-only", "--no-header", *paths], capture_output=True, text=True)
    if done.returncode not in (0, 5):  # Status 5 means that there are no tests.
        raise SystemExit(f"parity: pytest can't collect {', '.join(paths)}:\n{done.stdout}{done.stderr}")
    return [line for line in done.stdout.splitlines() if "::" in line and not line.startswith(" ")]


def chunks(tests: Sequence[str], size: int = CHUNK) -> list[list[str]]:
    """Split the tests into chunks of one file each, in order, of at most `size` tests; tests/gpu gets one each."""
    found: list[list[str]] = []
    for test in tests:
        file = test.partition("::")[0]
        alone = file.startswith("tests/gpu/")
        if not found or alone or len(found[-1]) >= size or found[-1][-1].partition("::")[0] != file:
            found.append([])
        found[-1].append(test)
    return found


def run(
    tests: Sequence[str],
    content: dict[str, Any],
    path: Path,
    *,
    jobs: int,
    budget: float,
    patience: float = PATIENCE,
    watch: Watch = OwnTime,
) -> None:
    """Run the tests until the budget ends, and write the file whenever something is known."""
    waiting, working, number = chunks(tests), list[Worker](), 0
    stop_at, saved_at = time.monotonic() + budget, 0.0
    with tempfile.TemporaryDirectory() as folder:
        try:
            while (waiting or working) and time.monotonic() < stop_at:
                while waiting and len(working) < jobs:
                    working.append(Worker(waiting.pop(0), Path(folder), number, watch))
                    number += 1
                for worker in list(working):
                    found, left = worker.found(patience)
                    _note(content, found)
                    if left is not None:
                        working.remove(worker)
                        waiting[:0] = [left] if left else []
                if time.monotonic() - saved_at > 1:
                    _save(content, path)
                    saved_at = time.monotonic()
                time.sleep(0.1)
        finally:
            for worker in working:
                worker.kill()
                _note(content, read(worker.said)[0])
            content["not_run"] = [test for test in tests if test not in content["tests"]]
            _save(content, path)


def _note(content: dict[str, Any], found: dict[str, dict[str, Any]]) -> None:
    for test, result in found.items():
        if content["tests"].get(test) != result and result["outcome"] != PASSED:
            last = (result["traceback"] or "").strip().splitlines()[-1:]
            print(f"{result['outcome']}: {test}: {' '.join(last)[:200]}", flush=True)
        content["tests"][test] = result  # A test that passed may still fail in its teardown.


def _save(content: dict[str, Any], path: Path) -> None:
    content["counts"] = dict(Counter(result["outcome"] for result in content["tests"].values()))
    result_file.save(content, path)


def begun(path: Path) -> dict[str, Any]:
    """Return the file's content if it has the same commit and versions, otherwise new content."""
    head = os.environ.get("COMMIT") or environment.commit()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    about = {"device": device, "torch": torch.__version__, "triton": packages.versions().get("triton"), "commit": head}
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        there = {}
    if {name: there.get(name) for name in about} == about:
        return dict(there)
    return {**about, "datetime": environment.now(), "counts": {}, "not_run": [], "tests": {}}


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the tests, print the failures and their number, and return 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="paths of tests (default: all that need a GPU)")
    parser.add_argument("--core", action="store_true", help="run only the tests on which benchmarks rest")
    parser.add_argument(
        "--json", type=Path, required=True, metavar="FILE", help="file of the results, to which new ones are added"
    )
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="stop all tests after this time"
    )
    parser.add_argument(
        "--jobs", type=int, default=max(1, min(14, (os.cpu_count() or 3) - 2)), help="number of processes"
    )
    parser.add_argument("--patience", type=float, default=PATIENCE, metavar="SECONDS", help="time that a test may take")
    args = parser.parse_args(None if arguments is None else list(arguments))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # This way the processes end, too.
    started = time.monotonic()
    content = begun(args.json)
    every = collected(args.paths or (CORE if args.core else ALL))
    tests = [test for test in every if test not in content["tests"]]
    print(f"{len(every)} tests, {len(every) - len(tests)} of them there already, {args.jobs} processes", flush=True)
    budget = args.budget - (time.monotonic() - started)
    run(tests, content, args.json, jobs=args.jobs, budget=budget, patience=args.patience)
    now = Counter(content["tests"][test]["outcome"] for test in every if test in content["tests"])
    counts = ", ".join(f"{count} {outcome}" for outcome, count in now.items())
    print(f"{counts or 'none run'}; {len(content['not_run'])} not run; {time.monotonic() - started:.0f} s; {args.json}")
    return 1 if now.keys() - {PASSED} else 0


if __name__ == "__main__":
    sys.exit(main())
