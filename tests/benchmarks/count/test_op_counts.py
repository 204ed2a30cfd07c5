"""Check that counts are exact, see inside our own ops, and don't grow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastdistill as fd
from fastdistill.benchmarks.count import op_counts, op_problems
from fastdistill.benchmarks.count.op_counts import COUNTS, OpCounter, count, count_all
from fastdistill.benchmarks.report import records, regressions
from fastdistill.testing import make_qkv

AGAIN = "python -m fastdistill.benchmarks.count.op_counts"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> records.Results:
    """Count the code as it is now, by the command."""
    path = tmp_path_factory.mktemp("counts") / "counts.json"
    op_counts.main(["--out", str(path)])
    return records.load(path)


@pytest.mark.parametrize("metric", COUNTS)
def test_no_count_grows(fresh: records.Results, metric: str) -> None:
    """Check CI's gate: the torch path dispatches, multiplies, moves and holds no more than was recorded."""
    recorded = records.load(op_counts.RECORDED)
    found = regressions.find_regressions(recorded, fresh, metric=metric, ratio=1.0)
    versions = f"torch {fresh.machine['torch']}, recorded with {recorded.machine['torch']}"
    assert not found.failures, f"{versions}; if it is worth it, record it: {AGAIN}\n" + "\n".join(found.failures)
    assert found.compared == len(fresh.records) == len(recorded.records), f"other rows than recorded: run {AGAIN}"


def test_every_public_op_is_counted(fresh: records.Results) -> None:
    """Check that each explicit pair that the package exports has a problem, and each problem all modes."""
    counted = {name.split(",")[0] for name in op_problems.NAMES}
    pairs = {name.removesuffix("_jvp") for name in fd.__all__ if name.endswith("_jvp")}
    assert pairs - {"merge_attention"} <= counted  # a few sums, which no table has
    assert [(row.key.op, row.key.mode) for row in fresh.records] == [
        (name, mode) for name in op_problems.NAMES for mode in op_problems.MODES
    ]


def test_matmuls_inside_our_ops_are_seen(fresh: records.Results) -> None:
    """Check attention's matmuls, in units of 2 H N M D: 6 forward, 5 and 15 more backward; causal blocks do 36/64."""
    unit = 2 * 4 * 256 * 256 * 64
    flops = {(row.key.op, row.key.mode): row.number("matmul_flops") for row in fresh.records}
    for mode, matmuls in zip(op_problems.MODES, (6, 6 + 5, 6 + 15)):
        assert flops["attention", mode] == matmuls * unit
        assert flops["attention, causal", mode] == matmuls * unit * 36 / 64
    # The products are x W and t_x W; there is no product by zero.
    assert flops["linear", "forward"] == 2 * 2 * 256 * 256 * 512


def test_bytes_are_those_that_are_read_and_written() -> None:
    """Check sums of two, in place, into a buffer, over an expanded dimension, and a copy; views move nothing."""
    x, y, out = torch.ones(8, 16), torch.ones(16), torch.empty(8, 16)
    large, small = x.nbytes, y.nbytes
    for run, moved in (
        (lambda: x + y, 2 * large + small),
        (lambda: x.add_(y), 2 * large + small),
        (lambda: torch.add(x, y, out=out), 2 * large + small),
        (lambda: x * y.expand(8, 16), 2 * large + small),
        (lambda: out.copy_(x), 2 * large),
        (lambda: out.zero_(), large),
        (lambda: x * x, 2 * large),
        (lambda: x.T.reshape(-1)[:4], 2 * large),  # The reshape copies.
        (lambda: torch.empty_like(x).view(-1), 0),
    ):
        assert count(run)["bytes_moved"] == moved


def test_composite_ops_count_as_what_they_do() -> None:
    """Check that the matmul of a vector counts as one mv, or what PyTorch makes of it, and never hides its work."""
    x, w = torch.ones(4, 8), torch.ones(8, 16)
    assert count(lambda: torch.matmul(x, w)) == count(lambda: torch.mm(x, w))
    assert count(lambda: torch.mm(x, w))["matmul_flops"] == 2 * 4 * 8 * 16
    out = torch.zeros(2, 4, 16)
    x3, w3 = x.expand(2, 4, 8), w.expand(2, 8, 16)
    assert count(lambda: out.baddbmm_(x3, w3))["matmul_flops"] == 2 * 2 * 4 * 8 * 16


def test_an_op_with_a_kernel_and_a_decomposition_counts_as_the_kernel() -> None:
    """Check that SiLU's backward counts as one op on a CPU, not as the seven of which it could be composed."""
    x, u = torch.randn(2, 64)
    found = count(lambda: torch.ops.aten.silu_backward(u, x))
    assert (found["aten_ops"], found["bytes_moved"]) == (1, 3 * x.nbytes)


def test_one_more_pass_over_the_data_is_seen() -> None:
    """Check that the gate can fail: an op that makes one more copy counts more of everything but flops."""
    (q, k, v), tangents = (make_qkv(1, 2, 64, 16, seed=seed) for seed in (0, 1))
    before = count(lambda: fd.attention_jvp(q, k, v, *tangents, impl="torch"))
    after = count(lambda: [x * 1 for x in fd.attention_jvp(q, k, v, *tangents, impl="torch")])
    assert after["matmul_flops"] == before["matmul_flops"] > 0
    assert after["aten_ops"] == before["aten_ops"] + 2
    assert after["bytes_moved"] == before["bytes_moved"] + 4 * q.nbytes


def test_peak_memory_is_seen_inside_our_ops() -> None:
    """Check that the peak includes the logits of a block, which live only inside the op."""
    (q, k, v), tangents = (make_qkv(1, 2, 64, 16, seed=seed) for seed in (0, 1))
    with OpCounter() as counter:
        results = fd.attention_jvp(q, k, v, *tangents, impl="torch")
    assert counter.peak >= 2 * 64 * 64 * 4 + sum(x.nbytes for x in results)
    assert counter.alive < counter.peak


def test_only_some_problems_can_be_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that problems can be chosen by name, a line each, and that an unknown name is refused."""
    op_counts.main(["--problems", "silu", "--out", str(tmp_path / "new" / "x.json")])
    assert [row.key.op for row in records.load(tmp_path / "new" / "x.json").records] == ["silu"] * 3
    assert len(capsys.readouterr().out.splitlines()) == 3
    with pytest.raises(SystemExit):
        op_counts.main(["--problems", "tanh"])
    with pytest.raises(ValueError, match=r"problem: expected one of .*, got 'tanh'"):
        list(count_all(["tanh"]))
    with pytest.raises(ValueError, match=r"mode: expected one of forward, .*, got 'backward'"):
        op_problems.run_mode(op_problems.problem("silu"), "backward")
