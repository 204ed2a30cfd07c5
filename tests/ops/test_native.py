"""Arguments of public ops, each of which reaches value and gradient, whichever path runs: PyTorch's own op too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdistill as fd
from tests.ops.op_cases import IMPLS, OPS, calls, draw

# An embedding of a time and rotations take no native path; the ops' own tests have them.
PARTLY = {"explain", "jvp", "merge_attention", "merge_attention_jvp", "ops", "rope_angles"}


def assert_same(ours: object, plain: object, what: str) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10, msg=lambda text: f"{what}: {text}")


def with_gradients(
    run: Callable[[dict[str, Tensor]], Sequence[Tensor]], tensors: dict[str, Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return outputs, and the gradient of each argument of a weighted sum over them."""
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    outs = run(leaves)
    loss = sum((o * torch.linspace(1, 2, o.numel(), dtype=o.dtype).view_as(o).cos()).sum() for o in outs)
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return [o.detach() for o in outs], dict(zip(leaves, gradients))


def test_the_table_has_every_public_op_and_every_argument() -> None:
    public = set(fd.__all__) - PARTLY
    assert {case.op.__name__ for case in OPS.values()} | {case.pair.__name__ for case in OPS.values()} == public
    assert {name: case.missing() for name, case in OPS.items() if case.missing()} == {}


def primal_of(pair: Callable[..., tuple[tuple[Tensor, ...], tuple[Tensor, ...]]], tensors: dict[str, Tensor]) -> Any:
    return pair(tensors, tangents={})[0]


@pytest.mark.parametrize("name", OPS)
def test_every_argument_counts_on_every_path(name: str) -> None:
    """Check PyTorch's own op, ours in plain PyTorch and the pair's primal, with each optional tensor there and away."""
    case = OPS[name]
    for shapes, options in calls(name):
        tensors, tangents = draw(shapes), draw(shapes, seed=1)
        formula = partial(case.of_reference, options=options)
        plain = with_gradients(formula, tensors)
        moved = torch.func.jvp(formula, (tensors,), (tangents,))
        for impl in IMPLS[name]:
            what = f"{name} {impl} of {sorted(shapes)} with {options}"
            op, pair = partial(case.of_op, options=options, **impl), partial(case.of_pair, options=options, **impl)
            assert_same(with_gradients(op, tensors), plain, what)
            assert_same(with_gradients(partial(primal_of, pair), tensors), plain, what)
            assert_same(pair(tensors, tangents=tangents), moved, what)


def test_an_rms_norm_with_a_bias_in_16_bits_rounds_once() -> None:
    x, h, bias = (torch.randn(s).bfloat16() for s in ((2, 3, 4), (2, 3, 4), (4,)))
    (_, auto), (_, ours) = (
        fd.gated_residual_ada_norm(x, None, h, None, None, bias=bias, rms=True, impl=i) for i in ("auto", "torch")
    )
    assert torch.equal(auto, ours)
