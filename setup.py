"""Run the build steps that pyproject.toml can't express: refuse a source tree that lost its symlinks."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup

for name in ("kernels", "benchmarks"):
    if not Path(__file__).with_name("fastdistill").joinpath(name).is_dir():
        raise SystemExit(
            f"fastdistill/{name} must be a symlink to ../{name}, and here it isn't a folder. Zip archives and\n"
            "Windows checkouts lose symlinks: clone with git (on Windows after\n"
            "`git config --global core.symlinks true`), or copy\n"
            f"the folder {name}/ to fastdistill/{name}, then install again."
        )

setup()
