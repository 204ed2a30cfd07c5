"""Dual protocol: one launch for primal and tangent, under every PyTorch transform.

`torch.autograd.Function.jvp` can't fuse: its forward runs before it sees a tangent. So each op here is a dispatcher op
with a Python kernel on the `Autograd` key, which sees primal and tangent together:

    name(primals, attrs, tangent_grad)                      what the public function calls: unpacks duals, calls ...
    name_dual(primals, tangents, attrs, tangent_grad)       ... this, once, and makes its results dual again
    name_backward(cotangents, saved, attrs, needs)          the reverse mode of name_dual

An op has one or more outputs, each with a tangent. A missing tangent is `None`, a structural zero. A result that a call
doesn't produce (no tangent, an output or a residual that nobody asked for) is an empty tensor inside the dispatcher,
whose schemas are fixed, and `None` everywhere else.

The tangent of a gradient is fused, too: the backward once more, with its cotangents exchanged. Other higher derivatives
(a tangent of a tangent, the gradient of a gradient) take `math` and `math_backward`: the same formulas in plain,
endlessly differentiable PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.protocol import compat
from fastdistill.ops.protocol.autograd import apply_function, reverse_mode, reverse_mode_of_backward
from fastdistill.ops.protocol.context import settled
from fastdistill.ops.protocol.pair import Needs, Pairs, flat, is_absent, pair_of, paired

Spec = tuple[tuple[int, ...], torch.dtype] | None
Tensors = Sequence[Tensor | None]

LIBRARY = torch.library.Library("fastdistill", "FRAGMENT")


@dataclass(frozen=True)
class DualOp:
    """Op family under the dual protocol; `pair.py` says what pairs are.

    Args:
        name: the op's name in `torch.ops.fastdistill`.
        primals: names of the tensor arguments, in the op's one order; a trailing "?" marks an optional one.
        outputs: names of the outputs.
        attrs: the schema of the other arguments, the last of which is `impl`: "float scale, str impl".
        residuals: names of what `forward` saves for the backward besides its outputs.
        forward: (inputs, attrs, tangent_grad) -> (outputs, residuals); runs below autograd.
        backward: (cotangents, inputs, (outputs, residuals), attrs, needs) -> gradients; runs below autograd.
        math: (inputs, attrs) -> outputs, differentiable plain PyTorch.
        math_backward: (cotangents, inputs, attrs, needs) -> gradients, differentiable plain PyTorch.
        native: (primals, attrs) -> outputs when nothing is differentiated forward, or None to use `forward`.
        specs: (inputs, attrs, tangent_grad) -> shape and dtype of each output and of each residual.
        wanted: attrs -> for each output, whether `name` returns it; all, unless told otherwise.
        broadcastable: primals whose batch dimension may be 1 where that of the others isn't.
        unfoldable: primals without a leading batch dimension.
        saves_outputs: whether `backward` wants the outputs and their tangents; else it gets None, and none is kept.
    """

    name: str
    primals: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: str
    residuals: tuple[str, ...]
    forward: Callable[[Any, Sequence[Any], bool], tuple[Any, Tensors]]
    backward: Callable[[Any, Any, Any, Sequence[Any], Needs], Any]
    math: Callable[[Any, Sequence[Any]], Pairs]
    math_backward: Callable[[Any, Any, Sequence[Any], Needs], Pairs]
    native: Callable[[Any, Sequence[Any]], Tensors | None]
    specs: Callable[[Any, Sequence[Any], bool], tuple[Sequence[Spec], Sequence[Spec]]]
    wanted: Callable[[Sequence[Any]], Sequence[bool]] | None = None
    broadcastable: frozenset[str] = frozenset()
    unfoldable: frozenset[str] = frozenset()
    saves_outputs: bool = True
    op: Any = field(init=False)
    op_dual: Any = field(init=False)
    op_backward: Any = field(init=False)
    _function: Any = field(init=False)
    _again: Any = field(init=False)

    def __post_init__(self) -> None:
        names = [name.rstrip("?") for name in self.primals]
        primals = [f"Tensor{'?' if name.endswith('?') else ''} {name.rstrip('?')}" for name in self.primals]
        tangents = [f"Tensor? t_{name}" for name in names]
        cotangents = [f"Tensor? {d}{name}" for d in ("d_", "dt_") for name in self.outputs]
        saved = [f"Tensor {t}{name}" for t in ("", "t_") for name in self.outputs]
        saved += [f"Tensor {name}" for name in self.residuals]
        flag = "bool tangent_grad"
        self._define("", [*primals, self.attrs, flag], len(self.outputs), self._on_autograd, self._plain)
        self._define("_dual", [*primals, *tangents, self.attrs, flag], len(saved), self._dual_on_autograd, self._dual)
        self._define(
            "_backward",
            [*cotangents, *primals, *tangents, *saved, self.attrs, "bool[] needs"],
            2 * len(names),
            self._backward_on_autograd,
            self._backward,
        )
        for suffix, fake, vmap in (
            ("", self._fake, self._vmap),
            ("_dual", self._fake_dual, self._vmap_dual),
            ("_backward", self._fake_backward, self._vmap_backward),
        ):
            torch.library.register_fake(f"fastdistill::{self.name}{suffix}", fake, lib=LIBRARY)
            torch.library.register_vmap(f"fastdistill::{self.name}{suffix}", vmap, lib=LIBRARY)
        object.__setattr__(self, "_function", reverse_mode(self))
        object.__setattr__(self, "_again", reverse_mode_of_backward(self))

    def _define(self, suffix: str, arguments: Sequence[str], returns: int, on_autograd: Any, below: Any) -> None:
        name = self.name + suffix
        LIBRARY.define(f"{name}({', '.join(arguments)}) -> ({', '.join(['Tensor'] * returns)})")
        LIBRARY.impl(name, on_autograd, "Autograd")
        LIBRARY.impl(name, below, "CompositeExplicitAutograd")
        object.__setattr__(self, f"op{suffix}", getattr(torch.ops.fastdistill, name).default)  # found once

    # What the public functions call.

    def __call__(self, primals: Tensors, attrs: Sequence[Any], tangent_grad: bool) -> list[Tensor | None]:
        """Return the outputs of the op on (possibly dual) tensors."""
        # What the dispatcher would end in, without its detour; a compiler must see the op.
        if not (compat.functorch_active() or torch.compiler.is_compiling()):
            native = self._native_where_still(primals, attrs)
            if native is not None:
                return list(native)
        results = self.op(*primals, *attrs, tangent_grad)
        results = (results,) if isinstance(results, Tensor) else results
        return [None if x.dim() == 1 and x.shape[0] == 0 else x for x in results]  # as `is_absent`

    def pair(self, inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> list[Any]:
        """Return the outputs of the op on explicit tangents; their tangents are zero where every tangent is None."""
        primals, tangents = zip(*inputs)
        results = self.op_dual(*primals, *tangents, *attrs, tangent_grad)
        outs, t_outs, _ = self._split_results(results)
        still = all(t is None for t in tangents)
        return paired(outs, [torch.zeros_like(x) for x in outs] if still else t_outs)

    # name: unpack duals, call name_dual once, make its results dual.

    def _on_autograd(self, *args: Any) -> Any:
        n = len(self.primals)
        primals, attrs = args[:n], args[n:-1]
        if not compat.functorch_active():
            native = self._native_where_still(primals, attrs)
            if native is not None:
                return _single([_packed(x, primals[0]) for x in native])
        results = self._dual_on_autograd(*primals, *[None] * n, *attrs, args[-1])
        return self._kept(results[: len(self.outputs)], attrs)

    def _native_where_still(self, primals: Tensors, attrs: Sequence[Any]) -> Tensors | None:
        """Return the native op's outputs where nothing is differentiated forward, if there is a native op."""
        if any([x is not None and compat.unpack_dual(x, 0)[1] is not None for x in primals]):
            return None
        return self.native(primals, attrs)

    def _plain(self, *args: Any) -> Any:
        n = len(self.primals)
        primals, attrs = args[:n], args[n:-1]
        outs = self.native(primals, attrs)
        if outs is None:
            outs = self._dual(*primals, *[None] * n, *attrs, args[-1])[: len(self.outputs)]
        return self._kept([_packed(x if x is None else x.contiguous(), args[0]) for x in outs], attrs)

    def _fake(self, *args: Any) -> Any:
        n = len(self.primals)
        return self._kept(self._fake_dual(*args[:n], *[None] * n, *args[n:])[: len(self.outputs)], args[n:-1])

    def _kept(self, outs: Sequence[Tensor], attrs: Sequence[Any]) -> Any:
        """Return those outputs that `name` returns."""
        if self.wanted is not None:
            outs = [x if keep else outs[0].new_empty(0) for x, keep in zip(outs, self.wanted(attrs), strict=True)]
        return _single(outs)

    # name_dual

    def _split_dual(self, args: Sequence[Any]) -> tuple[Tensors, Tensors, Sequence[Any], bool]:
        n = len(self.primals)
        return args[:n], args[n : 2 * n], args[2 * n : -1], args[-1]

    def _split_results(self, results: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return outputs, their tangents, residuals."""
        n, results = len(self.outputs), list(results)
        return results[:n], results[n : 2 * n], results[2 * n :]

    def _dual_on_autograd(self, *args: Any) -> Any:
        n = len(self.primals)
        duals = _unpack(args[: 2 * n])
        if all([t is None for _, t in duals]):
            return self._recorded(args)
        primals, tangents, attrs, tangent_grad = self._split_dual(args)
        if any([t is not None for t in tangents]):
            return self._tangent_of_tangent(primals, tangents, attrs)
        given = [None if t is None else t.to(p.dtype) for p, t in duals[:n]]
        bare = [p for p, _ in duals[:n]]
        kept = primals if tangent_grad else None
        outs, t_outs, residuals = self._split_results(self._recorded((*bare, *given, *attrs, tangent_grad), kept))
        if any(map(compat.is_legacy_batched, outs)):  # no dual has a batched primal there: the primals' own are not
            outs, *_ = self._split_results(self._recorded((*bare, *[None] * n, *attrs, tangent_grad), kept))
        absent = [outs[0].new_empty(0) for _ in outs]
        return (*[compat.make_dual(x, t, 0) for x, t in zip(outs, t_outs)], *absent, *residuals)

    def _tangent_of_tangent(self, primals: Any, tangents: Tensors, attrs: Sequence[Any]) -> Any:
        if attrs[-1] == "triton":
            raise NotImplementedError(
                f"{self.name}: expected one level of forward AD with impl='triton', got a tangent of a tangent, "
                "which has no fused form; impl='torch' computes it exactly"
            )
        results = [_packed(x, primals[0]) for x in flat(self.math(paired(primals, tangents), attrs))]
        return (*results, *[primals[0].new_empty(0) for _ in self.residuals])

    def _recorded(self, args: Sequence[Any], duals: Tensors | None = None) -> Any:
        """Call `name_dual` of tensors without tangents of their own, with its reverse mode where somebody needs it.

        `duals` are the primals with the tangents that the caller took off: the reverse mode keeps them, so that the
        gradient taken from it moves as its arguments do.
        """
        if _needs_grad(args[: 2 * len(self.primals)]):
            return apply_function(self._function, *args, duals)
        with compat.below_autograd():
            return self.op_dual(*args)

    def _dual(self, *args: Any) -> tuple[Tensor, ...]:
        n, like = len(self.primals), args[0]
        inputs = list(map(pair_of, zip(args[:n], args[n : 2 * n])))
        outputs, residuals = settled(like.device, self.forward, inputs, args[2 * n : -1], args[-1])
        outs, t_outs = zip(*outputs)
        return tuple([like.new_empty(0) if x is None else x.contiguous() for x in (*outs, *t_outs, *residuals)])

    def _fake_dual(self, *args: Any) -> tuple[Tensor, ...]:
        primals, tangents, attrs, tangent_grad = self._split_dual(args)
        like: Any = primals[0]
        outs, residuals = self.specs(paired(primals, tangents), attrs, tangent_grad)
        t_outs = [None if all(t is None for t in tangents) else spec for spec in outs]
        return tuple(
            like.new_empty(0) if s is None else like.new_empty(s[0], dtype=s[1]) for s in (*outs, *t_outs, *residuals)
        )

    # name_backward

    def _split_backward(self, args: Sequence[Any]) -> tuple[list[Any], ...]:
        """Split into cotangents (d, dt), primals, tangents, outputs, their tangents, residuals, and the rest."""
        n, k, r = len(self.primals), len(self.outputs), len(self.residuals)
        parts, rest = [], list(args)
        for length in (k, k, n, n, k, k, r):
            parts.append(rest[:length])
            rest = rest[length:]
        return (*parts, rest)

    def _backward_on_autograd(self, *args: Any) -> Any:
        d_outs, dt_outs, primals, tangents, *_, (*attrs, needs) = self._split_backward(args)
        tensors = (*d_outs, *dt_outs, *primals, *tangents)
        if any([t is not None for _, t in _unpack(tensors)]):
            grads = self._moving_gradients(*args)
            if grads is None:
                grads = self.second_order_gradients(d_outs, dt_outs, primals, tangents, attrs, needs)
            return tuple([_packed(g, primals[0]) for g in grads])
        if _needs_grad(tensors):  # somebody may differentiate again, as torch.func.grad always might
            return apply_function(self._again, *args)
        with compat.below_autograd():
            return self.op_backward(*args)

    def second_order_gradients(
        self, d_outs: Any, dt_outs: Any, primals: Any, tangents: Any, attrs: Sequence[Any], needs: Sequence[bool]
    ) -> list[Any]:
        """Return the gradients of primals and then of tangents, differentiable themselves, by `math_backward`."""
        n, inputs = len(self.primals), paired(primals, tangents)
        wanted = list(zip(needs[:n], needs[n:], strict=True))
        return flat(self.math_backward(paired(d_outs, dt_outs), inputs, attrs, wanted))

    def _moving_gradients(self, *args: Any) -> Tensors | None:
        """Return gradients of duals with their tangents, by two fused calls; None where that takes `math_backward`.

        The gradient Jᵀd has the tangent Jᵀt_d + (D Jᵀ)[t_x] d. Second derivatives are symmetric, so that this is the
        gradient of <t_d, y> + <d, t_y> with respect to the primals: the reverse mode of `name_dual` once more.
        """
        d_outs, dt_outs, primals, tangents, outs, t_outs, residuals, (*attrs, needs) = self._split_backward(args)
        tensors, k, n = (*d_outs, *primals), len(d_outs), len(primals)
        if _needs_grad(tensors) or any(x is not None for x in (*dt_outs, *tangents)):
            return None
        (d, t_d), (x, t_x), (o, t_o) = (zip(*map(_aligned, part)) for part in (d_outs, primals, outs))
        t_o = tuple(saved if t is None else t for saved, t in zip(t_outs, t_o))
        moving = any(t is not None for t in t_x)
        if moving and self.saves_outputs and any(map(is_absent, t_o)):
            return None
        if any(map(compat.is_legacy_batched, (z for z in (*d, *t_d, *x, *t_x) if z is not None))):
            return None
        none, rest = (None,) * n, (*o, *t_o, *residuals, *attrs, [*needs[:n], *[False] * n])
        backward = self.op_backward
        grads = backward(*d, *none[:1] * k, *x, *none, *rest)
        t_grads = backward(*t_d, *(d if moving else none[:1] * k), *x, *(t_x if moving else none), *rest)
        both = [compat.make_dual(g, t, 0) if need else None for g, t, need in zip(grads, t_grads, needs[:n])]
        return [*both, *none]

    def _backward(self, *args: Any) -> tuple[Tensor, ...]:
        d_outs, dt_outs, primals, tangents, *saved, (*attrs, needs) = self._split_backward(args)
        n, like = len(primals), primals[0]
        outs, t_outs, residuals = ([None if is_absent(x) else x for x in part] for part in saved)
        cotangents, inputs, wanted = paired(d_outs, dt_outs), paired(primals, tangents), list(zip(needs[:n], needs[n:]))
        kept = (paired(outs, t_outs), residuals)
        grads = settled(like.device, self.backward, cotangents, inputs, kept, attrs, wanted)
        return tuple([like.new_empty(0) if g is None else g.contiguous() for g in flat(grads)])

    def _fake_backward(self, *args: Any) -> tuple[Tensor, ...]:
        _, _, primals, tangents, *_, (*_, needs) = self._split_backward(args)
        return tuple(
            x.new_empty(x.shape) if need else primals[0].new_empty(0)
            for x, need in zip((*primals, *tangents), needs, strict=True)
        )

    # vmap folds the new dimension into the batch; where it can't, it loops.

    def _vmap(self, info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        return self._batched(self.op, self._fake, info, in_dims, args, len(self.primals))

    def _vmap_dual(self, info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        return self._batched(self.op_dual, self._fake_dual, info, in_dims, args, 2 * len(self.primals))

    def _vmap_backward(self, info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        return _looped(self.op_backward, self._fake_backward, info, in_dims, args)

    def _batched(self, op: Any, fake: Any, info: Any, in_dims: Sequence[Any], args: Sequence[Any], tensors: int) -> Any:
        names = [name.rstrip("?") for name in self.primals] * 2
        if any(dim is not None and names[i] in self.unfoldable for i, dim in enumerate(in_dims[:tensors])):
            return _looped(op, fake, info, in_dims, args)
        first, dim = args[0], in_dims[0]
        batch = first.shape[0] if dim is None else first.movedim(dim, 0).shape[1]
        folded = [
            x
            if x is None or name in self.unfoldable or (dim is None and name in self.broadcastable and x.shape[0] == 1)
            else _fold(x, dim, info.batch_size, batch)
            for x, dim, name in zip(args[:tensors], in_dims[:tensors], names)
        ]
        parts = [
            (x, None) if is_absent(x) else (x.reshape(info.batch_size, batch, *x.shape[1:]), 0)
            for x in _tuple(op(*folded, *args[tensors:]))
        ]
        return _single([x for x, _ in parts]), _single([d for _, d in parts])


def _packed(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Return what stands for `None` in a dispatcher schema, or the tensor itself."""
    return like.new_empty(0) if tensor is None else tensor


def _tuple(results: Any) -> tuple[Any, ...]:
    """Return the results as a tuple; PyTorch returns a single one bare."""
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _single(results: Sequence[Any]) -> Any:
    """Return a single result bare: the inverse of `_tuple`."""
    return tuple(results) if len(results) != 1 else results[0]


def _unpack(tensors: Tensors) -> list[tuple[Any, Tensor | None]]:
    return [(None, None) if x is None else compat.unpack_dual(x, 0) for x in tensors]


def _aligned(x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return primal and tangent in the primal's dtype."""
    primal, tangent = (None, None) if x is None else compat.unpack_dual(x, 0)
    return primal, tangent if tangent is None or primal is None else tangent.to(primal.dtype)


def _needs_grad(tensors: Tensors) -> bool:
    return torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in tensors])


def _fold(x: Tensor, dim: int | None, size: int, batch: int) -> Tensor:
    """Merge the mapped dimension into the leading batch dimension."""
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.expand(size, batch, *x.shape[2:]).reshape(size * batch, *x.shape[2:])


def _looped(op: Any, fake: Any, info: Any, in_dims: Sequence[Any], args: Sequence[Any]) -> Any:
    """Make one call an example: for what can't be folded, such as per-example gradients of a shared weight.

    Without examples the op's `fake` tells the shapes.
    """
    if info.batch_size == 0:
        one = [
            x.new_empty(x.movedim(d, 0).shape[1:]) if isinstance(x, Tensor) and d is not None else x
            for x, d in zip(args, in_dims)
        ]
        outs = [x.new_empty((0, *x.shape)) for x in _tuple(fake(*one))]
        return _single(outs), _single([0] * len(outs))
    rows = [
        op(*(x if d is None or not isinstance(x, Tensor) else x.select(d, i) for x, d in zip(args, in_dims)))
        for i in range(info.batch_size)
    ]
    outs = [torch.stack(column) for column in zip(*map(_tuple, rows))]
    return _single(outs), _single([0] * len(outs))
