"""Test the architecture: who imports whom, and what `import fastdistill` needs and costs."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# `fastdistill bench` and `fastdistill report --bench` need these.
ROOMS = ("benchmarks.ops", "benchmarks.run", "benchmarks.report")

# Maps a layer to the layers that it may import besides itself. "api" is `import fastdistill` and the names it offers.
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "ops.protocol.compat": set(),
    "ops": {"kernels", "ops.protocol.compat"},
    "reference": {"ops"},
    "testing": {"reference"},
    "jvp": {"ops", "ops.protocol.compat"},
    "api": {"ops", "jvp"},
    "nn": {"ops"},
    "models": {"ops", "nn"},
    "paths": set(),
    "couplings": set(),
    "times": {"paths"},
    "lookup": set(),
    "settings": set(),
    "samplers": {"paths", "times", "lookup"},
    "data": {"lookup"},
    "objectives": {"paths", "times", "samplers", "jvp", "ops.protocol.compat", "lookup", "settings"},
    "eval.exact": {"paths"},
    "train": {
        "api",
        "jvp",
        "nn",
        "models",
        "paths",
        "couplings",
        "times",
        "samplers",
        "objectives",
        "eval.exact",
        "data",
        "lookup",
        "settings",
    },
    "eval": {"api", "models", "paths", "times", "samplers", "objectives", "train", "eval.exact", "data", "lookup"},
    "method_notes": {"objectives", "samplers", "settings", "train"},
    "compare": {"models", "testing", "settings", "train", "eval", "data"},
    "demo": {"api", "models", "paths", "times", "samplers", "train", "eval", "eval.exact", "data"},
    "tune": {"kernels", "ops"},
    "benchmarks.ops": {"api", "reference", "testing", "ops", "models", "objectives"},
    "benchmarks.run": {"api", "reference", "testing", "ops", "models", "benchmarks.ops"},
    "benchmarks.count": {
        "api",
        "testing",
        "ops",
        "models",
        "benchmarks.ops",
        "benchmarks.run",
        "benchmarks.count.counting",
    },
    "benchmarks.count.counting": {"ops", "kernels"},
    "benchmarks.compile": {"kernels", "ops", "tune", "benchmarks.run"},
    "benchmarks.methods": {
        "benchmarks.run",
        "jvp",
        "paths",
        "samplers",
        "objectives",
        "train",
        "eval",
        "eval.exact",
        "compare",
        "data",
    },
    "benchmarks.report": {"benchmarks.ops", "benchmarks.run"},
    "benchmarks.gpu": {"benchmarks.ops", "benchmarks.run"},
    "cli": {"api", "models", "samplers", "data", "train", "eval", "demo", "method_notes", "compare", *ROOMS},
}
# These tests are about the kernels themselves and need Triton from the start.
NEED_TRITON = {"kernels", "tune", "benchmarks.compile", "benchmarks.count.counting"}
# These may use the packages of an extra; all others use torch, the kernels Triton too, and nothing else.
APPLICATIONS = {"train", "eval", "demo", "cli", "method_notes", "compare"}
APPLICATIONS |= {layer for layer in MAY_IMPORT if layer.startswith("benchmarks.")} - NEED_TRITON

# Maps an op to the ops whose formulas its own contains. Besides these, an op's room imports `ops.protocol` alone.
CONTAINS: dict[str, set[str]] = {"gated_norm": {"norm"}, "qk_norm_rope": {"norm"}}

# What a layer may import besides, inside the function that needs it: optional packages, which have an extra.
LAZY: dict[str, set[str]] = {
    "couplings": {"ot", "scipy"},
    "samplers": {"numpy", "scipy"},
    "data": {"PIL", "matplotlib", "numpy", "sklearn"},
}

# A fresh `import fastdistill` must not load these: none is needed before somebody asks for it.
HEAVY = ["triton", "matplotlib", "pydantic", "scipy", "sklearn", "tensorboard", "torch._inductor", "tyro"]


def modules() -> dict[str, Path]:
    """Return module name -> file, for all of fastdistill and, through the symlink, the kernels."""
    found = {}
    for folder, _, files in os.walk(ROOT / "fastdistill", followlinks=True):
        for path in (Path(folder, file) for file in files if file.endswith(".py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def layer_of(module: str) -> str:
    """Return the layer of a module: the longest beginning of its name that is one, or the second part of its name."""
    parts = module.split(".")[1:]
    beginnings = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((beginning for beginning in beginnings if beginning in MAY_IMPORT), parts[0] if parts else "api")


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[ast.stmt | ast.expr, str]]:
    """Yield each import of a module, wherever it stands, with the full name of what it imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node, str(arg.value)) for arg in node.args if isinstance(arg, ast.Constant))
        elif isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            here = parts[: len(parts) - node.level + is_package] if node.level else []
            source = ".".join(here + ([node.module] if node.module else []))
            for alias in node.names:
                name = f"{source}.{alias.name}"
                yield node, name if name in MODULES else source


def violations(module: str, code: str, is_package: bool = False) -> list[str]:
    """Return what a module imports against the rules, a line each."""
    tree, layer, found = ast.parse(code), layer_of(module), []
    if layer not in MAY_IMPORT:
        return [f"{module}: {layer!r} is a new layer; say in MAY_IMPORT what it may import"]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lazy = {inner for function in functions for inner in ast.walk(function)}
    for node, name in imports(tree, module, is_package):
        where, top = f"{module}:{node.lineno} imports {name}", name.split(".")[0]
        if top == "fastdistill":
            if layer_of(name) not in MAY_IMPORT[layer] | {layer}:
                found.append(f"{where}; {layer} may import {sorted(MAY_IMPORT[layer]) or 'no other layer'}")
            elif layer not in NEED_TRITON and layer_of(name) == "kernels" and node not in lazy:
                found.append(f"{where} at its top level; kernels are imported by the function that needs them")
        elif top == "triton" and layer not in NEED_TRITON:
            found.append(f"{where}; only the kernels do")
        elif top in LAZY.get(layer, set()) and node in lazy:
            continue
        elif top not in {"torch", "triton", *sys.stdlib_module_names} and layer not in APPLICATIONS:
            found.append(f"{where}; {layer} uses torch alone")
    return found


def strangers(module: str, code: str) -> list[str]:
    """Return what a module in the room of an op imports from rooms that its formula has nothing to do with."""
    room, file = module.split(".")[2], module.split(".")[-1]
    allowed = {room, *CONTAINS.get(room, set()), *({"protocol"} if file != "reference" else set())}
    return [
        f"{module}:{node.lineno} imports {name}; the room of {room} may import {sorted(allowed)}"
        for node, name in imports(ast.parse(code), module, False)
        if name.startswith("fastdistill.ops.") and name.split(".")[2] not in allowed
    ]


def neighbours(module: str, code: str) -> list[str]:
    """Return what one sampler or one data set imports of another: each is a file by itself."""
    package = ".".join(module.split(".")[:2])
    helpers = importlib.import_module(f"{package}.registry").HELPERS
    if module == package or module.split(".")[2] in helpers:
        return []
    return [
        f"{module}:{node.lineno} imports {name}; it may import {package}'s {', '.join(sorted(helpers))}"
        for node, name in imports(ast.parse(code), module, False)
        if name.startswith(package) and name.removeprefix(f"{package}.").split(".")[0] not in helpers
    ]


def fresh_python(code: str) -> str:
    """Return what a new Python prints that sees this checkout."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_module_imports_only_what_its_layer_may() -> None:
    """Check the diagram in CONTRIBUTING.md for every import statement, lazy ones included."""
    found = [
        line
        for module, path in MODULES.items()
        for line in violations(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


def test_the_room_of_an_op_imports_no_other_room() -> None:
    """Check that it imports only the protocol and the ops that its formula contains, a specification torch alone."""
    rooms = {module: path for module, path in MODULES.items() if module.startswith("fastdistill.ops.")}
    found = [line for module, path in rooms.items() for line in strangers(module, path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("fastdistill.ops.norm.eager", "from fastdistill.ops.attention import eager"),
        ("fastdistill.ops.norm.op", "from fastdistill.ops.gated_norm.op import GATED_NORM"),
        ("fastdistill.ops.norm.reference", "from fastdistill.ops.protocol import checks"),
        ("fastdistill.ops.protocol.checks", "def f():\n    from fastdistill.ops.norm import op"),
    ],
)
def test_a_stranger_in_a_room_is_found(module: str, code: str) -> None:
    assert len(strangers(module, code)) == 1
    assert not strangers("fastdistill.ops.gated_norm.op", "from fastdistill.ops.norm.op import choose")


def test_a_sampler_or_a_data_set_imports_no_other() -> None:
    """Check that it imports none, but what they share, whose names the registries have."""
    files = {name: path for name, path in MODULES.items() if layer_of(name) in ("samplers", "data")}
    found = [line for module, path in files.items() for line in neighbours(module, path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)
    assert len(neighbours("fastdistill.samplers.heun", "from fastdistill.samplers.euler import euler")) == 1
    assert len(neighbours("fastdistill.data.ring", "from fastdistill.data import Digits")) == 1
    assert not neighbours("fastdistill.data.ring", "from fastdistill.data.randomness import generator_at")


@pytest.mark.parametrize("room", ["activation", "attention", "gated_norm", "linear", "norm", "qk_norm_rope"])
def test_rooms_have_the_same_files(room: str) -> None:
    """Check that a newcomer who knows one op finds its way in every other."""
    files = {"functions", "op", "eager", "second_order", "reference", "cases"}
    assert files <= {path.stem for path in (ROOT / "fastdistill" / "ops" / room).glob("*.py")}


@pytest.mark.parametrize(
    ("module", "code", "complaint"),
    [
        ("fastdistill.kernels.attention", "from fastdistill.reference import attention", "no other layer"),
        ("fastdistill.kernels.attention", "from fastdistill import reference", "no other layer"),
        ("fastdistill.kernels.attention", "import numpy", "uses torch alone"),
        ("fastdistill.reference", "import triton", "only the kernels"),
        ("fastdistill.ops.norm.eager", "from ...reference import norm", "ops may import"),
        ("fastdistill.ops.attention.functions", "from fastdistill.kernels import attention", "at its top level"),
        (
            "fastdistill.ops.attention.functions",
            "k = importlib.import_module('fastdistill.kernels.norm')",
            "at its top level",
        ),
        ("fastdistill.paths", "def f():\n    import_module('fastdistill.kernels.norm')", "no other layer"),
        ("fastdistill.ops.attention.functions", "def f():\n    from fastdistill.nn import Attention", "ops may import"),
        ("fastdistill.objectives.meanflow", "from fastdistill.ops import rms_norm", "objectives may import"),
        ("fastdistill.objectives.meanflow", "import fastdistill as fd", "objectives may import"),
        ("fastdistill.objectives.meanflow", "from ..models.dit import DiT", "objectives may import"),
        ("fastdistill.objectives.meanflow", "from fastdistill.train import TrainConfig", "objectives may import"),
        ("fastdistill.objectives.settings.base", "from pydantic import Field", "uses torch alone"),
        ("fastdistill.settings", "from fastdistill.train.settings import Settings", "no other layer"),
        ("fastdistill.samplers", "from fastdistill import train", "samplers may import"),
        ("fastdistill.samplers.euler", "def f():\n    from fastdistill.data import Ring", "samplers may import"),
        ("fastdistill.samplers.adaptive", "import scipy", "uses torch alone"),
        ("fastdistill.data.ring", "from fastdistill.train import ConfigError", "data may import"),
        ("fastdistill.data.digits", "def f():\n    from fastdistill.eval.digits import DigitJudge", "data may import"),
        ("fastdistill.data.digits", "import sklearn", "uses torch alone"),
        ("fastdistill.lookup", "from fastdistill.data import Ring", "no other layer"),
        ("fastdistill.samplers", "import scipy", "uses torch alone"),
        ("fastdistill.paths", "def f():\n    import scipy", "uses torch alone"),
        ("fastdistill.models.dit", "import yaml", "uses torch alone"),
        ("fastdistill.unheard_of", "import torch", "a new layer"),
    ],
)
def test_a_planted_import_is_found(module: str, code: str, complaint: str) -> None:
    """Check that each kind of forbidden import is reported, in each way of writing it."""
    found = violations(module, code)
    assert len(found) == 1
    assert complaint in found[0]


def test_what_the_layers_allow_is_not_reported() -> None:
    """Check siblings, lower layers, torch, the standard library, and kernels imported where they are needed."""
    assert not violations("fastdistill.kernels.norm", "import math, torch, triton\nfrom . import attention")
    assert not violations("fastdistill.samplers.adaptive", "def f():\n    from scipy.integrate import solve_ivp")
    assert not violations("fastdistill.data.digits", "def f():\n    from sklearn.datasets import load_digits")
    assert not violations("fastdistill.ops.norm.functions", "def f():\n    from fastdistill.kernels import norm")
    assert not violations("fastdistill.models", "from .dit import DiT\nfrom fastdistill.nn import RMSNorm", True)


def test_import_works_without_triton() -> None:
    """Check that a Python that can't import Triton imports every module but the kernels, and runs an op."""
    core = [module for module in MODULES if layer_of(module) not in APPLICATIONS | NEED_TRITON]
    code = f"""
import importlib, sys
sys.modules["triton"] = None
import torch, fastdistill as fd
for module in {core}:
    importlib.import_module(module)
q = torch.ones(1, 1, 3, 4)
print(torch.func.jvp(lambda q: fd.scaled_dot_product_attention(q, q, q), (q,), (q,))[1].shape)
"""
    assert fresh_python(code) == "torch.Size([1, 1, 3, 4])"


def test_objectives_need_no_package_of_an_extra() -> None:
    """Check that their settings are plain: without pydantic each method can be called, and draws times."""
    code = """
import sys
for name in ("pydantic", "yaml", "tyro", "scipy"):
    sys.modules[name] = None
import torch
from fastdistill.objectives import OBJECTIVES, flow_matching
from fastdistill.objectives.settings import Instantaneous
x = torch.ones(3, 2)
t = Instantaneous(name="flow_matching").times.sampler()(3, torch.Generator())
print(len(OBJECTIVES), flow_matching(lambda x, t, s, y: 0 * x + 1, x, 0 * x, t)[0].item())
"""
    assert fresh_python(code).endswith(" 4.0")


def test_import_loads_nothing_heavy() -> None:
    """Check that `import fastdistill` costs little more than `import torch`."""
    loaded = fresh_python(f"import sys, fastdistill; print(*(name for name in {HEAVY} if name in sys.modules))")
    assert loaded == ""


@pytest.mark.parametrize("name", ["kernels", "benchmarks"])
def test_the_link_leads_to_a_folder_without_init(name: str) -> None:
    """Check that it is a namespace package, which never shadows another package of that name."""
    assert os.readlink(ROOT / "fastdistill" / name) == f"../{name}"
    assert not (ROOT / name / "__init__.py").exists()
