"""Test the time that processes had to themselves: sleeping and running count, waiting for a processor doesn't."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from fastdistill.benchmarks.gpu.patience import Look, OwnTime, look_at
from tests.benchmarks.toy import Time


def had(looks: list[Look | None], passed: float) -> float:
    """Return what a session had after so many looks, between which so many seconds passed."""
    time, rest = Time(), iter(looks)
    own = OwnTime(7, time, lambda session: next(rest))
    for _ in looks:
        time.now += passed
        own()
    return own()


@pytest.mark.parametrize(
    ("looks", "passed", "seconds"),
    [
        ([Look(True, {7: 3.0})] * 3, 1.0, 3.0),
        ([Look(False, {7: 0.0})] * 3, 1.0, 0.0),
        ([Look(False, {7: 0.25}), Look(False, {7: 0.5})], 1.0, 0.5),
        ([Look(False, {7: 4.0}), Look(False, {7: 8.0, 9: 1.0})], 1.0, 2.0),
        ([Look(False, {7: 0.5, 9: 1.5}), Look(False, {7: 0.75})], 10.0, 2.25),
        ([Look(True, {7: 0.0})], 600.0, 2.0),
        ([None, None], 5.0, 10.0),
    ],
    ids=["asleep", "starved", "running", "threads", "a child that ended", "a starved watcher", "no proc"],
)
def test_what_counts(looks: list[Look | None], passed: float, seconds: float) -> None:
    assert had(looks, passed) == seconds


def test_between_two_looks_nothing_is_read() -> None:
    """Check that no look happens, because each reads a file for every process of the machine."""
    time = Time()
    own = OwnTime(7, time, lambda session: pytest.fail("too early"))
    time.now += 0.5
    assert own() == 0.0


@pytest.fixture
def session() -> Iterator[subprocess.Popen[str]]:
    """Start a process in a session of its own, with a child; both do what a word tells them, and answer it."""
    child = "for word in iter(input, ''):\n    print(word, flush=True)\n    while word == 'run': pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True, start_new_session=True)
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_session_is_looked_at_with_all_its_processes(session: subprocess.Popen[str]) -> None:
    """Check that the session sleeps while both wait, and is awake while the child computes and its CPU time grows."""

    def tell(word: str) -> None:
        assert session.stdin is not None and session.stdout is not None
        session.stdin.write(f"{word}\n")
        session.stdin.flush()
        assert session.stdout.readline() == f"{word}\n"

    tell("wait")
    while not (asleep := look_at(session.pid)).asleep:  # It has answered, and will wait for the next word in a moment.
        pass
    assert len(asleep.cpu) == 2 and session.pid in asleep.cpu
    tell("run")
    while sum((awake := look_at(session.pid)).cpu.values()) <= sum(asleep.cpu.values()):
        pass
    assert not awake.asleep
    assert look_at(2**22 + 1) == Look(True, {})
