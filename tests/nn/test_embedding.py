"""Test the embeddings of times and positions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastdistill.nn as fnn
from fastdistill import ops


def test_time_features_change_no_faster_than_the_highest_frequency() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    features = fnn.sinusoids(t, 64, 16.0)
    dfeatures_dt = torch.func.jacfwd(lambda t: fnn.sinusoids(t, 64, 16.0))(t).diagonal(dim1=0, dim2=2).T
    torch.testing.assert_close(features.norm(dim=-1), torch.full_like(t, math.sqrt(32)))
    assert 15.9 < dfeatures_dt.abs().max() <= 16.0 + 1e-12
    assert dfeatures_dt.norm(dim=-1).max() < 8 * math.sqrt(32)


def test_time_features_of_a_low_precision_time_are_computed_in_float32() -> None:
    t = torch.tensor([0.8125], dtype=torch.bfloat16)  # It is exact in bf16, and so is 16 t, but its sine is not.
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


def test_the_time_embedder_of_dit_has_its_names_and_keeps_float32_under_autocast() -> None:
    module = fnn.TimestepEmbedder(16, 32)
    assert set(module.state_dict()) == {f"mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    t = 1000 * torch.rand(5)
    first, _, last = module.mlp
    expected = last(F.silu(first(ops.timestep_embedding(t, 32))))
    with torch.autocast("cpu", torch.bfloat16):
        embedded, t_embedded = torch.func.jvp(module, (t,), (torch.ones_like(t),))
    assert embedded.dtype == t_embedded.dtype == torch.float32
    torch.testing.assert_close(embedded, expected)
    slope = (module.double()(t.double() + 1e-6) - module(t.double() - 1e-6)) / 2e-6
    torch.testing.assert_close(t_embedded.double(), slope, rtol=1e-3, atol=1e-4)


def test_sincos_positions_are_distinct_and_number_tokens_row_by_row() -> None:
    positions = fnn.sincos_2d((3, 5), 16, like=torch.zeros(1, dtype=torch.float64))
    assert positions.shape == (15, 16)
    assert torch.cdist(positions, positions).fill_diagonal_(1).min() > 0.1
    # This is row 1, column 2.
    torch.testing.assert_close(positions[7, 0], torch.tensor(2.0, dtype=torch.float64).sin())
    torch.testing.assert_close(positions[7, 8], torch.tensor(1.0, dtype=torch.float64).sin())


@pytest.mark.parametrize("size", [6, 10])
def test_positions_refuse_a_width_that_is_no_multiple_of_four(size: int) -> None:
    with pytest.raises(ValueError, match=f"width: expected a multiple of 4, got {size}"):
        fnn.sincos_2d((2, 2), size, like=torch.zeros(1))
