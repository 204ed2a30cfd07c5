"""Test tuning without a GPU: a made-up GPU answers at once, and the user's file is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fastdistill import tune
from fastdistill.kernels import configs
from fastdistill.kernels.configs import Config
from fastdistill.ops.attention import eager
from fastdistill.tune import CallKind

CASE = CallKind("forward", torch.bfloat16, 72, "qkv", "none", 1024)
CASES = [CASE._replace(length=length) for length in (256, 1024, 4096)]
FASTEST = Config(64, 64, 4, 3)


class MadeUpGPU:
    """Fit everything but 128 rows; `FASTEST` is the fastest, and `wrong` configs give wrong results."""

    arch = 90
    where = "a made-up GPU"

    def __init__(self, wrong: Sequence[Config] = (), killed_at: int = 99) -> None:
        self.wrong, self.killed_at = wrong, killed_at
        self.timed: list[CallKind] = []

    def fitting(self, case: CallKind, candidates: Sequence[Config]) -> list[Config]:
        return [config for config in candidates if config.block_n < 128]

    def milliseconds(self, case: CallKind, config: Config) -> float:
        if case not in self.timed:
            self.timed.append(case)
        if len(self.timed) == self.killed_at:
            raise KeyboardInterrupt
        return 1.0 if config == FASTEST else 2.0 + config.num_stages

    def fault(self, case: CallKind, config: Config) -> str | None:
        return "result 1 is off" if config in self.wrong else None


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the user's file, in an empty folder, where lookups find it."""
    path = tmp_path / "fastdistill" / "gpu.json"
    monkeypatch.setattr(configs, "cache_path", lambda: path)
    configs.reload()
    yield path
    configs.reload()


def look_up(length: int) -> Config:
    """Return the config with which a call of that length is launched."""
    return configs.attention_config("forward", 90, torch.bfloat16, 72, "qkv", "none", length)


def test_the_fastest_config_is_kept_and_used(path: Path) -> None:
    """Check that lookups took the shipped table before, and take what was measured after, for other lengths as well."""
    assert look_up(1024) != FASTEST
    (entry,) = tune.tune([CASE], MadeUpGPU(), path, report=lambda line: None)
    assert entry.config == FASTEST
    assert entry.measured == "a made-up GPU: 1.0000 ms"
    assert configs.read(path) == (entry,)
    assert look_up(1024) == look_up(99) == FASTEST


def test_what_is_found_stands_where_a_launch_looks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a launch by pointers (exact float32, or by wish) reads sm_80's entries on newer GPUs too."""
    exact = CASE._replace(dtype=torch.float32)
    (entry,) = tune.tune([exact], MadeUpGPU(), path, report=lambda line: None)
    assert entry.arch == 80
    monkeypatch.setenv("FASTDISTILL_DESCRIPTORS", "0")
    assert {entry.arch for entry in tune.tune([CASE], MadeUpGPU(), path, report=lambda line: None)} == {80}
    monkeypatch.delenv("FASTDISTILL_DESCRIPTORS")
    entries = tune.tune([CASE], MadeUpGPU(), path, report=lambda line: None)
    assert sorted(entry.arch for entry in entries) == [80, 80, 90]


def test_a_wrong_result_is_never_kept(path: Path) -> None:
    """Check that the next fastest wins, and that the report says what was left out."""
    report: list[str] = []
    (entry,) = tune.tune([CASE], MadeUpGPU(wrong=[FASTEST]), path, report=report.append)
    assert entry.config != FASTEST
    assert "64x64, 4 warps, 3 stages left out: result 1 is off" in report[0]


def test_where_nothing_fits_nothing_is_kept(path: Path) -> None:
    """Check that the shipped config stays."""
    gpu = MadeUpGPU()
    gpu.fitting = lambda case, candidates: []  # type: ignore[method-assign]
    before, report = look_up(1024), []
    assert tune.tune([CASE], gpu, path, report=report.append) == []
    assert not path.exists() and look_up(1024) == before
    assert "can be used" in report[0]


def test_a_killed_run_goes_on_where_it_was(path: Path) -> None:
    """Check that what was measured before is in the file, and is not measured again."""
    with pytest.raises(KeyboardInterrupt):
        tune.tune(CASES, MadeUpGPU(killed_at=3), path, report=lambda line: None)
    assert len(configs.read(path)) == 2
    second = MadeUpGPU()
    assert len(tune.tune(CASES, second, path, report=lambda line: None)) == 3
    assert second.timed == CASES[2:]
    third = MadeUpGPU()
    tune.tune(CASES, third, path, again=True, report=lambda line: None)
    assert third.timed == CASES


def test_a_budget_ends_it_between_cases(path: Path) -> None:
    """Check that nothing is started with no time at all."""
    report: list[str] = []
    assert tune.tune(CASES, MadeUpGPU(), path, budget=-1, report=report.append) == []
    assert len(report) == 1 and "out of time" in report[0]


def test_a_damaged_file_is_named_with_its_remedy(path: Path) -> None:
    """Check it in a lookup and in tuning."""
    path.parent.mkdir()
    path.write_text('[{"kernel": "forward"')
    for use in (lambda: look_up(1024), lambda: tune.tune([CASE], MadeUpGPU(), path)):
        with pytest.raises(configs.ConfigFileError, match="delete it") as caught:
            use()
        assert str(path) in str(caught.value)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check for one message and status 2."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        tune.main([])
    assert caught.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_what_is_known_can_be_added_to_a_table(path: Path, tmp_path: Path) -> None:
    """Check --export: the table's own entries stay, except those that were measured here."""
    table = tmp_path / "configs.json"
    configs.write(table, configs.shipped())
    (entry,) = tune.tune([CASE], MadeUpGPU(), path, report=lambda line: None)
    tune.main(["--export", str(table)])
    assert set(configs.read(table)) == {*configs.shipped(), entry}


@pytest.mark.parametrize("kernel", configs.KERNELS)
@pytest.mark.parametrize("mask", configs.MASKS)
def test_the_calls_that_it_times_are_calls(kernel: str, mask: str) -> None:
    """Check that their arguments are an implementation's, and that each kernel's gradients are asked for alone."""
    case = CallKind(kernel, torch.float32, 8, "qkm" if mask == "mask" else "qk", mask, 24)
    call = tune.call_of(case, "cpu", batch=2, heads=2)
    results = tune.results_of(call, eager)
    assert all(x is not None for pair in results[0] for x in pair)
    if kernel != "forward":
        names = ("q", "k", "v", "m", "t_q", "t_k", "t_v", "t_m")
        gradients = dict(zip(names, tune.gradients_of(case, call, results, eager), strict=True))
        wanted = {"q", "t_q"} if kernel == "backward_q" else {"k", "v", "t_k"}
        assert {name for name, x in gradients.items() if x is not None} == wanted


def test_a_difference_is_found() -> None:
    """Check errors beyond the bound, and NaN; an absent result has nothing in which to differ."""
    x = torch.ones(3)
    assert tune.difference((x, None), (x + 1e-3, None), 1e-2) is None
    assert "result 1" in str(tune.difference((x, x), (x, x + 0.1), 1e-2))
    assert tune.difference((x * torch.nan,), (x,), 1e-2) is not None


def test_candidates_are_few_and_fit() -> None:
    """Check that any kernel has at most two dozen, and at least one."""
    for kernel in configs.KERNELS:
        for d in (8, 64, 72, 128, 256):
            for dtype in (torch.bfloat16, torch.float32):
                found = tune.candidates(CallKind(kernel, dtype, d, "qkv", "none", 1024))
                assert 1 <= len(found) <= 24, (kernel, d, dtype)
