"""The public ops with impl="triton", end to end: kernel forward, tangents under torch.func, gradients of everything."""

from __future__ import annotations

import torch
from torch import Tensor

import fastdistill as fd
from fastdistill import reference
from fastdistill.testing import make_qkv


def mixed_gradients(pair: tuple[Tensor, Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    out, t_out = pair
    return torch.autograd.grad((out.sin() * t_out).sum(), leaves)


def test_attention_and_its_gradients_match_the_reference() -> None:
    primals, tangents = make_qkv(1, 2, 20, 24, seed=1), make_qkv(1, 2, 20, 24, seed=2)
    ours = [x.clone().requires_grad_() for x in (*primals, *tangents)]
    plain = [x.clone().requires_grad_() for x in (*primals, *tangents)]
    pair = fd.attention_jvp(*ours, tangent_grad=True, impl="triton")
    truth = torch.func.jvp(reference.attention, tuple(plain[:3]), tuple(plain[3:]))
    torch.testing.assert_close(pair, truth)
    torch.testing.assert_close(mixed_gradients(pair, ours), mixed_gradients(truth, plain))


def test_ops_run_the_kernel_under_functorch() -> None:
    q, k, v = make_qkv(1, 2, 20, 24)
    push = lambda op: torch.func.jvp(op, (q, k, v), (v, q, k))  # noqa: E731
    ours = push(lambda *a: fd.scaled_dot_product_attention(*a, impl="triton"))
    torch.testing.assert_close(ours, push(reference.attention))
    x, w = torch.randn(2, 5, 40), torch.randn(40)
    push = lambda op: torch.func.jvp(op, (x, w), (x.sin(), w.cos()))  # noqa: E731
    ours = push(lambda x, w: fd.layer_norm(x, (40,), w, impl="triton"))
    torch.testing.assert_close(ours, push(lambda x, w: reference.layer_norm(x, (40,), w)))


def test_without_tangents_an_explicit_triton_still_runs_and_differentiates() -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 2, 20, 24))
    gradients = torch.autograd.grad(fd.scaled_dot_product_attention(q, k, v, impl="triton").sin().sum(), (q, k, v))
    truth = torch.autograd.grad(reference.attention(q, k, v).sin().sum(), (q, k, v))
    torch.testing.assert_close(gradients, truth)
