"""Build steps that pyproject.toml can't say: refuse a source tree whose symlink to the kernels was lost."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup

if not Path(__file__).with_name("fastdistill").joinpath("kernels").is_dir():
    raise SystemExit(
        "fastdistill/kernels must be a symlink to ../kernels, and here it isn't a folder. Zip archives and Windows\n"
        "checkouts lose symlinks: clone with git (on Windows after `git config --global core.symlinks true`), or copy\n"
        "the folder kernels/ to fastdistill/kernels, then install again."
    )

setup()
