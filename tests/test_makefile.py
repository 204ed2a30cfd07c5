"""Test `make` as the first command: what it does on a bare machine, and its messages where it can't."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a folder with the files that set-up reads, and no .venv."""
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy2(ROOT / name, tmp_path)
    return tmp_path


def make(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `make` outside of this test run's own make and environment."""
    kept = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "LANG"}}
    return subprocess.run(["make", *arguments], cwd=clone, env=kept, capture_output=True, text=True)


def python_that(clone: Path, name: str, script: str) -> str:
    """Return the path of a stand-in for an interpreter."""
    path = clone / name
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_help_lists_every_target_a_person_calls(clone: Path) -> None:
    """Check that `make` alone prints the targets."""
    done = make(clone)
    assert done.returncode == 0
    targets = ("setup", "demo", "test", "bench", "aot", "evidence", "lint", "clean")
    assert all(f"make {target} " in done.stdout for target in targets)


def test_the_first_command_sets_up_and_then_tests(clone: Path) -> None:
    """Check the order: .venv, torch alone so that its build is the requested one, the project, then the tests."""
    plan = make(clone, "--dry-run", "test", "TORCH=torch==2.12.0").stdout
    steps = [
        "-m venv .venv",
        'install --disable-pip-version-check "torch==2.12.0"',
        '--editable ".[train,dev]"',
        "-m pytest",
    ]
    positions = [plan.index(step) for step in steps]
    assert positions == sorted(positions)
    assert "TRITON_INTERPRET=1" in plan[plan.index("-m pytest") - 200 : plan.index("tests/kernels")]


def test_set_up_is_done_once(clone: Path) -> None:
    """Check that a finished .venv installs nothing again, until pyproject.toml changes."""
    (clone / ".venv").mkdir()
    (clone / ".venv" / ".installed").touch()
    assert "pip install" not in make(clone, "--dry-run", "demo").stdout
    os.utime(clone / "pyproject.toml", (2**31, 2**31))
    assert "pip install" in make(clone, "--dry-run", "demo").stdout


def test_an_old_python_is_named(clone: Path) -> None:
    """Check that `make` without a new enough interpreter says which it tried and what it needs."""
    old = python_that(clone, "python3.9", "exit 1")
    done = make(clone, "setup", f"PYTHON={old}")
    assert done.returncode != 0
    assert "needs Python 3.11, 3.12 or 3.13" in done.stderr
    assert old in done.stderr


def test_a_missing_venv_module_is_explained(clone: Path) -> None:
    """Check Debian's Python without python3-venv: the message names the package, and no .venv is left behind."""
    (clone / "stripped").mkdir()
    (clone / "stripped" / "ensurepip.py").write_text("raise ImportError", encoding="utf-8")
    bare = python_that(clone, "python3", f'PYTHONPATH={clone}/stripped exec {sys.executable} "$@"')
    done = make(clone, "setup", f"PYTHON={bare}")
    assert done.returncode != 0
    assert f"apt-get install python3.{sys.version_info.minor}-venv" in done.stderr
    assert not (clone / ".venv").exists()
