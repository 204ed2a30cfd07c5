"""Test other people's packages: found, absent with a reason, or refused."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastdistill.benchmarks.ops import packages
from fastdistill.benchmarks.ops.attention import ATTENTION, limit_of_jvp_flash_attention
from fastdistill.benchmarks.ops.pointwise import POINTWISE
from fastdistill.benchmarks.ops.timed_op import TimedCase
from tests.benchmarks.toy import CPU

CUDA = torch.device("cuda")  # Only its name is used; nothing is put there.


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a folder of packages for one test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)
    packages._imported.cache_clear()
    yield tmp_path
    packages._imported.cache_clear()
    for name in set(sys.modules) - known:
        del sys.modules[name]


def install(site: Path, **files: str) -> None:
    """Write modules, `a__b` as a/b.py, with an __init__ above them."""
    for name, code in files.items():
        path = site.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        if path.parent != site:
            (path.parent / "__init__.py").touch()
        path.write_text(code)
    importlib.invalidate_caches()


def test_the_impostor_apex_is_refused(site: Path) -> None:
    """Check that PyPI's `apex`, another project of that name, is installed and yet not run."""
    install(site, apex__views="")
    found = packages.find("apex.normalization.fused_layer_norm", CUDA)
    assert found.module is None
    assert found.absent == packages.APEX_IMPOSTOR
    reasons = {x.name: x.absent for x in POINTWISE["rms_norm"].providers(CPU)}
    assert reasons["apex, no tangent"] == packages.APEX_IMPOSTOR


def test_an_impostor_with_a_module_of_that_name_is_refused(site: Path) -> None:
    """Check that a package without the compiled part doesn't count as NVIDIA's."""
    install(site, apex__normalization="")
    assert packages.find("apex.normalization", CUDA).absent == packages.APEX_IMPOSTOR


def test_nvidia_apex_is_found(site: Path) -> None:
    """Check that NVIDIA's package is recognised by both of its marks."""
    install(site, apex__normalization="fused = True", fused_layer_norm_cuda="")
    found = packages.find("apex.normalization", CUDA)
    assert found.absent is None and found.module.fused


def test_an_impostor_that_can_not_be_imported_is_refused(site: Path) -> None:
    """Check that code of 2013, which may fail in any way, is refused."""
    install(site, apex__views="")
    (site / "apex" / "__init__.py").write_text("raise SystemError('python 2 only')")
    assert packages.find("apex.normalization", CUDA).absent == packages.APEX_IMPOSTOR


def test_reasons_for_absence(site: Path) -> None:
    """Check the reasons: not installed, no GPU, and broken."""
    assert packages.find("flash_attn", CUDA).absent == "not installed: flash-attn"
    install(site, xformers__ops="raise OSError('undefined symbol')")
    assert packages.find("xformers.ops", CPU).absent == "xformers needs a CUDA device"
    assert packages.find("xformers.ops", CUDA).absent == "xformers.ops can't be imported: OSError: undefined symbol"


def test_our_own_implementations_say_why_they_can_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the reason is in the words of the ops."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert packages.impl_problem("torch", CPU) is None
    assert "needs a CUDA device" in str(packages.impl_problem("triton", CPU))
    assert "no CUDA extension" in str(packages.impl_problem("cuda", CPU))


def test_every_provider_of_the_issue_is_listed() -> None:
    """Check that absent providers are listed too on any machine, so that nothing is hidden."""
    names = {provider.name for provider in ATTENTION.providers(CPU)}
    assert names >= {
        "fastdistill torch",
        "fastdistill triton",
        "fastdistill cuda",
        "torch.func.jvp, math",
        "torch.func.jvp, compiled",
        "finite differences",
        "jvp-flash-attention",
        "xformers, no tangent",
        "SDPA flash, no tangent",
        "SDPA cuDNN, no tangent",
        "flash-attn, no tangent",
    }
    norms = {provider.name for provider in POINTWISE["layer_norm"].providers(CPU)}
    assert norms >= {"apex, no tangent", "Liger, no tangent"}


@pytest.mark.parametrize(
    ("n", "m", "d", "mode", "words"),
    [
        (256, 256, 72, "forward", "head dims 16, 32, 64, 128 and 256 only"),
        (255, 255, 64, "forward", "self-attention of lengths that 32 divides only"),
        (256, 512, 64, "forward", "self-attention of lengths that 32 divides only"),
        (256, 256, 64, "mixed", "its backward drops the cotangent of the tangent"),
        (256, 256, 64, "primal", None),
    ],
)
def test_what_jvp_flash_attention_can_not_do_is_said(n: int, m: int, d: int, mode: str, words: str | None) -> None:
    """Check that the limits are told before the package corrupts memory or returns something wrong."""
    case = TimedCase("dit", "attention", "x", mode, {"batch": 1, "heads": 1, "n": n, "m": m, "d": d}, "bfloat16")
    assert limit_of_jvp_flash_attention(case) == words
