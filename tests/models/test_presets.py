"""Test the presets: published sizes, overrides, and errors that name what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdistill.models import MLP, PRESETS, DiT, count_parameters, create


@pytest.mark.parametrize(
    ("name", "millions"), [("dit-s/2", 33.0), ("dit-b/2", 130.5), ("dit-l/2", 458.1), ("dit-xl/2", 675.1)]
)
def test_sizes_are_the_published_ones_up_to_known_differences(name: str, millions: float) -> None:
    with torch.device("meta"):
        net = create(name)
    assert isinstance(net, DiT)
    width = net.config["width"]
    second_time = count_parameters(net.d_embedder)
    assert second_time == width**2 + 258 * width
    # DiT predicts a variance as well, and counts its fixed positions (16 x 16 tokens) as parameters.
    published = count_parameters(net) - second_time + 16 * (width + 1) + 256 * width
    assert published / 1e6 == pytest.approx(millions, abs=0.05)


def test_the_largest_has_exactly_the_parameters_of_dit_xl_2() -> None:
    with torch.device("meta"):
        net = create("dit-xl/2")
    assert count_parameters(net) == 675_129_632 - 16 * 1153 - 256 * 1152 + (1152**2 + 258 * 1152)


@pytest.mark.parametrize("name", ["mlp-ring", "mlp-digits", "dit-digits"])
def test_small_presets_map_a_batch_to_its_own_shape(name: str) -> None:
    net = create(name)
    x = torch.randn(4, 2) if name == "mlp-ring" else torch.randn(4, 1, 8, 8)
    t, y = torch.rand(4), torch.tensor([0, 3, 9, 10])
    assert net(x, t=t, s=t / 2, y=y).shape == x.shape
    assert count_parameters(net) < 2_000_000


def test_the_digits_mlp_has_the_size_that_its_results_are_quoted_for() -> None:
    assert count_parameters(create("mlp-digits")) == pytest.approx(610_000, rel=0.01)


def test_every_preset_rebuilds_from_its_config() -> None:
    with torch.device("meta"):
        for name in PRESETS:
            config: Any = create(name).config
            assert create(name, **config).config == config


def test_overrides_replace_arguments_and_leave_the_table_alone() -> None:
    net = create("dit-digits", depth=1, pos="rope", qk_norm=True)
    assert isinstance(net, DiT)
    assert (net.config["depth"], net.config["pos"], len(net.blocks)) == (1, "rope", 1)
    assert PRESETS["dit-digits"].arguments["depth"] != 1
    assert isinstance(create("mlp-ring", width=8), MLP)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"name: expected one of mlp-ring, .*dit-xl/2, got 'dit-xxl'"):
        create("dit-xxl")


def test_unknown_overrides_are_named_with_what_is_accepted() -> None:
    accepted = "dim, width, depth, num_classes, guidance"
    with pytest.raises(
        ValueError, match=rf"overrides: expected arguments of 'mlp-ring' \({accepted}\), got heads, pos"
    ):
        create("mlp-ring", pos="rope", heads=2)


def test_a_bad_value_is_refused_by_the_network() -> None:
    with pytest.raises(ValueError, match="heads=5"):
        create("dit-digits", heads=5)
