"""Settings of single methods and what they give objectives: recipes, scales, labels, samplers; and old runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastdistill.data import Batch, Digits, generator_at
from fastdistill.objectives.settings import Context
from fastdistill.times import LogitNormal, pair_times
from fastdistill.train import ConfigError, TrainConfig, load_config, train
from fastdistill.train.checkpoint import CheckpointError, list_checkpoints, save_checkpoint
from fastdistill.train.config import parse_config, read_yaml, to_yaml
from fastdistill.train.loop import make_batch
from fastdistill.train.methods import METHODS
from fastdistill.train.sampling import OWN, Sampling, draw
from tests.train.conftest import MakeConfig, tiny_fields

LAWS = {"cifar10_paper": (LogitNormal(-2.0, 2.0), None), "cifar10_code": (LogitNormal(-0.6, 1.6), LogitNormal(-4, 1.6))}


def method(name: str, **fields: Any) -> Any:
    """Return the settings of a method."""
    return METHODS[name].model_validate({"name": name} | fields)


def context(rows: int = 8, y: torch.Tensor | None = None, undropped: torch.Tensor | None = None) -> Context:
    """Return one step of a run, without a network."""
    x = torch.zeros(rows, 2)
    batch = Batch(x, x, y, 3, undropped)
    return Context(None, batch, generator_at(0, "times"), 0, 0, 100, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", LAWS)
def test_meanflows_recipes_draw_from_their_laws(recipe: str) -> None:
    """Check LN(-2, 2) for both times in the paper, two laws in its code, 75 % of rows with s != t, and p = 0.75."""
    settings = method("meanflow", recipe=recipe)
    t, s = settings.draw_times(context(64))
    first, second = LAWS[recipe]
    expected = pair_times(64, first, 0.75, end_sampler=second, generator=generator_at(0, "times"))
    assert torch.equal(t, expected[0]) and torch.equal(s, expected[1])
    assert (t != s).sum() == 48 and settings.p == 0.75


def test_fields_beside_a_recipe_hold_and_the_command_line_takes_all_of_it(tmp_path: Path) -> None:
    assert method("meanflow", recipe="cifar10_paper", p=1.0).p == 1.0
    file = tmp_path / "own.yaml"
    fields = tiny_fields(tmp_path / "run") | {"method": {"name": "meanflow", "recipe": "cifar10_code", "p": 0.5}}
    file.write_text(yaml.safe_dump(fields))
    assert load_config(file).method == method("meanflow", recipe="cifar10_code", p=0.5)
    ring = load_config("ring", ["--method.recipe", "cifar10_code"])
    assert ring.method == method("meanflow", recipe="cifar10_code", c=0.01)
    changed = load_config("ring", ["--method.recipe=cifar10_paper", "--method.p", "0.25"])
    assert changed.method == method("meanflow", recipe="cifar10_paper", c=0.01, p=0.25)
    assert parse_config(yaml.safe_load(to_yaml(changed)), "its own file") == changed
    with pytest.raises(ConfigError, match=r"method.recipe: expected 'cifar10_paper' or 'cifar10_code', got 'cifar'"):
        load_config("ring", ["--method.recipe", "cifar"])
    file.write_text(yaml.safe_dump(fields | {"method": {"name": "meanflow", "recipe": ["cifar10_code"]}}))
    with pytest.raises(ConfigError, match=r"method.recipe: expected 'cifar10_paper' or 'cifar10_code', got \['cif"):
        load_config(file)
    with pytest.raises(ConfigError, match=r"unknown field 'recipe'"):
        load_config("ring", ["--method.name", "psd", "--method.recipe", "cifar10_code"])


def test_improved_meanflow_draws_its_scales_log_uniformly() -> None:
    """Check that as many are between 1 and 2 as between 4 and 8; MeanFlow's own guidance draws them uniformly."""
    guidance = method("improved_meanflow", guidance={"scale_to": 8.0}).guidance
    scale = guidance.build(context(20_000)).scale
    share = scale.log2() / 3
    assert scale.min() >= 1 and scale.max() <= 8
    torch.testing.assert_close(share.sort().values, torch.linspace(0, 1, 20_000), rtol=0, atol=0.02)
    uniform = method("meanflow", guidance={"scale_to": 8.0}).guidance.build(context(20_000)).scale
    torch.testing.assert_close(uniform.sort().values, torch.linspace(1, 8, 20_000), rtol=0, atol=0.14)


def test_tvm_divides_its_residuals_by_the_scale() -> None:
    assert "factor" not in method("tvm").keywords(context())
    assert method("tvm", guidance={"scale": 2.5}).keywords(context())["factor"] == 0.4
    given = method("tvm", guidance={"scale": 1.0, "scale_to": 3.0}).keywords(context())
    torch.testing.assert_close(given["factor"], 1 / given["guidance"].scale)


def test_batches_know_the_labels_before_the_drop(tiny: MakeConfig) -> None:
    """Check the same rows with and without a drop, both of which improved MeanFlow gets."""
    data = {"name": "digits", "batch": 64, "label_dropout": 0.5}
    config = tiny(data=data, model={"preset": "mlp-digits", "width": 8, "depth": 1}, method={"name": "meanflow"})
    digits = Digits()
    batch = make_batch(digits, config, 3, torch.device("cpu"))
    assert batch.y is not None and batch.undropped is not None
    dropped = batch.y == 10
    assert 10 < dropped.sum() < 54
    assert torch.equal(batch.undropped, digits.batch(config.seed, 3, 64)[1])
    assert torch.equal(batch.undropped[~dropped], batch.y[~dropped])
    given = method("improved_meanflow").keywords(context(64, batch.y, batch.undropped))
    assert given["undropped"] is batch.undropped


def test_shortcut_samples_the_finest_steps_with_its_velocity(tiny: MakeConfig) -> None:
    """Check that no row trains a jump of that length, and that steps that are no power of two have no jumps."""
    config, gaps = tiny(method={"name": "shortcut", "finest": 4}), []

    class Listening(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor, y: None = None) -> torch.Tensor:
            gaps.append(float((t - s).max()))
            return x

    x1, chosen = torch.randn(8, 2), Sampling("average_velocity")
    for steps, asked in ((1, 1.0), (2, 0.5), (4, 0.0), (8, 0.0)):
        for how in (OWN, chosen, chosen.resolve(config)):
            gaps.clear()
            x = draw(Listening(), config, x1, None, steps, how)
            assert gaps == [asked] * steps
            torch.testing.assert_close(x, x1 * (1 - 1 / steps) ** steps)
    assert [steps for steps in range(1, 9) if config.method.has_learnt(steps)] == [1, 2, 4]


def test_alpha_flow_takes_half_of_the_rows_and_a_bound() -> None:
    """Check it as the code's recipes have them."""
    settings = method("alpha_flow")
    assert settings.distinct == 0.5 and settings.keywords(context())["clamp"] == 4.0
    assert method("alpha_flow", clamp=None).keywords(context())["clamp"] is None


CHANGED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"name": "shortcut"}, {}),
    ({"name": "alpha_flow"}, {}),
    ({"name": "esd"}, {}),
    ({"name": "improved_meanflow"}, {"data": {"name": "digits", "batch": 8, "label_dropout": 0.5}}),
    ({"name": "tvm", "guidance": {"scale": 2.0}}, {"data": {"name": "digits", "batch": 8, "label_dropout": 0.5}}),
]
SAME: list[dict[str, Any]] = [{"name": "meanflow"}, {"name": "improved_meanflow"}, {"name": "tvm"}, {"name": "psd"}]


def of_before(tmp_path: Path, fields: dict[str, Any], changes: dict[str, Any]) -> TrainConfig:
    """Make a run of three steps whose checkpoint and config.yaml know nothing of definitions, as older ones don't."""
    if changes:
        changes = changes | {"model": {"preset": "mlp-digits", "width": 8, "depth": 1}}
    config = TrainConfig.model_validate(tiny_fields(tmp_path / "run", **changes) | {"method": fields, "steps": 3})
    train(config)
    saved = torch.load(list_checkpoints(config.out)[0], weights_only=True)
    del saved["definition"]
    save_checkpoint(config.out, saved["step"], saved, 1)
    older = read_yaml(config.out / "config.yaml")
    for name in ("recipe", "through", "clamp"):
        older["method"].pop(name, None)
    (config.out / "config.yaml").write_text(yaml.safe_dump(older))
    more = 3 if config.method.depends_on_steps else 5
    return TrainConfig.model_validate(config.model_dump(mode="json") | {"out": config.out, "steps": more})


@pytest.mark.parametrize(("fields", "changes"), CHANGED, ids=lambda value: value.get("name"))
def test_a_run_whose_method_has_changed_since_is_refused(
    fields: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"what the method computes changed since .* \(None -> 2\)"):
        train(of_before(tmp_path, fields, changes))


@pytest.mark.parametrize("fields", SAME, ids=lambda value: value["name"])
def test_a_run_whose_method_is_the_same_goes_on(fields: dict[str, Any], tmp_path: Path) -> None:
    assert train(of_before(tmp_path, fields, {})).is_dir()
