"""Check that specifications of samplers are found by file, agree with their functions, and are refused if wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import samplers
from fastdistill.lookup import discover
from fastdistill.paths import LINEAR
from fastdistill.samplers import PARAMETERS, SAMPLERS, SPECS, Parameter, Sampler, euler, taking
from fastdistill.samplers.registry import HELPERS, collect
from tests.samplers.fields import defaults

MAPS = ["average_velocity", "gamma", "consistency"]


def test_every_file_is_a_sampler_or_a_helper() -> None:
    """Check that a file without a specification is an error, because its sampler would otherwise go unnoticed."""
    assert set(discover("fastdistill.samplers", "SPEC", HELPERS)) == set(SPECS)
    with pytest.raises(ImportError, match=r"^fastdistill\.samplers\.spec: expected SPEC in every module here but"):
        discover("fastdistill.samplers", "SPEC", HELPERS - {"spec"})


def test_public_names_are_the_functions() -> None:
    """Check that a sampler's name in the package is its function, and not the module of the same name."""
    assert {name: getattr(samplers, name) for name in SPECS} == SAMPLERS
    assert set(samplers.__all__) & set(SAMPLERS) == {"euler", "heun", "adaptive", *MAPS}


def test_samplers_are_listed_by_what_they_need_then_by_their_cost() -> None:
    """Check that samplers without fresh noise come before those with it."""
    shipped = [name for name in SPECS if name in samplers.__all__]
    assert shipped == ["euler", "heun", "adaptive", *MAPS]


class Counter:
    """Network that returns zero and counts its calls."""

    calls = 0

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls += 1
        return torch.zeros_like(x)


def both_ends(spec: Sampler) -> Iterator[dict[str, float]]:
    """Give the parameters of a sampler at either end of their ranges."""
    for end in ("low", "high"):
        yield {name: getattr(of, end) for name, of in spec.parameters.items()}


@pytest.mark.parametrize("name", SPECS)
def test_a_specification_tells_evaluations_and_noise(name: str) -> None:
    """Count the evaluations of three steps, and check whether the generator of the noise was used."""
    spec = SPECS[name]
    for parameters in [defaults(name), *both_ends(spec)]:
        options: dict[str, Any] = parameters
        net, generator = Counter(), torch.Generator().manual_seed(1)
        before = generator.get_state()
        samplers.sample(name, net, torch.randn(4, 2), 3, path=LINEAR, generator=generator, **options)
        assert net.calls > 0 and spec.evaluations in (None, net.calls / 3)
        assert torch.equal(before, generator.get_state()) != spec.adds_noise(parameters)


def test_a_parameter_says_what_is_out_of_its_range() -> None:
    """Check that a parameter whose default is an int takes whole numbers alone."""
    half, count = Parameter(0.5, 0.0, 1.0, "a share"), Parameter(2, 1, 4, "how often")
    half.check("share", 1)
    count.check("count", 4)
    for value in (-0.1, 1.5, float("nan"), True):
        with pytest.raises(ValueError, match=r"^share: expected in \[0, 1\], got"):
            half.check("share", value)
    for value in (0, 2.5, float("inf")):
        with pytest.raises(ValueError, match=r"^count: expected a whole number in \[1, 4\], got"):
            count.check("count", value)


def test_samplers_that_share_a_parameter_mean_the_same() -> None:
    """Check that samplers can't give one name different meanings, nor reuse a name that all samplers know.

    A name stands for one setting and one option, whichever sampler is chosen.
    """
    assert taking({"gamma"}) == ["gamma"] and taking(set()) == list(SPECS)

    def other(**_: Any) -> Tensor:
        return torch.zeros(1)

    def planted(parameter: str, meaning: Parameter) -> dict[str, Sampler]:
        return {**SPECS, "other": Sampler(other, ("map",), 1, parameters={parameter: meaning})}

    assert collect(planted("gamma", PARAMETERS["gamma"]))[1] == PARAMETERS
    with pytest.raises(ImportError, match=r"samplers\.other: expected gamma as another sampler has it"):
        collect(planted("gamma", Parameter(0.1, 0.0, 1.0, "something else")))
    with pytest.raises(ImportError, match=r"samplers\.other: steps means something else"):
        collect(planted("steps", Parameter(1, 1, 2, "of mine")))
    with pytest.raises(ImportError, match=r"samplers\.ddim: expected SPEC of a function ddim, got euler"):
        collect({"ddim": Sampler(euler, ("velocity",), 1)})
