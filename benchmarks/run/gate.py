"""Judge results before they are timed: a wrong result is reported with its error, and never timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastdistill.benchmarks.ops.timed_op import FLOOR, Op, Provider, Tensors, TimedCase
from fastdistill.benchmarks.run.clock import is_out_of_memory
from fastdistill.testing import errors_against

OK, FAILED, OOM, UNAVAILABLE, UNSUPPORTED, ERROR = "ok", "failed parity", "oom", "unavailable", "unsupported", "error"

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """Store whether a provider may be timed, and its errors.

    Args:
        status: `OK`, `FAILED`, `OOM` or `ERROR`.
        reason: says in words why the provider may not be timed.
        errors, allowed: for each result by its name, the largest error against float64, and the largest that the
            tolerance
            rule of `fastdistill.testing` allows, as shares of the largest entry of the truth.
    """

    status: str
    reason: str | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    allowed: Mapping[str, float] = field(default_factory=dict)


class Gate:
    """Judge providers on the small form of a case; one judgement serves all cases with the same small form."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._verdicts: dict[tuple[object, ...], Verdict] = {}
        self._wrong_at_size: dict[tuple[object, ...], Verdict] = {}
        self._truths: dict[tuple[object, ...], tuple[Named, Named]] = {}

    def judge(self, op: Op, provider: Provider, case: TimedCase) -> Verdict:
        """Run a provider once and compare each result with float64; a backward is judged after its forward."""
        if (wrong := self._wrong_at_size.get(_key(op, case, provider))) is not None:
            return wrong
        small = op.small(case)
        if small.mode in ("primal", "mixed"):
            forward = self.judge(op, provider, replace(case, mode="forward"))
            if forward.status != OK:
                return replace(forward, reason=f"its forward: {forward.reason}")
        key = (op.name, small.mode, small.dtype, tuple(sorted(small.shape.items())))
        if (*key, provider.name) not in self._verdicts:
            self._verdicts[(*key, provider.name)] = self._judged(op, provider, small, key)
        return self._verdicts[(*key, provider.name)]

    def _judged(self, op: Op, provider: Provider, small: TimedCase, key: tuple[object, ...]) -> Verdict:
        try:
            data = op.data(small, self._device)
            expected, baseline = self._truth(op, provider, small, data, key)
            actual = op.named(small, provider.prepare(small, data)())
        except Exception as error:  # A peer may raise anything, and the benchmark goes on without it.
            return Verdict(OOM if is_out_of_memory(error) else ERROR, first_line(error))
        return _compared(provider, small, actual, expected, baseline)

    def at_size(
        self, op: Op, provider: Provider, case: TimedCase, data: Any, forward: Callable[[], Tensors]
    ) -> Verdict | None:
        """Judge the last rows of a forward at the size that is timed; return None where an op can't compute rows alone.

        A kernel may be right on the small form, and wrong where indices are large. A provider that fails here is
        refused for the backwards of this size too.
        """
        if op.part(data, ()) is None:
            return None
        found = op.part(data, forward())
        assert found is not None
        part, results = found
        plain = provider.plain or op.plain
        expected, baseline = (op.named(case, plain(case, x)()) for x in (op.exact(part), part))
        verdict = _compared(provider, case, op.named(case, results), expected, baseline)
        if verdict.status != OK:
            verdict = replace(verdict, reason=f"at this size: {verdict.reason}")
            self._wrong_at_size[_key(op, case, provider)] = verdict
        return verdict

    def _truth(
        self, op: Op, provider: Provider, small: TimedCase, data: Any, key: tuple[object, ...]
    ) -> tuple[Named, Named]:
        """Return the results of the specification in float64, and in the dtype of the case."""
        plain = provider.plain or op.plain
        key = (*key, provider.name if provider.plain else None)
        if key not in self._truths:
            truths, baselines = plain(small, op.exact(data))(), plain(small, data)()
            self._truths[key] = (op.named(small, truths), op.named(small, baselines))
        return self._truths[key]


def _key(op: Op, case: TimedCase, provider: Provider) -> tuple[object, ...]:
    return (op.name, case.dtype, tuple(sorted(case.shape.items())), provider.name)


def _compared(provider: Provider, case: TimedCase, actual: Named, expected: Named, baseline: Named) -> Verdict:
    """Compare each result, by its name, with the truth, by the tolerance rule."""
    complete = actual.keys() == expected.keys()
    if not complete and not (provider.kind == FLOOR and actual and actual.keys() < expected.keys()):
        return Verdict(FAILED, f"its results are {', '.join(actual) or 'none'} instead of {', '.join(expected)}")
    order = 2 if case.mode == "mixed" else 1
    measured = {
        name: errors_against(x.detach(), expected[name].detach(), baseline[name].detach(), order)
        for name, x in actual.items()
    }
    errors, allowed = ({name: pair[i] for name, pair in measured.items()} for i in (0, 1))
    wrong = [name for name in measured if not errors[name] <= allowed[name]]
    return Verdict(FAILED if wrong else OK, _words(wrong, errors, allowed), errors, allowed)


def _words(wrong: Sequence[str], errors: Mapping[str, float], allowed: Mapping[str, float]) -> str | None:
    """Say which result is the most wrong, and how many others are wrong too."""
    if not wrong:
        return None
    name = max(wrong, key=lambda name: errors[name] / allowed[name] if allowed[name] else math.inf)
    others = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"{name}: error {errors[name]:.1e}, allowed {allowed[name]:.1e}{others}"


def worst(values: Mapping[str, float], tangents: bool) -> float | None:
    """Return the largest value of tangents and their gradients, or of the other results; None if there is none."""
    found = [value for name, value in values.items() if name.startswith(("t_", "dt_")) is tangents]
    largest = max(found, default=None)
    return None if largest is None or not math.isfinite(largest) else largest


def first_line(error: BaseException) -> str:
    """Return an error's message, short enough for a table."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    # Errors of torch.compile have their message in the second line.
    words = lines[0] if not lines[0].endswith("raised:") else " ".join(lines[:2])
    return f"{type(error).__name__}: {words}"[:300].removesuffix(": ")
