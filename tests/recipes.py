"""Provide the tests of recipes with the code that CONTRIBUTING.md shows, and with a copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]


def shown_in(section: str) -> str:
    """Return the one Python block in a section of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    body = re.split(r"^## ", text.split(f"\n## {section}\n")[1], flags=re.MULTILINE)[0]
    (block,) = re.findall(r"^ *```python\n(.*?)^ *```$", body, flags=re.DOTALL | re.MULTILINE)
    return textwrap.dedent(block)


def copy_of_package(folder: Path) -> Path:
    """Copy the package into a folder, with links to what stands beside it, and return the copy of the package."""
    package = shutil.copytree(ROOT / "fastdistill", folder / "fastdistill", symlinks=True)
    for name in ("kernels", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    return package


def run_python(folder: Path, *arguments: str) -> str:
    """Return what a fresh Python prints that imports the package from a folder; fail with what it says on stderr."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
