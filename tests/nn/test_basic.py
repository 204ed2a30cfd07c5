"""Test linear layers, activations, norms and modulation: they are compatible with torch.nn's, and right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdistill.nn as fnn


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("ours", "theirs"), [(fnn.LayerNorm, nn.LayerNorm), (fnn.RMSNorm, nn.RMSNorm)], ids=["LayerNorm", "RMSNorm"]
)
def test_norms_load_the_state_of_torch_and_give_its_values(
    ours: type[nn.Module], theirs: type[nn.Module], affine: bool
) -> None:
    reference = theirs(24, eps=1e-6, elementwise_affine=affine, dtype=torch.float64)
    for parameter in reference.parameters():
        nn.init.normal_(parameter)
    module = ours(24, eps=1e-6, elementwise_affine=affine, dtype=torch.float64)
    module.load_state_dict(reference.state_dict())
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(module(x), reference(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("affine", [True, False])
def test_adaptive_norms_are_the_plain_lines(affine: bool) -> None:
    x, h, gate, scale, shift = torch.randn(5, 2, 5, 24, dtype=torch.float64).unbind(0)
    gate, scale, shift = (part[:, :1] for part in (gate, scale, shift))
    rms = fnn.AdaRMSNorm(24, elementwise_affine=affine).double()
    layer = fnn.AdaLayerNorm(24, elementwise_affine=affine).double()
    step = fnn.GatedResidualAdaNorm(24, elementwise_affine=affine).double()
    for parameter in (*rms.parameters(), *layer.parameters(), *step.parameters()):
        nn.init.normal_(parameter)
    assert set(rms.state_dict()) == set(nn.RMSNorm(24, elementwise_affine=affine).state_dict())
    for module in (layer, step):
        assert set(module.state_dict()) == set(nn.LayerNorm(24, elementwise_affine=affine).state_dict())
    normed = F.layer_norm(x, (24,), layer.weight, layer.bias, 1e-6) * (1 + scale) + shift
    torch.testing.assert_close(layer(x, scale, shift), normed)
    normed = F.rms_norm(x, (24,), rms.weight, 1e-6) * (1 + scale)
    torch.testing.assert_close(rms(x, scale), normed)
    torch.testing.assert_close(rms(x, scale, shift), normed + shift)
    r, y = step(x, gate, h, scale, shift)
    torch.testing.assert_close(r, x + gate * h)
    torch.testing.assert_close(y, F.layer_norm(r, (24,), step.weight, step.bias, 1e-6) * (1 + scale) + shift)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_loads_the_state_of_torch_and_gives_its_values_and_tangents(bias: bool) -> None:
    """Check that it is a torch.nn.Linear for code that asks by type."""
    reference = nn.Linear(24, 40, bias=bias, dtype=torch.float64)
    module = fnn.Linear(24, 40, bias=bias, dtype=torch.float64)
    module.load_state_dict(reference.state_dict())
    x, t_x = torch.randn(2, 3, 24, dtype=torch.float64).unbind(0)
    torch.testing.assert_close(module(x), reference(x), rtol=0, atol=0)
    torch.testing.assert_close(torch.func.jvp(module, (x,), (t_x,)), torch.func.jvp(reference, (x,), (t_x,)))
    assert isinstance(module, nn.Linear)


def test_modulation_gives_its_vectors_in_the_order_of_the_projection() -> None:
    module = fnn.Modulation(4, 3)
    condition = torch.randn(2, 4)
    parts = module(condition)
    assert [part.shape for part in parts] == [(2, 1, 4)] * 3
    assert torch.equal(torch.cat(parts, dim=-1)[:, 0], module.linear(F.silu(condition)))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(fnn.SiLU(), nn.SiLU()), (fnn.GELU(), nn.GELU()), (fnn.GELU("tanh"), nn.GELU("tanh"))],
    ids=["silu", "gelu", "gelu-tanh"],
)
def test_activations_stand_in_for_those_of_torch(ours: nn.Module, theirs: nn.Module) -> None:
    """Check type, value and tangent, and that there are no parameters."""
    x, t_x = torch.randn(2, 3, 8, dtype=torch.float64).unbind(0)
    torch.testing.assert_close(torch.func.jvp(ours, (x,), (t_x,)), torch.func.jvp(theirs, (x,), (t_x,)))
    assert isinstance(ours, type(theirs)) and not ours.state_dict()
