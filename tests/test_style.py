"""The house rules that a program can check: one vocabulary, docstrings, and the size of things."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import fastdistill

ROOT = Path(__file__).parents[1]
FOLDERS = ("fastdistill", "kernels", "benchmarks", "tests")

FORBIDDEN = {
    "the tangent of q is t_q, its gradient dq, the gradient of its tangent dt_q": (
        r"\b(?:d?[qkvo]_(?:t|dot|tan|tangent|jvp)|(?:tan|tangent|dot|jvp|grad|g)_(?:[qkvox]|acc|out)|[qkvox]_grad)\b"
    ),
    "t_ says tangent; a transpose is k.T or kT": (
        r"\btransposed (?:query|key|value)\b|\bt_[qkv] = [qkv]\.(?:m?T\b|transpose|permute)"
    ),
    "the kernels are fastdistill.kernels": r"^\s*(?:import|from) kernels\b",
    "no reminders": r"\b(?:TODO|FIXME|XXX|HACK)\b",
    "no banners": r"^\s*#\s*[-=*#~]{3,}",
}
MAX_FILE, MAX_OBJECTIVE, MAX_KERNEL, MAX_KERNEL_PARAMETERS = 400, 100, 100, 20


def sources() -> dict[str, str]:
    """Path -> text of all Python but this file, which has to quote what it forbids."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if path != Path(__file__)]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def words_against_the_vocabulary(path: str, code: str) -> list[str]:
    """Each line that uses a forbidden word, with the rule."""
    return [
        f"{path}:{number}: {line.strip()!r}: {rule}"
        for number, line in enumerate(code.splitlines(), start=1)
        for rule, pattern in FORBIDDEN.items()
        if re.search(pattern, line)
    ]


def undocumented(path: str, code: str) -> list[str]:
    """The public functions and classes at the top level of a module, and the module, that have no docstring."""
    tree = ast.parse(code)
    named = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    public = [node for node in named if not node.name.startswith("_")]
    missing = [f"{path}:{node.lineno}: {node.name} has no docstring" for node in public if not ast.get_docstring(node)]
    return missing if ast.get_docstring(tree) else [f"{path}: the module has no docstring", *missing]


def too_big(path: str, code: str) -> list[str]:
    """What a file holds that is longer, or takes more parameters, than the budget of its kind."""
    found = []
    if (lines := len(code.splitlines())) > MAX_FILE:
        found.append(f"{path}: {lines} lines, at most {MAX_FILE}")
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.FunctionDef):
            continue
        where, length = f"{path}:{node.lineno}: {node.name}", (node.end_lineno or node.lineno) - node.lineno + 1
        if "/objectives/" in path and length > MAX_OBJECTIVE:
            found.append(f"{where}: {length} lines, at most {MAX_OBJECTIVE}")
        if path.startswith("kernels/") and any("jit" in ast.unparse(line) for line in node.decorator_list):
            parameters = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
            if length > MAX_KERNEL:
                found.append(f"{where}: {length} lines, at most {MAX_KERNEL}")
            if parameters > MAX_KERNEL_PARAMETERS:
                found.append(f"{where}: {parameters} parameters, at most {MAX_KERNEL_PARAMETERS}")
    return found


@pytest.mark.parametrize("rule", [words_against_the_vocabulary, too_big])
def test_all_code_keeps_the_rule(rule: Callable[[str, str], list[str]]) -> None:
    """Names and sizes, in the package, the kernels and the tests."""
    found = [line for path, code in sources().items() for line in rule(path, code)]
    assert not found, "\n".join(found)


def test_every_public_name_has_a_docstring() -> None:
    """In every module of the package and the kernels, and everything that `fastdistill` exports."""
    found = [
        line
        for path, code in sources().items()
        if path.startswith(("fastdistill/", "kernels/"))
        for line in undocumented(path, code)
    ]
    found += [f"fastdistill.{name}" for name in fastdistill.__all__ if not getattr(fastdistill, name).__doc__]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "dq_t = 1",
        "q_tangent = 1",
        "grad_q = 1",
        "g_acc += 1",
        "q_grad = 1",
        "t_k = k.transpose(-1, -2)",
        "# the transposed query",
        "import kernels",
        "from kernels.norm import f",
        "# TODO later",
        "# -------- forward --------",
    ],
)
def test_a_planted_word_is_found(line: str) -> None:
    """One line against each rule, and against each half of a rule that has several."""
    assert len(words_against_the_vocabulary("planted.py", f"x = 1\n{line}\n")) == 1


def test_the_vocabulary_itself_is_not_reported() -> None:
    """The names that the rules ask for, and near misses."""
    code = "t_q, dq, dt_q, kT, x_t, du_dt = 1\nfrom fastdistill.kernels import norm\nx.requires_grad  # k.T - 1"
    assert words_against_the_vocabulary("planted.py", code) == []


def test_a_missing_docstring_is_found() -> None:
    """A module, a function and a class without one; private names need none."""
    found = undocumented("planted.py", "def f(): ...\nclass C: ...\ndef _g(): ...\n")
    assert len(found) == 3
    assert all("has no docstring" in line and "_g" not in line for line in found)


def test_what_is_too_big_is_found() -> None:
    """A long file, a long objective, and a kernel that is long and takes too much."""
    long_body = "    x = 1\n" * 100
    assert len(too_big("fastdistill/x.py", "x = 1\n" * 401)) == 1
    assert len(too_big("fastdistill/objectives/x.py", f"def f():\n{long_body}")) == 1
    arguments = ", ".join(f"a{i}" for i in range(21))
    assert len(too_big("kernels/x.py", f"@triton.jit\ndef f({arguments}):\n{long_body}")) == 2
    assert too_big("fastdistill/x.py", f"def f({arguments}):\n{long_body}") == []
