"""Print the counts that say whether the house works: calls to a launch, wide functions, circles of imports.

    python -m tests.house_counts

`test_house.py` holds them to their limits.
"""

from __future__ import annotations

import ast
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

import torch

import fastdistill as fd
from tests.test_layers import MODULES, imports

ROOT = Path(__file__).parents[1]
MOST_ARGUMENTS = 10


class Calls(NamedTuple):
    """Calls that Python runs from a public function to the launch of its kernel.

    total: calls, PyTorch's and the standard library's own included. files: those of ours that they are in.
    """

    total: int
    files: list[str]


class _Launched(Exception):
    """Ends a run where its kernel would be launched."""


class _Launcher:
    """Stands in for a kernel: the count ends where it would be launched."""

    def __getitem__(self, grid: Any) -> Any:
        sys.setprofile(None)
        raise _Launched


def calls_to_the_launch(requires_grad: bool = False) -> Calls:
    """Count from `fd.scaled_dot_product_attention`, under `torch.func.jvp`, to the launch; the call is not the first.

    `torch.func.jvp`'s own work before it calls the function is not counted: about a hundred calls of PyTorch's.
    """
    from fastdistill.kernels import attention

    primals = tuple(torch.randn(2, 2, 16, 64, requires_grad=requires_grad) for _ in range(3))
    tangents = tuple(torch.randn(2, 2, 16, 64) for _ in range(3))
    counted: Counter[str] = Counter()
    started = False

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal started
        started = started or frame.f_code is fd.scaled_dot_product_attention.__code__
        if started and event == "call" and frame.f_code is not _Launcher.__getitem__.__code__:
            counted[frame.f_code.co_filename] += 1

    def run() -> None:
        with suppress(_Launched):
            torch.func.jvp(lambda q, k, v: fd.scaled_dot_product_attention(q, k, v, impl="triton"), primals, tangents)

    previous = sys.getprofile()
    with (
        mock.patch.object(attention, "_attention_kernel", _Launcher()),
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
    ):
        run()
        sys.setprofile(note)
        try:
            run()
        finally:
            sys.setprofile(previous)
    paths = [Path(path).resolve() for path in counted if Path(path).is_absolute()]
    ours = sorted(str(path.relative_to(ROOT)) for path in paths if path.is_relative_to(ROOT))
    return Calls(sum(counted.values()), [path for path in ours if path.startswith(("fastdistill", "kernels"))])


def python_files(*folders: str) -> Iterator[Path]:
    """Yield the Python files of these folders of the repository."""
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def wide_functions() -> dict[str, int]:
    """Return the functions that want more than ten arguments, with their number.

    Options by keyword, which have a default, don't count; nor do Triton's kernels, whose arguments are a launch's, and
    the public ops, whose arguments are PyTorch's and their tangents.
    """
    found = {}
    for path in python_files("fastdistill", "kernels", "benchmarks"):
        if path.is_symlink() or any(part.is_symlink() for part in path.parents):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or node.name in fd.__all__ or _is_kernel(node):
                continue
            if (count := _arguments(node)) > MOST_ARGUMENTS:
                found[f"{path.relative_to(ROOT)}: {node.name}"] = count
    return found


def _is_kernel(node: ast.FunctionDef) -> bool:
    return any("triton" in ast.unparse(line) for line in node.decorator_list)


def _arguments(node: ast.FunctionDef) -> int:
    of = node.args
    needed = sum(default is None for default in of.kw_defaults)
    method = bool(of.args) and of.args[0].arg in ("self", "cls")
    return len(of.posonlyargs) + len(of.args) - method + needed


def imports_of_modules() -> dict[str, set[str]]:
    """Return the modules that each module of the package imports: at its top, in functions, and for type checkers."""
    found = {}
    for module, path in MODULES.items():
        named = imports(ast.parse(path.read_text(encoding="utf-8")), module, path.name == "__init__.py")
        found[module] = {name for _, name in named if name in MODULES and name != module}
    return found


def import_circles(imported: Mapping[str, set[str]]) -> list[list[str]]:
    """Return circles of imports, so many that without one import of each there are none; each begins where it ends."""
    left, found = {module: set(names) for module, names in imported.items()}, []
    while True:
        try:
            TopologicalSorter(left).prepare()
        except CycleError as error:
            circle = error.args[1][::-1]
            found.append(circle)
            left[circle[0]].discard(circle[1])
        else:
            return found


def main() -> None:
    """Print all counts."""
    for requires_grad in (False, True):
        calls = calls_to_the_launch(requires_grad)
        graph = "with a graph" if requires_grad else "without a graph"
        print(
            f"Python calls from the public attention to the launch, {graph}: {calls.total} in {len(calls.files)} files"
        )
        print("".join(f"    {path}\n" for path in calls.files), end="")
    print("circles of imports:", import_circles(imports_of_modules()) or "none")
    print("functions with more than ten arguments:", wide_functions() or "none")


if __name__ == "__main__":
    main()
