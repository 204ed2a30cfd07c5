"""Improved MeanFlow's velocity head, by a configuration: it learns, and nothing but training knows of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastdistill.train import load_run, train
from fastdistill.train.checkpoint import list_checkpoints, read_checkpoint
from fastdistill.train.run import build_network
from fastdistill.train.state import new_state
from tests.train.conftest import MakeConfig
from tests.train.test_diagnostics import points_of

HEAD = {"name": "improved_meanflow", "velocity_head": True}


def test_the_head_learns_and_the_export_is_without_it(tiny: MakeConfig) -> None:
    """Check that its error is written, its weights move, and the exported network has the parameters it always had."""
    run = train(tiny(method=HEAD, optim={"lr": 0.01, "warmup_steps": 0}))
    assert all(point["head_error"] > 0 for point in points_of(run))
    saved = read_checkpoint(list_checkpoints(run)[0])
    start = new_state(tiny(method=HEAD), torch.device("cpu"))["velocity_layer"].state_dict()
    for name, value in saved["velocity_layer"].items():
        assert not torch.equal(value, start[name])
        assert not torch.equal(value, saved["net"][f"out_layer.{name}"]), "a layer of its own"
    plain = build_network(tiny(method={"name": "improved_meanflow"})).state_dict()
    assert set(load_file(run / "export" / "ema.safetensors")) == set(plain)


@pytest.mark.parametrize("trunk", ["mlp-digits", "dit-digits"])
def test_both_networks_can_carry_it(trunk: str, tiny_digits: MakeConfig) -> None:
    """Check both with guidance, which then is of the head's own estimates."""
    sizes = {"preset": trunk, "width": 16, "depth": 1} | ({"heads": 2} if trunk.startswith("dit") else {})
    guidance = {"guidance": {"scale": 2.0}}
    states = []
    for name, fields in (("with", HEAD), ("without", {"name": "improved_meanflow"})):
        run = train(tiny_digits(f"{trunk}-{name}", method=fields | guidance, model=sizes))
        states.append(read_checkpoint(list_checkpoints(run)[0])["net"])
    assert states[0].keys() == states[1].keys()
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_it_starts_where_the_network_s_own_velocity_is(tiny: MakeConfig, tmp_path: Path) -> None:
    """Check the same initial weights as without it, and with init_from_teacher, the teacher's velocity."""
    teacher = train(tiny("flow", method={"name": "flow_matching"}, steps=2))
    plain = new_state(tiny(method={"name": "improved_meanflow"}), torch.device("cpu"))["net"].state_dict()
    state = new_state(tiny(method=HEAD), torch.device("cpu"))
    assert all(torch.equal(value, plain[name]) for name, value in state["net"].state_dict().items())
    state = new_state(tiny(method=HEAD, teacher=str(teacher), init_from_teacher=True), torch.device("cpu"))
    learnt, x, t = load_run(teacher, device="cpu")[0], torch.randn(4, 2), torch.rand(4)
    assert torch.equal(state["net"](x, t, t, last_layer=state["velocity_layer"]), learnt(x, t, t))
