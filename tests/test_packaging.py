"""Check that what the symlinks reach can be imported from a wheel, an editable install, and a plain checkout."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

import fastdistill

ROOT = Path(__file__).parents[1]
SITE_PACKAGES = sysconfig.get_path("purelib")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command, and return the finished process with its output as text."""
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def imported_from(folder: Path, cwd: Path) -> str:
    """Return where a Python finds the kernels and benchmarks that sees only its library, `folder`, torch and Triton.

    `-S` leaves out this environment's .pth files, through which an editable install of fastdistill would answer.
    """
    code = f"""
import site, sys
site.addsitedir({str(folder)!r})
sys.path.append({SITE_PACKAGES!r})
import fastdistill, fastdistill.kernels
from fastdistill.benchmarks.ops import suites
from fastdistill.kernels import attention
print(attention.__file__)
"""
    done = run(sys.executable, "-S", "-c", code, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def installed_here() -> list[str]:
    """Return what this environment has of fastdistill: metadata and its command."""
    folders = (Path(SITE_PACKAGES), Path(sysconfig.get_path("scripts")))
    return sorted(path.name for folder in folders for path in folder.glob("*fastdistill*"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what a build needs, so that builds leave nothing in the checkout, and find nothing stale."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy)
    for name in ("fastdistill", "kernels", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """Build the wheel as a release is built: a source archive first, then the wheel from that."""
    done = run(sys.executable, "-m", "build", "--no-isolation", cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tree / "dist").glob("*.whl")
    return path


def test_wheel_imports_the_kernels(wheel: Path, tmp_path: Path) -> None:
    """Check a wheel that is unpacked elsewhere, with no checkout near."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    found = imported_from(tmp_path / "site", cwd=tmp_path)
    assert found == str(tmp_path / "site" / "fastdistill" / "kernels" / "attention.py")


def test_wheel_holds_the_package_with_its_data_and_nothing_else(wheel: Path) -> None:
    """Check that every file of fastdistill and its links is there once, without tests, caches and results."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    expected = {
        path.relative_to(ROOT).as_posix()
        for folder in (ROOT / "fastdistill", ROOT / "fastdistill" / "kernels", ROOT / "fastdistill" / "benchmarks")
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".sh" and not {"__pycache__", "results"} & set(path.parts)
    }
    assert sorted(names) == sorted(expected)


def test_editable_install_imports_the_kernels(tree: Path, tmp_path: Path) -> None:
    """Check the checkout itself, through the link; what this environment has installed stays."""
    before = installed_here()
    # Without --ignore-installed pip would uninstall the fastdistill of this environment first, prefix or not.
    options = ("--no-deps", "--no-build-isolation", "--ignore-installed", "--prefix", tmp_path, "--editable", ".")
    done = run(sys.executable, "-m", "pip", "install", *options, cwd=tree)
    assert done.returncode == 0, done.stderr
    assert installed_here() == before
    (site_packages,) = tmp_path.rglob("site-packages")
    assert imported_from(site_packages, cwd=tmp_path) == str(tree / "fastdistill" / "kernels" / "attention.py")


def test_plain_checkout_imports_the_kernels(tmp_path: Path) -> None:
    """Check it with nothing installed, from the folder alone."""
    assert imported_from(ROOT, cwd=tmp_path) == str(ROOT / "fastdistill" / "kernels" / "attention.py")


def test_a_tree_whose_link_was_lost_is_refused(tree: Path, tmp_path: Path) -> None:
    """Check a checkout without symlinks, which has a small text file there: the build stops and says what to do."""
    broken = tmp_path / "broken"
    shutil.copytree(tree, broken, symlinks=True, ignore=shutil.ignore_patterns("dist", "*.egg-info"))
    (broken / "fastdistill" / "kernels").unlink()
    (broken / "fastdistill" / "kernels").write_text("../kernels")
    done = run(sys.executable, "-m", "build", "--no-isolation", "--wheel", cwd=broken)
    assert done.returncode != 0
    assert "must be a symlink to ../kernels" in done.stdout + done.stderr


def project() -> dict[str, Any]:
    """Return the [project] table of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def test_the_version_is_the_same_everywhere() -> None:
    """Check that pyproject.toml, the module and the changelog agree."""
    assert fastdistill.__version__ == project()["version"]
    assert project()["version"] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_core_depends_on_torch_and_triton_alone() -> None:
    """Check that all other packages are in an extra."""
    assert project()["dependencies"] == ["torch>=2.11", 'triton>=3.6; platform_system == "Linux"']


@pytest.fixture(scope="module")
def declared() -> set[str]:
    """Return the import names of the packages that `dependencies` and the extra `train` list."""
    required = project()["dependencies"] + project()["optional-dependencies"]["train"]
    names = {line.split(";")[0].split(">")[0].strip().lower() for line in required}
    return {name for name, found in packages_distributions().items() if names & {each.lower() for each in found}}


def undeclared(code: str, declared: set[str]) -> set[str]:
    """Return the packages that a file imports and that are neither declared, nor Python's, nor ours."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"fastdistill"} - declared


def test_every_import_is_a_declared_dependency(declared: set[str]) -> None:
    """Check that the demo runs where only `fastdistill[train]` is installed."""
    missing = {
        path.relative_to(ROOT).as_posix(): names
        for path in (ROOT / "fastdistill").rglob("*.py")
        if (names := undeclared(path.read_text(encoding="utf-8"), declared))
    }
    assert not missing
    assert undeclared("import torch, requests_that_nobody_declared", declared) == {"requests_that_nobody_declared"}
    assert undeclared("from pytest import fixture", declared) == {"pytest"}
