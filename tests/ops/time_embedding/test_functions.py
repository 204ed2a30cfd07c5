"""Sinusoidal time embedding and its tangent, in float32 whatever the dtype of the time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdistill as fd
from fastdistill import reference

TIMES = torch.linspace(0, 1000, 41, dtype=torch.float64)


def jvps(t: Tensor, t_t: Tensor, dim: int) -> list[tuple[Tensor, Tensor]]:
    """Return the jvp by forward AD, and by the pair."""
    by_torch = torch.func.jvp(lambda t: fd.timestep_embedding(t, dim), (t,), (t_t,))
    return [by_torch, fd.timestep_embedding_jvp(t, t_t, dim)]


@pytest.mark.parametrize("dim", [2, 7, 256])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_tangents_are_accurate(dtype: torch.dtype, dim: int) -> None:
    """Check them up to the angle's rounding, 1000 eps / 2 in radians: a 16-bit time is a rounded one, and no more."""
    t, t_t = TIMES.to(dtype), torch.randn(41, dtype=torch.float64).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    truths = torch.func.jvp(lambda t: reference.timestep_embedding(t, dim), (t.double(),), (t_t.double(),))
    for found in jvps(t, t_t, dim):
        for actual, truth in zip(found, truths, strict=True):
            assert actual.dtype == wide
            assert actual.shape == (41, dim)
            size = float(truth.abs().max())
            torch.testing.assert_close(actual.double(), truth, rtol=0, atol=1000 * torch.finfo(wide).eps * size)


def test_integer_times_are_those_of_diffusion_steps() -> None:
    steps = torch.arange(1000)
    torch.testing.assert_close(fd.timestep_embedding(steps, 8), fd.timestep_embedding(steps.float(), 8), rtol=0, atol=0)


def test_it_is_the_embedding_of_dit() -> None:
    """Check that it agrees with DiT's code, on its own terms."""
    t, half = TIMES.float(), 16
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(half, dtype=torch.float32) / half)
    angles = t[:, None] * frequencies[None]
    expected = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    torch.testing.assert_close(fd.timestep_embedding(t, 32), expected, rtol=0, atol=3e-4)


def test_any_shape_and_no_tangent() -> None:
    e, t_e = fd.timestep_embedding_jvp(torch.ones(2, 3), None, 6, 100)
    assert e.shape == t_e.shape == (2, 3, 6)
    assert not t_e.any()
    torch.testing.assert_close(e, fd.timestep_embedding(torch.ones(()), 6, 100).expand(2, 3, 6))


def test_gradients_reach_the_time_and_its_tangent() -> None:
    points = tuple(torch.rand(2, 3, dtype=torch.float64, requires_grad=True).unbind(0))
    for run in (lambda t, t_t: jvps(t, t_t, 6)[0], lambda t, t_t: jvps(t, t_t, 6)[1]):
        assert torch.autograd.gradcheck(run, points)


def test_vmap_and_compile() -> None:
    t = torch.rand(3)
    torch.testing.assert_close(torch.vmap(lambda t: fd.timestep_embedding(t, 6))(t), fd.timestep_embedding(t, 6))
    run = torch.compile(lambda t: jvps(t, t, 6)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(t), jvps(t, t, 6)[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, None, 8), "t: expected a tensor, got float"),
        ((TIMES, None, 1), "dim: expected 2 or more, got 1"),
        ((TIMES, None, 4.5), "dim: expected a whole number, got float"),
        ((TIMES, None, True), "dim: expected a whole number, got bool"),
        ((TIMES + 1j, None, 8), r"t: expected real numbers, got torch\.complex"),
        ((TIMES, None, 8, float("nan")), "max_period: expected a positive number, got nan"),
        ((TIMES, None, 8, "many"), "max_period: expected a number, got str"),
        ((TIMES, None, 8, 0), "max_period: expected a positive number, got 0"),
        ((TIMES, TIMES[:1], 8), r"t_t: expected shape \(41,\) as t, got \(1,\)"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        fd.timestep_embedding_jvp(*arguments)
