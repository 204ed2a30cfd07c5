"""Define a small problem for each op of the torch path, and for a network under `fd.jvp`.

The counting benchmarks run these. Shapes are small, but large enough that an op takes its usual road: attention has
several blocks of rows, linear layers have their two matmuls. Every problem runs in three modes:

    forward             the output and its tangent, with all tangents given and no graph
    forward + primal    the same with a graph for the output, and the gradients of the output, as in a MeanFlow step
    forward + mixed     the same with a graph for both, and the gradients of both, as where a loss sees the tangent
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdistill as fd
from fastdistill.models.dit import DiT
from fastdistill.testing import make_packed, make_qkv

MODES = ("forward", "forward + primal", "forward + mixed")
TOKENS, CHANNELS = (2, 128), 256
PairFunction = Callable[..., tuple[Any, Any]]
ops: Any = fd  # Arguments are spread from tuples, whose lengths a type checker can't count.


class Problem(NamedTuple):
    """Hold an op with its inputs.

    Args:
        pair: (primals, tangents, tangent_grad) -> (out, t_out), each a tensor or a tuple of tensors.
        primals, tangents: float32 inputs, in the same order and of the same shapes.
    """

    pair: PairFunction
    primals: tuple[Tensor, ...]
    tangents: tuple[Tensor, ...]


def problem(name: str) -> Problem:
    """Return the problem of this name, one of `NAMES`, with random inputs of a fixed seed."""
    if name not in PROBLEMS:
        raise ValueError(f"problem: expected one of {', '.join(NAMES)}, got {name!r}")
    return PROBLEMS[name]()


def run_mode(task: Problem, mode: str) -> None:
    """Run the problem once, in one of `MODES`."""
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == "forward":
        with torch.no_grad():
            task.pair(task.primals, task.tangents, False)
        return
    mixed = mode == "forward + mixed"
    leaves = [x.detach().requires_grad_() for x in task.primals]
    leaf_tangents = [x.detach().requires_grad_(mixed) for x in task.tangents]
    out, t_out = (_tuple(x) for x in task.pair(leaves, leaf_tangents, mixed))
    roots, wanted = (*out, *t_out) if mixed else out, [*leaves, *leaf_tangents] if mixed else leaves
    torch.autograd.grad(roots, wanted, [torch.ones_like(x) for x in roots], allow_unused=True)


def _tuple(x: Any) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def _normal(*shapes: Sequence[int]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Draw primals of these shapes, and tangents of the same shapes."""
    generator = torch.Generator().manual_seed(0)
    primals, tangents = (tuple(torch.randn(*shape, generator=generator) for shape in shapes) for _ in range(2))
    return primals, tangents


def _attention(**options: Any) -> Problem:
    kv_heads, mask = options.pop("kv_heads", None), options.pop("mask", False)
    qkv, t_qkv = (make_qkv(1, 4, 256, 64, kv_heads=kv_heads, seed=seed) for seed in (0, 1))
    if mask:
        options["attn_mask"] = torch.arange(256) < 200

    def pair(primals: Sequence[Tensor], tangents: Sequence[Tensor], tangent_grad: bool) -> tuple[Tensor, Tensor]:
        out, t_out = ops.attention_jvp(*primals, *tangents, **options, tangent_grad=tangent_grad, impl="torch")
        return out, t_out

    return Problem(pair, qkv, t_qkv)


def _varlen() -> Problem:
    packed, (cu_n, _, longest, _) = make_packed((200, 56), (200, 56), heads=4)
    primals = tuple(x[0].transpose(0, 1) for x in packed)
    tangents = tuple(torch.roll(x, 1, 0) for x in primals)

    def pair(primals: Sequence[Tensor], tangents: Sequence[Tensor], tangent_grad: bool) -> tuple[Any, Any]:
        lengths = (cu_n, None, longest, longest)
        return ops.varlen_attention_jvp(*primals, *lengths, *tangents, tangent_grad=tangent_grad, impl="torch")

    return Problem(pair, primals, tangents)


def _norm(rms: bool) -> Problem:
    function = ops.rms_norm_jvp if rms else ops.layer_norm_jvp
    primals, tangents = _normal((*TOKENS, CHANNELS), *[(CHANNELS,)] * (1 if rms else 2))
    names = ("weight", "bias")

    def pair(primals: Sequence[Tensor], tangents: Sequence[Tensor], tangent_grad: bool) -> tuple[Tensor, Tensor]:
        (x, *affine), (t_x, *t_affine) = primals, tangents
        given = dict(zip(names, affine)) | {f"t_{name}": t for name, t in zip(names, t_affine)}
        return function(x, t_x, (CHANNELS,), **given, tangent_grad=tangent_grad, impl="torch")

    return Problem(pair, primals, tangents)


def _ada_norm(rms: bool) -> Problem:
    function = ops.ada_rms_norm_jvp if rms else ops.ada_layer_norm_jvp
    primals, tangents = _normal((*TOKENS, CHANNELS), *[(TOKENS[0], 1, CHANNELS)] * 2)

    def pair(primals: Sequence[Tensor], tangents: Sequence[Tensor], tangent_grad: bool) -> tuple[Tensor, Tensor]:
        return function(*primals, *tangents, tangent_grad=tangent_grad, impl="torch")

    return Problem(pair, primals, tangents)


def _gated_norm() -> Problem:
    stream, sample = (*TOKENS, CHANNELS), (TOKENS[0], 1, CHANNELS)
    primals, tangents = _normal(stream, sample, stream, sample, sample)

    def pair(primals: Sequence[Tensor], tangents: Sequence[Tensor], tangent_grad: bool) -> tuple[Any, Any]:
        return ops.gated_residual_ada_norm_jvp(*primals, *tangents, tangent_grad=tangent_grad, impl="torch")

    return Problem(pair, primals, tangents)


def _qk_norm_rope() -> Problem:
    primals, tangents = _normal((2, 4, 64, 64), (2, 4, 64, 64), (64,), (64,))
    angles = ops.rope_angles((8, 8), 64)

    def pair(primals: Sequence[Tensor], tangents: Sequence[Tensor], tangent_grad: bool) -> tuple[Any, Any]:
        (q, k, *weights), (t_q, t_k, t_q_weight, t_k_weight) = primals, tangents
        given: dict[str, Any] = {"t_q_weight": t_q_weight, "t_k_weight": t_k_weight, "tangent_grad": tangent_grad}
        return ops.qk_norm_rope_jvp(q, k, t_q, t_k, *angles, *weights, **given, impl="torch")

    return Problem(pair, primals, tangents)


def _activation(function: Any, inputs: int, *options: str) -> Problem:
    primals, tangents = _normal(*[(*TOKENS, CHANNELS)] * inputs)

    def pair(primals: Sequence[Tensor], tangents: Sequence[Tensor], tangent_grad: bool) -> tuple[Tensor, Tensor]:
        return function(*primals, *tangents, *options, tangent_grad=tangent_grad, impl="torch")

    return Problem(pair, primals, tangents)


def _linear(rows: int) -> Problem:
    (x, *affine), (t_x, *_) = _normal((rows, CHANNELS), (512, CHANNELS), (512,))

    def pair(primals: Sequence[Tensor], tangents: Sequence[Tensor], tangent_grad: bool) -> tuple[Tensor, Tensor]:
        return ops.linear_jvp(primals[0], tangents[0], *affine, tangent_grad=tangent_grad, impl="torch")

    return Problem(pair, (x,), (t_x,))


def _timestep_embedding() -> Problem:
    primals, tangents = _normal((TOKENS[0],))

    def pair(primals: Sequence[Tensor], tangents: Sequence[Tensor], tangent_grad: bool) -> tuple[Tensor, Tensor]:
        return ops.timestep_embedding_jvp(*primals, *tangents, CHANNELS)

    return Problem(pair, primals, tangents)


def _network() -> Problem:
    torch.manual_seed(0)
    net = DiT(channels=4, patch_size=2, width=64, depth=2, heads=4, num_classes=10, qk_norm=True, pos="rope")
    parameters = tuple(x.detach() for x in net.parameters())
    names = [name for name, _ in net.named_parameters()]
    (x, *_), (v, *_) = _normal((2, 4, 16, 16))
    t, labels = torch.tensor([0.7, 0.4]), torch.tensor([1, 2])

    def pair(primals: Sequence[Tensor], tangents: Sequence[Tensor], tangent_grad: bool) -> tuple[Tensor, Tensor]:
        weights = dict(zip(names, primals[1:]))

        def along(x: Tensor, t: Tensor) -> Tensor:
            return torch.func.functional_call(net, weights, (x, t, torch.zeros_like(t), labels))

        u, du_dt = fd.jvp(along, (primals[0], t), (tangents[0], 1.0), tangent_grad=tangent_grad)
        return u, du_dt

    return Problem(pair, (x, *parameters), (v,))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "attention": _attention,
    "attention, causal": lambda: _attention(is_causal=True),
    "attention, window": lambda: _attention(window_size=(64, 64)),
    "attention, key mask": lambda: _attention(mask=True),
    "attention, grouped": lambda: _attention(kv_heads=2, enable_gqa=True),
    "varlen_attention": _varlen,
    "layer_norm": lambda: _norm(rms=False),
    "rms_norm": lambda: _norm(rms=True),
    "ada_layer_norm": lambda: _ada_norm(rms=False),
    "ada_rms_norm": lambda: _ada_norm(rms=True),
    "gated_residual_ada_norm": _gated_norm,
    "qk_norm_rope": _qk_norm_rope,
    "gelu": lambda: _activation(ops.gelu_jvp, 1),
    "gelu, tanh": lambda: _activation(ops.gelu_jvp, 1, "tanh"),
    "silu": lambda: _activation(ops.silu_jvp, 1),
    "swiglu": lambda: _activation(ops.swiglu_jvp, 2),
    "geglu": lambda: _activation(ops.geglu_jvp, 2),
    "linear": lambda: _linear(256),
    "linear, few rows": lambda: _linear(4),
    "timestep_embedding": _timestep_embedding,
    "DiT under fd.jvp": _network,
}
NAMES = tuple(PROBLEMS)
