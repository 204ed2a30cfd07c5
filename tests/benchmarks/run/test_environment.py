"""Test what stands beside the numbers: the machine, without its name, and the commit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastdistill.benchmarks.run import environment
from fastdistill.benchmarks.run.clock import CpuClock
from tests.benchmarks.toy import CPU, Time


def test_a_machine_is_described_without_its_name() -> None:
    """Check processor, threads, versions and ceilings; results are public, host names are not."""
    found = environment.machine_info(CPU, CpuClock(), None, "no GPU")
    assert found["node"] == ""
    assert found["device"] == "cpu" and found["gpu"] is None and found["torch"] == torch.__version__
    assert found["threads"] == 1 and found["packages"]["pytest-benchmark"]
    assert found["ceilings"]["matmul_dtype"] == "float32"
    assert found["ceilings"]["matmul_tflops"] > 0 and found["ceilings"]["copy_gbs"] > 0


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check all that a GPU's numbers depend on."""
    properties = SimpleNamespace(name="Made-up", major=9, minor=0, total_memory=80, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = environment._gpu(torch.device("cuda"), SimpleNamespace(driver=lambda: "580.1"))
    expected = {"name": "Made-up", "capability": "9.0", "memory_bytes": 80, "multiprocessors": 132, "driver": "580.1"}
    assert found == expected


def test_a_clock_that_stands_still_gives_no_ceiling() -> None:
    """Check that it is None, and not infinite."""
    found = environment.ceilings(CPU, CpuClock(Time()))
    assert found["matmul_tflops"] is None and found["copy_gbs"] is None


def test_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the given commit without a repository, a + for uncommitted changes, and None where it is unknown."""
    told = environment.commit_info("abc+")
    assert (told["id"], told["dirty"], told["project"]) == ("abc", True, "fastdistill")
    monkeypatch.setattr(environment, "commit", lambda: None)
    assert environment.commit_info()["id"] is None
