"""Test the MLP for points in the plane."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor

import fastdistill as fd
from fastdistill.models import MLP


def points(batch: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w = torch.randn(2, batch, 2, dtype=torch.float64).unbind(0)
    t = torch.rand(batch, dtype=torch.float64)
    return x, t, t * torch.rand(batch, dtype=torch.float64), w


def test_tangent_equals_a_central_difference() -> None:
    net = MLP(width=16).double()
    x, t, s, w = points()
    _, du_dt = fd.jvp(net, (x, t, s), (w, 1.0, 0.0))
    h = 1e-5
    difference = (net(x + h * w, t + h, s) - net(x - h * w, t - h, s)) / (2 * h)
    torch.testing.assert_close(du_dt, difference, rtol=1e-7, atol=1e-8)


def test_output_depends_on_every_argument_but_labels() -> None:
    net = MLP(width=16).double()
    x, t, s, w = points()
    u = net(x, t=t, s=s)
    assert u.shape == x.shape
    for other in (net(x + w, t, s), net(x, t + 0.1, s), net(x, t, s - 0.1)):
        assert (u - other).abs().max() > 1e-3
    assert torch.equal(u, net(x, t, s, y=torch.zeros(7, dtype=torch.int64)))


def test_times_in_float32_do_for_a_float64_network() -> None:
    x, t, s, _ = points()
    assert MLP(width=16).double()(x, t.float(), s.float()).dtype == torch.float64


def test_autocast_does_not_touch_it() -> None:
    net = MLP(width=16)
    x, t, s, _ = (part.float() for part in points())
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = net(x, t, s)
    assert torch.equal(under_autocast, net(x, t, s))


def test_labels_and_guidance_are_inputs_of_the_networks_that_ask_for_them() -> None:
    """Check that None means "no label" and scale 1; a network made without them refuses or ignores both."""
    net = MLP(dim=64, width=16, num_classes=3, guidance=True).double()
    x, t, s = torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.rand(5), torch.zeros(5)
    y, g = torch.tensor([0, 1, 2, 3, 3]), torch.full((5,), 2.0)
    u = net(x, t, s, y, g=g)
    assert u.shape == x.shape
    assert torch.equal(net(x, t, s), net(x, t, s, torch.full((5,), 3), g=torch.ones(5)))
    assert (u - net(x, t, s, y)).abs().flatten(1).amax(1).min() > 1e-4
    assert (u - net(x, t, s, g=g)).abs().flatten(1).amax(1)[:3].min() > 1e-4
    with pytest.raises(ValueError, match="g: this network takes no guidance scale"):
        MLP()(torch.zeros(5, 2), t, s, g=g)


def test_a_network_without_them_has_the_parameters_that_it_always_had() -> None:
    """Check that old checkpoints load."""
    plain = set(MLP(depth=2).state_dict())
    parts = ("in_layer", "hidden_layers.0", "out_layer")
    assert plain == {f"{layer}.{part}" for layer in parts for part in ("weight", "bias")}
    more = set(MLP(depth=2, num_classes=3, guidance=True).state_dict())
    assert more - plain == {"y_embedder.weight", "g_embedder.weight", "g_embedder.bias"}


def test_another_last_layer_makes_another_output_of_the_same_trunk() -> None:
    """Check that its own layer changes nothing; a zero one gives 0, and blocks the gradient nowhere but there."""
    net = MLP(width=16, num_classes=3, guidance=True)
    x, t, s, g = torch.randn(4, 2), torch.rand(4), torch.zeros(4), torch.full((4,), 2.0)
    other = copy.deepcopy(net.last_layer)
    assert torch.equal(net(x, t, s, g=g, last_layer=other), net(x, t, s, g=g))
    net(x, t, s, g=g, last_layer=other).square().sum().backward()
    assert {name for name, weight in net.named_parameters() if weight.grad is None} == {
        "out_layer.weight", "out_layer.bias"
    }  # fmt: skip
    torch.nn.init.zeros_(other.get_parameter("weight"))
    torch.nn.init.ones_(other.get_parameter("bias"))
    assert torch.equal(net(x, t, s, last_layer=other), torch.ones(4, 2))


def test_config_rebuilds_the_network_by_way_of_json() -> None:
    net = MLP(dim=2, width=16, depth=4)
    rebuilt = MLP(**json.loads(json.dumps(net.config)))
    rebuilt.load_state_dict(net.state_dict())


@pytest.mark.parametrize("name", ["dim", "width", "depth"])
def test_sizes_below_one_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a positive integer, got 0"):
        MLP(**{name: 0})
    with pytest.raises(ValueError, match="num_classes: expected an integer from 0 up, got -1"):
        MLP(num_classes=-1)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (7, 3), r"x: expected \(B, 2\), got \(7, 3\)"),
        ("t", (7, 1), r"t: expected \(7,\), one for each point, got \(7, 1\)"),
        ("s", (6,), r"s: expected \(7,\), one for each point, got \(6,\)"),
    ],
)
def test_inputs_of_the_wrong_shape_are_refused_by_name(name: str, shape: tuple[int, ...], message: str) -> None:
    arguments = {"x": torch.zeros(7, 2), "t": torch.zeros(7), "s": torch.zeros(7)} | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        MLP()(**arguments)
