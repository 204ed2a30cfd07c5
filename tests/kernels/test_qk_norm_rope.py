"""Compare the kernels that normalise and turn queries and keys with float64 autodiff, forward and both backwards."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fastdistill as fd
from fastdistill import reference
from fastdistill.kernels import qk_norm_rope as kernel
from fastdistill.ops.qk_norm_rope import eager
from fastdistill.testing import make_qkv
from tests.kernels.device import DEVICE
from tests.ops.qk_norm_rope.eager_cases import ALL_NAMES, NAMES, Case, backward, check, forward, problem


@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_norm_rotation_and_dtype(norm: str, interleaved: bool, dtype: torch.dtype) -> None:
    """Check it with a tangent to each tensor; only inputs and outputs are rounded."""
    check(kernel, Case(norm, interleaved, dtype=dtype), DEVICE)


CASES = [
    *(Case(tangents=tangents, parts=NAMES[2:4]) for r in range(5) for tangents in itertools.combinations(NAMES[:4], r)),
    Case("layer", tangents=("q_bias",)),
    Case("layer", True, tangents=("k_bias",), angles="none"),
    Case("layer", parts=("k_weight",)),
    Case("rms", parts=()),
    Case("none", tangents=("k",)),
    Case("layer", parts=(), offset=30.0, spread=0.03, d=128),
    Case("rms", offset=1e-4, spread=1e-4),
    Case("layer", lengths=(3, 7)),
    Case("rms", lengths=(7, 3), angles="each"),
    Case("rms", True, angles="each"),
    Case("layer", angles="none"),
    Case("none", True, angles="none"),
    *(Case("layer", interleaved, d=d) for d, interleaved in itertools.product((6, 72, 128), (False, True))),
    Case("rms", d=2),
    Case("layer", d=170),
    Case("rms", True, heads=(3, 1), lengths=(11, 11), d=128),
    Case("layer", heads=(1, 1), lengths=(1, 1)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_absent_is_left_out(case: Case) -> None:
    """Check any subset of tangents, calls without a part or angles, other lengths of keys, and any head dim."""
    check(kernel, case, DEVICE, backwards=1)


def test_programs_that_take_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check sums over steps of a program and then over programs, the last of which is cut short."""
    monkeypatch.setattr(kernel, "_steps", lambda *_: 3)
    monkeypatch.setattr(kernel, "_tile", lambda d: (2, {"D": d, "ROWS": 2, "HALF": 8}))
    check(kernel, Case("layer", heads=(2, 1), lengths=(5, 5)), DEVICE, backwards=1)
    check(kernel, Case("rms", True, heads=(1, 1), lengths=(4, 3)), DEVICE, backwards=1)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("d", [16, 18])
def test_any_strides(interleaved: bool, d: int) -> None:
    """Check views of packed projections, of every other channel, of one element, against copies, in any unit."""
    case = Case("layer", interleaved, heads=(4, 4), d=d)
    primals, tangents, angles = problem(case, DEVICE)
    draw = lambda *shape: torch.randn(*shape, device=DEVICE)  # noqa: E731
    primals["q"], primals["k"] = draw(2, 7, 3, 4, d).permute(2, 0, 3, 1, 4)[:2]
    tangents["q"], tangents["k"] = draw(d, 2, 7, 4).permute(1, 3, 2, 0), draw(2, 4, 7, 2 * d)[..., ::2]
    primals["q_weight"] = draw(2 * d)[::2]
    cotangents = [draw(2, 7, 4, d).transpose(1, 2), draw(1).expand(2, 4, 7, d), draw(2, 4, 7, d), draw(2, 4, d, 7).mT]
    cos, sin = angles[0].expand(2, -1, -1), angles[1].mT.contiguous().mT

    def run(*, copied: bool) -> list[Tensor]:
        own = (lambda x: x.contiguous()) if copied else (lambda x: x)
        at = [{name: own(x) for name, x in part.items()} for part in (primals, tangents)]
        angles = (own(cos), own(sin))
        values = forward(kernel, case, at[0], at[1], angles)
        return [*values, *backward(kernel, case, list(map(own, cotangents)), (at[0], at[1], angles))]

    torch.testing.assert_close(run(copied=False), run(copied=True), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_only_what_is_needed_is_written(name: str) -> None:
    """Check that the launch has no other output, and that the gradient is the same as among all, to the last bit."""
    case = Case("layer")
    primals, tangents, angles = problem(case, DEVICE)
    d = [torch.randn_like(primals[side]) for side in ("q", "q", "k", "k")]
    at = (primals, tangents, angles)
    first, every = (backward(kernel, case, d, at) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, every))
    needs = tuple(other == name for other in ALL_NAMES)
    found = backward(kernel, case, d, at, needs)
    assert [g is not None for g in found] == list(needs)
    torch.testing.assert_close(found[ALL_NAMES.index(name)], every[ALL_NAMES.index(name)], rtol=0, atol=0)


def test_a_loss_of_queries_alone_has_zeros_for_keys() -> None:
    case = Case()
    primals, tangents, angles = problem(case, DEVICE)
    d = torch.randn(2, *primals["q"].shape, device=DEVICE).unbind(0)
    grads = backward(kernel, case, (*d, None, None), (primals, tangents, angles))
    assert all((grad != 0).any() for grad in grads[0::2])
    assert all((grad == 0).all() for grad in grads[1::2])


def test_no_rows() -> None:
    """Check that gradients of parameters are zeros."""
    case = Case()
    primals, tangents, angles = problem(case, DEVICE, batch=0)
    d = [torch.empty_like(primals[side]) for side in ("q", "q", "k", "k")]
    assert forward(kernel, case, primals, tangents, angles)[3].shape == (0, 2, 7, 16)
    grads = backward(kernel, case, d, (primals, tangents, angles))
    assert grads[2].shape == (16,) and not grads[2].any()


def test_one_launch_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check one launch for queries, keys and tangents, read from a packed projection, and one for all gradients."""
    launches: list[str] = []

    def counted(name: str) -> None:
        original = getattr(kernel, name)

        class Counter:
            def __getitem__(self, grid: tuple[int, ...]) -> object:
                launches.append(name)
                return original[grid]

        monkeypatch.setattr(kernel, name, Counter())

    counted("_forward_kernel")
    counted("_backward_kernel")
    monkeypatch.setattr(eager, "qk_norm_rope_forward", None)
    monkeypatch.setattr(eager, "qk_norm_rope_backward", None)
    leaves = [x.requires_grad_() for seed in (0, 1) for x in make_qkv(n=5, d=16, device=DEVICE, seed=seed)[:2]]
    cos, sin = fd.rope_angles((5,), 16, device=DEVICE)
    w = torch.ones(16, device=DEVICE, requires_grad=True)

    def gradients(op: object) -> tuple[Tensor, ...]:
        outs, t_outs = torch.func.jvp(op, tuple(leaves[:2]), tuple(leaves[2:]))
        return torch.autograd.grad(sum((y.sin() * t_y).sum() for y, t_y in zip(outs, t_outs)), (*leaves, w))

    ours = gradients(lambda q, k: fd.qk_norm_rope(q, k, cos, sin, w, w, impl="triton"))
    assert launches == ["_forward_kernel", "_backward_kernel"]
    plain = gradients(lambda q, k: reference.qk_norm_rope(q, k, cos, sin, w, w))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (torch.ones(1, 1, 1, 8, dtype=torch.float64), "q: expected float32, bfloat16 or float16"),
        (torch.ones(1, 1, 1, 514), "q: expected an even head dim of at most 512"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused(q: Tensor, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        fd.qk_norm_rope(q.to(DEVICE), q.to(DEVICE), None, None, impl="triton")
