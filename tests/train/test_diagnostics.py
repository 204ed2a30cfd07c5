"""Diagnostics: bins of times, gradients of terms, what broke first, and why a loss is flat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdistill.data import Ring
from fastdistill.train import NonFiniteError, TrainConfig, train
from fastdistill.train.checkpoint import list_checkpoints, read_checkpoint
from fastdistill.train.diagnostics import attribute, bin_by_times, gradient_cosines, why_flat
from fastdistill.train.loop import make_batch, make_context
from fastdistill.train.methods import METHODS
from fastdistill.train.state import new_state
from tests.train.conftest import MakeConfig
from tests.train.test_resume import assert_same_state


def points_of(run: Path) -> list[dict[str, float]]:
    """Read the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_rows_are_averaged_by_bin() -> None:
    """Check that both ends of [0, 1] have a bin, and that empty bins are left out."""
    rows = {
        "t": torch.tensor([1.0, 0.9, 0.3, 0.3]),
        "s": torch.tensor([0.0, 0.1, 0.3, 0.2]),
        "raw_error": torch.tensor([1.0, 3.0, 5.0, 7.0]),
    }
    found = {name: value.item() for name, value in bin_by_times(rows, 2).items()}
    assert found == {"raw_error/t.50-1.00/s.00-.50": 2.0, "raw_error/t.00-.50/s.00-.50": 6.0}


def test_cosines_of_gradients_are_those_of_the_terms() -> None:
    """Check terms that are opposed, alike and at right angles; one that doesn't reach a parameter is zero there."""
    net = nn.Linear(2, 1)
    weight, bias = net.weight, net.bias
    terms = {"a": weight.sum(), "b": -2 * weight.sum(), "c": bias.sum()}
    found = {name: value.item() for name, value in gradient_cosines(terms, net).items()}
    assert found["gradient_cosine/a/b"] == pytest.approx(-1)
    assert found["gradient_cosine/a/c"] == found["gradient_cosine/b/c"] == 0
    assert found["gradient_norm/b"] == pytest.approx(8**0.5)


@pytest.mark.parametrize(
    "name", ["meanflow", "improved_meanflow", "alpha_flow", "facm", "esd", "lsd", "psd", "shortcut", "tvm"]
)
def test_the_terms_of_a_composed_method_add_up(name: str, tiny: MakeConfig) -> None:
    """Check it so that the cosine is about all of the loss."""
    config = tiny(method={"name": name})
    state = new_state(config, torch.device("cpu"))
    context = make_context(state, config, make_batch(Ring(), config, 0, state["device"]))
    loss, metrics = config.method.loss(context)
    torch.testing.assert_close(sum(metrics["terms"].values()), loss)
    found = gradient_cosines(metrics["terms"], state["net"])
    assert -1 <= found["gradient_cosine/distillation/anchor"] <= 1
    loss.backward()  # the graph is still there


def test_looking_is_written_at_its_own_steps_and_changes_no_weight(tiny: MakeConfig) -> None:
    """Check every third step, whatever log_every says; TensorBoard and metrics.jsonl get the same."""
    method = {"name": "facm"}
    plain = train(tiny("plain", method=method, diagnostics={"every": 0}))
    looked = train(tiny("looked", method=method, diagnostics={"every": 3, "bins": 2, "gradients": True}))
    with_bins = [point["step"] for point in points_of(looked) if any("/t" in name for name in point)]
    assert with_bins == [3, 6, 9, 12]
    assert "gradient_cosine/distillation/anchor" in points_of(looked)[-1]
    assert not any("/" in name for point in points_of(plain) for name in point)
    states = [read_checkpoint(list_checkpoints(run)[0])["net"] for run in (plain, looked)]
    assert_same_state(*states)


def test_a_loss_of_one_term_says_that_it_has_no_cosine(tiny: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that it is said once, where it was asked for, and that the run goes on."""
    said = "diagnostics.gradients: the loss of imm is a single term here"
    asked = {"every": 3, "gradients": True}
    run = train(tiny("asked", method={"name": "imm"}, diagnostics=asked))
    assert capsys.readouterr().err.count(said) == 1
    assert points_of(run)[-1]["step"] == 12
    train(tiny("not", method={"name": "imm"}, diagnostics={"every": 3}))
    train(tiny("two", method={"name": "alpha_flow"}, diagnostics=asked))
    assert "diagnostics.gradients" not in capsys.readouterr().err


def test_a_planted_nan_in_the_data_is_named_with_its_rows(tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that it says which rows, at which times, and which parameter's gradient first."""
    batch = Ring.batch

    def poisoned(self: Ring, seed: int, step: int, size: int) -> tuple[Tensor, None]:
        x0, _ = batch(self, seed, step, size)
        if step == 1:
            x0[2] = float("nan")
        return x0, None

    monkeypatch.setattr(Ring, "batch", poisoned)
    with pytest.raises(NonFiniteError) as caught:
        train(tiny(method={"name": "facm"}))
    message = str(caught.value)
    assert message.startswith("step 2: loss is nan (the batch's x0 isn't finite in row 2 (1 of 8);")
    assert "not finite: distillation, anchor" in message
    assert "raw_error isn't finite in row 2 (1 of 8), at times in t" in message
    assert "first gradient that isn't finite: in_layer.weight" in message


def test_a_term_and_a_weight_that_broke_are_named(tiny: MakeConfig) -> None:
    """Check a term that overflows by itself, and a weight that is infinite already."""
    config = tiny()
    state = new_state(config, torch.device("cpu"))
    batch = make_batch(Ring(), config, 0, state["device"])
    terms: dict[str, Tensor] = {"anchor": torch.tensor(1.0), "score": torch.tensor(float("inf"))}
    net = state["net"]
    assert attribute(batch, {}, None, terms, net, 4) == "not finite: score"
    with torch.no_grad():
        net.out_layer.bias[0] = float("inf")
    assert "first weight that isn't finite: out_layer.bias (1 in all)" in attribute(batch, {}, None, {}, net, 4)
    with torch.no_grad():
        net.out_layer.bias[0] = 0
    assert attribute(batch, {}, None, {}, net, 4) == "each part is finite by itself: the sum overflowed"


def test_the_trainer_says_why_a_loss_is_flat(tiny: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that it is said where p = 1 or the weight is learned, and only there."""
    train(tiny("flat", method={"name": "meanflow", "p": 1.0}, steps=1))
    assert "the loss stays nearly flat by design: at p = 1" in capsys.readouterr().err
    train(tiny("steep", method={"name": "meanflow", "p": 0.5}, steps=1))
    assert "by design" not in capsys.readouterr().err

    def reason(name: str, **fields: Any) -> str | None:
        return why_flat(TrainConfig.model_validate(tiny().model_dump() | {"method": {"name": name, **fields}}).method)

    assert "falls below zero" in str(reason("scm"))
    assert "normalised tangent" in str(reason("scm", learned_weight=False))
    assert "normalised tangent" in str(reason("ayf_emd")) and reason("ayf_emd", c=None) is None
    assert "curriculum" in str(reason("alpha_flow"))
    assert reason("flow_matching") is reason("esd") is None
    assert {name for name in METHODS if reason(name)} >= {"meanflow", "improved_meanflow", "scm", "rcm"}
