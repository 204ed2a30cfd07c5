"""Say of every public op what whoever tries, counts, compiles or times it has to know: one row for each.

A room's `cases.py` lists its rows as `CASES`, and `every_case` finds them. So a new op is tested under all transforms
and by its kernels, passes the parity gate, and is counted, compiled ahead of time and benchmarked once it has a row.
Shapes are written in letters:

    B batch      N tokens or queries      M keys      H heads      G heads of keys      D head dim      E that of values
    C channels   F hidden channels        K, O channels into and out of a linear layer
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

Dims = tuple[str | int, ...]
Sizes = Mapping[str, int]
Shapes = dict[str, tuple[int, ...]]
Tensors = tuple[Tensor, ...]
NOTHING: Mapping[str, Any] = MappingProxyType({})

# At which op counts are taken: small, but not so small that an op takes another road than at its usual size.
COUNTED: Sizes = {"B": 2, "N": 128, "M": 128, "H": 4, "G": 4, "D": 64, "E": 64, "C": 256, "F": 256, "K": 256, "O": 512}


def dit(batch: int, tokens: int, width: int, heads: int) -> Sizes:
    """Return the sizes of a DiT's tensors."""
    of_heads = {"H": heads, "G": heads, "D": width // heads, "E": width // heads}
    return {"B": batch, "N": tokens, "M": tokens, **of_heads, "C": width, "F": 4 * width, "K": width, "O": width}


# The models at whose sizes ops are timed: images of 512 px, videos of 480p and 81 frames, images of 1024 px with text.
DITS = {
    "DiT-S/2": dit(32, 1024, 384, 6),
    "DiT-B/2": dit(32, 1024, 768, 12),
    "DiT-L/2": dit(32, 1024, 1024, 16),
    "DiT-XL/2": dit(32, 1024, 1152, 16),
}
LIGHTNING = {"LightningDiT-XL": {**dit(32, 1024, 1152, 16), "F": 3072}}
WANS = {"Wan2.1-1.3B": dit(1, 32760, 1536, 12), "Wan2.1-14B": dit(1, 32760, 5120, 40)}
MMDITS = {
    "SD3-M": dit(4, 4429, 1536, 24),
    "SD3.5-L": dit(4, 4429, 2432, 38),
    "FLUX.1": dit(4, 4608, 3072, 24),
    "FLUX.2": dit(4, 4608, 6144, 48),
}


@dataclass(frozen=True)
class PublicOp:
    """Public op: its forms, its arguments, the sizes at which it is tried, and what it costs at least.

    Args:
        name: that of the explicit pair without its `_jvp`.
        op, pair: the public functions.
        reference: the specification, with the arguments of the pair's primals.
        native: what one writes in plain PyTorch without us, with the arguments of the op.
        tensors: the arguments that may have a tangent, by the op's names, and their dimensions.
        outputs: the same of the results.
        tiny: the sizes at which transforms are tried in float64.
        optional: the tensors that may be None.
        usual: the optional ones that a network gives.
        parameters: the tensors that have gradients in a network, but no tangent.
        options: sets of other arguments for the transforms, a call each; under "shapes" other shapes for the call.
        variants: by name, sets of other arguments that op counts tell apart; a function is called with the sizes, and
            under "sizes" are other sizes. "" is the op as it is.
        launched: the variants whose launches are counted, and which are timed.
        constants: sizes -> other arguments that every call needs.
        pair_names: what the pair and the reference call an argument differently.
        op_only: arguments that the pair does without.
        flops: (sizes, mode) -> floating-point operations of a mode of benchmarks/ops/timed_op.py, or of "plain", the
            forward without a tangent.
        counted: at which op counts are taken, where those of `COUNTED` don't fit.
        models: at whose sizes it is timed; see `DITS` and its neighbours.
        compiled: the sizes at which the Triton kernels are compiled ahead of time, () without any.
        wide: the tensors that are float32 beside 16-bit ones there, as a residual stream under autocast is.
        triton: whether it has Triton kernels.
    """

    name: str
    op: Callable[..., Any]
    pair: Callable[..., Any]
    reference: Callable[..., Any]
    native: Callable[..., Any]
    tensors: Mapping[str, Dims]
    outputs: Mapping[str, Dims]
    tiny: Sizes
    optional: tuple[str, ...] = ()
    usual: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    options: tuple[Mapping[str, Any], ...] = (NOTHING,)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    launched: tuple[str, ...] = ("",)
    constants: Callable[[Sizes], Mapping[str, Any]] = lambda sizes: NOTHING
    pair_names: Mapping[str, str] = field(default_factory=dict)
    op_only: tuple[str, ...] = ()
    flops: Callable[[Sizes, str], float] = lambda sizes, mode: 0.0
    counted: Sizes = field(default_factory=lambda: COUNTED)
    models: Mapping[str, Sizes] = field(default_factory=dict)
    compiled: tuple[Sizes, ...] = ()
    wide: tuple[str, ...] = ()
    triton: bool = True

    def shapes(self, sizes: Sizes, names: Sequence[str] | None = None) -> Shapes:
        """Return the shapes of these tensors, by default of those that a network gives."""
        if names is None:
            names = [name for name in self.tensors if name not in self.optional or name in self.usual]
        return {name: sized(self.tensors[name], sizes) for name in names}

    def variant(self, name: str, sizes: Sizes) -> tuple[Sizes, dict[str, Any]]:
        """Return the sizes of a variant and its other arguments, constants included."""
        options = dict(self.variants[name])
        sizes = {**sizes, **options.pop("sizes", {})}
        given = {key: value(sizes) if callable(value) else value for key, value in options.items()}
        return sizes, {**self.constants(sizes), **given}

    def of_op(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any], **more: Any) -> Tensors:
        """Return the op's outputs, as a tuple; `more` is the choice of an `impl`, for the ops that have one."""
        return as_tuple(self.op(**self._filled(tensors, options), **options, **_choices(self.op, more)))

    def of_native(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensors:
        """Return what plain PyTorch makes of them, as a tuple."""
        return as_tuple(self.native(**self._filled(tensors, options), **options))

    def of_reference(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensors:
        """Return the specification's outputs, as a tuple."""
        given = {self.pair_names.get(name, name): x for name, x in self._filled(tensors, options).items()}
        return as_tuple(self.reference(**given, **options))

    def of_pair(
        self, tensors: Mapping[str, Tensor], tangents: Mapping[str, Any], options: Mapping[str, Any], **more: Any
    ) -> tuple[Tensors, Tensors]:
        """Return the explicit pair's outputs and their tangents, each as a tuple.

        `more` is the choice of an `impl` and of `tangent_grad`, for the ops that have these.
        """
        names = {name: self.pair_names.get(name, name) for name in self.tensors}
        given = {names[name]: x for name, x in self._filled(tensors, options).items()}
        given |= {f"t_{names[name]}": tangents.get(name) for name in self.tensors}
        kept = {name: x for name, x in options.items() if name not in self.op_only}
        results = self.pair(**given, **kept, **_choices(self.pair, more))
        if isinstance(results[0], tuple):
            return results[0], results[1]
        return tuple(results[::2]), tuple(results[1::2])

    def _filled(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor | None]:
        return {name: tensors.get(name) for name in self.tensors if name not in options}

    def missing(self) -> set[str]:
        """Return the arguments of the op or of its pair that no call for the transforms passes."""
        constants = self.constants(self.tiny)
        passed = {*self.tensors, *constants, *(name for given in self.options for name in given)} - {"shapes"}
        names = {self.pair_names.get(name, name) for name in self.tensors}
        in_pair = (passed - set(self.tensors) - set(self.op_only)) | names | {f"t_{name}" for name in names}
        of_op, of_pair = (set(inspect.signature(f).parameters) - {"impl", "tangent_grad"} for f in (self.op, self.pair))
        return (of_op ^ passed) | (of_pair ^ in_pair)


def sized(dims: Dims, sizes: Sizes) -> tuple[int, ...]:
    """Return a shape: the letters by their sizes, numbers as they are."""
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in dims)


def per_element(dims: Dims, plain: int, tangent: int, primal: int, mixed: int) -> Callable[[Sizes, str], float]:
    """Return the flops of an op that is bound by memory: so many operations an element, of which the order matters.

    plain is of the primal, tangent of the tangent beside it, primal and mixed are of the two backwards.
    """
    each = {"plain": plain, "forward": plain + tangent, "primal": primal, "mixed": mixed}
    return lambda sizes, mode: float(each[mode] * torch.Size(sized(dims, sizes)).numel())


def as_tuple(results: Any) -> Tensors:
    """Return one result or several as a tuple."""
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _choices(function: Callable[..., Any], more: Mapping[str, Any]) -> dict[str, Any]:
    taken = _arguments(function)
    return {name: value for name, value in more.items() if name in taken or name not in ("impl", "tangent_grad")}


@cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def every_case() -> Iterator[PublicOp]:
    """Yield the rows of every room, in the order of their names."""
    package = importlib.import_module("fastdistill.ops")
    for room in sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg):
        if room != "protocol":
            yield from importlib.import_module(f"fastdistill.ops.{room}.cases").CASES
