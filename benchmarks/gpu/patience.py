"""Measure patience: how long processes slept or ran, whatever else keeps the machine busy.

A clock on the wall can't tell a hung test from one that waits for a processor: where four other programs run, importing
torch may take a minute. Here waiting for a processor, or for a disk, counts nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

EVERY = 1.0  # Seconds between two looks; each look reads a file for every process of the machine.
LONGEST = 2.0  # The most seconds that one interval may count; beyond it, this process was kept waiting too.


class Look(NamedTuple):
    """Hold a session's state: `asleep` says that no thread wants a processor, `cpu` has CPU seconds by process."""

    asleep: bool
    cpu: dict[int, float]


class OwnTime:
    """Count the seconds that a session of processes has had to itself; a call returns the count so far.

    While all its threads sleep, as in a deadlock, time on the wall counts. While one of them runs or wants to, the CPU
    time that they took counts, but never more than has passed.

    Args:
        session: the process id of the session's first process.
        timer: returns seconds on the wall.
        look: returns the state of a session; None where the system has no /proc, and then time on the wall counts.
    """

    def __init__(
        self,
        session: int,
        timer: Callable[[], float] = time.monotonic,
        look: Callable[[int], Look | None] | None = None,
    ) -> None:
        self._session, self._timer, self._look = session, timer, look or look_at
        self._seconds, self._looked, self._cpu = 0.0, timer(), dict[int, float]()

    def __call__(self) -> float:
        """Return the seconds up to the last look, of which there is one a second."""
        passed = self._timer() - self._looked
        if passed >= EVERY:
            self._looked += passed
            found = self._look(self._session)
            if found is None:
                self._seconds += passed
            else:
                used = sum(max(0.0, seconds - self._cpu.get(pid, 0.0)) for pid, seconds in found.cpu.items())
                self._seconds += min(passed, LONGEST if found.asleep else used)
                self._cpu = found.cpu
        return self._seconds


def look_at(session: int) -> Look | None:
    """Return the state of all processes of a session, or None where the system has no /proc."""
    if not Path("/proc/self/stat").exists():
        return None
    asleep, cpu = True, dict[int, float]()
    for process in Path("/proc").glob("[0-9]*"):
        for fields in _stat(process):
            if int(fields[3]) == session:
                cpu[int(process.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                threads = (thread[0] for task in process.glob("task/*") for thread in _stat(task))
                asleep = asleep and not {"R", "D"} & set(threads)
    return Look(asleep, cpu)


def _stat(folder: Path) -> Iterator[list[str]]:
    """Yield the fields of a process or thread from its state on; nothing if it ended meanwhile."""
    try:
        text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    yield text.rpartition(")")[2].split()  # The name before it, in parentheses, may hold anything.
