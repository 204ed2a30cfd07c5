"""Test the command line: help, errors in one message, and the whole way from a configuration to samples."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastdistill
from fastdistill.cli import main
from fastdistill.data import Ring
from fastdistill.train import load_config, train

TINY = ["--steps", "2", "--data.batch", "8", "--model.width", "8", "--device", "cpu"]


def told(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a command prints, after checking its exit status."""
    try:
        actual: object = main(arguments)
    except SystemExit as stop:
        actual = stop.code
    output = capsys.readouterr()
    assert actual == status, output
    return output.out + output.err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished tiny run."""
    return train(load_config("ring", ["--out", str(tmp_path_factory.mktemp("cli") / "ring"), *TINY]))


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Check that the help names every command, and that each command's help has examples."""
    text = told(["--help"], 0, capsys)
    for command in ("train", "sample", "eval", "explain", "compare", "demo", "bench", "report", "doctor"):
        assert f"\n    {command} " in text
        assert f"  fastdistill {command}" in text
        assert "examples:\n  fastdistill" in told([command, "--help"], 0, capsys)


def test_help_for_a_configuration_lists_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    """Check some fields with their types."""
    text = told(["train", "ring", "--help"], 0, capsys)
    for field in ("--optim.lr FLOAT", "--method.distinct FLOAT", "--log.checkpoint-every INT", "--resume-from"):
        assert field in text


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    """Check `fastdistill --version`."""
    assert told(["--version"], 0, capsys) == f"fastdistill {fastdistill.__version__}\n"


def test_help_loads_nothing_heavy() -> None:
    """Check that a fresh Python shows help without loading what only training needs."""
    code = """
import sys
from fastdistill.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
print(*(name for name in ("pydantic", "tyro", "sklearn", "matplotlib", "tensorboard") if name in sys.modules))
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "", done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["required", "COMMAND"]),
        (["trian"], ["invalid choice", "'trian'", "train"]),
        (["train"], ["CONFIG"]),
        (["train", "rinng"], ["rinng", "no shipped configuration", "ring"]),
        (["train", "ring", "--stepz", "3"], ["--stepz", "--steps INT"]),
        (["train", "ring", "--steps", "0"], ["steps", "greater than or equal to 1"]),
        (["train", "ring", "--init-from-teacher"], ["init_from_teacher", "teacher"]),
        (["train", "digits-meanflow", "--teacher", "nowhere"], ["teacher", "nowhere", "train it first"]),
        (["sample", "nowhere"], ["nowhere", "expected a run folder"]),
        (["sample", "nowhere", "--n", "0"], ["--n", "from 1 up", "'0'"]),
        (["sample", "nowhere", "--n", "x"], ["--n", "from 1 up", "'x'"]),
        (["sample", "nowhere", "--out", "a.gif"], ["--out", ".png or .npy", "a.gif"]),
        (["eval", "nowhere"], ["nowhere", "expected a run folder"]),
        (["eval", "nowhere", "--n", "5"], ["--n", "from 64 up", "'5'"]),
        (["train", "ring", "--method.name", "meanflo"], ["method.name", "did you mean 'meanflow'?"]),
        (
            ["train", "ring", "--method.name", "dmd"],
            ["teacher", "runs/ring-flow", "train it first", "train ring-flow)"],
        ),
        (["train", "ring", "--method.name", "scm"], ["teacher", "train ring-flow)", "--teacher None"]),
        (["train", "ring", "--path.name", "edm", "--method.name", "scm"], ["path.name: scm fits", "trig"]),
        (["explain", "meanflo"], ["method", "did you mean 'meanflow'?"]),
        (["compare", "--methods", "facm,dmx"], ["methods", "'dmx'", "did you mean 'dmd'?"]),
        (["compare", "--data", "cifar"], ["data", "ring, digits", "'cifar'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_ends_in_one_message_and_status_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that the message names what was wrong, without a traceback."""
    text = told(arguments, 2, capsys)
    for word in words:
        assert word in text
    assert "Traceback" not in text


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that an error that no message explains is not swallowed."""

    def broken(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("fastdistill.train.load_config", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["train", "ring"])


def test_a_missing_package_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check the message if an optional dependency isn't installed."""

    def missing(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'tyro'", name="tyro")

    monkeypatch.setattr("fastdistill.train.load_config", missing)
    assert "pip install 'fastdistill[train]'" in told(["train", "ring"], 2, capsys)


def test_a_run_that_diverges_ends_in_one_message_and_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that the status isn't 2, because the user made no mistake."""
    batch = Ring.batch
    monkeypatch.setattr(Ring, "batch", lambda *args: (batch(*args)[0] / 0, None))
    text = told(["train", "ring", "--out", str(tmp_path / "run"), *TINY], 1, capsys)
    assert "step 1: loss is nan" in text
    assert "Traceback" not in text


def test_training_on_the_ring_ends_with_the_distance_to_the_exact_map(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check the table after training at 1, 2, 4 and 8 steps, and that of `eval` at the requested steps."""
    assert main(["train", "ring", "--out", str(run), *TINY]) == 0
    text = capsys.readouterr().out
    assert "map error" in text
    assert all(f"meanflow, {number} step" in text for number in (1, 2, 4, 8))
    assert (run / "summary.json").is_file()
    assert (run / "samples" / "flow_map.png").is_file()
    text = told(["eval", str(run), "--steps", "1", "3", "--n", "64"], 0, capsys)
    assert "meanflow, 3 steps" in text
    assert "meanflow, 8 steps" not in text


def test_samples_are_written_as_a_picture_or_an_array(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that samples go to the given path, or into the run folder, and that the path is printed."""
    array, picture = tmp_path / "points.npy", run / "samples" / "sample.png"
    assert told(["sample", str(run), "--n", "7", "--steps", "2", "--out", str(array)], 0, capsys) == f"{array}\n"
    assert np.load(array).shape == (7, 2)
    assert told(["sample", str(run)], 0, capsys) == f"{picture}\n"
    with Image.open(picture) as image:
        assert image.size == (400, 430)


def test_samples_and_measures_by_another_sampler(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that a name or gamma chooses the sampler, and that options that don't fit are refused by name."""
    arrays = []
    for name, how in (("a", []), ("b", ["--sampler", "consistency"]), ("c", ["--gamma", "0.5"])):
        out = tmp_path / f"{name}.npy"
        told(["sample", str(run), "--n", "7", "--steps", "2", "--out", str(out), *how], 0, capsys)
        arrays.append(np.load(out))
    assert not np.array_equal(arrays[0], arrays[1]) and not np.array_equal(arrays[1], arrays[2])
    assert "meanflow, 2 steps" in told(["eval", str(run), "--steps", "2", "--n", "64", "--gamma", "0.5"], 0, capsys)
    for command in ("sample", "eval"):
        assert " --gamma: expected in [0, 1], got 2.0" in told([command, str(run), "--gamma", "2"], 2, capsys)
        useless = told([command, str(run), "--gamma", "0.5", "--sampler", "consistency"], 2, capsys)
        assert " --gamma: expected none with the sampler consistency" in useless and "got 0.5" in useless
    assert " --sampler: expected one of euler, " in told(["sample", str(run), "--sampler", "ddim"], 2, capsys)


def test_methods_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """Check the description of one method, and the table of all."""
    assert "arXiv:2505.13447" in told(["explain", "meanflow"], 0, capsys)
    table = told(["explain"], 0, capsys)
    assert all(f"\n{name} " in table for name in ("meanflow", "facm", "dmd", "reflow"))


def test_methods_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that the command passes its options on, and prints the table and where the report is."""
    import fastdistill.compare as module

    small = ["--model.width", "8", "--data.batch", "16", "--device", "cpu"]
    original = module.compare
    monkeypatch.setattr(module, "compare", lambda *args, **options: original(*args, **options, overrides=small))
    arguments = ["--methods", "flow_matching", "--steps", "2", "--n", "64", "--out", str(tmp_path / "out")]
    text = told(["compare", *arguments], 0, capsys)
    assert "map error@1" in text and "flow_matching" in text
    assert (tmp_path / "out" / "report.html").is_file()


def test_samples_that_a_run_cannot_give_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check labels of data without labels, guidance of MeanFlow, and a folder that doesn't exist."""
    assert "ring has no labels" in told(["sample", str(run), "--label", "3"], 2, capsys)
    assert "guidance built in" in told(["sample", str(run), "--guidance", "2"], 2, capsys)
    assert "is no folder" in told(["sample", str(run), "--out", str(tmp_path / "no" / "a.png")], 2, capsys)


def test_the_doctor_tries_each_implementation(capsys: pytest.CaptureFixture[str]) -> None:
    """Check that the report says which implementations run, and why others don't."""
    text = told(["doctor"], 0, capsys)
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert lines["fastdistill"].startswith(fastdistill.__version__)
    assert lines["impl='torch'"].startswith("runs")
    assert lines["impl='triton'"].startswith(("runs", "no: "))
    assert lines["impl='auto'"] in ("torch", "triton")
