"""Check that data sets are found by file or reference, and that everything that breaks the protocol is named."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from fastdistill.data import DATASETS, Digits, Ring, make_data_set
from fastdistill.data.protocol import check_protocol, try_data_set
from fastdistill.data.registry import HELPERS, settings_of
from fastdistill.lookup import UnresolvedError, discover, find, make
from tests.data import own_sets
from tests.data.own_sets import Blobs, Points, with_batch

ROOT = Path(__file__).parents[2]
HERE = "tests.data.own_sets:"


def test_every_file_is_a_data_set_or_a_helper() -> None:
    """Check that a set has the name of its file, and that a file without a set must be a helper."""
    assert discover("fastdistill.data", "DATA_SET", HELPERS) == DATASETS
    assert (DATASETS["digits"], DATASETS["ring"]) == (Digits, Ring)
    with pytest.raises(ImportError, match=r"^fastdistill\.data\.pictures: expected DATA_SET in every module here but"):
        discover("fastdistill.data", "DATA_SET", HELPERS - {"pictures"})


def asked_by_name(code: str) -> list[int]:
    """Return the lines that compare something with the name of a data set."""
    lines = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Compare):
            words = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
            lines += [node.lineno] * bool(words & set(DATASETS))
    return lines


def test_nobody_asks_for_a_data_set_by_its_name() -> None:
    """Check that no code and no template of a report compares the name of a data set.

    Properties of a set are attributes of the set or of its judge, so that users' own sets are treated alike.
    """
    for path in (ROOT / "fastdistill").rglob("*.py"):
        assert not asked_by_name(path.read_text(encoding="utf-8")), path
    for path in (ROOT / "fastdistill").rglob("*.jinja"):
        assert not re.search(r"[=!]=\s*['\"]", path.read_text(encoding="utf-8")), path
    assert asked_by_name("if config.data.name == 'ring' or name in ('digits', 'x'):\n    pass") == [1, 1]


@pytest.mark.parametrize("name", DATASETS)
def test_the_sets_that_come_along_keep_the_protocol(name: str) -> None:
    """Check fastdistill's own sets by the same trial as a user's set."""
    try_data_set(name, make_data_set(name))


def test_making_a_set_reads_nothing() -> None:
    """Check that images are read for the first batch only, because every check of a configuration makes the set."""
    assert not vars(Digits())
    assert Digits().held_out_x.shape == (296, 1, 8, 8)


def test_a_set_of_ones_own_is_an_object_or_made_from_settings() -> None:
    assert make_data_set(f"{HERE}POINTS") is own_sets.POINTS
    assert isinstance(make_data_set(f"{HERE}Points()"), Points)
    assert settings_of(f"{HERE}Blobs()") is Blobs.Settings
    assert settings_of(f"{HERE}Points()") is settings_of("ring") is None
    made = make_data_set(f"{HERE}Blobs()", Blobs.Settings(side=6, classes=2))
    assert (made.shape, made.num_classes) == ((3, 6, 6), 2)


def test_what_a_set_lacks_is_named_attribute_by_attribute() -> None:
    with pytest.raises(
        ValueError, match=r"^expected a data set, got the class .*Points; its instances are named .*\(\)$"
    ):
        make_data_set(f"{HERE}Points")
    with pytest.raises(ValueError, match=r"^expected .*Empty\(\) to keep the protocol") as missing:
        make_data_set(f"{HERE}Empty()")
    for attribute in ("shape is missing, a tuple", "num_classes is missing", "batch is missing, a method batch(seed"):
        assert attribute in str(missing.value)
    assert "judge" not in str(missing.value) and "picture" not in str(missing.value)
    with pytest.raises(ValueError, match=r"keep the protocol") as wrong:
        check_protocol("crooked", own_sets.Crooked())
    for attribute in ("shape", "num_classes", "batch", "judge", "picture"):
        assert f"{attribute} must be" in str(wrong.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (with_batch(own_sets.short), r"x0 of mine.batch to be \(2, 2\) float32 for a size of 2, got \(1, 2\)"),
        (with_batch(own_sets.labelled), r"y of mine.batch to be None, for num_classes is 0, got \(2,\) torch.int64"),
        (with_batch(own_sets.unlabelled, 3), r"y of mine.batch to be \(2,\) int64 for a size of 2, got None"),
        (with_batch(own_sets.beyond, 3), r"y of mine.batch in 0 to 2, for num_classes, got \[3, 3\]"),
        (with_batch(own_sets.infinite), r"x0 of mine.batch to be finite"),
        (with_batch(own_sets.drifting), r"the same rows for the same seed, step and size, got others"),
        (with_batch(own_sets.lonely, 0), r"y of mine.batch to be None|x0 of mine.batch to be \(2, 2\)"),
        (with_batch(own_sets.failing), r"a pair \(x0, y\) as batch\(seed, step, size\), got OSError: the disk is gone"),
    ],
)
def test_batches_that_break_the_protocol_are_refused(data: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^expected .*{words}"):
        try_data_set("mine", data)


def test_pictures_that_are_none_are_refused() -> None:
    for picture, words in ((lambda self, samples, columns: "a.png", "the bytes of a PNG file, got 'a.png'"),
                           (lambda self, samples: b"", "two rows in two columns, got TypeError")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^expected mine.picture to .*{words}"):
            try_data_set("mine", type("Drawn", (Points,), {"picture": picture})())


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("Points", r"expected 'package.module:attribute', followed by \(\) if that .* to make it, got 'Points'"),
        ("no.such:Points", r"got ModuleNotFoundError: .* PYTHONPATH"),
        (f"{HERE}Pionts", r"has no attribute 'Pionts'; did you mean 'Points'\?"),
        (f"{HERE}Blobs()", r"expected .*Blobs\(\) to be importable, got TypeError: .* missing 1 required"),
    ],
)
def test_a_reference_that_leads_nowhere_says_why(reference: str, words: str) -> None:
    with pytest.raises(UnresolvedError, match=words):
        make(reference, "it")


def test_a_reference_leads_into_attributes_and_is_called_on_demand_alone() -> None:
    assert find(f"{HERE}Blobs.Settings", "it") is Blobs.Settings
    assert find(f"{HERE}Blobs()", "it") is Blobs
    assert make(f"{HERE}Blobs.Settings()", "it", 6).side == 6
