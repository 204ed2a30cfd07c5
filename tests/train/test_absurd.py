"""Absurd configurations: each field with values that it wasn't made for, YAML bombs, several processes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fastdistill import cli
from fastdistill.train import ConfigError, checks, load_config, train
from fastdistill.train.checks import check_config
from fastdistill.train.config import parse_config
from fastdistill.train.methods import METHODS
from tests.train.absurd import NUMBERS, OTHERS, all_places, planted
from tests.train.conftest import MakeConfig, tiny_fields

SHARE = 0.15  # of all combinations, drawn with a fixed seed: some 1,300 of 8,900


def assert_is_named(message: str, place: tuple[str, ...]) -> None:
    """Assert that a short message, a line for each problem, names the field, its group, or the method as a whole."""
    told = message.removeprefix("c.yaml:\n").splitlines()
    assert len(told) <= 3 and max(map(len, told)) < 500, message
    names = {place[-1], place[0], ".".join(place[:-1]), "method.name"} - {""}
    assert any(name in message for name in names), message


def test_every_field_takes_or_refuses_every_value_by_name(tmp_path: Path) -> None:
    """Check that no other error than a ConfigError comes out, whatever goes in."""
    combinations = [(method, place, value) for method, place in all_places() for value in NUMBERS + OTHERS]
    for method, place, value in random.Random(0).sample(combinations, int(SHARE * len(combinations))):
        teacher = {"teacher": str(tmp_path / "teacher")} if METHODS[method].needs_teacher() else {}
        fields = planted(tiny_fields(tmp_path / "run", method={"name": method}, **teacher), place, value)
        try:
            check_config(parse_config(fields, "c.yaml"))
        except ConfigError as error:
            assert_is_named(str(error), place)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("seed: 18446744073709551616", "seed: .*less than 18446744073709551616, got 18446744073709551616"),
        ("data: {name: ring, batch: 9223372036854775808}", r"data\.batch: .*less than or equal to 16777216"),
        ("data: {name: ring, batch: 16777216}", r"data\.batch: a step of 16,777,216 rows takes more than"),
        ("model: {preset: mlp-ring, width: 549755813888}", "model: mlp-ring with width 549755813888 can't be built"),
        ("model: {preset: mlp-ring, width: 262144}", r"model: [\d,]+ weights, .* expected a smaller model\.width"),
        ("model: {preset: mlp-ring, depth: 1099511627776}", r"model\.depth: .*less than or equal to 1024"),
        ("method: {name: meanflow, sample_steps: 1000000000}", r"method\.sample_steps: .*less than or equal to 10000"),
        ("method: {name: imm, group: 65536}", r"method\.group: .*less than or equal to 4096"),
        ("method: {name: alpha_flow, gain: 1.0e+300}", "method.name: alpha_flow can't be trained so: math range error"),
        ("method: {name: ect, stages: 9999999}", "method.name: ect can't be trained so"),
        ("method: null", r"method: .*, got None"),
        ("method: abc", r"method: .*, got 'abc'"),
        (f"out: {'x' * 300}", "out: .* can't be a path here: File name too long"),
        (f"teacher: {'x' * 300}", "teacher: .* can't be a path here: File name too long"),
        ('out: "a\\0b"', "out: .* can't be a path here"),
        ("steps: 0x" + "f" * 5000, "at most 100 digits, got 5002 in line"),
        ("methods: abc", "methods: expected names of methods, each with its fields, got 'abc'"),
        ("methods: rings", "got 'rings'; those of a shipped configuration are called ring or digits"),
        ("methods: {meanflo: {}}", "methods: unknown method 'meanflo'; did you mean 'meanflow'"),
        ("methods: {esd: [1]}", r"methods\.esd: expected fields and their values, got \[1\]"),
        ("methods: {esd: {method: 5}}", r"methods\.esd\.method: expected fields and their values, got 5"),
        ("seed: 1\nseed: 2", "expected each field once, got 'seed' twice"),
        ("steps: " + "[" * 5000 + "]" * 5000, "nested at most 40 deep, got more in line"),
        ("seed: !!timestamp x", "is no YAML: a value can't be read"),
        ("seed: &a [*a]", "values nested at most 40 deep"),
    ],
    ids=lambda value: value.split(":")[0] + str(len(value)),
)  # fmt: skip
def test_an_absurd_line_is_refused_in_a_line(
    line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that it names field or file, before anything is built or made, on a machine of 8 GiB."""
    monkeypatch.setattr(checks, "memory_of_machine", lambda: 2**33)
    replaced = line.split(":")[0]
    rest = [f"{name}: {value}" for name, value in FIELDS.items() if name != replaced]
    path = tmp_path / "c.yaml"
    path.write_text("\n".join([*rest, line, ""]), encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(path, ["--method.name", "esd"] if replaced == "methods" else [])
    assert len(str(caught.value).removeprefix(f"{path}:\n").splitlines()) == 1


FIELDS = {
    "out": "run",
    "steps": "9",
    "data": "{name: ring, batch: 65536}",
    "model": "{preset: mlp-ring}",
    "method": "{name: meanflow}",
}

BOMB = "&a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"q{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "&a {x: 1}\n" + "".join(
    f"q{name}: &{name} {{<<: [{','.join(['*' + before] * 9)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("bomb", [BOMB, MERGES], ids=["lists", "merges"])
@pytest.mark.parametrize(
    "place",
    ["*i", "{name: *i}", "{name: ring, batch: *i}", "{betas: *i}", "{meanflow: *i}", "{meanflow: {method: *i}}"],
)
def test_aliases_that_stand_for_gigabytes_are_refused_at_once(place: str, bomb: str, tmp_path: Path) -> None:
    """Check that they are counted, wherever they are used, before anything is built of them."""
    path = tmp_path / "bomb.yaml"
    for field in ("data", "optim", "method", "methods"):
        path.write_text(f"qa: {bomb}{field}: {place}\n", encoding="utf-8")
        with pytest.raises(ConfigError, match=r"bomb\.yaml: expected at most 10,000 values .* aliases .* in line"):
            load_config(path, ["--method.name", "meanflow"])


def test_aliases_of_an_honest_size_work(tmp_path: Path) -> None:
    """Check that YAML's own way to say a thing once is taken."""
    path = tmp_path / "c.yaml"
    fields = tiny_fields(tmp_path / "run")
    text = "\n".join(f"{name}: {value}" for name, value in FIELDS.items() if name != "method")
    path.write_text(f"{text}\nmethod: {{name: meanflow, times: &a {{law: logit_normal}}, end_times: *a}}\n", "utf-8")
    config = load_config(path)
    assert config.method.times == config.method.end_times
    assert fields["method"]["name"] == config.method.name


@pytest.mark.parametrize(("world", "said"), [("2", "got 2"), ("many", "got many")])
def test_several_processes_are_refused_by_name(
    world: str, said: str, tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that nothing is made, for each rank of torchrun would train alone."""
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ConfigError, match=rf"WORLD_SIZE: expected 1, {said}: .*torchrun"):
        train(tiny())
    assert not tiny().out.exists()
    assert cli.main(["train", "ring", "--out", str(tiny().out)]) == 2
    assert capsys.readouterr().err.startswith("fastdistill: WORLD_SIZE")
    monkeypatch.setenv("WORLD_SIZE", "1")
    train(tiny(steps=1))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--guidance", "nan"], "guidance: expected a finite number, got nan"),
        (["--gamma", "inf"], r"gamma: expected in \[0, 1\], got inf"),
        (["--n", "9" * 30], "expected a whole number from 1 up"),
        (["--n", "99999999999"], "too little memory"),
        (["--label", "3"], "label: expected none"),
        (["--out", "nowhere/at/all.png"], "is no folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_absurd_options_of_sample_are_refused_in_a_line(
    arguments: list[str], said: str, tiny: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that it ends with status 2 and no traceback."""
    run = train(tiny(steps=1))
    capsys.readouterr()
    try:
        status = cli.main(["sample", str(run), *arguments])
    except SystemExit as error:  # argparse's own
        status = error.code if isinstance(error.code, int) else 1
    assert status == 2
    assert said.replace("\\", "") in capsys.readouterr().err
