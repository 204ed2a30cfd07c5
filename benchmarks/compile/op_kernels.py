"""Compile the kernels, forward and backward, of the ops whose rows in the rooms' `cases.py` name sizes for it.

An op's public pair says what it hands to the dispatcher, of tensors without memory; its Triton implementation is then
called with that, and each launch is written down, or compiled, instead of made. Every tensor has a tangent, parameters
too, and all gradients are asked for. Rows are in bfloat16; vectors and modulations in float32, as a network has them.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor

from fastdistill.kernels.configs import NormConfig
from fastdistill.ops.protocol.cases import Dims, PublicOp, Sizes, every_case
from fastdistill.ops.protocol.dual_op import DualOp
from fastdistill.tune import Case

BACKWARD = "_backward"
KERNELS = Path(__file__).parents[2] / "kernels"


class Call(NamedTuple):
    """Call of an op that a public function hands to the dispatcher."""

    op: DualOp
    inputs: Sequence[Any]
    attrs: Sequence[Any]


class Launched(NamedTuple):
    """Launch that was written down: the kernel, its arguments and its options."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


@cache
def _rows() -> dict[str, tuple[PublicOp, str]]:
    """Return the rows and variants to compile, by the names of their forward kernels in the table."""
    rows = [row for row in every_case() if row.compiled]
    return {f"{row.name}_{variant}".removesuffix("_"): (row, variant) for row in rows for variant in row.launched}


def kernels() -> list[str]:
    """Return the names in the table: of every op to compile, and of its backward."""
    return [name + suffix for name in _rows() for suffix in ("", BACKWARD)]


def cases() -> Iterator[tuple[Case, NormConfig]]:
    """Yield every case, and the config of its first launch."""
    for name in kernels():
        for sizes in _rows()[name.removesuffix(BACKWARD)][0].compiled:
            case = Case(name, torch.bfloat16, _width(sizes), "", "none", sizes["N"])
            options = launches(case)[0].options
            width = options.get("BLOCK_C") or 2 * options["HALF"]
            yield case, NormConfig(options["ROWS"], width, options["num_warps"])


def launches(case: Case) -> list[Launched]:
    """Return the launches of a case, one or more."""
    found: list[Launched] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(Launched(self, args, options))

    with _instead_of_launching(note):
        _call(case)
    return found


def compiled(case: Case) -> list[Any]:
    """Return its kernels, for the architecture that Triton compiles for now."""
    run, found = triton.runtime.jit.JITFunction.run, list[Any]()

    def compile_only(self: Any, *args: Any, warmup: bool, **options: Any) -> None:
        found.append(run(self, *args, warmup=True, **options))

    with _instead_of_launching(compile_only):
        _call(case)
    return found


@contextmanager
def _instead_of_launching(run: Callable[..., Any]) -> Iterator[None]:
    with mock.patch.object(triton.runtime.jit.JITFunction, "run", run):
        yield


def _call(case: Case) -> None:
    """Call the Triton implementation of a case's forward or backward on tensors without memory."""
    backward = case.kernel.endswith(BACKWARD)
    op, inputs, attrs = captured(case)
    if not backward:
        op.forward(inputs, attrs, True)
        return
    outs, residuals = op.specs(inputs, attrs, True)
    given = [None if x is None else _empty(*x[0], dtype=x[1]) for x in outs]
    cotangents = [(x, x) for x in given]
    saved = ([(x, x) for x in given], [None if x is None else _empty(*x[0], dtype=x[1]) for x in residuals])
    needs = [(x is not None, t is not None) for x, t in inputs]
    op.backward(cotangents, inputs, saved, attrs, needs)


def captured(case: Case) -> Call:
    """Return what the op of a case hands to the dispatcher, with Triton asked for."""
    row, variant = _rows()[case.kernel.removesuffix(BACKWARD)]
    (chosen,) = [sizes for sizes in row.compiled if _width(sizes) == case.d]
    sizes, given = row.variant(variant, chosen)
    options = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in given.items()}
    tensors = {name: _like(row.tensors[name], shape, name in row.wide) for name, shape in row.shapes(sizes).items()}
    calls: list[Call] = []

    def note(self: DualOp, inputs: Any, attrs: Any, tangent_grad: bool) -> Any:
        calls.append(Call(self, inputs, (*attrs[:-1], "triton")))
        return [
            (x, x) for x in (_empty(*spec[0], dtype=spec[1]) for spec in self.specs(inputs, attrs, False)[0] if spec)
        ]

    with mock.patch.object(DualOp, "pair", note):
        row.of_pair(tensors, tensors, options, tangent_grad=True, impl="torch")
    (call,) = calls
    return call


def _like(dims: Dims, shape: tuple[int, ...], wide: bool) -> Tensor:
    narrow = len(dims) > 1 and 1 not in dims and not wide
    return _empty(*shape, dtype=torch.bfloat16 if narrow else torch.float32)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _width(sizes: Sizes) -> int:
    """Return what tells the sizes of an op apart: the channels of a row, or of a head."""
    return next(sizes[letter] for letter in "CFD" if letter in sizes)


@cache
def family(kernel: str) -> str:
    """Return the kernels' module that a name in the table belongs to: that of its op's dispatcher op."""
    row, _ = _rows()[kernel.removesuffix(BACKWARD)]
    case = Case(kernel, torch.bfloat16, _width(row.compiled[0]), "", "none", row.compiled[0]["N"])
    return captured(case).op.name


def families() -> set[str]:
    """Return the kernels' modules of the names in the table."""
    return set(map(family, kernels()))


def files(module: str) -> list[Path]:
    """Return the files of a kernels' module: its own and those that it imports, and these import."""
    found, waiting = dict[Path, None](), [KERNELS / f"{module}.py"]
    while waiting:
        path = waiting.pop()
        found[path] = None
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                waiting += [at for name in names if (at := KERNELS / f"{name}.py") not in found]
    return sorted(found)
