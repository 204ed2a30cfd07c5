"""Define a toy op with providers that behave as told, on a clock that only a provider moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastdistill.benchmarks.ops.common_providers import dual_provider, plain_floor
from fastdistill.benchmarks.ops.timed_op import (
    FLOOR,
    OURS,
    Dual,
    OpForms,
    Provider,
    Run,
    Tensors,
    TimedCase,
    by_jvp,
)
from fastdistill.benchmarks.run.clock import CpuClock
from fastdistill.benchmarks.run.in_turns import Bench, Limits

CPU = torch.device("cpu")
CASE = TimedCase("toys", "square", "square-N4", "forward", {"n": 4, "model": "toy"}, "float32", quick=True)


def square(x: Tensor) -> Tensor:
    """Compute the op."""
    return x * x


def squares(*, off: float = 1.0) -> Callable[[TimedCase], Dual]:
    """Return the op's pair, with a tangent that is off by a factor."""

    def of_case(case: TimedCase) -> Dual:
        exact = by_jvp(square)

        def dual(primals: Tensors, tangents: Sequence[Tensor | None], mixed: bool) -> tuple[Tensors, Tensors]:
            outs, t_outs = exact(primals, tangents, mixed)
            return outs, tuple(off * t_y for t_y in t_outs)

        return dual

    return of_case


def right(name: str = "right", kind: str = OURS) -> Provider:
    """Return a provider that passes the gate."""
    return plain_floor(name, lambda case: square) if kind == FLOOR else dual_provider(name, kind, squares())


def wrong(name: str = "wrong") -> Provider:
    """Return a provider whose tangent is a thousandth off."""
    return dual_provider(name, OURS, squares(off=1.001))


def op_of(*providers: Provider, last: int | None = None) -> OpForms:
    """Return the op with these providers; its `last` numbers are compared at the size that is timed."""
    return OpForms(
        name="square",
        primals=("x",),
        moving=("x",),
        results=("y",),
        like=("x",),
        make=lambda case, draw: (draw(case.size("n")),),
        reference=lambda case: square,
        own=lambda case: square,
        pair=lambda case, impl: squares()(case),
        flops=lambda case, floor: 2.0 * case.size("n"),
        small=lambda case: case.resized(n=min(4, case.size("n"))),
        last=None if last is None else lambda name, x: x[-last:],
        common=lambda op, device: list(providers),
    )


@dataclass
class Time:
    """Count time by hand, and log who ran."""

    now: float = 0.0
    log: list[str] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def takes(self, provider: Provider, seconds: Sequence[float]) -> Provider:
        """Return the provider with calls that take these seconds in turn; the last one repeats for ever."""
        durations = self._durations(seconds)

        def prepare(case: TimedCase, data: object) -> Run:
            run = provider.prepare(case, data)

            def timed() -> Tensors:
                self.log.append(provider.name)
                self.now += next(durations)
                return run()

            return timed

        return replace(provider, prepare=prepare)

    @staticmethod
    def _durations(seconds: Sequence[float]) -> Iterator[float]:
        yield from seconds
        while True:
            yield seconds[-1]


def bench(time: Time | None = None, **limits: float) -> Bench:
    """Return a bench on the CPU, by this timer, by default with few rounds."""
    return Bench(CPU, CpuClock(time or Time()), limits=Limits(**{"seconds": 0.0, "least": 3, "most": 3, **limits}))  # type: ignore[arg-type]
