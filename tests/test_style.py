"""Check the house rules that a program can check: one vocabulary, docstrings, and the size of things."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import fastdistill
from tests.recipes import shown_in

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

# The words with which a function's docstring may begin. A new verb is added here; a word that is mostly a noun is not.
VERBS = frozenset(
    re.findall(
        r"\w+",
        """
        accumulate adapt add advance allocate allow apply arrange ask assert assign attach average begin
        bend bind bring broadcast build calculate call carry cast centre change check choose claim clear
        clip close collect combine compare compile compute concatenate configure continue convert copy count
        couple cover create cut damage decide delete derive describe detach differentiate disable distil divide
        draw drop dump embed enable end ensure enter estimate evaluate expand expect explain export express
        extract fail fill filter find finish fit fix flip fold follow forget format freeze gate gather generate
        get give group guide halve hash hold ignore imitate implement import increase infer initialise
        insert install integrate interpolate invert join judge jump keep kill label launch leave let limit
        list load log look lose make map mark mask match measure merge move multiply name negate normalise note
        open order pack pad pair parse pass patch perform pick pickle place plan plant plot pop pose predict
        prepare print process produce project propagate prove pull push put raise read rearrange recompute
        record reduce refer refuse register regress reject release remove rename render renoise repeat
        replace report require resample rescale reset reshape resolve restore resume return reverse rewrite
        rotate round run sample save say scale seed select send serve set shape shift shorten show shrink
        shuffle sign simulate skip solve sort spell split stand start step stop store stream strip subtract
        sum summarise switch take tell test time trace track train transform try turn undo unpack update use
        validate verify wait walk warn weigh wrap write yield
        """,
    )
)
# Words that begin a fragment. Modules and classes may begin with a noun, but with none of these.
FRAGMENTS = frozenset(
    re.findall(
        r"\w+",
        """
        a all although an and another any as at before beside between both but by each either even every
        everything from how however if in inside it its neither no nor not nothing of on one only or over so
        some that the their there these they this those to two under until what whatever when where whether
        which while who whose why with without
        """,
    )
)


def sources() -> dict[str, str]:
    """Return path -> text of all Python but this file, which has to quote what it forbids."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if path != Path(__file__)]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def words_against_the_vocabulary(path: str, code: str) -> list[str]:
    """Return each line that uses a forbidden word, with the rule."""
    return [
        f"{path}:{number}: {line.strip()!r}: {rule}"
        for number, line in enumerate(code.splitlines(), start=1)
        for rule, pattern in FORBIDDEN.items()
        if re.search(pattern, line)
    ]


def undocumented(path: str, code: str) -> list[str]:
    """Return the module, and the public functions and classes at its top level, that have no docstring."""
    tree = ast.parse(code)
    named = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    public = [node for node in named if not node.name.startswith("_")]
    missing = [f"{path}:{node.lineno}: {node.name} has no docstring" for node in public if not ast.get_docstring(node)]
    return missing if ast.get_docstring(tree) else [f"{path}: the module has no docstring", *missing]


def unclear(path: str, code: str) -> list[str]:
    """Return each docstring that doesn't begin with a capital and a verb, or whose summary isn't a sentence on a line.

    A module or a class may begin with a noun instead.
    """
    found = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not (docstring := ast.get_docstring(node)):
            continue
        summary = re.split(r"\n\s*\n", docstring)[0]
        first = summary.split()[0].rstrip(",:;.")
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        where = f"{path}:{node.body[0].lineno}: {summary.splitlines()[0]!r}"
        if not first[0].isupper():
            found.append(f"{where} begins without a capital")
        if is_function and first.lower() not in VERBS:
            found.append(f"{where} begins with {first!r}, which is no verb")
        if not is_function and first.lower() in FRAGMENTS:
            found.append(f"{where} begins with {first!r}: say in a sentence what it does or is")
        if summary[-1] not in ".:":
            found.append(f"{where}: its first paragraph ends without a full stop or a colon")
        if "\n" in summary:
            found.append(f"{where}: its first paragraph takes more than a line")
    return found


def too_big(path: str, code: str) -> list[str]:
    """Return what in a file is longer, or takes more parameters, than the budget of its kind."""
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
    """Check names and sizes in the package, the kernels, the benchmarks and the tests."""
    found = [line for path, code in sources().items() for line in rule(path, code)]
    assert not found, "\n".join(found)


def test_every_docstring_is_a_sentence_that_begins_with_a_verb() -> None:
    """Check the docstrings of all code, of the tests and of the recipes in CONTRIBUTING.md too."""
    texts = sources() | {"tests/test_style.py": Path(__file__).read_text(encoding="utf-8")}
    texts |= {
        f"CONTRIBUTING.md, {title}": shown_in(f"Add a {title}") for title in ("method", "sampler", "data set", "model")
    }
    found = [line for path, code in texts.items() for line in unclear(path, code)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("code", "complaints"),
    [
        ('def f():\n    """What it returns."""', 1),
        ('def f():\n    """Whether it is so."""', 1),
        ('def f():\n    """The sum."""', 1),
        ('def f():\n    """Sums over tokens."""', 1),
        ('def f():\n    """(y, t_y) of x."""', 2),
        ('def f():\n    """Return the sum"""', 1),
        ('def f():\n    """Return the sum\n    over tokens.\n    """', 1),
        ('class C:\n    """How it is done."""', 1),
        ('class C:\n    @property\n    def f(self):\n        """Name the colour."""', 0),
        ('class C:\n    @property\n    def f(self):\n        """By name."""', 1),
        ('"""By name."""', 1),
        ('"""sCM\'s path, which is curved."""', 1),
        ('"""Straight path, whose velocity is constant."""', 0),
        ('def f():\n    """Compute, then return:\n\n    y = x\n    """', 0),
        ('def f():\n    def g():\n        """Of both."""', 1),
    ],
)
def test_a_planted_fragment_is_found(code: str, complaints: int) -> None:
    """Check each rule by a docstring that breaks it, and some docstrings that break none."""
    assert len(unclear("planted.py", code)) == complaints


def test_every_public_name_has_a_docstring() -> None:
    """Check every module of the package and the kernels, and everything that `fastdistill` exports."""
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
    """Check a line against each rule, and against each half of a rule that has several."""
    assert len(words_against_the_vocabulary("planted.py", f"x = 1\n{line}\n")) == 1


def test_the_vocabulary_itself_is_not_reported() -> None:
    """Check the names that the rules ask for, and near misses."""
    code = "t_q, dq, dt_q, kT, x_t, du_dt = 1\nfrom fastdistill.kernels import norm\nx.requires_grad  # k.T - 1"
    assert words_against_the_vocabulary("planted.py", code) == []


def test_a_missing_docstring_is_found() -> None:
    """Check a module, a function and a class without one; private names need none."""
    found = undocumented("planted.py", "def f(): ...\nclass C: ...\ndef _g(): ...\n")
    assert len(found) == 3
    assert all("has no docstring" in line and "_g" not in line for line in found)


def test_what_is_too_big_is_found() -> None:
    """Check a long file, a long objective, and a kernel that is long and takes too much."""
    long_body = "    x = 1\n" * 100
    assert len(too_big("fastdistill/x.py", "x = 1\n" * 401)) == 1
    assert len(too_big("fastdistill/objectives/x.py", f"def f():\n{long_body}")) == 1
    arguments = ", ".join(f"a{i}" for i in range(21))
    assert len(too_big("kernels/x.py", f"@triton.jit\ndef f({arguments}):\n{long_body}")) == 2
    assert too_big("fastdistill/x.py", f"def f({arguments}):\n{long_body}") == []
