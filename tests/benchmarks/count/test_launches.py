"""Test the counts of kernels and bytes: the counting itself, our numbers, and the table that the benchmark wrote."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType

import fastdistill as fd
from fastdistill.benchmarks.count import launches
from fastdistill.benchmarks.count.counting import counted, size
from fastdistill.benchmarks.count.launches import DTYPES, WAYS, Sizes
from fastdistill.benchmarks.run.clock import CpuClock
from fastdistill.benchmarks.run.environment import RESULTS

SMALL = Sizes(batch=2, tokens=32, width=64, heads=4)
# The backward of output and tangent is one launch, and one more for each gradient that is a sum over tokens.
BACKWARD = {"ada_layer_norm": 5, "ada_rms_norm": 5, "gated_residual_ada_norm": 7, "attention": 3}
LEFT_TO_PYTORCH = {"linear": 2, "linear, modulation": 6}


@pytest.fixture(scope="module")
def counts() -> dict[tuple[str, str, str], dict[str, Any]]:
    """Return the counts of each op, way and direction, in float32."""
    found = launches.count_ops("float32", "cpu", SMALL)
    return {(row["op"], row["way"], row["direction"]): row for row in found}


def test_every_op_of_ours_is_one_launch_at_the_floor(counts: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    """Check output and tangent together: no byte is read twice, and only row statistics are written besides them."""
    ours = {op: row for (op, way, direction), row in counts.items() if (way, direction) == (WAYS[2], "forward")}
    assert len(ours) == 12
    for op, row in ours.items():
        assert row["kernels"] == 1 and "." in row["names"][0], op
        assert row["floor"] <= row["bytes"] + 1e-9 < 1.05 * row["floor"], op
        plain = counts[op, WAYS[0], "forward"]
        assert plain["kernels"] >= 2 and plain["bytes"] > 1.2 * row["floor"], op


def test_every_backward_of_ours_is_one_launch_and_one_for_each_sum_over_tokens(
    counts: dict[tuple[str, str, str], dict[str, Any]],
) -> None:
    """Check the gradients in all inputs and all tangents; attention launches for its counts, keys, and queries."""
    ours = {op: row for (op, way, direction), row in counts.items() if (way, direction) == (WAYS[2], "backward")}
    assert {op: row["kernels"] for op, row in ours.items()} == {op: BACKWARD.get(op, 1) for op in ours}
    assert all(row["names"].count("sum") == BACKWARD[op] - 1 for op, row in ours.items() if "norm" in op and op in BACKWARD)  # fmt: skip  # noqa: E501


def test_linear_layers_skip_the_product_by_zeros(counts: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    for op, kernels in LEFT_TO_PYTORCH.items():
        ours, plain = (counts[op, way, "forward"] for way in (WAYS[1], WAYS[0]))
        matmuls = [sum(name in launches.MATMULS for name in row["names"]) for row in (ours, plain)]
        assert matmuls == [2 if op == "linear" else 1, 3]
        assert ours["kernels"] == kernels and ours["bytes"] < 0.7 * plain["bytes"]


def test_a_block_with_its_tangent_is_thirty_launches() -> None:
    """Count nine matmuls (of two products each; the modulation's is one), and one launch for every op between them."""
    counts = {(row["block"], row["way"]): row for row in launches.count_blocks(SMALL._replace(batch=1), "cpu")}
    for block, ours, total in (("DiT-XL/2", 5, 29), ("with RoPE, QK-norm", 6, 30)):
        row, plain = counts[block, "`fd.jvp`, Triton"], counts[block, "`torch.func.jvp` of plain modules"]
        assert (row["kernels"], row["matmuls"], row["ours"]) == (total, 9, ours), row["names"]
        assert plain["kernels"] > 160 and plain["matmuls"] == 21
    in_order = [name for name in counts["with RoPE, QK-norm", "`fd.jvp`, Triton"]["names"] if "." in name]
    assert in_order == [
        "activation.forward",
        "norm.norm",
        "qk_norm_rope.forward",
        "attention.attention",
        "norm.norm",
        "activation.forward",
    ]


X = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("run", "names", "moved"),
    [
        (lambda: X.view(8, 4).T[1:], [], 0),
        (lambda: torch.empty_like(X), [], 0),
        (lambda: X + X[:1], ["add"], 128 + 32 + 128),
        (lambda: X + X[:1].expand(4, 8), ["add"], 128 + 32 + 128),
        (lambda: X.clone().add_(1), ["clone", "add_"], 256 + 256),
        (lambda: torch.zeros(8).copy_(X[0]), ["zeros", "copy_"], 32 + 64),
        (lambda: torch.cat([X, X]), ["cat"], 512),
        (lambda: F.linear(X, X), ["mm"], 256 + 64),
        (lambda: torch._efficientzerotensor((4, 8)) * X, [], 0),
        (lambda: fd.silu(X, impl="torch"), ["silu"], 256),
    ],
    ids=[
        "views",
        "allocation",
        "broadcast",
        "expanded",
        "in-place",
        "overwritten",
        "list",
        "composite",
        "zeros",
        "ours",
    ],
)
def test_what_is_a_kernel_and_what_it_moves(run: Callable[[], Tensor], names: list[str], moved: int) -> None:
    with counted("torch") as kernels:
        run()
    assert [kernel.name for kernel in kernels] == names
    assert sum(kernel.bytes for kernel in kernels) == moved


def test_size_counts_what_there_is() -> None:
    assert size(X) == 128 and size(X[:1].expand(4, 8)) == 32 and size(X[:, :0]) == 0 and size(X[:, ::2]) == 64
    assert size(torch._efficientzerotensor((4, 8))) == 0


def test_ops_inside_are_opened_in_both_directions() -> None:
    """Check that inner ops run as the implementation that was asked for."""
    x = torch.randn(2, 3, 8, requires_grad=True)
    with counted("torch") as in_torch, counted("triton") as in_triton:
        pass
    assert not in_torch and not in_triton
    with counted("triton") as kernels:
        y, t_y = torch.func.jvp(lambda x: fd.layer_norm(x, (8,)), (x,), (torch.ones(2, 3, 8),))
        torch.autograd.grad(y.sum() + t_y.sum(), x)
    assert [kernel.name for kernel in kernels if "." in kernel.name] == ["norm.norm", "norm_backward.backward"]
    with counted("torch") as kernels:
        torch.func.jvp(lambda x: fd.layer_norm(x, (8,)), (x,), (torch.ones(2, 3, 8),))
    assert not [kernel for kernel in kernels if "." in kernel.name] and len(kernels) > 5


def test_a_block_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "plain_block", lambda state, prefix, heads, x, c, angles: 1.001 * x)
    with pytest.raises(SystemExit, match="parity failed"):
        launches.count_blocks(SMALL._replace(batch=1), "cpu")


def test_the_recorded_tables_are_complete_and_those_of_the_counts() -> None:
    """Check that every op is there in both dtypes, that our kernels are those of now, and that both files agree."""
    path = RESULTS / "launches"
    table = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    copy = table["copy_gb_per_s"]
    sizes = launches.Sizes(**table["sizes"])
    assert launches.tables(table["ops"], table["blocks"], copy, sizes) == path.with_suffix(".md").read_text(
        encoding="utf-8"
    )
    ours = [row for row in table["ops"] if (row["way"], row["direction"]) == (WAYS[2], "forward")]
    assert len(ours) == 12 * len(DTYPES) and all(row["kernels"] == 1 for row in ours)


def test_the_program_writes_both_files_and_speeds_where_there_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new folder" / "launches"
    launches.main(["--device", "cpu", "--batch", "1", "--tokens", "4", "--width", "64", "--out", str(out)])
    assert "GB/s: not yet measured" in out.with_suffix(".md").read_text() == capsys.readouterr().out[:-1]
    table = json.loads(out.with_suffix(".json").read_text())
    timed = [row | {"gb_per_s": 1234.5} for row in table["ops"]]
    text = launches.tables(timed, table["blocks"], 3000.0, launches.Sizes(**table["sizes"]))
    assert "on 1 x 4 tokens of width 64" in text
    assert "| GB/s | of torch.func.jvp |" in text and "| 1234 | 1234 |" in text and "of a copy, 3000" in text


def test_a_time_becomes_gigabytes_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace clock and profiler by stand-ins that need no GPU."""
    ticks = itertools.count(0.0, 0.002)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    events = [SimpleNamespace(device_type=kind) for kind in (DeviceType.CPU, DeviceType.CUDA, DeviceType.CUDA)]
    profiler = nullcontext(SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities, acc_events: profiler)
    found = launches.speed(lambda: (), 6_000_000, CpuClock(timer=lambda: next(ticks)))
    assert found == pytest.approx({"ms": 2.0, "gb_per_s": 3.0, "kernels_profiled": 2})
