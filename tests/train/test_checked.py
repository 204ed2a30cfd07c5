"""Plain settings become classes that check them: bounds, meanings, kinds of groups, and pickles."""

from __future__ import annotations

import pickle
from typing import Annotated, Literal

import pytest
from pydantic import ValidationError

from fastdistill.settings import Bounds, meanings, settings
from fastdistill.train.checked import checked
from fastdistill.train.methods import METHODS


@settings
class Fixed:
    """Settings of one kind, a fixed one."""

    law: Literal["fixed"] = "fixed"
    at: Annotated[float, Bounds(ge=0, lt=1)] = 0.5
    """Where it lies."""

    def double(self) -> float:
        """Return twice the place."""
        return 2 * self.at


@settings
class Free:
    """Settings of one kind, a free one."""

    law: Literal["free"] = "free"


@settings
class Both:
    """Settings with either of the kinds, or none."""

    first: Fixed | Free = Fixed(at=0.25)
    """The first."""
    second: Fixed | Free | None = None
    pair: tuple[Annotated[int, Bounds(gt=0)], ...] = (1,)


def test_a_checked_group_has_the_plain_ones_defaults_bounds_and_methods() -> None:
    kind = checked(Both)
    assert kind().first.double() == 0.5 and isinstance(kind().first, Fixed)
    assert kind(second={"law": "fixed", "at": 0}).second.at == 0
    assert isinstance(kind(first={"law": "free"}).first, Free)
    for wrong in (
        {"first": {"law": "fixed", "at": 1}},
        {"first": {"law": "other"}},
        {"pair": [0]},
        {"thrid": 3},
        {"second": {"at": 0.5}},
    ):
        with pytest.raises(ValidationError):
            kind(**wrong)


def test_meanings_are_the_strings_under_the_fields() -> None:
    assert meanings(Both) == {"first": "The first.", "second": None, "pair": None}
    assert checked(Both).model_fields["first"].description == "The first."
    assert METHODS["ayf_lmd"].model_fields["sample_gamma"].description == (
        "Of the sampler gamma: how much of the noise is new at each step."
    )


@pytest.mark.parametrize("name", METHODS)
def test_settings_of_a_method_can_be_pickled(name: str) -> None:
    """Check that each group in them can be pickled, too."""
    made = METHODS[name](sample_steps=3)
    assert pickle.loads(pickle.dumps(made)) == made
    for value in (getattr(made, field) for field in type(made).model_fields):
        assert pickle.loads(pickle.dumps(value)) == value
