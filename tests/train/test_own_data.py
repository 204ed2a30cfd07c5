"""Runs on a data set of the user's own: trained, resumed, sampled, guided, and refused where the set has changed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastdistill import cli
from fastdistill.train import (
    CheckpointError,
    ConfigError,
    TrainConfig,
    data_settings,
    generate,
    load_config,
    load_run,
    train,
)
from fastdistill.train.checkpoint import list_checkpoints, read_checkpoint
from fastdistill.train.config import to_yaml
from fastdistill.train.files import write_checked
from tests.data import own_sets
from tests.train.conftest import MakeConfig

HERE = "tests.data.own_sets:"
DIT = {"preset": "dit-digits", "width": 16, "depth": 1, "heads": 2, "patch_size": 2}


@pytest.fixture
def blobs(tiny: MakeConfig) -> MakeConfig:
    """Make a tiny configuration on colour images with three classes."""

    def make(name: str = "blobs", **changes: Any) -> TrainConfig:
        fields: dict[str, Any] = {
            "data": {"name": f"{HERE}Blobs()", "batch": 4, "classes": 3, "label_dropout": 0.5},
            "model": DIT,
            "method": {"name": "flow_matching"},
            "steps": 4,
            "log": {"checkpoint_every": 2},
        }
        base = tiny(name).model_dump(exclude={"data", "model", "method"})
        return TrainConfig.model_validate(base | fields | changes)

    return make


def test_a_run_on_images_of_ones_own_goes_the_whole_way(blobs: MakeConfig) -> None:
    """Check that it is trained, drawn, read with its settings, resumed exactly, sampled by class, and guided."""
    run = train(blobs())
    assert (run / "samples" / "step_00000004.png").is_file()
    net, config = load_run(run)
    assert config.data.build().shape == (3, 4, 4)
    assert yaml.safe_load((run / "config.yaml").read_text())["data"] == {
        "name": f"{HERE}Blobs()", "batch": 4, "label_dropout": 0.5, "side": 4, "classes": 3,
    }  # fmt: skip
    train(blobs("again", steps=2))
    again = train(blobs("again"))
    first, second = (read_checkpoint(list_checkpoints(path)[0])["net"] for path in (run, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert generate(net, config, 5, label=2, guidance=2.0).shape == (5, 3, 4, 4)
    with pytest.raises(ConfigError, match=r"label: expected one of 0 to 2, got 3"):
        generate(net, config, 1, label=3)


def test_a_set_s_own_settings_are_fields_of_the_configuration(blobs: MakeConfig, tmp_path: Path) -> None:
    """Check them on the command line too, that another set leaves them behind, and the nearest to a misspelt one."""
    file = tmp_path / "my.yaml"
    file.write_text(to_yaml(blobs()))
    config = load_config(file, ["--data.side", "6", "--data.batch", "2"])
    assert config.data.build().shape == (3, 6, 6)
    assert config.data.batch == 2
    assert pickle.loads(pickle.dumps(config)) == config
    kept = load_config(file, ["--data.name", f"{HERE}Blobs()"])
    assert kept.data == config.data.model_copy(update={"side": 4, "batch": 4})
    points = ["--data.name", "ring", "--data.label-dropout", "0", "--model.preset", "mlp-ring"]
    chosen = load_config(file, [*points, *(f"--model.{name}=None" for name in ("depth", "heads", "patch-size"))])
    assert chosen.data.model_dump() == {"name": "ring", "batch": 4, "label_dropout": 0.0}
    file.write_text(file.read_text().replace("side:", "sied:"))
    with pytest.raises(ConfigError, match=r"data: unknown field 'sied'; did you mean 'side'\?"):
        load_config(file)
    file.write_text(file.read_text().replace("sied: 4", "side: four"))
    with pytest.raises(ConfigError, match=r"data\.side: .*valid integer.* got 'four'"):
        load_config(file)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "digts",
            r"expected 'digits' or .*, or 'package.module:attribute' .* got 'digts'; did you mean 'digits'\?",
        ),
        (f"{HERE}Empty()", r"shape is missing, .*; num_classes is missing, .*; batch is missing"),
        (f"{HERE}Points", r"its instances are named tests.data.own_sets:Points\(\)"),
        (f"{HERE}Pionts()", r"did you mean 'Points'\?"),
        (f"{HERE}Greedy()", r"expected Greedy\.Settings to leave the name build to the trainer"),
        ("no.such.module:data", r"got ModuleNotFoundError"),
    ],
)
def test_a_name_that_leads_to_no_data_set_is_refused(name: str, words: str, tmp_path: Path) -> None:
    """Check that nothing is made, by a file or on the command line."""
    file = tmp_path / "my.yaml"
    file.write_text(
        to_yaml(load_config("ring", ["--out", str(tmp_path / "run")])).replace("name: ring", f"name: '{name}'")
    )
    for given, overrides in ((file, []), ("ring", ["--data.name", name])):
        with pytest.raises(ConfigError, match=rf"(?s)\ndata\.name: .*{words}"):
            load_config(given, overrides)
    assert not (tmp_path / "run").exists()


def test_batches_that_break_the_protocol_stop_the_run_before_it_starts(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(data={"name": f"{HERE}POINTS"})
    monkeypatch.setattr(own_sets.Points, "batch", own_sets.drifting)
    with pytest.raises(ConfigError, match=r"^data\.name: expected .*POINTS\.batch to give the same rows"):
        train(config)
    assert not config.out.exists()


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotate the images of Blobs: other shapes of equal size; and forget the sets that are made already."""

    class Rotated(own_sets.Blobs):
        def __init__(self, settings: own_sets.Blobs.Settings) -> None:
            super().__init__(settings)
            self.shape = (3, 2, 8)

    monkeypatch.setattr(own_sets, "Blobs", Rotated)
    monkeypatch.setattr(data_settings, "_made", {})


def test_a_run_is_not_resumed_on_a_set_that_has_changed(blobs: MakeConfig, request: pytest.FixtureRequest) -> None:
    """Check one with images of another shape, and that its network isn't read as the new one's."""
    run, teacher = train(blobs(steps=2)), blobs("other").out
    request.getfixturevalue("changed")
    what = r"\(data\.shape: \[3, 4, 4\] -> \[3, 2, 8\]\)"
    with pytest.raises(ConfigError, match=rf"^out: the checkpoint .* of a run with other settings.* {what}"):
        train(blobs())
    with pytest.raises(CheckpointError, match=rf"ema\.safetensors is of a run with other settings.* {what}"):
        load_run(run)
    assert not teacher.exists()


def test_a_checkpoint_from_before_sets_were_written_down_goes_on(tiny: MakeConfig) -> None:
    """Check it, as for all that hold no fingerprint."""
    run = train(tiny(steps=4))
    path = list_checkpoints(run)[0]
    state = read_checkpoint(path)
    assert state.pop("data") == {"shape": [2], "num_classes": 0}
    write_checked(path, lambda temporary: torch.save(state, temporary))
    (run / "export" / "ema.safetensors").unlink()
    assert train(tiny(steps=8)) == run


def test_a_teacher_of_other_shapes_is_refused(blobs: MakeConfig) -> None:
    teacher = train(blobs("teacher", steps=2))
    data = {"name": f"{HERE}Blobs()", "batch": 4, "classes": 3, "label_dropout": 0.5, "side": 6}
    with pytest.raises(ConfigError, match=r"^teacher: .* learnt other data: data\.shape: \[3, 4, 4\] -> \[3, 6, 6\]"):
        train(blobs("student", data=data, method={"name": "facm"}, teacher=teacher))
    with pytest.raises(ConfigError, match=r"e\.g\. of method\.name flow_matching on tests\.data.* --teacher RUN"):
        train(blobs("student", method={"name": "dmd"}))


def test_a_module_that_moved_is_followed(blobs: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that it is followed where config.yaml is edited to say so."""
    run = train(blobs(steps=2))
    monkeypatch.setattr(own_sets, "Renamed", own_sets.Blobs, raising=False)
    monkeypatch.delattr(own_sets, "Blobs")
    with pytest.raises(ConfigError, match="has no attribute 'Blobs'"):
        load_run(run)
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("Blobs()", "Renamed()"))
    for ema in (True, False):
        assert load_run(run, ema=ema)[1].data.name == f"{HERE}Renamed()"


def test_rows_without_a_picture_are_trained_and_sampled(
    tiny: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that the log says why there is no picture, and so does the command that would draw one."""
    run = train(tiny(data={"name": f"{HERE}Series()"}, steps=2))
    assert "is not drawn: rows of shape (5,) have no picture" in capsys.readouterr().err
    assert cli.main(["sample", str(run), "--n", "3", "--out", str(tmp_path / "rows.npy")]) == 0
    assert cli.main(["sample", str(run), "--n", "3"]) == 2
    assert "--out: rows of shape (5,) have no picture" in capsys.readouterr().err
