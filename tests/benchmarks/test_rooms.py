"""Test the rooms of benchmarks/: what stands where, and that every named command and file exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = {"ops", "run", "count", "compile", "methods", "report", "gpu"}


def texts() -> dict[str, str]:
    """Return the text of all that may name a benchmark, by its path."""
    files = [ROOT / name for name in ("Makefile", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml")]
    for folder in ("benchmarks", "docs", "fastdistill", "kernels", "tests"):
        files += [path for end in ("py", "md", "sh", "jinja") for path in (ROOT / folder).rglob(f"*.{end}")]
    files = [path for path in files if path != Path(__file__)]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}


def unknown(text: str) -> list[str]:
    """Return what a text names of `fastdistill.benchmarks`, and of benchmarks/, that isn't there."""
    found = []
    for name in re.findall(r"fastdistill\.benchmarks\.(\w+(?:\.\w+)?)", text):
        path = ROOT / "benchmarks" / name.replace(".", "/")
        if not path.is_dir() and not path.with_suffix(".py").exists():
            found.append(f"fastdistill.benchmarks.{name}")
    files = re.findall(r"(?<![\w/.])(?:\.\./)?benchmarks/([\w/]+\.(?:py|sh))\b", text)
    return found + [f"benchmarks/{name}" for name in files if not (ROOT / "benchmarks" / name).exists()]


def test_everything_stands_in_a_room() -> None:
    """Check that only the script for a GPU, which has to be found, stands outside; tests mirror the rooms."""
    inside = {path.name for path in (ROOT / "benchmarks").iterdir() if path.name != "__pycache__"}
    assert inside == {*ROOMS, "results", "run_gpu.sh"}
    assert not list((ROOT / "benchmarks").rglob("__init__.py"))
    mirrored = {path.parent.name for path in (ROOT / "tests" / "benchmarks").glob("*/test_*.py")}
    assert mirrored == ROOMS - {"compile"}  # Its tests are in tests/kernels_aot.


def test_what_is_named_is_there() -> None:
    """Check commands in the documentation, the Makefile and the scripts, and files."""
    gone = {"benchmarks/results/NOTES.md": ["benchmarks/cpu_linear.py"]}  # The commit that it names had this file.
    found = {path: names for path, text in texts().items() if (names := unknown(text)) and names != gone.get(path)}
    assert not found


def test_a_planted_name_is_found() -> None:
    text = "python -m fastdistill.benchmarks.run.nothing; fastdistill.benchmarks.clock, benchmarks/clock.py"
    assert unknown(text) == [
        "fastdistill.benchmarks.run.nothing",
        "fastdistill.benchmarks.clock",
        "benchmarks/clock.py",
    ]
    assert unknown("fastdistill.benchmarks.run.clock.CpuClock, benchmarks/run_gpu.sh, tests/benchmarks/x.py") == []
