"""Test the precision policy on small images, and the table that the benchmark wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastdistill.benchmarks.run import precision
from fastdistill.benchmarks.run.environment import RESULTS
from fastdistill.benchmarks.run.precision import CAPS, NETWORKS, WAYS

RECORDED = json.loads((RESULTS / "precision.json").read_text(encoding="utf-8"))["results"]


@pytest.mark.parametrize("network", NETWORKS)
def test_twelve_blocks_keep_the_caps_and_the_default_halves_the_error(network: str) -> None:
    """Check the default at 16 tokens against 16 bits everywhere and against plain autocast."""
    found = precision.errors(NETWORKS[network], seed=0, size=8)
    tangent = {way: t_u for way, (_, t_u) in found.items()}
    assert tangent["float32"] < CAPS["float32"] and tangent["autocast"] < CAPS["bfloat16"]
    assert 2 * tangent["autocast"] < min(tangent["bf16 storage"], tangent["autocast, plain"])


def test_the_recorded_table_is_complete_and_within_the_caps() -> None:
    """Check that every way, network and seed is there, and that the Markdown agrees with the JSON."""
    assert len(RECORDED) == len(WAYS) * len(NETWORKS) * len(precision.SEEDS)
    assert not precision.beyond_caps(RECORDED)
    assert precision.table(RECORDED) == (RESULTS / "precision.md").read_text(encoding="utf-8")


def test_an_error_beyond_its_cap_is_found() -> None:
    row = next(row for row in RECORDED if row["way"] == "autocast")
    (line,) = precision.beyond_caps([row | {"error_t_u": 1.3e-2}, row | {"way": "bf16 storage", "error_t_u": 1.0}])
    assert "1.3e-02, cap 1.2e-02" in line
    assert precision.beyond_caps([row | {"error_t_u": float("nan")}])


def test_another_function_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that nothing is measured against plain modules that compute something else."""
    modulated = precision.PlainDiT.__call__.__globals__["modulated"]
    monkeypatch.setattr(
        "fastdistill.benchmarks.ops.plain_dit.modulated", lambda x, scale, shift: modulated(x, scale, shift) + 1e-9
    )
    with pytest.raises(SystemExit, match="parity failed"):
        precision.errors(NETWORKS["RoPE, QK-norm"], seed=0, size=4)


def test_the_program_writes_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "SEEDS", (0,))
    precision.main(["--size", "4", "--out", str(tmp_path / "new" / "precision")])
    assert len(json.loads((tmp_path / "new/precision.json").read_text())["results"]) == len(WAYS) * len(NETWORKS)
    assert "| **all float32, `fd.jvp`** |" in (tmp_path / "new/precision.md").read_text()
