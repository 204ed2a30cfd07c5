"""Define the parts of a benchmark: cases, ops that make inputs and truth, and providers that compute them.

A mode says what is timed:
  forward   the outputs and their tangents
  primal    the gradients of the outputs, after a forward with tangents that is not timed
  mixed     the gradients of outputs and tangents in primals and tangents, after a forward that is not timed
  step      a whole training step without the optimiser: the loss and the gradients of all parameters
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

MODES = ("forward", "primal", "mixed", "step")
COMPARED_TOKENS = 256  # This many tokens are compared at the size that is timed.
OURS, PEER, FLOOR = "ours", "peer", "floor"

Tensors = tuple[Tensor, ...]
Run = Callable[[], Tensors]
Shape = Mapping[str, int | str]


class BenchError(ValueError):
    """Report a request that can't be met; the message says what was expected."""


@dataclass(frozen=True)
class TimedCase:
    """Describe one case of a suite: an op at one shape, in one mode.

    Args:
        suite, op: names of the suite and of the op.
        name: name of the shape, such as "DiT-XL/2-256px-B8-H16-N256-D72".
        mode: one of `MODES`.
        shape: what the op needs to know, by name; sizes are numbers.
        dtype: "float32", "bfloat16", ...; ops that run under autocast keep float32 parameters.
        quick: marks a case of `--quick`, which runs nothing that takes long to prepare.
    """

    suite: str
    op: str
    name: str
    mode: str
    shape: Shape
    dtype: str
    quick: bool = False

    @property
    def group(self) -> str:
        """Return the name that all providers of this case share in a result file."""
        return f"{self.suite}/{self.name}-{self.dtype}/{self.mode}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the torch.dtype that `dtype` names."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def resized(self, **sizes: int | str) -> TimedCase:
        """Return the same case at another shape."""
        return replace(self, shape={**self.shape, **sizes})

    def size(self, name: str) -> int:
        """Return a size of the shape."""
        value = self.shape[name]
        assert isinstance(value, int)
        return value


class Cost(NamedTuple):
    """Hold the least cost of a run: floating-point operations, and bytes when each tensor is read or written once."""

    flops: float | None
    bytes: float | None


@dataclass(frozen=True)
class Provider:
    """Describe an implementation.

    Args:
        name: name that results show.
        kind: `OURS`, `PEER`, or `FLOOR`. A floor computes no tangents, and its time can hardly be beaten.
        prepare: (case, data) -> the run that is timed. Earlier work, such as the forward of a backward, happens here.
        absent: the reason why this machine lacks it, or None.
        refuses: returns the reason why it can't run a case, or None.
        plain: a formula of its own for truth and baseline, where the op's formula doesn't apply.
    """

    name: str
    kind: str
    prepare: Callable[[TimedCase, Any], Run]
    absent: str | None = None
    refuses: Callable[[TimedCase], str | None] = lambda case: None
    plain: Callable[[TimedCase, Any], Run] | None = None


class Op(Protocol):
    """Describe the interface of an op that can be benchmarked."""

    @property
    def name(self) -> str:
        """Return the op's name."""

    def data(self, case: TimedCase, device: torch.device) -> Any:
        """Return the inputs, the same on every call."""

    def exact(self, data: Any) -> Any:
        """Return the inputs in float64."""

    def plain(self, case: TimedCase, data: Any) -> Run:
        """Return a run of the specification in plain PyTorch; `exact` inputs give the truth, others the baseline."""

    def named(self, case: TimedCase, results: Tensors) -> dict[str, Tensor]:
        """Return the results of a run by the names under which the gate compares them; a floor returns fewer."""

    def part(self, data: Any, results: Tensors) -> tuple[Any, Tensors] | None:
        """Return the last part of a forward's results, and the inputs that it needs; None if it needs all inputs."""

    def small(self, case: TimedCase) -> TimedCase:
        """Return the case at a size for the parity gate, at which float64 and (N, M) matrices are cheap."""

    def cost(self, case: TimedCase, data: Any, kind: str) -> Cost:
        """Return the cost that a provider of this kind is credited with, whatever it does."""

    def providers(self, device: torch.device) -> list[Provider]:
        """Return all providers, including those that are absent."""


@dataclass(frozen=True)
class Point:
    """Hold the inputs of an op.

    Args:
        primals: inputs in the op's order.
        tangents: a tangent beside each primal, or None.
        d_outs, dt_outs: cotangents of the outputs and of their tangents.
        constants: indices of the primals that have no gradient, such as the angles of a rotation.
    """

    primals: Tensors
    tangents: tuple[Tensor | None, ...]
    d_outs: Tensors
    dt_outs: Tensors
    constants: tuple[int, ...] = ()

    def double(self) -> Point:
        """Return the point in float64."""
        primals, d_outs, dt_outs = (tuple(x.double() for x in xs) for xs in (self.primals, self.d_outs, self.dt_outs))
        tangents = tuple(x if x is None else x.double() for x in self.tangents)
        return Point(primals, tangents, d_outs, dt_outs, self.constants)


# (primals, tangents, mixed) -> (outputs, their tangents), differentiable; if mixed, the tangents are differentiable
# too.
Dual = Callable[[Tensors, Sequence[Tensor | None], bool], tuple[Tensors, Tensors]]


def workload(dual: Dual, mode: str, point: Point) -> Run:
    """Return the run that is timed: the forward of a dual function, or its backward after a forward right here."""
    if mode == "forward":

        def forward() -> Tensors:
            with torch.no_grad():
                outs, t_outs = dual(point.primals, point.tangents, False)
            return (*outs, *t_outs)

        return forward
    mixed = mode == "mixed"
    leaves = tuple(x.detach().requires_grad_(i not in point.constants) for i, x in enumerate(point.primals))
    tangents = tuple(x if x is None else x.detach().requires_grad_(mixed) for x in point.tangents)
    outs, t_outs = dual(leaves, tangents, mixed)
    wanted = [x for x in (*leaves, *tangents) if x is not None and x.requires_grad]
    results, cotangents = (*outs, *t_outs), (*point.d_outs, *point.dt_outs)
    if not mixed:
        results, cotangents = outs, point.d_outs

    def backward() -> Tensors:
        gradients = torch.autograd.grad(results, wanted, cotangents, retain_graph=True, allow_unused=True)
        return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients, strict=True))

    return backward


@dataclass(frozen=True)
class OpForms:
    """Describe an op with one function of its primals, in the forms that the generic providers need.

    Args:
        name: name of the op.
        primals: names of the primals, in order.
        moving: names of the primals with tangents.
        results: names of the outputs.
        like: for each output, the primal whose shape it has.
        make: (case, draw) -> primals; draw(*shape) draws standard normal tensors.
        reference: case -> the specification, a function of the primals.
        own: case -> the same by PyTorch's own ops, with a forward mode, as one writes it without this library.
        pair: (case, impl) -> our explicit pair, as a dual function.
        flops: (case, floor) -> floating-point operations; a floor computes no tangents.
        small: see `Op`.
        common: (op, device) -> the providers that all ops have.
        more: device -> the providers that only this op has.
        constants: names of the primals that have no gradient.
        last: (name, primal) -> the part of the primal on which the last outputs depend; None where that is everything.
    """

    name: str
    primals: tuple[str, ...]
    moving: tuple[str, ...]
    results: tuple[str, ...]
    like: tuple[str, ...]
    make: Callable[[TimedCase, Callable[..., Tensor]], Tensors]
    reference: Callable[[TimedCase], Callable[..., Any]]
    own: Callable[[TimedCase], Callable[..., Any]]
    pair: Callable[..., Dual]
    flops: Callable[[TimedCase, bool], float | None]
    small: Callable[[TimedCase], TimedCase]
    common: Callable[[OpForms, torch.device], list[Provider]]
    more: Callable[[torch.device], list[Provider]] = field(default=lambda device: [])
    constants: tuple[str, ...] = ()
    last: Callable[[str, Tensor], Tensor] | None = None

    def data(self, case: TimedCase, device: torch.device) -> Point:
        """Return primals, tangents and cotangents in the dtype of the case, drawn from one seed."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=case.torch_dtype, device=device, generator=generator)

        primals = self.make(case, draw)
        by_name = dict(zip(self.primals, primals, strict=True))
        tangents = tuple(draw(*by_name[name].shape) if name in self.moving else None for name in self.primals)
        d_outs, dt_outs = (tuple(draw(*by_name[name].shape) for name in self.like) for _ in range(2))
        constants = tuple(i for i, name in enumerate(self.primals) if name in self.constants)
        return Point(primals, tangents, d_outs, dt_outs, constants)

    def exact(self, data: Point) -> Point:
        """Return the point in float64."""
        return data.double()

    def plain(self, case: TimedCase, data: Point) -> Run:
        """Return a run of the reference under `torch.func.jvp`."""
        return workload(by_jvp(self.reference(case)), case.mode, data)

    def named(self, case: TimedCase, results: Tensors) -> dict[str, Tensor]:
        """Name the results: outputs y and t_y after a forward; gradients dq, dt_q, ... after a backward."""
        leaves = (name for name in self.primals if name not in self.constants)
        names = (*(f"d{name}" for name in leaves), *(f"dt_{name}" for name in self.moving))
        if case.mode == "forward":
            names = (*self.results, *(f"t_{name}" for name in self.results))
        return dict(zip(names, results, strict=False))

    def cost(self, case: TimedCase, data: Point, kind: str) -> Cost:
        """Return the flops of the formula, and the bytes of every tensor that comes in or goes out once."""
        floor = kind == FLOOR
        primals, d_outs = (sum(x.nbytes for x in some) for some in (data.primals, data.d_outs))
        tangents = sum(x.nbytes for x in data.tangents if x is not None)
        moved = {
            "forward": primals + d_outs if floor else primals + tangents + 2 * d_outs,
            "primal": 2 * primals + d_outs,
            "mixed": 2 * (primals + tangents + d_outs),
        }
        return Cost(self.flops(case, floor), float(moved[case.mode]))

    def part(self, data: Point, results: Tensors) -> tuple[Point, Tensors] | None:
        """Cut the results and the inputs by `last`; an output is cut like the primal whose shape it has."""
        if self.last is None:
            return None
        primals = tuple(self.last(name, x) for name, x in zip(self.primals, data.primals, strict=True))
        pairs = zip(self.primals, data.tangents, strict=True)
        tangents = tuple(x if x is None else self.last(name, x) for name, x in pairs)
        names = (*self.like, *self.like)[: len(results)]
        cut = tuple(self.last(name, x) for name, x in zip(names, results, strict=True))
        return Point(primals, tangents, (), (), data.constants), cut

    def providers(self, device: torch.device) -> list[Provider]:
        """Return our providers, the generic peers, and those that only this op has."""
        return [*self.common(self, device), *self.more(device)]


def as_tuple(outs: Any) -> Tensors:
    """Return the outputs as a tuple, also if there is only one."""
    return (outs,) if isinstance(outs, Tensor) else tuple(outs)


def along(fn: Callable[..., Any], primals: Tensors, tangents: Sequence[Tensor | None]) -> tuple[Any, Tensors, Tensors]:
    """Return fn as a function of the primals that have tangents, then these primals, then their tangents."""
    moving = [i for i, tangent in enumerate(tangents) if tangent is not None]

    def moved(*values: Tensor) -> Tensors:
        full = list(primals)
        for i, value in zip(moving, values, strict=True):
            full[i] = value
        return as_tuple(fn(*full))

    return moved, tuple(primals[i] for i in moving), tuple(x for x in tangents if x is not None)


def by_jvp(fn: Callable[..., Any]) -> Dual:
    """Return the pair of a function by `torch.func.jvp`."""

    def dual(primals: Tensors, tangents: Sequence[Tensor | None], mixed: bool) -> tuple[Tensors, Tensors]:
        moved, point, direction = along(fn, primals, tangents)
        outs, t_outs = torch.func.jvp(moved, point, direction)[:2]
        return outs, t_outs

    return dual


def by_differences(fn: Callable[..., Any]) -> Dual:
    """Return the pair of a function by central differences, with the step that suits the dtype."""

    def dual(primals: Tensors, tangents: Sequence[Tensor | None], mixed: bool) -> tuple[Tensors, Tensors]:
        moved, point, direction = along(fn, primals, tangents)
        step = torch.finfo(point[0].dtype).eps ** (1 / 3)
        after, before = (
            moved(*(x + sign * step * t_x for x, t_x in zip(point, direction, strict=True))) for sign in (1, -1)
        )
        return moved(*point), tuple((a - b) / (2 * step) for a, b in zip(after, before, strict=True))

    return dual


def without_tangents(fn: Callable[..., Any]) -> Dual:
    """Return a dual function without tangents; it serves as a floor."""

    def dual(primals: Tensors, tangents: Sequence[Tensor | None], mixed: bool) -> tuple[Tensors, Tensors]:
        return as_tuple(fn(*primals)), ()

    return dual


def last_tokens(name: str, x: Tensor) -> Tensor:
    """Return the last tokens of the last sample and its last head, where the indices of a kernel are largest."""
    if x.dim() == 4:
        return x[-1:, -1:, -COMPARED_TOKENS:]
    if x.dim() == 3:
        return x[-1:, -COMPARED_TOKENS:]
    return x[-COMPARED_TOKENS:] if x.dim() == 2 else x


def few(n: int, most: int) -> int:
    """Return n, or a shorter length that 32 divides only if it divides n, so that awkward lengths stay awkward."""
    return n if n <= most else most - (32 - n % 32 if n % 32 else 0)
