"""Measure one case with all its providers: judge them first, then time them in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fastdistill.benchmarks.ops.memory import free_bytes
from fastdistill.benchmarks.ops.timed_op import Cost, Op, Provider, Run, TimedCase
from fastdistill.benchmarks.run import gate
from fastdistill.benchmarks.run.clock import Clock, Timed, empty_cache, is_out_of_memory, still_works
from fastdistill.benchmarks.run.gate import ERROR, OK, OOM, UNAVAILABLE, UNSUPPORTED, Gate, Verdict
from fastdistill.benchmarks.run.nvml import Load, Meter


class ProcessLost(RuntimeError):
    """Report that a provider, the one of `outcome`, left torch or the GPU in a state in which nothing runs any more."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(f"{outcome.provider.name} left nothing working here: {outcome.reason}")
        self.outcome = outcome


SHARE_OF_MEMORY = 0.8  # The share of the free memory that the providers of a case may hold together.


@dataclass
class Outcome:
    """Store the result of one provider in one case; `samples` are seconds, and empty unless the status is "ok"."""

    provider: Provider
    status: str
    reason: str | None = None
    verdict: Verdict = field(default_factory=lambda: Verdict(OK))
    cost: Cost = field(default_factory=lambda: Cost(None, None))
    samples: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    host_seconds: float | None = None
    in_turns: bool = False
    at_size: bool = False
    load: Load = field(default_factory=Load)


@dataclass(frozen=True)
class Limits:
    """Limit how long a case is measured.

    Args:
        seconds: total time of a case's samples, over all providers.
        least, most: bounds of the number of rounds; the lower one holds even if the rounds take longer than `seconds`.
    """

    seconds: float = 2.5
    least: int = 5
    most: int = 100

    def rounds(self, one_round: float) -> int:
        """Return the number of rounds that take this many seconds each; very long rounds are fewer than `least`."""
        least = self.least if one_round < self.seconds else min(self.least, 3)
        return min(self.most, max(least, int(self.seconds / one_round) if one_round > 0 else self.most))


@dataclass
class Bench:
    """Hold what measuring needs: a device, its clock, its counters where it has any, and the gate."""

    device: torch.device
    clock: Clock
    meter: Meter | None = None
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        self.gate = Gate(self.device)

    def run(self, op: Op, case: TimedCase, providers: Sequence[Provider]) -> list[Outcome]:
        """Judge and time the providers; return their outcomes in the same order.

        A provider that fails the gate is not timed, and no provider's failure ends the case.

        Raises:
            ProcessLost: an error happened from which only a new process recovers.
        """
        outcomes = [self._admitted(op, case, provider) for provider in providers]
        open_ones = [outcome for outcome in outcomes if outcome.status == OK]
        data = None
        if open_ones:
            try:
                data = op.data(case, self.device)
            except Exception as error:
                for outcome in open_ones:
                    _close(outcome, error)
        if data is not None:
            for outcome in open_ones:
                outcome.cost = op.cost(case, data, outcome.provider.kind)
            self._time(op, [outcome for outcome in open_ones if outcome.status == OK], case, data)
        empty_cache(self.device)
        return outcomes

    def _admitted(self, op: Op, case: TimedCase, provider: Provider) -> Outcome:
        if provider.absent is not None:
            return Outcome(provider, UNAVAILABLE, provider.absent)
        if (reason := provider.refuses(case)) is not None:
            return Outcome(provider, OOM if reason.startswith("out of memory") else UNSUPPORTED, reason)
        verdict = self.gate.judge(op, provider, case)
        outcome = Outcome(provider, verdict.status, verdict.reason, verdict)
        if verdict.status == ERROR:
            self._check_process(outcome)
        return outcome

    def _time(self, op: Op, outcomes: list[Outcome], case: TimedCase, data: Any) -> None:
        """Time the providers in turns if all of them fit into memory together, otherwise one after the other."""
        for outcome in outcomes:  # Each provider runs alone here, so that no other provider makes it run out of memory.
            outcome.peak_bytes = self._guarded(outcome, partial(self.clock.peak_bytes, _preparing(outcome, case, data)))
            if outcome.status == OK and case.mode == "forward":
                self._guarded(outcome, partial(self._check_at_size, op, outcome, case, data))
            empty_cache(self.device)
        alive = [outcome for outcome in outcomes if outcome.status == OK]
        free = free_bytes(self.device)
        together = free is None or sum(outcome.peak_bytes or 0 for outcome in alive) < SHARE_OF_MEMORY * free
        for batch in [alive] if together else [[outcome] for outcome in alive]:
            self._in_turns(batch, case, data)
            empty_cache(self.device)

    def _check_at_size(self, op: Op, outcome: Outcome, case: TimedCase, data: Any) -> None:
        verdict = self.gate.at_size(op, outcome.provider, case, data, lambda: _preparing(outcome, case, data)()())
        if verdict is not None:
            outcome.status, outcome.reason, outcome.verdict = verdict.status, verdict.reason, verdict
            outcome.at_size = True

    def _in_turns(self, outcomes: list[Outcome], case: TimedCase, data: Any) -> None:
        ready: list[tuple[Outcome, Timed]] = []
        for outcome in outcomes:
            timed = self._guarded(outcome, partial(self._warm, outcome, case, data))
            if timed is not None:
                outcome.host_seconds, outcome.in_turns = timed.host_seconds, len(outcomes) > 1
                ready.append((outcome, timed))
        for i in range(self.limits.rounds(sum(timed.seconds for _, timed in ready))):
            turn = i % max(1, len(ready))
            for outcome, timed in ready[turn:] + ready[:turn]:
                if outcome.status == OK:
                    sample = self._guarded(outcome, partial(self.clock.sample, timed))
                    outcome.samples += [] if sample is None else [sample]
        for outcome, timed in ready:
            if self.meter is not None and outcome.status == OK:
                outcome.load = (
                    self._guarded(outcome, partial(self.meter.load_under, timed.run, timed.seconds)) or Load()
                )

    def _warm(self, outcome: Outcome, case: TimedCase, data: Any) -> Timed:
        return self.clock.warm_up(_preparing(outcome, case, data)())

    def _guarded(self, outcome: Outcome, action: Callable[[], Any]) -> Any:
        """Return the result of an action; if it raises, close the outcome and return None."""
        try:
            return action()
        except Exception as error:  # A failure of one provider must not cost the others their numbers.
            _close(outcome, error)
        self._check_process(outcome)
        empty_cache(self.device)
        return None

    def _check_process(self, outcome: Outcome) -> None:
        if not still_works(self.device):
            outcome.status = ERROR
            raise ProcessLost(outcome)


def _preparing(outcome: Outcome, case: TimedCase, data: Any) -> Callable[[], Run]:
    return lambda: outcome.provider.prepare(case, data)


def _close(outcome: Outcome, error: Exception) -> None:
    outcome.status = OOM if is_out_of_memory(error) else ERROR
    outcome.reason, outcome.samples = gate.first_line(error), []


def quantile(samples: Sequence[float], share: float) -> float:
    """Return a quantile, interpolated linearly between the samples."""
    if len(samples) == 1:
        return samples[0]
    return statistics.quantiles(samples, n=100, method="inclusive")[round(100 * share) - 1]
