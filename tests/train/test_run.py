"""Run folders read again as networks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors
import torch

from fastdistill import models
from fastdistill.train import CheckpointError, ConfigError, load_run, train
from fastdistill.train.checkpoint import list_checkpoints, read_checkpoint
from fastdistill.train.run import averaged_weights
from tests.train.conftest import MakeConfig


def test_the_export_is_the_averaged_weights_and_rebuilds_the_network(tiny: MakeConfig) -> None:
    """Check that its metadata alone is enough."""
    run = train(tiny())
    with safetensors.safe_open(run / "export" / "ema.safetensors", "pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    net = models.create(metadata["preset"], **json.loads(metadata["network"]))
    net.load_state_dict(weights)
    assert metadata["step"] == "12"
    averaged = averaged_weights(read_checkpoint(list_checkpoints(run)[0])["ema"])
    assert all(torch.equal(weights[name], averaged[name]) for name in averaged)


def test_a_loaded_network_is_frozen_and_in_eval_mode(tiny: MakeConfig) -> None:
    """Check averaged weights by default, and the last ones on request."""
    config = tiny()
    run = train(config)
    (averaged, loaded), (last, _) = load_run(run, device="cpu"), load_run(run, ema=False, device="cpu")
    assert loaded == config
    assert not averaged.training
    assert not any(weight.requires_grad for weight in averaged.parameters())
    state = read_checkpoint(list_checkpoints(run)[0])
    assert all(torch.equal(value, state["net"][name]) for name, value in last.state_dict().items())
    assert any(not torch.equal(value, state["net"][name]) for name, value in averaged.state_dict().items())


def test_a_run_that_was_moved_is_read_where_it_is(tiny: MakeConfig, tmp_path: Path) -> None:
    """Check that the configuration's `out` follows."""
    train(tiny()).rename(tmp_path / "moved")
    assert load_run(tmp_path / "moved")[1].out == tmp_path / "moved"


def test_an_unfinished_run_is_read_from_its_newest_checkpoint(tiny: MakeConfig) -> None:
    """Check that the average in it is taken, where there is no export."""
    run = train(tiny())
    expected = load_run(run)[0].state_dict()
    (run / "export" / "ema.safetensors").unlink()
    assert all(torch.equal(value, expected[name]) for name, value in load_run(run)[0].state_dict().items())


def test_a_damaged_export_is_refused_by_name(tiny: MakeConfig) -> None:
    """Check that it is written anew by starting the run again."""
    run = train(tiny())
    os.truncate(run / "export" / "ema.safetensors", 500)
    with pytest.raises(CheckpointError, match=r"ema\.safetensors is truncated or corrupt.*start the run again"):
        load_run(run)
    train(tiny())
    load_run(run)


def test_what_is_no_run_is_refused_by_name(tmp_path: Path, tiny: MakeConfig) -> None:
    """Check a folder without a configuration, and a run without weights."""
    with pytest.raises(ConfigError, match="expected a run folder"):
        load_run(tmp_path)
    run = train(tiny())
    (run / "export" / "ema.safetensors").unlink()
    for path in list_checkpoints(run):
        path.unlink()
    with pytest.raises(CheckpointError, match="no checkpoint and no export"):
        load_run(run)


def test_a_teacher_is_checked_before_training(tiny: MakeConfig, tiny_digits: MakeConfig, tmp_path: Path) -> None:
    """Check an absent one, other data, another network, no guidance learnt, and training unfinished."""
    digits, ring = train(tiny_digits("teacher", data={"name": "digits", "batch": 4})), train(tiny("ring"))
    guided = {"name": "meanflow", "guidance": {"scale": 2.0}}
    cases = [
        (tiny("s", teacher="nowhere/at/all"), "teacher: .*nowhere/at/all; train it first"),
        (tiny("s", teacher=str(digits)), "learnt digits, and data.name is ring"),
        (tiny("s", teacher=str(ring), init_from_teacher=True, model={"width": 16}), "different: model.width"),
        (tiny_digits("s", teacher=digits, method=guided), "method.guidance: .* can't guide"),
    ]
    for config, message in cases:
        with pytest.raises(ConfigError, match=message):
            train(config)
    (ring / "export" / "ema.safetensors").unlink()
    with pytest.raises(ConfigError, match="finish its training first"):
        train(tiny("s", teacher=str(ring)))
    assert not (tmp_path / "s").exists()
