"""Test attention as a module: names and values of others', and one op for norms and rotation of heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdistill as fd
import fastdistill.nn as fnn
from fastdistill import ops


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


def test_its_state_is_that_of_timm() -> None:
    """Compare with ``timm.layers.Attention(24, 3, qkv_bias=True, qk_norm=True, norm_layer=RmsNorm)``."""
    names = {f"{part}.{kind}" for part in ("qkv", "proj") for kind in ("weight", "bias")}
    assert set(fnn.Attention(24, 3, qk_norm=True).state_dict()) == names | {"q_norm.weight", "k_norm.weight"}


@pytest.mark.parametrize("qk_norm", [False, True], ids=["bare", "qk-norm"])
@pytest.mark.parametrize("rope", [False, True], ids=["still", "rope"])
def test_norms_and_rotation_of_heads_are_one_op(monkeypatch: pytest.MonkeyPatch, qk_norm: bool, rope: bool) -> None:
    """Check that there is one op or none, with the values and gradients of norms and of complex products in turn."""
    module = fnn.Attention(48, 4, qk_norm=qk_norm).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    angles = fd.rope_angles((2, 3), 12, dtype=torch.float64)
    x = torch.randn(2, 6, 48, dtype=torch.float64)

    def turned(z: Tensor) -> Tensor:
        pairs = torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(*angles)).flatten(-2)

    def plain(x: Tensor) -> Tensor:
        q, k, v = module.qkv(x).unflatten(-1, (3, 4, 12)).permute(2, 0, 3, 1, 4)
        if qk_norm:
            q, k = F.rms_norm(q, (12,), module.q_norm.weight, 1e-6), F.rms_norm(k, (12,), module.k_norm.weight, 1e-6)
        q, k = (turned(q), turned(k)) if rope else (q, k)
        return module.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    calls, one = [], ops.qk_norm_rope
    monkeypatch.setattr(ops, "qk_norm_rope", lambda *a, **kw: calls.append(1) or one(*a, **kw))
    ours = module(x, angles if rope else None)
    assert len(calls) == (qk_norm or rope)
    torch.testing.assert_close(ours, plain(x))
    parameters = list(module.parameters())
    found, expected = (torch.autograd.grad(y.sin().sum(), parameters) for y in (ours, plain(x)))
    torch.testing.assert_close(found, expected)


def test_logits_depend_on_the_offset_between_tokens_only() -> None:
    """Check that the first half of a head turns with the row, the second with the column."""
    rows, columns = 3, 4
    q, k = torch.randn(2, 8, dtype=torch.float64).expand(rows * columns, 1, 1, 2, 8).permute(3, 1, 2, 0, 4)
    angles = fd.rope_angles((rows, columns), 8, dtype=torch.float64)
    q, k = (part[0, 0] for part in fd.qk_norm_rope(q, k, *angles, norm="none", interleaved=True))
    products = (q @ k.T).unflatten(1, (rows, columns)).unflatten(0, (rows, columns))
    torch.testing.assert_close(products[1:, 1:, 1:, 1:], products[:-1, :-1, :-1, :-1], rtol=1e-12, atol=1e-12)
    assert (products[0, 0, 1, 0] - products[0, 0, 0, 1]).abs() > 1e-3
    torch.testing.assert_close(q.norm(dim=-1), q.norm(dim=-1)[:1].expand(12), rtol=1e-12, atol=1e-12)
