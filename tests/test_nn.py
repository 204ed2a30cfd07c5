"""The modules of `fastdistill.nn`: compatible with torch.nn's, and right."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdistill.nn as fnn
from fastdistill import ops


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
    step = fnn.GatedResidualAdaNorm(24, elementwise_affine=affine).double()
    for parameter in (*rms.parameters(), *step.parameters()):
        nn.init.normal_(parameter)
    assert set(rms.state_dict()) == set(nn.RMSNorm(24, elementwise_affine=affine).state_dict())
    assert set(step.state_dict()) == set(nn.LayerNorm(24, elementwise_affine=affine).state_dict())
    normed = F.rms_norm(x, (24,), rms.weight, 1e-6) * (1 + scale)
    torch.testing.assert_close(rms(x, scale), normed)
    torch.testing.assert_close(rms(x, scale, shift), normed + shift)
    r, y = step(x, gate, h, scale, shift)
    torch.testing.assert_close(r, x + gate * h)
    torch.testing.assert_close(y, F.layer_norm(r, (24,), step.weight, step.bias, 1e-6) * (1 + scale) + shift)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_loads_the_state_of_torch_and_gives_its_values_and_tangents(bias: bool) -> None:
    """And is one, for whoever asks by type."""
    reference = nn.Linear(24, 40, bias=bias, dtype=torch.float64)
    module = fnn.Linear(24, 40, bias=bias, dtype=torch.float64)
    module.load_state_dict(reference.state_dict())
    x, t_x = torch.randn(2, 3, 24, dtype=torch.float64).unbind(0)
    torch.testing.assert_close(module(x), reference(x), rtol=0, atol=0)
    torch.testing.assert_close(torch.func.jvp(module, (x,), (t_x,)), torch.func.jvp(reference, (x,), (t_x,)))
    assert isinstance(module, nn.Linear)


def test_attention_equals_torch_multi_head_attention_with_the_same_weights() -> None:
    module = fnn.Attention(24, 3).double()
    reference = nn.MultiheadAttention(24, 3, batch_first=True, dtype=torch.float64)
    names = {"qkv.weight": "in_proj_weight", "qkv.bias": "in_proj_bias"}
    names |= {f"proj.{kind}": f"out_proj.{kind}" for kind in ("weight", "bias")}
    state = reference.state_dict()
    module.load_state_dict({mine: state[theirs] for mine, theirs in names.items()})
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(module(x), reference(x, x, x, need_weights=False)[0], rtol=1e-12, atol=1e-12)


def test_query_key_and_value_reach_attention_as_views_of_one_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spy(*qkv: Tensor) -> Tensor:
        seen.extend(qkv)
        return F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])

    monkeypatch.setattr(ops, "scaled_dot_product_attention", spy)
    fnn.Attention(24, 3)(torch.randn(2, 7, 24))
    assert [part.shape for part in seen] == [(2, 3, 7, 8)] * 3
    assert len({part.untyped_storage().data_ptr() for part in seen}) == 1


def test_qk_norm_makes_attention_blind_to_the_size_of_queries_and_keys() -> None:
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    for qk_norm in (True, False):
        module = fnn.Attention(24, 3, qk_norm=qk_norm, bias=False).double()
        before = module(x)
        with torch.no_grad():
            module.qkv.weight[:48] *= 1000
        assert torch.allclose(module(x), before, rtol=1e-3, atol=1e-4) is qk_norm


def test_attention_refuses_a_width_that_heads_do_not_divide() -> None:
    with pytest.raises(ValueError, match="width: expected a multiple of heads=5, got 24"):
        fnn.Attention(24, 5)


def test_mlp_equals_its_plain_line() -> None:
    module = fnn.Mlp(8, 20).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    expected = module.fc2(F.gelu(module.fc1(x), approximate="tanh"))
    torch.testing.assert_close(module(x), expected, rtol=1e-14, atol=1e-14)


def test_modulation_gives_its_vectors_in_the_order_of_the_projection() -> None:
    module = fnn.Modulation(4, 3)
    condition = torch.randn(2, 4)
    parts = module(condition)
    assert [part.shape for part in parts] == [(2, 1, 4)] * 3
    assert torch.equal(torch.cat(parts, dim=-1)[:, 0], module.linear(F.silu(condition)))


def test_time_features_change_no_faster_than_the_highest_frequency() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    features = fnn.sinusoids(t, 64, 16.0)
    dfeatures_dt = torch.func.jacfwd(lambda t: fnn.sinusoids(t, 64, 16.0))(t).diagonal(dim1=0, dim2=2).T
    torch.testing.assert_close(features.norm(dim=-1), torch.full_like(t, math.sqrt(32)))
    assert 15.9 < dfeatures_dt.abs().max() <= 16.0 + 1e-12
    assert dfeatures_dt.norm(dim=-1).max() < 8 * math.sqrt(32)


def test_time_features_of_a_low_precision_time_are_computed_in_float32() -> None:
    t = torch.tensor([0.8125], dtype=torch.bfloat16)  # exact in bf16; 16 t is, too, but its sine is not
    features = fnn.sinusoids(t, 32, 16.0)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.double(), fnn.sinusoids(t.double(), 32, 16.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("features", [3, 7, 2])
def test_time_features_refuse_an_odd_or_tiny_number(features: int) -> None:
    with pytest.raises(ValueError, match=f"features: expected an even number from 4 up, got {features}"):
        fnn.sinusoids(torch.zeros(1), features, 16.0)


def test_time_embedding_keeps_float32_under_autocast() -> None:
    module = fnn.TimestepEmbedding(16)
    t = torch.rand(5)
    with torch.autocast("cpu", torch.bfloat16):
        embedded = module(t)
    assert embedded.dtype == torch.float32
    assert torch.equal(embedded, module(t))


def test_sincos_positions_are_distinct_and_number_tokens_row_by_row() -> None:
    positions = fnn.sincos_2d((3, 5), 16, like=torch.zeros(1, dtype=torch.float64))
    assert positions.shape == (15, 16)
    assert torch.cdist(positions, positions).fill_diagonal_(1).min() > 0.1
    torch.testing.assert_close(positions[7, 0], torch.tensor(2.0, dtype=torch.float64).sin())  # row 1, column 2
    torch.testing.assert_close(positions[7, 8], torch.tensor(1.0, dtype=torch.float64).sin())


def test_rotated_products_depend_on_the_offset_between_tokens_only() -> None:
    rows, columns = 3, 4
    q, k = torch.randn(2, 8, dtype=torch.float64).unbind(0)
    rotation = fnn.rotary_2d((rows, columns), 8, like=q)
    q, k = (fnn.rotate(part.expand(1, 1, rows * columns, 8), rotation)[0, 0] for part in (q, k))
    products = (q @ k.T).unflatten(1, (rows, columns)).unflatten(0, (rows, columns))
    torch.testing.assert_close(products[1:, 1:, 1:, 1:], products[:-1, :-1, :-1, :-1], rtol=1e-12, atol=1e-12)
    assert (products[0, 0, 1, 0] - products[0, 0, 0, 1]).abs() > 1e-3
    torch.testing.assert_close(q.norm(dim=-1), q.norm(dim=-1)[:1].expand(12), rtol=1e-12, atol=1e-12)


def test_rotation_of_a_bf16_tensor_is_done_in_float32() -> None:
    x = torch.randn(1, 2, 6, 8).bfloat16()
    rotation = fnn.rotary_2d((2, 3), 8, like=x)
    assert [part.dtype for part in rotation] == [torch.float32] * 2
    assert torch.equal(fnn.rotate(x, rotation), fnn.rotate(x.float(), rotation).bfloat16())


@pytest.mark.parametrize("size", [6, 10])
def test_positions_refuse_a_width_that_is_no_multiple_of_four(size: int) -> None:
    with pytest.raises(ValueError, match=f"width: expected a multiple of 4, got {size}"):
        fnn.sincos_2d((2, 2), size, like=torch.zeros(1))
    with pytest.raises(ValueError, match=f"head_dim: expected a multiple of 4, got {size}"):
        fnn.rotary_2d((2, 2), size, like=torch.zeros(1))
