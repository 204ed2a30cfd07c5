"""Run the command `fastdistill bench`: choose cases and providers, measure them in order, and print the results."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastdistill.benchmarks.ops.suites import OPS, SUITES, WHAT, cases
from fastdistill.benchmarks.ops.timed_op import OURS, BenchError, Provider, TimedCase
from fastdistill.benchmarks.run import gate, result_file, text_table
from fastdistill.benchmarks.run.clock import clock_for
from fastdistill.benchmarks.run.environment import commit_info, machine_info
from fastdistill.benchmarks.run.in_turns import Bench, Limits, Outcome, ProcessLost
from fastdistill.benchmarks.run.nvml import meter_for

QUICK_LIMITS = Limits(seconds=0.02, least=3, most=20)
LIMITS = Limits()


class LostError(BenchError):
    """Report that a provider broke torch or the GPU for this process; a new process can go on with the same file."""


@dataclass(frozen=True)
class Request:
    """Describe what a run of the benchmarks measures.

    Args:
        suites: names of the suites.
        quick: takes tiny shapes, which run on any machine.
        path: the result file; None writes none.
        budget: seconds after which no further case is started.
        device: "cuda", "cpu", or None, which takes the GPU where there is one.
        dtype: dtype of the cases; None takes bfloat16 on a GPU and float32 on a CPU.
        providers: regular expressions, one of which a provider's name has to match; an empty list takes all providers.
        pattern: a regular expression that a case's group has to match, or None.
        commit: commit of the code, for a machine that has no repository.
    """

    suites: Sequence[str]
    quick: bool = False
    path: Path | None = None
    budget: float = float("inf")
    device: str | None = None
    dtype: str | None = None
    providers: Sequence[str] = ()
    pattern: str | None = None
    commit: str | None = None


def say(line: str) -> None:
    """Print a line about the progress to stderr."""
    print(line, file=sys.stderr, flush=True)


def listing(request: Request) -> str:
    """Return the list of suites, and below it the cases that the request would measure, one a line."""
    device = _device(request)
    lines = [f"{name:<8} {WHAT[name]}" for name in SUITES]
    if request.suites:
        lines += ["", *(case.group for case in wanted(request, device))]
    return "\n".join(lines)


def wanted(request: Request, device: torch.device) -> list[TimedCase]:
    """Return the cases of the requested suites whose group matches the pattern.

    Raises:
        BenchError: a suite or dtype is unknown, the pattern is no regular expression, or no case matches.
    """
    dtype = request.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if not request.suites:
        raise BenchError(f"--suite: expected some of {', '.join(SUITES)}, got none")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise BenchError(f"--dtype: expected float32, bfloat16 or float16, got {dtype!r}")
    try:
        found = [case for suite in request.suites for case in cases(suite, dtype, request.quick)]
    except ValueError as error:
        raise BenchError(f"--{error}") from error
    if request.pattern is not None:
        found = [case for case in found if _compiled(request.pattern, "--cases").search(case.group)]
    if not found:
        raise BenchError(f"--cases: expected a pattern that fits a case, got {request.pattern!r}; --list shows them")
    return found


def run(request: Request, tell: Callable[[str], None] = say) -> tuple[list[result_file.Entry], int]:
    """Measure the requested cases; return their entries, and how many of our own results are wrong.

    Raises:
        BenchError: the request can't be met, or the file belongs to another setting.
        LostError: a provider left this process unable to run anything.
    """
    device = _device(request)
    todo = wanted(request, device)
    clock, (meter, meter_name) = clock_for(device), meter_for(device)
    machine = machine_info(device, clock, meter, meter_name)
    file = result_file.ResultFile(request.path, machine, commit_info(request.commit))
    bench = Bench(device, clock, meter, QUICK_LIMITS if request.quick else LIMITS)
    started, left_out = time.monotonic(), 0
    for number, case in enumerate(todo, start=1):
        op = OPS[case.op]
        providers = chosen(op.providers(device), request.providers)
        there = file.statuses(case.group)
        missing = [provider for provider in providers if not _known(provider, there.get(provider.name))]
        head = f"[{number}/{len(todo)}, {time.monotonic() - started:.0f} s] {case.group}"
        if not missing:
            tell(f"{head}: {'there already' if providers else 'no provider of that name'}")
            continue
        if time.monotonic() - started > request.budget:
            left_out += 1
            continue
        try:
            outcomes = bench.run(op, case, missing)
        except ProcessLost as lost:
            file.add(*result_file.entries(case, [lost.outcome], device.type))
            raise LostError(f"{case.group}: {lost}. The same command with --json goes on without it") from lost
        file.add(*result_file.entries(case, outcomes, device.type))
        tell(f"{head}: {_short(outcomes)}")
    if left_out:
        tell(f"out of time: {left_out} of {len(todo)} cases left; the same command with --json goes on there")
    every = file.of_groups({case.group for case in todo})
    infos = [entry["extra_info"] for entry in every]
    return every, sum(info["kind"] == OURS and info["status"] in (gate.FAILED, gate.ERROR) for info in infos)


def main(request: Request) -> int:
    """Measure, print the table of all these cases, and return 1 if one of our own results is wrong."""
    every, wrong = run(request)
    print(text_table.text(every))
    if request.quick:
        print("These are tiny shapes (--quick): they show that everything runs, and nothing about speed.")
    if request.path is not None:
        print(request.path)
    if wrong:
        print(f"{wrong} of our own results failed: see above", file=sys.stderr)
    return 1 if wrong else 0


def chosen(providers: Sequence[Provider], patterns: Sequence[str]) -> list[Provider]:
    """Return the providers whose name matches one of the patterns; without patterns, return all."""
    tests = [_compiled(pattern, "--providers") for pattern in patterns]
    return [provider for provider in providers if not tests or any(test.search(provider.name) for test in tests)]


def _known(provider: Provider, status: str | None) -> bool:
    """Return whether the file's entry for a provider still holds; an absent provider may be installed by now."""
    return status is not None and (status != gate.UNAVAILABLE or provider.absent is not None)


def _short(outcomes: Sequence[Outcome]) -> str:
    counts: dict[str, int] = {}
    for outcome in outcomes:
        counts[outcome.status] = counts.get(outcome.status, 0) + 1
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def _device(request: Request) -> torch.device:
    name = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device: there is no CUDA device here; --quick --device cpu shows that everything runs")
    return torch.device(name)


def _compiled(pattern: str, option: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise BenchError(f"{option}: expected a regular expression, got {pattern!r}: {error}") from error
