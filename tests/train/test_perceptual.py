"""Perceptual distances by name: imported, tried, and refused in words where they won't do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdistill.train import ConfigError, load_config, load_run, train
from fastdistill.train.checkpoint import list_checkpoints, read_checkpoint
from fastdistill.train.perceptual import load_distance
from tests.train.conftest import MakeConfig

HERE = f"{__name__}:"


class Features(nn.Module):
    """Squared distance of random features, (B, 1, 1, 1) as LPIPS gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.layer(self.dropout(a)) - self.layer(self.dropout(b))).square().sum(1)[:, None, None, None]


def squares(a: Tensor, b: Tensor) -> Tensor:
    """Return the plain distance l2, by another name."""
    return (a - b).square().flatten(1).sum(1)


def make_nothing() -> None:
    """Forget to return, as a factory may."""


def by_element(a: Tensor, b: Tensor) -> Tensor:
    """Return one value too many a row."""
    return (a - b).square()


def without_gradient(a: Tensor, b: Tensor) -> Tensor:
    """Return a distance that nothing can learn from."""
    return squares(a, b).detach()


def consistency(name: str | None, distance: str = "lpips") -> dict[str, Any]:
    return {"name": "consistency", "intervals": (4, 16), "distance": distance, "perceptual": name}


def test_a_function_is_the_distance_of_the_loss(tiny: MakeConfig) -> None:
    """Check that it gives the same weights as l2, which it is."""
    runs = [train(tiny("a", method=consistency(f"{HERE}squares"))), train(tiny("b", method=consistency(None, "l2")))]
    states = [read_checkpoint(list_checkpoints(run)[0])["net"] for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_a_network_is_made_frozen_and_in_eval_mode(tiny: MakeConfig) -> None:
    """Check a factory, here its class, and that the run is read without its name."""
    found = load_distance(f"{HERE}Features()", (2,), torch.device("cpu"))
    assert isinstance(found, Features)
    assert not found.training
    assert not any(weight.requires_grad for weight in found.parameters())
    run = train(tiny(method=consistency(f"{HERE}Features()")))
    file = run / "config.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace(__name__, "gone.since"), encoding="utf-8")
    assert getattr(load_run(run)[1].method, "perceptual", None) == "gone.since:Features()"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("squares", "expected 'package.module:attribute', followed by"),
        (":squares", "expected 'package.module:attribute', followed by"),
        (
            "no.such.module:squares",
            "to be importable, got ModuleNotFoundError: No module named 'no'; install it, or .* PYTHONPATH",
        ),
        (f"{HERE}absent", "to be importable, got AttributeError: .* 'absent'"),
        (f"{HERE}squares()", "to be importable, got TypeError: .* missing 2 required"),
        (f"{HERE}HERE", "expected a function or a network, got .*, which is 'tests"),
        (f"{HERE}make_nothing()", "expected a function or a network, got .*, which is None"),
        (f"{HERE}Features", "expected its instances, as .*:Features\\(\\), got"),
        (f"{HERE}by_element", r"one value a row, got ValueError: .* \(2,\), got shape \(2, 2\)"),
        (f"{HERE}without_gradient", "to pass gradients on to its first argument, got none"),
        (None, "expected package.module:attribute with distance lpips, got None and lpips"),
    ],
)
def test_what_will_not_do_is_refused_before_training(name: str | None, words: str, tiny: MakeConfig) -> None:
    """Check that nothing is made yet, not even the run folder."""
    config = tiny(method=consistency(name))
    with pytest.raises(ConfigError, match=rf"^method.perceptual: .*{words}"):
        train(config)
    assert not config.out.exists()


def test_a_distance_that_nothing_uses_is_refused(tiny: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"^method.perceptual: expected distance lpips too, got .*squares and huber"):
        train(tiny(method=consistency(f"{HERE}squares", "huber")))


def test_rows_of_the_data_are_what_it_is_tried_on(tmp_path: Path) -> None:
    """Check that a network for points, which can't take digits, is refused."""
    overrides = ["--method.name", "consistency", "--method.distance", "lpips", "--teacher", str(tmp_path)]
    with pytest.raises(ConfigError, match=r"two batches of rows \(1, 8, 8\) .* got RuntimeError"):
        load_config("digits", [*overrides, "--method.perceptual", f"{HERE}Features()"])
