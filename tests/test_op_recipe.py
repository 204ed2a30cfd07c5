"""Follow CONTRIBUTING's recipe for an op in a copy of the repository: nine files, and all that tries ops tries it too.

The op is the one in `tests/example_op`: the room and the kernel of an L2 norm.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "tests" / "example_op"
EXPORTS = "fastdistill/ops/__init__.py"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """Return the copy with the op, and the files that were added or changed."""
    tree = tmp_path_factory.mktemp("copy") / "repository"
    ignored = shutil.ignore_patterns("__pycache__", "example_op", "results", "evidence")
    for name in ("fastdistill", "kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    shutil.copytree(ROOT / "benchmarks" / "results", tree / "benchmarks" / "results")
    shutil.copy2(ROOT / "pyproject.toml", tree)
    touched = {EXPORTS, "kernels/l2_norm.py"}
    shutil.copy2(RECIPE / "kernel.py", tree / "kernels" / "l2_norm.py")
    for path in (RECIPE / "l2_norm").glob("*.py"):
        at = tree / "fastdistill" / "ops" / "l2_norm" / path.name
        at.parent.mkdir(exist_ok=True)
        shutil.copy2(path, at)
        touched.add(str(at.relative_to(tree)))
    exports = (tree / EXPORTS).read_text(encoding="utf-8")
    exports = exports.replace(
        "\n__all__ = [", "from fastdistill.ops.l2_norm.functions import l2_norm, l2_norm_jvp\n\n__all__ = ["
    )
    (tree / EXPORTS).write_text(
        exports.replace("__all__ = [", '__all__ = [\n    "l2_norm",\n    "l2_norm_jvp",'), encoding="utf-8"
    )
    return tree, touched


def run(tree: Path, *command: str, **environment: str) -> str:
    """Return what a Python of this environment says that finds the copy first."""
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", **environment}
    env.pop("TRITON_INTERPRET", None) if "TRITON_INTERPRET" not in environment else None
    done = subprocess.run([sys.executable, *command], cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_an_op_is_nine_files(copy: tuple[Path, set[str]]) -> None:
    tree, touched = copy
    assert len(touched) <= 9, touched
    assert run(tree, "-c", "import fastdistill as fd; print(fd.__file__, fd.l2_norm.__name__)").startswith(str(tree))


def test_its_room_is_tried_like_every_other(copy: tuple[Path, set[str]]) -> None:
    """Check it under all transforms, by PyTorch's judges, in every dtype, and in its layer."""
    tests = ("test_vmap.py", "test_gradcheck.py", "test_native.py", "test_forward_over_reverse.py", "test_accuracy.py")
    files = [f"tests/ops/{name}" for name in tests]
    said = run(
        copy[0],
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *files,
        "tests/test_layers.py",
        "-k",
        "l2_norm or layer",
    )
    assert " passed" in said and int(said.split(" passed")[0].split()[-1]) > 30


def test_its_kernels_are_tried_and_compiled(copy: tuple[Path, set[str]]) -> None:
    quiet = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "l2_norm")
    said = run(copy[0], *quiet, "tests/kernels/test_every_op.py", TRITON_INTERPRET="1")
    assert "4 passed" in said
    code = "from fastdistill.benchmarks.compile import op_kernels as o; print([c.kernel for c, _ in o.cases()])"
    assert "'l2_norm', 'l2_norm_backward'" in run(copy[0], "-c", code)


def test_it_is_counted_and_benchmarked(copy: tuple[Path, set[str]]) -> None:
    """Check that its parity is judged before a time is taken, by the suite that it is in by being there."""
    code = "from fastdistill.benchmarks.count.op_problems import NAMES; print('l2_norm' in NAMES)"
    assert run(copy[0], "-c", code).strip() == "True"
    bench = [
        "-m",
        "fastdistill.cli",
        "bench",
        "--suite",
        "norms",
        "--quick",
        "--device",
        "cpu",
        "--cases",
        "l2_norm.*forward",
    ]
    command = (*bench, "--providers", "fastdistill torch", "no tangent")
    assert "l2_norm" in run(copy[0], *command)
