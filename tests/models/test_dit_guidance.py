"""Test the DiT's guidance input: it is off by default and, if on, a smooth input beside the times."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fastdistill as fd
from fastdistill.models import DiT

SMALL: dict[str, Any] = {"channels": 1, "patch_size": 2, "width": 16, "depth": 2, "heads": 2, "num_classes": 5}


def test_only_a_network_made_for_it_has_its_parameters() -> None:
    """Check that old checkpoints load, and that other networks keep the random numbers of their initialisation."""
    torch.manual_seed(0)
    plain = DiT(**SMALL).state_dict()
    torch.manual_seed(0)
    guided = DiT(**SMALL, guidance=True)
    assert {name for name in guided.state_dict() if name not in plain} == {
        f"g_embedder.{layer}.{part}" for layer in ("fc1", "fc2") for part in ("weight", "bias")
    }
    assert not any("g_embedder" in name for name in plain)
    assert DiT(**guided.config).config == guided.config


def test_the_scale_changes_the_output_and_none_is_scale_one() -> None:
    """Check that the tangent follows from the chain rule: central differences agree."""
    net = DiT(**SMALL, guidance=True).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, w = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64).unbind(0)
    t = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)
    s, y, g = 0.5 * t, torch.tensor([0, 4, 5]), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    u = net(x, t, s, y)
    assert torch.equal(u, net(x, t, s, y, g=torch.ones(3)))
    changed = (net(x, t, s, y, g=g) - u).abs().flatten(1).amax(1)
    assert changed[0] == 0
    assert changed[1:].min() > 1e-3
    _, du_dt = fd.jvp(lambda x, t, s: net(x, t, s, y, g=g), (x, t, s), (w, 1.0, None))
    h = 1e-5
    difference = (net(x + h * w, t + h, s, y, g=g) - net(x - h * w, t - h, s, y, g=g)) / (2 * h)
    torch.testing.assert_close(du_dt, difference, rtol=1e-6, atol=1e-7)


def test_another_last_layer_makes_another_output_of_the_same_trunk() -> None:
    """Check that the network's own layer changes nothing; another's gradient reaches all but the network's own."""
    net = DiT(**SMALL, guidance=True)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, t, other = torch.randn(3, 1, 4, 4), torch.rand(3), copy.deepcopy(net.last_layer)
    assert torch.equal(net(x, t, t, g=t, last_layer=other), net(x, t, t, g=t))
    nn.init.normal_(other.get_parameter("linear.weight"))
    changed = net(x, t, t, g=t, last_layer=other)
    assert (changed - net(x, t, t, g=t)).abs().min() > 1e-6
    changed.square().sum().backward()
    without = {name for name, weight in net.named_parameters() if weight.grad is None}
    assert without == {f"final_layer.{name}" for name, _ in other.named_parameters()}


def test_a_scale_for_a_network_without_the_input_is_refused() -> None:
    """Check a scale of the wrong shape too; the message names it."""
    x, t = torch.zeros(3, 1, 4, 4), torch.ones(3)
    with pytest.raises(ValueError, match="g: this network takes no guidance scale"):
        DiT(**SMALL)(x, t, t, g=t)
    with pytest.raises(ValueError, match=r"g: expected \(3,\)"):
        DiT(**SMALL, guidance=True)(x, t, t, g=torch.ones(2))
