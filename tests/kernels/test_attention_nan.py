"""Test that attention has NaN wherever the plain formula has it, and nowhere else.

One exception is of the op's own making: a query that sees no key gets zeros, where a softmax of -inf is NaN.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastdistill as fd
from tests.kernels.attention_cases import inputs, normal
from tests.kernels.device import DEVICE

# NumPy, with which the interpreter computes, warns of NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ROW, KEY, LAST = 3, 5, 35  # A row in a tile's midst, a key there, and a key in the last tile.

Case = dict[str, list[tuple[tuple[object, ...], float]]]
# Each case says which entries of which tensor become what, in turn; t_ are tangents.
CASES: dict[str, Case] = {
    "mask": {"attn_mask": [((ROW, KEY), math.nan)]},
    "mask, last tile": {"attn_mask": [((ROW, LAST), math.nan)]},
    "mask, else hidden": {"attn_mask": [((ROW, slice(None)), -math.inf), ((ROW, LAST), math.nan)]},
    "mask, beside a dead row": {"attn_mask": [((ROW, KEY), math.nan), ((ROW + 4, slice(None)), -math.inf)]},
    "mask is inf": {"attn_mask": [((ROW, KEY), math.inf)]},
    "mask is inf, last tile": {"attn_mask": [((ROW, LAST), math.inf)]},
    "tangent of the mask": {"t_attn_mask": [((ROW, KEY), math.nan)]},
    "tangent of the mask, hidden": {"attn_mask": [((ROW, KEY), -math.inf)], "t_attn_mask": [((ROW, KEY), math.nan)]},
    "query, else hidden": {"q": [((ROW, 2), math.nan)], "attn_mask": [((ROW, slice(1, None)), -math.inf)]},
    **{name: {name: [((ROW, 2), math.nan)]} for name in ("q", "k", "v", "t_q", "t_k", "t_v")},
}


def plain(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> tuple[Tensor, Tensor]:
    s = q @ k.mT * q.shape[-1] ** -0.5 + attn_mask
    return torch.softmax(s, -1) @ v, torch.logsumexp(s, -1)


def results(impl: str | None, mixed: bool, leaves: list[Tensor]) -> list[Tensor]:
    """Return o, lse, t_o, mu, and the gradients of a loss of o, or of both o and t_o."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    op = plain if impl is None else lambda *x: fd.scaled_dot_product_attention(*x, return_lse=True, impl=impl)
    (o, lse), (t_o, mu) = torch.func.jvp(op, tuple(leaves[:4]), tuple(leaves[4:]))
    loss = (o * torch.linspace(-1, 1, o.numel(), device=DEVICE).view_as(o)).sum()
    if mixed:
        loss = loss + (t_o * torch.linspace(1, -2, o.numel(), device=DEVICE).view_as(o)).sum()
    gradients = torch.autograd.grad(loss, leaves if mixed else leaves[:4])
    return [x.detach() for x in (o, lse, t_o, mu, *gradients)]


@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_nan_comes_out_where_the_formula_has_it(case: str, impl: str, mixed: bool) -> None:
    """Check forward, tangent and both backwards; what isn't NaN has the right value."""
    primals, tangents = inputs(n=20, m=40, d=16)
    primals["attn_mask"], tangents["attn_mask"] = normal(1, 1, 20, 40), normal(1, 1, 20, 40)
    named = {**primals, **{f"t_{name}": x for name, x in tangents.items()}}
    for name, changes in CASES[case].items():
        for at, value in changes:
            named[name][0, 0][at] = value
    dead = (primals["attn_mask"][0, 0] == -math.inf).all(-1)
    found = results(impl, mixed, list(named.values()))
    expected = results(None, mixed, list(named.values()))
    assert any(x.isnan().any() for x in expected)
    names = ["o", "lse", "t_o", "mu", *(f"gradient of {name}" for name in named)]
    for name, x, truth in zip(names, found, expected):
        if name == "lse":
            x, truth = (y.nan_to_num(nan=math.nan, posinf=math.nan) for y in (x, truth))  # It may be inf - inf or inf.
        if truth.shape[2] == 20:  # This is a tensor of queries.
            x, truth = x[:, :, ~dead], truth[:, :, ~dead]
        elif dead.any():  # This is a tensor of keys: the softmax of a dead row is NaN for all of them.
            continue
        assert torch.equal(x.isnan(), truth.isnan()), name
        torch.testing.assert_close(x, truth, rtol=1e-4, atol=2e-5, equal_nan=True)
