"""Test the command: all of it at tiny shapes, going on with a file, and its answers to wrong requests."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill.benchmarks.ops.suites import SUITES
from fastdistill.benchmarks.ops.timed_op import Dual, Op, Tensors, TimedCase
from fastdistill.benchmarks.run import bench
from fastdistill.benchmarks.run.bench import BenchError, LostError, Request, listing, run, wanted
from fastdistill.cli import main
from tests.benchmarks.toy import CASE, CPU, op_of, right, wrong

OURS = ["fastdistill torch"]
QUICK = ["--quick", "--device", "cpu"]


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Callable[[Op], None]:
    """Return a function that makes an op's cases the suite `toys`, the only one."""

    def install(op: Op) -> None:
        monkeypatch.setattr(bench, "OPS", {"square": op})
        monkeypatch.setattr(bench, "SUITES", {"toys": ()})
        monkeypatch.setattr(bench, "cases", lambda suite, dtype, quick: [CASE, CASE.resized(n=5)][:1])

    return install


def test_a_suite_at_tiny_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check every mode from the command line to the JSON: gate, times, memory, the failed and the absent."""
    path = tmp_path / "new folder" / "block.json"
    assert main(["bench", "--suite", "block", *QUICK, "--json", str(path)]) == 0
    captured = capsys.readouterr()
    content = json.loads(path.read_text())
    timed = {(x["extra_info"]["mode"], x["extra_info"]["provider"]): x for x in content["benchmarks"]}
    assert {mode for mode, provider in timed if provider == "fastdistill torch"} == {"forward", "primal", "mixed"}
    forward = timed["forward", "fastdistill torch"]
    assert forward["stats"]["median"] > 0 and forward["stats"]["rounds"] >= 3
    info = forward["extra_info"]
    assert info["error"]["tangent"] <= info["allowed_error"]["tangent"] < 1e-4
    assert info["peak_memory_bytes"] > 0 and info["ratio_to_floor"] > 0 and info["device"] == "cpu"
    assert info["floor_provider"] == "PyTorch, no tangent" and info["sm_clock_mhz"] is None and info["quick"]
    failed = {x["extra_info"]["provider"]: x["extra_info"] for x in content["not_timed"]}
    assert failed["finite differences"]["status"] == "failed parity"
    assert failed["finite differences"]["error"]["tangent"] > failed["finite differences"]["allowed_error"]["tangent"]
    machine = content["machine_info"]
    assert machine["gpu"] is None and machine["node"] == "" and machine["counters"] == "no GPU"
    assert machine["ceilings"]["matmul_tflops"] > 0 and machine["ceilings"]["copy_gbs"] > 0
    assert "finite differences: failed parity: t_y: error" in captured.out
    assert "fastdistill cuda: impl='cuda': this version has no CUDA extension" in captured.out
    assert "say nothing about speed" not in captured.err and "nothing about speed" in captured.out
    assert captured.err.count("] block/") == 3


def test_going_on_with_a_file(tmp_path: Path) -> None:
    """Check that known cases and providers are not measured again, whatever else is asked for."""
    path, said = tmp_path / "a.json", []
    request = Request(["dit"], quick=True, path=path, device="cpu", pattern="forward", providers=["math"])
    run(request, said.append)
    first = json.loads(path.read_text())["benchmarks"]
    request = Request(["dit"], quick=True, path=path, device="cpu", pattern="forward", providers=["math", "^SDPA,"])
    run(request, said.append)
    second = json.loads(path.read_text())["benchmarks"]
    assert [len(first), len(second)] == [1, 2] and second[0]["stats"] == first[0]["stats"]
    assert second[0]["extra_info"]["ratio_to_floor"] is not None
    run(request, said.append)
    assert json.loads(path.read_text())["benchmarks"] == second
    assert [line.rpartition(": ")[2] for line in said] == ["1 ok", "1 ok", "there already"]


def test_what_was_absent_is_tried_again_once_it_is_there() -> None:
    """Check that an entry "not installed" is not final."""
    provider = right()
    assert bench._known(provider, "ok") and not bench._known(provider, None)
    assert not bench._known(provider, "unavailable")


def test_time_runs_out_between_cases(tmp_path: Path) -> None:
    """Check that cases that weren't started are named, and left for the next call."""
    said: list[str] = []
    every, _ = run(Request(["dit"], quick=True, device="cpu", budget=-1.0), said.append)
    assert every == []
    assert said == ["out of time: 3 of 3 cases left; the same command with --json goes on there"]


def test_being_wrong_ourselves_fails_the_command(
    toys: Callable[[Op], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Check for status 1, and that the table shows the error in place of the time."""
    toys(op_of(wrong("fastdistill planted"), right("right")))
    assert main(["bench", "--suite", "toys", *QUICK]) == 1
    captured = capsys.readouterr()
    assert "fastdistill planted: failed parity: t_y: error" in captured.out
    assert "1 of our own results failed" in captured.err


def test_a_peer_may_be_wrong(toys: Callable[[Op], None]) -> None:
    """Check that this is a result, and not a failure."""
    toys(op_of(right("ours"), right("peer", "peer")))
    _, failures = run(Request(["toys"], quick=True, device="cpu"), lambda line: None)
    assert failures == 0


def test_a_lost_process_leaves_a_note_and_a_status(
    toys: Callable[[Op], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the next process goes on without that provider, as run_gpu.sh does on status 3."""

    def explode(case: object, data: object) -> Callable[[], tuple[torch.Tensor, ...]]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    breaking = right("breaking", "peer").__class__("breaking", "peer", explode)
    toys(op_of(breaking, right("ours")))
    path = tmp_path / "a.json"
    request = Request(["toys"], quick=True, device="cpu", path=path)
    with monkeypatch.context() as patch:
        patch.setattr("fastdistill.benchmarks.run.in_turns.still_works", lambda device: False)
        with pytest.raises(LostError, match="breaking left nothing working here"):
            run(request, lambda line: None)
        path.unlink()
        assert main(["bench", "--suite", "toys", *QUICK, "--json", str(path)]) == 3
    every, _ = run(request, lambda line: None)
    assert {x["extra_info"]["provider"]: x["extra_info"]["status"] for x in every} == {
        "ours": "ok",
        "breaking": "error",
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "dots"], "suite: expected one of dit, video, mmdit, norms, block, step, scaling, got 'dots'"),
        ([], "--suite: expected some of dit, video"),
        (["--suite", "dit", "--dtype", "float64"], "--dtype: expected float32, bfloat16 or float16, got 'float64'"),
        (["--suite", "dit", "--cases", "("], "--cases: expected a regular expression, got '('"),
        (["--suite", "dit", "--cases", "nothing"], "--cases: expected a pattern that fits a case, got 'nothing'"),
        (["--suite", "dit", "--providers", "["], "--providers: expected a regular expression, got '['"),
    ],
)
def test_a_request_that_can_not_be_met(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Check for one message and status 2."""
    assert main(["bench", *QUICK, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that no CPU is timed in its place."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--suite", "dit", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_without_pytest_benchmark_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the message names the extra that has it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "--suite", "dit"]) == 2
    assert "pip install 'fastdistill[bench]'" in capsys.readouterr().err


def test_listing(capsys: pytest.CaptureFixture[str]) -> None:
    """Check the list of suites alone, and with the cases of some; nothing is measured."""
    assert main(["bench", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(SUITES)
    text = listing(Request(["video"], device="cpu", pattern="14B-720p-81f-B.*forward"))
    assert text.splitlines()[-1] == "video/Wan2.1-14B-720p-81f-B1-H40-N75600-D128-float32/forward"


def test_a_gpu_measures_bfloat16() -> None:
    """Check that a CPU measures float32, unless the request says otherwise."""
    request = Request(["dit"])
    assert {case.dtype for case in wanted(request, torch.device("cuda"))} == {"bfloat16"}
    assert {case.dtype for case in wanted(request, CPU)} == {"float32"}
    with pytest.raises(BenchError):
        wanted(Request(["dit"], dtype="int8"), CPU)


def test_a_planted_error_in_an_op_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the gate sees what the timed call returns: a wrong op of ours, nothing else changed."""
    from fastdistill.benchmarks.ops import pointwise

    op = pointwise.POINTWISE["gelu_tanh"]

    def broken(case: TimedCase, impl: str) -> Dual:
        exact = op.pair(case, impl)

        def dual(*args: Any) -> tuple[Tensors, Tensors]:
            outs, t_outs = exact(*args)
            return outs, tuple(t * (1 + math.sqrt(torch.finfo(torch.float32).eps)) for t in t_outs)

        return dual

    monkeypatch.setattr(bench, "OPS", {"gelu_tanh": op.__class__(**{**vars(op), "pair": broken})})
    request = Request(
        ["norms"], quick=True, device="cpu", pattern="gelu_tanh.*forward", providers=["fastdistill torch"]
    )
    (entry,), failures = run(request, lambda line: None)
    assert failures == 1 and entry["extra_info"]["status"] == "failed parity"
