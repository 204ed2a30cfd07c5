"""Every public op with every argument that it takes, its explicit pair, and its formula in plain PyTorch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdistill as fd
from fastdistill import reference

BOUNDS = torch.tensor([0, 2, 2, 3])
COS, SIN = fd.rope_angles((4,), 4, dtype=torch.float64)


class Public(NamedTuple):
    """A public op; `options` are the other arguments to call it with, one set a call.

    An option that is a dict of shapes, under the name "shapes", replaces those of `tensors` for its call.
    """

    op: Callable[..., Any]
    pair: Callable[..., Any]
    plain: Callable[..., Any]
    tensors: dict[str, tuple[int, ...]]
    optional: tuple[str, ...] = ()
    options: tuple[dict[str, Any], ...] = ({},)
    fixed: Mapping[str, Any] = MappingProxyType({})
    renamed: Mapping[str, str] = MappingProxyType({})
    op_alone: tuple[str, ...] = ()

    def calls(self) -> Iterator[tuple[dict[str, tuple[int, ...]], dict[str, Any]]]:
        """(shapes, options) of each call: with every optional tensor, with each of them alone, and with none."""
        kept = [*{frozenset(self.optional), *(frozenset({x}) for x in self.optional), frozenset()}]
        for given in self.options:
            options = {**self.fixed, **given}
            sizes = {**self.tensors, **options.pop("shapes", {})}
            for names in sorted(kept, key=sorted):
                shapes = {name: size for name, size in sizes.items() if name not in self.optional or name in names}
                if not (options.get("norm") == "none" and names):
                    yield shapes, options

    def of_op(self, tensors: dict[str, Tensor], options: dict[str, Any], **more: Any) -> tuple[Tensor, ...]:
        """The op's outputs, as a tuple."""
        return _tuple(self.op(**self._filled(tensors), **options, **more))

    def of_formula(self, tensors: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, ...]:
        """The formula's outputs, as a tuple."""
        given = {INPUT.get(name, name): x for name, x in self._filled(tensors).items()}
        return _tuple(self.plain(**given, **options))

    def of_pair(
        self, tensors: dict[str, Tensor], tangents: dict[str, Tensor], options: dict[str, Any], **more: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The pair's outputs and their tangents."""
        names = {name: self.renamed.get(name, name) for name in self.tensors}
        given = {names[name]: x for name, x in self._filled(tensors).items()}
        given |= {f"t_{names[name]}": tangents.get(name) for name in self.tensors}
        kept = {name: x for name, x in options.items() if name not in self.op_alone}
        results = self.pair(**given, **kept, **more)
        if isinstance(results[0], tuple):
            return results
        return tuple(results[::2]), tuple(results[1::2])

    def _filled(self, tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
        return {name: tensors.get(name) for name in self.tensors}

    def missing(self) -> set[str]:
        """Arguments of the op or of its pair that no call passes."""
        passed = {*self.tensors, *self.fixed, *(name for given in self.options for name in given)} - {"shapes"}
        names = {self.renamed.get(name, name) for name in self.tensors}
        in_pair = (passed - set(self.tensors) - set(self.op_alone)) | names | {f"t_{name}" for name in names}
        of_op, of_pair = (set(inspect.signature(f).parameters) - {"impl", "tangent_grad"} for f in (self.op, self.pair))
        return (of_op ^ passed) | (of_pair ^ in_pair)


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    align: str = "upper_left",
    return_lse: bool = False,
    centre: bool = False,
) -> Any:
    """The formula under the public op's argument names; in real numbers `centre` changes nothing."""
    band = (window_size[0], 0 if is_causal else window_size[1])
    options = {"scale": scale, "window": band, "lower_right": align == "lower_right"}
    out = reference.attention(query, key, value, attn_mask, **options)
    return (out, reference.attention_lse(query, key, attn_mask, **options)) if return_lse else out


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    align: str = "lower_right",
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """`attention` of each packed sequence by itself."""
    bounds_q, bounds_k = cu_seq_q.tolist(), (cu_seq_q if cu_seq_k is None else cu_seq_k).tolist()
    outs, lses = [], []
    for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:]):
        q, k, v = (x.transpose(0, 1)[None] for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        out, lse = attention(q, k, v, align=align, return_lse=True, **options)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return (torch.cat(outs), torch.cat(lses, -1)) if return_lse else torch.cat(outs)


def silu(x: Tensor, inplace: bool) -> Tensor:
    """The formula under the public op's argument names; a formula writes over nothing."""
    return reference.silu(x)


INPUT = {"input": "x"}  # PyTorch's name, ours in the pairs and the formulas
PARAMETERS = {"weight": (3,), "bias": (3,)}
MODULATED = {"x": (2, 2, 3), "scale": (2, 1, 3), "shift": (1, 2, 3)}
WINDOWS: tuple[dict[str, Any], ...] = (
    {},
    {"scale": 0.3},
    {"window_size": (1, 0)},
    {"window_size": (-1, 0), "align": "lower_right"},
    {"window_size": (-1, 0), "align": "upper_left"},
    {"return_lse": True},
    {"centre": True},
)

OPS = {
    "scaled_dot_product_attention": Public(
        fd.scaled_dot_product_attention,
        fd.attention_jvp,
        attention,
        {"query": (1, 2, 2, 2), "key": (1, 2, 3, 2), "value": (1, 2, 3, 1), "attn_mask": (2, 3)},
        optional=("attn_mask",),
        options=(
            *WINDOWS,
            {"is_causal": True},
            {"dropout_p": 0.0},
            {"enable_gqa": True, "shapes": {"key": (1, 1, 3, 2), "value": (1, 1, 3, 1)}},
        ),
        renamed={"query": "q", "key": "k", "value": "v"},
        op_alone=("dropout_p",),
    ),
    "varlen_attention": Public(
        fd.varlen_attention,
        fd.varlen_attention_jvp,
        varlen_attention,
        {"query": (3, 2, 2), "key": (3, 2, 2), "value": (3, 2, 1)},
        options=(*WINDOWS, {"enable_gqa": True, "shapes": {"key": (3, 1, 2), "value": (3, 1, 1)}}),
        fixed={"cu_seq_q": BOUNDS, "cu_seq_k": None, "max_q": 2, "max_k": 2},
        renamed={"query": "q", "key": "k", "value": "v"},
        op_alone=("centre",),
    ),
    "layer_norm": Public(
        fd.layer_norm,
        fd.layer_norm_jvp,
        reference.layer_norm,
        {"input": (2, 3), **PARAMETERS},
        ("weight", "bias"),
        ({}, {"eps": 0.1}),
        {"normalized_shape": (3,)},
        renamed=INPUT,
    ),
    "rms_norm": Public(
        fd.rms_norm,
        fd.rms_norm_jvp,
        reference.rms_norm,
        {"input": (2, 3), "weight": (3,)},
        ("weight",),
        ({}, {"eps": 0.1}),
        {"normalized_shape": (3,)},
        renamed=INPUT,
    ),
    "ada_layer_norm": Public(
        fd.ada_layer_norm,
        fd.ada_layer_norm_jvp,
        reference.ada_layer_norm,
        {**MODULATED, **PARAMETERS},
        ("weight", "bias"),
        ({}, {"eps": 0.1}),
    ),
    "ada_rms_norm": Public(
        fd.ada_rms_norm,
        fd.ada_rms_norm_jvp,
        reference.ada_rms_norm,
        {**MODULATED, "weight": (3,)},
        ("shift", "weight"),
        ({}, {"eps": 0.1}),
    ),
    "gated_residual_ada_norm": Public(
        fd.gated_residual_ada_norm,
        fd.gated_residual_ada_norm_jvp,
        reference.gated_residual_ada_norm,
        {"gate": (2, 1, 3), "h": (2, 2, 3), **MODULATED, **PARAMETERS},
        ("gate", "scale", "shift", "weight", "bias"),
        ({}, {"rms": True}, {"rms": True, "eps": 0.1}),
    ),
    "qk_norm_rope": Public(
        fd.qk_norm_rope,
        fd.qk_norm_rope_jvp,
        reference.qk_norm_rope,
        {
            "q": (1, 2, 4, 4),
            "k": (1, 1, 3, 4),
            **dict.fromkeys(("q_weight", "k_weight", "q_bias", "k_bias"), (4,)),
        },
        ("q_weight", "k_weight", "q_bias", "k_bias"),
        ({"norm": "rms"}, {"norm": "layer", "eps": 0.1}, {"norm": "none"}, {"interleaved": True}),
        {"cos": COS, "sin": SIN},
    ),
    "gelu": Public(
        fd.gelu,
        fd.gelu_jvp,
        reference.gelu,
        {"input": (2, 3)},
        options=({}, {"approximate": "tanh"}),
        renamed=INPUT,
    ),
    "silu": Public(
        fd.silu,
        fd.silu_jvp,
        silu,
        {"input": (2, 3)},
        options=({"inplace": False},),
        renamed=INPUT,
        op_alone=("inplace",),
    ),
    "swiglu": Public(fd.swiglu, fd.swiglu_jvp, reference.swiglu, {"gate": (2, 3), "up": (2, 3)}),
    "geglu": Public(
        fd.geglu,
        fd.geglu_jvp,
        reference.geglu,
        {"gate": (2, 3), "up": (2, 3)},
        options=({}, {"approximate": "tanh"}),
    ),
    "linear": Public(
        fd.linear,
        fd.linear_jvp,
        reference.linear,
        {"input": (2, 3), "weight": (2, 3), "bias": (2,)},
        ("bias",),
        renamed=INPUT,
    ),
    "timestep_embedding": Public(
        fd.timestep_embedding,
        fd.timestep_embedding_jvp,
        reference.timestep_embedding,
        {"t": (2,)},
        options=({"max_period": 100.0}, {}),
        fixed={"dim": 5},
    ),
}
IMPLS = {name: ({},) if name == "timestep_embedding" else ({"impl": "auto"}, {"impl": "torch"}) for name in OPS}


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0, lead: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Standard normal float64 tensors of these shapes, with `lead` before each."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*lead, *s, dtype=torch.float64, generator=generator) for name, s in shapes.items()}
