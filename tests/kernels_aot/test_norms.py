"""Test the norms' machine code on Hopper: registers suffice, and every combination of absent arguments compiles."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.benchmarks.compile.aot_table import TOOLS, compiling_for
from fastdistill.kernels import norm, norm_backward
from fastdistill.kernels.launch import Launch
from fastdistill.kernels.norm_rows import Inputs

VECTORS, MODULATION = ("weight", "bias"), ("scale", "shift", "gate")


def inputs(width: int, names: tuple[str, ...], tangents: tuple[str, ...], length: int = 8192) -> Inputs:
    """Return meta tensors: bfloat16 rows, or a float32 stream with bfloat16 blocks; the rest in float32."""

    def make(name: str) -> Tensor:
        shape = (width,) if name in VECTORS else (2, 1 if name in MODULATION else length, width)
        low = name == "h" or (name == "x" and "h" not in names)
        return torch.empty(shape, dtype=torch.bfloat16 if low else torch.float32, device="meta")

    given = {name: make(name) for name in ("x", *names)}
    return Inputs(**{"t_x": None, **given, **{f"t_{name}": make(name) for name in tangents}})


def forward(of: Inputs, rms: bool) -> list[tuple[Any, Launch]]:
    """Return the kernel and its launch."""
    moving = any(value is not None for name, value in of._asdict().items() if name.startswith("t_"))
    outputs = norm.allocate(of.x, moving, rms, torch.bfloat16, of.h is not None)
    return [(norm._norm_kernel, norm.plan(of, outputs, 1e-6, rms))]


def backward(of: Inputs, rms: bool, cotangents: tuple[str, ...]) -> list[tuple[Any, Launch]]:
    """Return the kernel and its launches, for all gradients."""
    given = {name: of.x if name.endswith("r") else of.x.bfloat16() for name in cotangents}
    primal = not any(name.startswith("dt_") for name in cotangents)
    if primal:
        of = of._replace(**{name: None for name in Inputs._fields if name.startswith("t_")})
    row = torch.empty(of.x.shape[:2], device="meta")
    wanted = [name for name, value in of._asdict().items() if value is not None]
    both = norm_backward.Cotangents(**{"dy": None, "dt_y": None, **given})
    task = norm_backward.plan(both, of, None if rms else row, row, rms, wanted)
    return [(norm_backward._backward_kernel, launch) for launch in task.launches]


def spills(kernel: Any) -> int:
    """Count local-memory loads and stores in the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"\b(?:STL|LDL)\b", code))


def compiled(launches: list[tuple[Any, Launch]], arch: int = 90) -> list[Any]:
    """Compile for an architecture, without a GPU."""
    with compiling_for(arch):
        return [kernel.warmup(*launch.args, grid=launch.grid, **launch.options) for kernel, launch in launches]


GATED = ("h", "gate", "scale", "shift")
ALL = (*GATED, *VECTORS)
COTANGENTS = ("dy", "dt_y", "dr", "dt_r")


@pytest.mark.parametrize("width", [1152, 4096, 8192])
@pytest.mark.parametrize("names", [GATED, ALL], ids=["gated", "all"])
def test_nothing_spills(width: int, names: tuple[str, ...]) -> None:
    """Check the costliest calls of each size, in both directions, with programs that take many steps."""
    of = inputs(width, names, ("x", *names))
    launches = [*forward(of, False), *backward(of, False, COTANGENTS)]
    assert [spills(kernel) for kernel in compiled(launches)] == [0] * len(launches)
    assert len(launches) == (2 if width == 1152 and names == GATED else 3)


@pytest.mark.parametrize(
    ("names", "tangents", "cotangents"),
    [
        ((), (), ("dy",)),
        ((), ("x",), ("dt_y",)),
        (VECTORS, ("weight",), ("dy", "dt_y")),
        (("scale", "shift"), ("shift",), ("dy", "dt_y")),
        (("h",), ("h",), ("dr", "dt_y")),
        (GATED, (), COTANGENTS),
        (GATED, ("scale",), ("dr", "dt_r")),
        (ALL, ("x", *ALL), ("dr",)),
        (ALL, ("gate",), ("dy",)),
    ],
    ids=lambda names: "+".join(names) or "none",
)
@pytest.mark.parametrize("wide", [False, True], ids=["fused", "columns"])
def test_absent_arguments_compile(
    names: tuple[str, ...], tangents: tuple[str, ...], cotangents: tuple[str, ...], wide: bool
) -> None:
    """Check that a None in a tuple or from a branch, which the interpreter takes for granted, compiles."""
    of = inputs(8192 if wide else 72, names, tangents, length=40)
    compiled([*forward(of, not names), *backward(of, not names, cotangents)])
