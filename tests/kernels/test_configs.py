"""Test the table of configs: every call finds one that fits, the nearest, and a damaged file is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from fastdistill.kernels import configs
from fastdistill.kernels.configs import Config, Entry

WANTED = Entry("forward", 90, 16, 72, "q", "none", 10, configs.INTERPRETED, None)


def entry(number: int, **changes: object) -> Entry:
    """Return an entry that serves `WANTED`, marked by its config."""
    return WANTED._replace(config=Config(number, 16, 4, 2))._replace(**changes)


def test_every_call_finds_a_config() -> None:
    """Check any kernel, architecture, dtype, head dim, tangents, mask and length: a new one needs no tuning."""
    for kernel, arch, dtype, d, tangents, mask, length in itertools.product(
        configs.KERNELS,
        configs.ARCHITECTURES,
        (torch.bfloat16, torch.float16, torch.float32),
        (1, 8, 40, 64, 72, 112, 128, 192, 256),
        ("", "v", "q", "qkv", "qkvm"),
        configs.MASKS,
        (1, 255, 32760),
    ):
        if "m" not in tangents or mask == "mask":
            config = configs.attention_config(kernel, arch, dtype, d, tangents, mask, length)
            assert all(size >= 16 and size & (size - 1) == 0 for size in config[:2])


def test_the_interpreter_has_one_config() -> None:
    """Check that it is small, so that short tests have several tiles."""
    config = configs.attention_config("forward", configs.INTERPRETER, torch.float32, 64, "qkv", "none", 64)
    assert config == configs.INTERPRETED


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"d": 80}, {"d": 96}),
        ({"tangents": "qk"}, {"tangents": "qkv"}),
        ({"mask": "band"}, {"mask": "mask"}),
        ({"log2_length": 12}, {"log2_length": 6}),
        ({"log2_length": 3}, {"log2_length": None}),
        ({"measured": "there", "log2_length": 1}, {}),
        ({"d": 80, "tangents": "qkv", "mask": "mask"}, {"d": 96}),
        ({"tangents": "qk", "mask": "mask"}, {"tangents": "qkv"}),
    ],
)
def test_the_nearest_entry_serves(better: dict[str, object], worse: dict[str, object]) -> None:
    """Check the order: narrow heads first, then few tangents, a simple mask, measured ones, and the length."""
    both = [entry(1, **worse), entry(2, **better)]
    assert configs.nearest(WANTED, both) == configs.nearest(WANTED, both[::-1]) == both[1]


@pytest.mark.parametrize(
    "change",
    [{"kernel": "backward_q"}, {"arch": 80}, {"bits": 32}, {"d": 64}, {"tangents": "kv"}],
    ids=lambda change: next(iter(change)),
)
def test_an_entry_that_might_not_fit_never_serves(change: dict[str, object]) -> None:
    """Check another kernel or architecture, wider elements, a wider head, and a tangent that it was not made for."""
    assert configs.nearest(WANTED, [entry(1, **change)]) is None
    assert configs.nearest(WANTED._replace(mask="mask"), [entry(1, mask="band")]) is None


def test_a_users_entry_wins_where_it_is_as_near() -> None:
    """Check that a shipped one wins if it is made for narrower heads: a config for 256 would be a poor one for 72."""
    shipped = entry(1, measured="there")
    assert configs.nearest(WANTED, [entry(2, log2_length=3)], [shipped]) == entry(2, log2_length=3)
    assert configs.nearest(WANTED, [entry(2, d=256)], [shipped]) == shipped


def test_buckets_are_rounded_logarithms() -> None:
    """Check that one bucket gives way to the next at the geometric mean."""
    assert [configs.bucket(n) for n in (0, 1, 2, 3, 256, 362, 363, 511, 32760)] == [0, 0, 1, 2, 8, 8, 9, 9, 15]


def test_a_file_keeps_what_it_is_given(tmp_path: Path) -> None:
    """Check that each entry has its own line, and that nothing is written beside the file."""
    entries = [entry(16, log2_length=None), entry(32, measured="there: 0.1 ms")]
    path = tmp_path / "new folder" / "table.json"
    configs.write(path, entries)
    assert set(configs.read(path)) == set(entries)
    assert len(path.read_text().splitlines()) == 4
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "text",
    ["", "[", "{}x", "[1]", '[{"kernel": "forward"}]', "3", "null"],
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    """Check that the message has its name and what to do."""
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(configs.ConfigFileError, match=r"table\.json is no table of configs .*; delete it"):
        configs.read(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("kernel", "sideways"), ("mask", "some"), ("tangents", "x"), ("arch", "90"), ("config", [64, 64, 4]),
     ("config", [64, 64, 0, 1]), ("log2_length", "8")],
)  # fmt: skip
def test_a_strange_entry_is_refused(tmp_path: Path, field: str, value: object) -> None:
    """Check that a name or a number that no lookup asks for is an error."""
    path = tmp_path / "table.json"
    configs.write(path, [entry(16)._replace(**{field: value}) if field != "kernel" else entry(16)])
    if field == "kernel":
        path.write_text(path.read_text().replace("forward", str(value)))
    with pytest.raises(configs.ConfigFileError):
        configs.read(path)


def test_forced_configs_end_with_their_block() -> None:
    """Check that inside every device counts as that architecture."""
    with configs.forced(90, {"forward": Config(16, 16, 1, 1)}):
        assert configs.arch_of(torch.device("meta")) == 90
        assert configs.attention_config("forward", 90, torch.bfloat16, 64, "", "none", 8) == Config(16, 16, 1, 1)
        assert configs.attention_config("backward_q", 90, torch.bfloat16, 64, "", "none", 8) != Config(16, 16, 1, 1)
    assert configs.arch_of(torch.device("meta")) == configs.INTERPRETER


def test_the_shipped_table_has_no_line_twice() -> None:
    """Check that each key has one config."""
    table = configs.shipped()
    assert len({line[:7] for line in table}) == len(table)


def test_the_shipped_table_has_no_holes() -> None:
    """Check that kinds of call have the same head dims; a call might otherwise take a config of a costlier kind."""
    dims: dict[tuple[object, ...], dict[tuple[str, str], set[int]]] = {}
    for line in configs.shipped():
        dims.setdefault(line[:3], {}).setdefault((line.tangents, line.mask), set()).add(line.d)
    for kinds in dims.values():
        whole = [found for found in kinds.values() if 256 in found]
        assert all(found == whole[0] for found in whole)
