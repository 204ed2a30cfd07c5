"""Implementations take pairs in one order, eager and Triton alike, and no function takes more than ten arguments."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMPLEMENTATIONS = {
    "activation": (["fastdistill/ops/activation/eager.py"], ["kernels/activation.py"]),
    "attention": (["fastdistill/ops/attention/eager.py"], ["kernels/attention.py", "kernels/attention_backward.py"]),
    "gated_norm": (["fastdistill/ops/gated_norm/eager.py"], ["kernels/gated_norm.py"]),
    "norm": (["fastdistill/ops/norm/eager.py"], ["kernels/norm.py", "kernels/norm_backward.py"]),
    "qk_norm_rope": (["fastdistill/ops/qk_norm_rope/eager.py"], ["kernels/qk_norm_rope.py"]),
    "linear": (["fastdistill/ops/linear/eager.py"],),
}
ROOMS = ("activation", "attention", "linear", "protocol", "time_embedding")
KERNELS = ("activation", "attention*", "configs", "launch", "tiles")
MOST = 10


def functions(code: str) -> list[ast.FunctionDef]:
    """Return the functions of a module, but the kernels and what they call."""
    found = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef)]
    return [node for node in found if not any("jit" in ast.unparse(line) for line in node.decorator_list)]


def signatures(op: str, files: list[str]) -> dict[str, tuple[list[str], list[str]]]:
    """Name -> positional and keyword-only arguments of the forward and the backward that some files define."""
    names = (f"{op}_forward", f"{op}_backward")
    found = [node for file in files for node in functions((ROOT / file).read_text(encoding="utf-8"))]
    return {
        node.name: ([a.arg for a in node.args.args], [a.arg for a in node.args.kwonlyargs])
        for node in found
        if node.name in names
    }


def crowded(path: str, code: str) -> list[str]:
    """Name each function that takes too much; options, which are keywords with a default, don't count."""
    return [
        f"{path}:{node.lineno}: {node.name} takes {count} arguments, at most {MOST}"
        for node in functions(code)
        if (count := len(node.args.posonlyargs + node.args.args) + node.args.kw_defaults.count(None)) > MOST
    ]


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_implementations_have_one_signature(op: str) -> None:
    """Check that pairs come first, in one order, and then the options, which are the same ones."""
    eager, *others = (signatures(op, files) for files in IMPLEMENTATIONS[op])
    assert eager[f"{op}_forward"][0] == ["inputs"]
    positional, keywords = eager[f"{op}_backward"]
    assert positional == ["cotangents", "inputs", "saved"] and keywords[-1] == "needs"
    assert set(keywords[:-1]) <= set(eager[f"{op}_forward"][1])
    assert all(other == eager for other in others)


def test_no_function_takes_more_than_ten_arguments() -> None:
    """Check the functions in these rooms and beside their kernels."""
    paths = [path for room in ROOMS for path in (ROOT / "fastdistill" / "ops" / room).glob("*.py")]
    paths += [path for name in KERNELS for path in (ROOT / "kernels").glob(f"{name}.py")]
    found = [line for path in paths for line in crowded(str(path), path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_a_function_that_takes_too_much_is_found() -> None:
    """Check that required keywords count, and that kernels and keywords with a default don't."""
    ten = ", ".join(f"a{i}" for i in range(MOST))
    assert len(crowded("x.py", f"def f({ten}, b): ...")) == len(crowded("x.py", f"def f({ten}, *, b): ...")) == 1
    assert not crowded("x.py", f"def f({ten}, *, b=1): ...\n@triton.jit\ndef g({ten}, b): ...")
