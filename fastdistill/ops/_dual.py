"""The dual protocol: one launch for primal and tangent, under every PyTorch transform.

`torch.autograd.Function.jvp` can't fuse: its forward runs before it sees a tangent. So each op here is a dispatcher op
with a Python kernel on the `Autograd` key, which sees primal and tangent together:

    name(primals, attrs, tangent_grad)                      what the public function calls: unpacks duals, calls ...
    name_dual(primals, tangents, attrs, tangent_grad)       ... this, once, and makes its results dual again
    name_backward(cotangents, saved, attrs, needs)          the reverse mode of name_dual

A missing tangent is `None`, a structural zero. A result that a call doesn't produce (no tangent, a residual that nobody
asked for) is an empty tensor inside the dispatcher, whose schemas are fixed, and `None` everywhere else.

Higher derivatives (a tangent of a tangent, the gradient of a gradient) take `math` and `math_backward`: the same
formulas in plain, endlessly differentiable PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdistill import _compat
from fastdistill.ops._choice import without_autocast

Spec = tuple[tuple[int, ...], torch.dtype] | None
Tensors = Sequence[Tensor | None]

LIBRARY = torch.library.Library("fastdistill", "FRAGMENT")


def packed(tensor: Tensor | None, like: Tensor) -> Tensor:
    """`None` as the empty tensor that stands for it in a dispatcher schema."""
    return like.new_empty(0) if tensor is None else tensor.contiguous()


def is_absent(tensor: Tensor) -> bool:
    """Whether `tensor` is the stand-in for `None`."""
    return tensor.dim() == 1 and tensor.shape[0] == 0


def unpacked(tensor: Tensor) -> Tensor | None:
    """Inverse of `packed`."""
    return None if is_absent(tensor) else tensor


@dataclass(frozen=True)
class DualOp:
    """One op family under the dual protocol. Every callable takes tensors in the order of `primals`, then attributes.

    Args:
        name: the op's name in `torch.ops.fastdistill`.
        primals: names of the tensor arguments; a trailing "?" marks an optional one.
        attrs: the schema of the other arguments, e.g. "bool is_causal, float scale, str impl".
        residuals: names of what `forward` saves for the backward besides its outputs.
        forward: (primals, tangents, attrs, tangent_grad) -> (out, t_out | None, residuals); runs below autograd.
        backward: (dout, dt_out | None, primals, tangents, out, t_out, residuals, attrs, needs) -> gradients of primals
            and tangents; runs below autograd.
        math: (primals, tangents, attrs) -> (out, t_out | None), differentiable plain PyTorch.
        math_backward: as `backward`, without out, t_out and residuals, differentiable plain PyTorch.
        native: (primals, attrs) -> out when nothing is differentiated forward, or None to use `forward`.
        specs: (primals, tangents, attrs, tangent_grad) -> shape and dtype of out and of each residual.
        broadcastable: primals whose batch dimension may be 1 where that of the others isn't.
        unfoldable: primals without a leading batch dimension.
    """

    name: str
    primals: tuple[str, ...]
    attrs: str
    residuals: tuple[str, ...]
    forward: Callable[..., tuple[Tensor, Tensor | None, Tensors]]
    backward: Callable[..., Tensors]
    math: Callable[..., tuple[Tensor, Tensor | None]]
    math_backward: Callable[..., Tensors]
    native: Callable[..., Tensor | None]
    specs: Callable[..., tuple[Spec, Sequence[Spec]]]
    broadcastable: frozenset[str] = frozenset()
    unfoldable: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        names = [name.rstrip("?") for name in self.primals]
        primals = [f"Tensor{'?' if name.endswith('?') else ''} {name.rstrip('?')}" for name in self.primals]
        tangents = [f"Tensor? t_{name}" for name in names]
        saved = ["Tensor out", "Tensor t_out", *(f"Tensor {name}" for name in self.residuals)]
        two = "(Tensor, Tensor" + ", Tensor" * len(self.residuals) + ")"
        grads = "(" + ", ".join(["Tensor"] * 2 * len(names)) + ")"
        flag = "bool tangent_grad"
        self._define(self.name, [*primals, self.attrs, flag], "Tensor", self._on_autograd, self._plain)
        self._define(
            f"{self.name}_dual", [*primals, *tangents, self.attrs, flag], two, self._dual_on_autograd, self._dual
        )
        self._define(
            f"{self.name}_backward",
            ["Tensor? dout", "Tensor? dt_out", *primals, *tangents, *saved, self.attrs, "bool[] needs"],
            grads,
            self._backward_on_autograd,
            self._backward,
        )
        torch.library.register_fake(f"fastdistill::{self.name}", self._fake, lib=LIBRARY)
        torch.library.register_fake(f"fastdistill::{self.name}_dual", self._fake_dual, lib=LIBRARY)
        torch.library.register_fake(f"fastdistill::{self.name}_backward", self._fake_backward, lib=LIBRARY)
        torch.library.register_vmap(f"fastdistill::{self.name}", self._vmap, lib=LIBRARY)
        torch.library.register_vmap(f"fastdistill::{self.name}_dual", self._vmap_dual, lib=LIBRARY)
        torch.library.register_vmap(f"fastdistill::{self.name}_backward", self._vmap_backward, lib=LIBRARY)
        object.__setattr__(self, "_function", _reverse_mode(self))

    def _define(self, name: str, arguments: Sequence[str], returns: str, on_autograd: Any, below: Any) -> None:
        LIBRARY.define(f"{name}({', '.join(arguments)}) -> {returns}")
        LIBRARY.impl(name, on_autograd, "Autograd")
        LIBRARY.impl(name, below, "CompositeExplicitAutograd")

    def _op(self, suffix: str = "") -> Any:
        return getattr(torch.ops.fastdistill, self.name + suffix).default

    # What the public functions call.

    def __call__(self, primals: Tensors, attrs: Sequence[Any], tangent_grad: bool) -> Tensor:
        """The op on (possibly dual) tensors."""
        result: Tensor = self._op()(*primals, *attrs, tangent_grad)
        return result

    def pair(
        self, primals: Tensors, tangents: Tensors, attrs: Sequence[Any], tangent_grad: bool
    ) -> tuple[Tensor, Tensor]:
        """The op on explicit tangents: (out, t_out), `t_out` zero when every tangent is None."""
        out, t_out, *_ = self._op("_dual")(*primals, *tangents, *attrs, tangent_grad)
        return out, torch.zeros_like(out) if all(t is None for t in tangents) else t_out

    # name: unpack duals, call name_dual once, make its result dual.

    def _on_autograd(self, *args: Any) -> Tensor:
        n = len(self.primals)
        primals, attrs, tangent_grad = args[:n], args[n:-1], args[-1]
        duals = _unpack(primals)
        if all(t is None for _, t in duals) and not _compat.functorch_active():
            out = self.native(primals, attrs)
            if out is not None:
                return out
        out, *_ = self._op("_dual")(*primals, *[None] * n, *attrs, tangent_grad)
        return out

    def _plain(self, *args: Any) -> Tensor:
        n = len(self.primals)
        primals, attrs, tangent_grad = args[:n], args[n:-1], args[-1]
        out = self.native(primals, attrs)
        out = self._dual(*primals, *[None] * n, *attrs, tangent_grad)[0] if out is None else out
        return out.contiguous()

    def _fake(self, *args: Any) -> Tensor:
        n = len(self.primals)
        return self._fake_dual(*args[:n], *[None] * n, *args[n:])[0]

    # name_dual

    def _split_dual(self, args: Sequence[Any]) -> tuple[Tensors, Tensors, Sequence[Any], bool]:
        n = len(self.primals)
        return args[:n], args[n : 2 * n], args[2 * n : -1], args[-1]

    def _dual_on_autograd(self, *args: Any) -> Any:
        primals, tangents, attrs, tangent_grad = self._split_dual(args)
        duals = _unpack((*primals, *tangents))
        if all(t is None for _, t in duals):
            if _needs_grad((*primals, *tangents)):
                return _compat.apply_function(self._function, *args)  # type: ignore[attr-defined]
            with _compat.below_autograd():
                return self._op("_dual")(*args)
        residuals = [primals[0].new_empty(0) for _ in self.residuals]  # type: ignore[union-attr]
        if any(t is not None for t in tangents):  # a tangent of a tangent
            out, t_out = self.math(primals, tangents, attrs)
            return (out, packed(t_out, out), *residuals)
        given = [None if t is None or p is None else t.to(p.dtype) for p, t in duals[: len(primals)]]
        out, t_out, *residuals = self._op("_dual")(
            *[None if x is None else p for x, (p, _) in zip(primals, duals)], *given, *attrs, tangent_grad
        )
        return (_compat.make_dual(out, t_out), out.new_empty(0), *residuals)

    def _dual(self, *args: Any) -> tuple[Tensor, ...]:
        primals, tangents, attrs, tangent_grad = self._split_dual(args)
        assert primals[0] is not None
        with without_autocast(primals[0].device):
            out, t_out, residuals = self.forward(primals, tangents, attrs, tangent_grad)
        return tuple(packed(x, out) for x in (out, t_out, *residuals))

    def _fake_dual(self, *args: Any) -> tuple[Tensor, ...]:
        primals, tangents, attrs, tangent_grad = self._split_dual(args)
        like = primals[0]
        assert like is not None
        out, residuals = self.specs(primals, tangents, attrs, tangent_grad)
        t_out = None if all(t is None for t in tangents) else out
        return tuple(
            like.new_empty(0) if s is None else like.new_empty(s[0], dtype=s[1]) for s in (out, t_out, *residuals)
        )

    # name_backward

    def _split_backward(self, args: Sequence[Any]) -> tuple[Any, ...]:
        n, r = len(self.primals), len(self.residuals)
        primals, tangents = args[2 : 2 + n], args[2 + n : 2 + 2 * n]
        out, t_out = args[2 + 2 * n : 4 + 2 * n]
        residuals = args[4 + 2 * n : 4 + 2 * n + r]
        return args[0], args[1], primals, tangents, out, t_out, residuals, args[4 + 2 * n + r : -1], args[-1]

    def _backward_on_autograd(self, *args: Any) -> Any:
        dout, dt_out, primals, tangents, *_, attrs, needs = self._split_backward(args)
        tensors = (dout, dt_out, *primals, *tangents)
        if _needs_grad(tensors) or any(t is not None for _, t in _unpack(tensors)):
            grads = self.math_backward(dout, dt_out, primals, tangents, attrs, needs)
            return tuple(primals[0].new_empty(0) if g is None else g for g in grads)
        with _compat.below_autograd():
            return self._op("_backward")(*args)

    def _backward(self, *args: Any) -> tuple[Tensor, ...]:
        dout, dt_out, primals, tangents, out, t_out, residuals, attrs, needs = self._split_backward(args)
        with without_autocast(primals[0].device):
            grads = self.backward(
                torch.zeros_like(out) if dout is None else dout,
                dt_out,
                primals,
                tangents,
                out,
                unpacked(t_out),
                [unpacked(r) for r in residuals],
                attrs,
                needs,
            )
        return tuple(packed(g, out) for g in grads)

    def _fake_backward(self, *args: Any) -> tuple[Tensor, ...]:
        _, _, primals, tangents, *_, needs = self._split_backward(args)
        return tuple(
            x.new_empty(x.shape) if need else primals[0].new_empty(0)
            for x, need in zip((*primals, *tangents), needs, strict=True)
        )

    # vmap folds the new dimension into the batch; where it can't, it loops.

    def _vmap(self, info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        return self._batched(self._op(), info, in_dims, args, len(self.primals))

    def _vmap_dual(self, info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        return self._batched(self._op("_dual"), info, in_dims, args, 2 * len(self.primals))

    def _vmap_backward(self, info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        return _looped(self._op("_backward"), info, in_dims, args)

    def _batched(self, op: Any, info: Any, in_dims: Sequence[Any], args: Sequence[Any], tensors: int) -> Any:
        names = [name.rstrip("?") for name in self.primals] * 2
        if any(dim is not None and names[i] in self.unfoldable for i, dim in enumerate(in_dims[:tensors])):
            return _looped(op, info, in_dims, args)
        first, dim = args[0], in_dims[0]
        batch = first.shape[0] if dim is None else first.movedim(dim, 0).shape[1]
        folded = [
            x
            if x is None or name in self.unfoldable or (dim is None and name in self.broadcastable and x.shape[0] == 1)
            else _fold(x, dim, info.batch_size, batch)
            for x, dim, name in zip(args[:tensors], in_dims[:tensors], names)
        ]
        result = op(*folded, *args[tensors:])
        many = isinstance(result, tuple)
        parts = [
            (x, None) if is_absent(x) else (x.reshape(info.batch_size, batch, *x.shape[1:]), 0)
            for x in (result if many else (result,))
        ]
        return (tuple(x for x, _ in parts), tuple(d for _, d in parts)) if many else parts[0]


def _reverse_mode(op: DualOp) -> type[_compat.SingleLevelFunction]:
    """The autograd function of `name_dual`; its forward redispatches below Autograd, to the next functorch level."""
    n = len(op.primals)

    class Dual(_compat.SingleLevelFunction):
        @staticmethod
        def forward(*args: Any) -> Any:
            with _compat.redispatching():
                return op._op("_dual")(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            primals, tangents, attrs, tangent_grad = op._split_dual(inputs)
            out, t_out, *residuals = output
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*residuals, *(() if tangent_grad else (t_out,)))
            saved = t_out if tangent_grad else t_out.new_empty(0)
            kept = tangents if tangent_grad else [None] * n
            ctx.save_for_backward(*primals, *kept, out, saved, *residuals)
            ctx.attrs = attrs

        @staticmethod
        def backward(ctx: Any, dout: Tensor | None, dt_out: Tensor | None, *_: None) -> Any:
            if dout is None and dt_out is None:
                return (None,) * len(ctx.needs_input_grad)
            needs = [ctx.needs_input_grad[i] and not (i >= n and dt_out is None) for i in range(2 * n)]
            saved = list(ctx.saved_tensors)
            if dt_out is None:
                saved[n : 2 * n] = [None] * n
            grads = op._op("_backward")(dout, dt_out, *saved, *ctx.attrs, needs)
            return (*(g if need else None for g, need in zip(grads, needs)), *[None] * (len(ctx.attrs) + 1))

    Dual.__name__ = Dual.__qualname__ = f"{op.name.title().replace('_', '')}Dual"
    return Dual


def _unpack(tensors: Tensors) -> list[tuple[Tensor | None, Tensor | None]]:
    return [(None, None) if x is None else _compat.unpack_dual(x) for x in tensors]


def _needs_grad(tensors: Tensors) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _fold(x: Tensor, dim: int | None, size: int, batch: int) -> Tensor:
    """Merge the mapped dimension into the leading batch dimension."""
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.expand(size, batch, *x.shape[2:]).reshape(size * batch, *x.shape[2:])


def _looped(op: Any, info: Any, in_dims: Sequence[Any], args: Sequence[Any]) -> Any:
    """One call an example: for what can't be folded, such as per-example gradients of a shared weight."""
    rows = [
        op(*(x if d is None or not isinstance(x, Tensor) else x.select(d, i) for x, d in zip(args, in_dims)))
        for i in range(info.batch_size)
    ]
    if isinstance(rows[0], Tensor):
        return torch.stack(rows), 0
    outs = [torch.stack(column) for column in zip(*rows)]
    return tuple(outs), tuple(0 for _ in outs)
