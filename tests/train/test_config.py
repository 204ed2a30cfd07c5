"""Configurations: what is refused, and in which words; what resolves to what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fastdistill import models
from fastdistill.data import DATASETS
from fastdistill.train import ConfigError, TrainConfig, load_config, shipped_configs
from fastdistill.train.checks import check_config
from fastdistill.train.config import changed_fields, model_arguments, to_yaml
from tests.train.conftest import MakeConfig, tiny_fields


def written(tmp_path: Path, **changes: Any) -> Path:
    """Write a YAML file with the tiny configuration and some changes."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tiny_fields(tmp_path / "run", **changes)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stepz": 5}, ["unknown field 'stepz'", "did you mean 'steps'?"]),
        ({"optim": {"learning": 1}}, ["optim:", "unknown field 'learning'", "lr"]),
        ({"optim": {"warmup": 1}}, ["optim:", "'warmup'", "did you mean 'warmup_steps'?"]),
        ({"method": {"distnct": 0.5}}, ["method: unknown field 'distnct'", "did you mean 'distinct'?"]),
        ({"method": {"guidance": {"scales": 2}}}, ["method.guidance:", "did you mean 'scale'?"]),
        ({"steps": 0}, ["steps:", "greater than or equal to 1", "got 0"]),
        ({"steps": "many"}, ["steps:", "valid integer", "got 'many'"]),
        ({"steps": 1.5}, ["steps:", "got 1.5"]),
        ({"seed": -1}, ["seed:", "greater than or equal to 0"]),
        ({"optim": {"lr": -1.0}}, ["optim.lr:", "greater than 0", "got -1.0"]),
        ({"optim": {"lr": float("nan")}}, ["optim.lr:", "finite", "got nan"]),
        ({"optim": {"betas": [0.9, 1.5]}}, ["optim.betas.1:", "less than 1", "got 1.5"]),
        ({"method": {"distinct": 1.5}}, ["method.distinct:", "less than or equal to 1", "got 1.5"]),
        (
            {"method": {"times": {"law": "gaussian"}}},
            ["method.times.law:", "'logit_normal', 'uniform'", "got 'gaussian'"],
        ),
        (
            {"method": {"name": "meanflo"}},
            ["method.name:", "'flow_matching', 'reflow', 'meanflow'", "got 'meanflo'; did you mean 'meanflow'?"],
        ),
        ({"precision": "fp8"}, ["precision:", "'auto', 'fp32' or 'bf16'", "got 'fp8'"]),
        ({"data": {"name": "cifar"}}, ["data.name:", " or ".join(map(repr, DATASETS)), "got 'cifar'"]),
        ({"data": None}, ["data:", "got None"]),
        ({"model": {"preset": "dit-xxl"}}, ["model.preset:", "mlp-ring", "dit-s/2", "got 'dit-xxl'"]),
        (
            {"model": {"heads": 4}},
            ["model: expected arguments of 'mlp-ring' (dim, width, depth, num_classes, guidance), got heads"],
        ),
        ({"data": {"label_dropout": 0.1}}, ["data.label_dropout:", "ring has no labels"]),
        ({"method": {"guidance": {"scale": 2.0}}}, ["method.guidance:", "ring has no labels"]),
        ({"init_from_teacher": True}, ["init_from_teacher:", "teacher"]),
        ({"method": {"name": "flow_matching", "distinct": 0.5}}, ["method: unknown field 'distinct'"]),
        (
            {"method": {"name": "consistency", "by_gap": True}},
            ["method: unknown field 'by_gap'", "did you mean 'gap'?"],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_field_is_named_with_what_was_expected(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    """Check that each message leads with the field, and that nothing is made on disk."""
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, **changes))
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    """Check that two wrong fields give two lines, and the file's name."""
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, steps=0, seed=-1))
    assert [line.split(":")[0] for line in str(caught.value).splitlines()[1:]] == ["seed", "steps"]
    assert "mine.yaml" in str(caught.value)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    """Check a field without a default, and the kind of a union."""
    for path, content in (("steps", "data: {name: ring}"), ("method.name", "method: {p: 1}")):
        file = tmp_path / "bare.yaml"
        file.write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=f"(?m)^{path}: this field is required"):
            load_config(file)


@pytest.mark.parametrize("content", ["steps: [", "just words", "\x00"])
def test_a_file_that_holds_no_fields_is_named(tmp_path: Path, content: str) -> None:
    """Check broken YAML, YAML of another shape, and no text at all."""
    path = tmp_path / "broken.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config(path)


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    """Check that a misspelt name meets all right ones."""
    with pytest.raises(ConfigError, match="digits, digits-flow, digits-meanflow, ring, ring-flow"):
        load_config("rinng")


def test_impossible_combinations_on_digits_are_refused(tiny_digits: MakeConfig) -> None:
    """Check what each field allows by itself and all of them together don't."""
    meanflow = {"name": "meanflow", "guidance": {"scale": 2.0}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"teacher": Path("x")}, "teacher: flow_matching learns without a teacher; .*meanflow"),
        (
            {"method": {"name": "flow_matching", "sample_guidance": 2.0}, "data": {"name": "digits"}},
            "sample_guidance: needs",
        ),
        ({"method": meanflow, "data": {"name": "digits"}}, r"method.guidance: needs data.label_dropout > 0"),
        ({"model": {"preset": "mlp-ring"}}, "model.preset: mlp-ring can't take digits"),
        ({"model": {"preset": "dit-digits", "patch_size": 3}}, "model.patch_size: expected a divisor"),
        ({"model": {"preset": "dit-digits", "width": 30, "heads": 4}}, "model.width: expected a multiple of 4"),
    ]
    for changes, message in cases:
        with pytest.raises(ConfigError, match=message):
            check_config(tiny_digits(**changes))


def test_overrides_reach_nested_fields() -> None:
    """Check that the command line wins over the file."""
    config = load_config(
        "ring", ["--optim.lr", "3e-4", "--steps", "7", "--method.times.std", "2", "--model.width", "32"]
    )
    assert (config.optim.lr, config.steps, config.model.width) == (3e-4, 7, 32)
    assert config.method.times.model_dump() == {"law": "logit_normal", "mean": -0.4, "std": 2.0}
    assert config.out == Path("runs/ring")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optim.lrr", "1"], ["--optim.lrr", "--optim.lr FLOAT"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--optim.lr", "-1"], ["optim", "lr", "greater than 0"]),
        (["--precision", "fp8"], ["--precision", "fp8", "bf16"]),
        (["--method.distinct", "2"], ["method", "distinct", "less than or equal to 1"]),
    ],
    ids=["unknown", "no-number", "out-of-range", "no-choice", "nested"],
)
def test_a_wrong_override_is_named(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Check that tyro exits with status 2 and names field and value."""
    with pytest.raises(SystemExit) as caught:
        load_config("ring", arguments)
    assert caught.value.code == 2
    told = capsys.readouterr().err
    for word in words:
        assert word in told


def test_an_override_can_mend_the_file(tmp_path: Path) -> None:
    """Check that combinations are checked after the overrides: a shipped student can be given its teacher."""
    path = written(tmp_path, init_from_teacher=True)
    assert not load_config(path, ["--no-init-from-teacher"]).init_from_teacher


def test_the_shipped_configurations_are_valid() -> None:
    """Check them all, the student's too before its teacher is trained."""
    assert shipped_configs() == ["digits", "digits-flow", "digits-meanflow", "ring", "ring-flow"]
    assert load_config("ring").data.name == "ring"
    assert load_config("ring-flow").method.name == "flow_matching"
    assert load_config("digits").model.preset == "mlp-digits"
    assert load_config("digits-flow").method.name == "flow_matching"
    assert load_config("digits-meanflow").teacher == Path("runs/digits-flow")


def test_a_resolved_configuration_reads_back_the_same(tiny: MakeConfig, tmp_path: Path) -> None:
    """Check that config.yaml holds every field."""
    config = tiny()
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config
    assert set(yaml.safe_load(to_yaml(config))) == set(TrainConfig.model_fields) - {"resume_from"}


OLD_CONFIG = """
out: runs/old
seed: 0
steps: 12
data: {name: digits, batch: 128, label_dropout: 0.1}
model: {preset: dit-digits, width: null, depth: null, heads: null, patch_size: 4, mlp_ratio: null, qk_norm: true,
  pos: null}
method: {name: meanflow, times: {law: uniform}, distinct: 0.75, p: 1.0, c: 1.0,
  guidance: {scale: 1.0, kappa: 0.0, interval: [0.0, 1.0]}, sample_steps: 1}
teacher: runs/digits-flow
init_from_teacher: true
optim: {lr: 0.001, betas: [0.9, 0.95], weight_decay: 0.0, warmup_steps: 100, clip_norm: 1.0, ema: 0.995}
log: {log_every: 50, sample_every: 200, checkpoint_every: 200, keep_checkpoints: 3}
device: auto
precision: auto
"""


def test_a_run_from_before_paths_and_samplers_goes_on(tmp_path: Path) -> None:
    """Check that its config.yaml loads, and gives no other weights than the same command today."""
    path = tmp_path / "config.yaml"
    path.write_text(OLD_CONFIG, encoding="utf-8")
    old = load_config(path)
    assert old.path.name == "linear"
    assert changed_fields(old, load_config("digits-meanflow")) == []
    path.write_text(OLD_CONFIG.replace("kappa", "kapa"), encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean 'kappa'"):
        load_config(path)


def test_only_fields_that_decide_the_weights_count_as_changed(tiny: MakeConfig) -> None:
    """Check that steps, logging and places are free to change, and everything else is named with both values."""
    old = tiny()
    assert changed_fields(old, tiny("elsewhere", steps=99, log={"log_every": 1}, precision="auto")) == []
    assert changed_fields(old, tiny(seed=3, optim={"lr": 0.5})) == ["optim.lr: 0.001 -> 0.5", "seed: 0 -> 3"]


@pytest.mark.parametrize(
    ("method", "moves"),
    [
        ({"name": "alpha_flow"}, True),
        ({"name": "ect"}, True),
        ({"name": "consistency"}, True),
        ({"name": "consistency", "grid": "fixed"}, False),
        ({"name": "scm"}, False),
    ],
    ids=str,
)
def test_steps_decide_the_weights_where_a_curriculum_spans_them(
    method: dict[str, Any], moves: bool, tiny: MakeConfig
) -> None:
    """Check that a finished alpha-Flow doesn't go on to twice the steps, which would be its curriculum's middle."""
    found = changed_fields(tiny(method=method), tiny(method=method, steps=99))
    assert found == (["steps: 12 -> 99"] if moves else [])


def test_channels_and_classes_follow_from_the_data(tiny_digits: MakeConfig) -> None:
    """Check that a preset for 1,000 classes of latents becomes one for ten digits."""
    config = tiny_digits(model={"preset": "dit-s/2", "depth": 1})
    arguments = model_arguments(config)
    assert (arguments["channels"], arguments["num_classes"], arguments["depth"], arguments["width"]) == (1, 10, 1, 384)
    assert models.create("dit-s/2", **arguments).config == arguments | {
        "mlp_ratio": 4.0,
        "qk_norm": False,
        "pos": "sincos",
        "guidance": False,
    }
