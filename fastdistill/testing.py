"""Share what tests and benchmarks need: input makers, float64 truths by autodiff, and the one tolerance rule."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Accuracy is tested on every machine's CPU, and on its GPU where it has one.
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FLOAT64_SLACK = 1e-12  # The truth itself is rounded in float64, so there the rule has no room of its own.


def assert_accurate(actual: Tensor, truth: Tensor, baseline: Tensor, *, name: str, order: int = 1) -> None:
    """Assert err(actual) <= factor * err(baseline) + 2 * eps * max|truth|, where err is the largest absolute error.

    truth is float64; baseline is plain PyTorch in the tested dtype, whose eps counts. factor is 2. It is 3 for second
    order (`order=2`: gradients of tangents), where a baseline sums fewer roundings than a fused formula. If the
    baseline is float64 too, 1e-12 takes the place of 2 * eps. Any value that isn't finite fails.
    """
    if truth.dtype != torch.float64:
        raise TypeError(f"truth of {name}: expected float64, got {truth.dtype}")
    if actual.shape != truth.shape or baseline.shape != truth.shape:
        shapes = f"actual {tuple(actual.shape)}, baseline {tuple(baseline.shape)}, truth {tuple(truth.shape)}"
        raise AssertionError(f"{name}: shapes differ: {shapes}")
    for role, tensor in (("actual", actual), ("baseline", baseline), ("truth", truth)):
        if not tensor.isfinite().all():
            raise AssertionError(f"{name}: {role} has {int((~tensor.isfinite()).sum())} non-finite entries")
    error, baseline_error = _largest_error(actual, truth), _largest_error(baseline, truth)
    factor, slack, largest = _rule(truth, baseline, order)
    allowed = factor * baseline_error + slack * largest
    if not error <= allowed:
        raise AssertionError(
            f"{name}: error {error:.3e} > {allowed:.3e} = {factor} * {baseline_error:.3e} (PyTorch in {baseline.dtype})"
            f" + {slack:.1e} * {largest:.3e} (largest |truth|)"
        )


def errors_against(actual: Tensor, truth: Tensor, baseline: Tensor, order: int = 1) -> tuple[float, float]:
    """Return the largest error of `actual`, and the error that `assert_accurate` allows it, as shares of max|truth|.

    If the truth is all zeros, both are absolute. The error is infinite if `actual` has another shape or isn't finite.
    """
    factor, slack, largest = _rule(truth, baseline, order)
    size = largest if largest > 0 else 1.0
    allowed = (factor * _largest_error(baseline, truth) + slack * largest) / size
    if actual.shape != truth.shape or not actual.isfinite().all():
        return math.inf, allowed
    return _largest_error(actual, truth) / size, allowed


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Return ||actual - truth|| / ||truth|| (Frobenius, in float64), or the absolute error if the truth is zero."""
    truth = truth.double()
    size = float(truth.norm())
    return float((actual.double() - truth).norm()) / (size if size > 0 else 1.0)


def _rule(truth: Tensor, baseline: Tensor, order: int) -> tuple[int, float, float]:
    """Return the factor of the baseline's error, the slack, and the largest |truth|, which the slack multiplies."""
    slack = FLOAT64_SLACK if baseline.dtype == torch.float64 else 2 * torch.finfo(baseline.dtype).eps
    return 2 if order == 1 else 3, slack, float(truth.abs().max()) if truth.numel() else 0.0


def _largest_error(actual: Tensor, truth: Tensor) -> float:
    return float((actual.double() - truth).abs().max()) if truth.numel() else 0.0


def make_qkv(
    batch: int = 2,
    heads: int = 4,
    n: int = 63,
    d: int = 64,
    *,
    kv_heads: int | None = None,
    m: int | None = None,
    dv: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str = "bhnd",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw standard normal q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) in float64, and round them to `dtype`.

    The layout "bhnd" is contiguous. "bnhd" is a transposed view of (B, N, H, D). "packed" gives views of one (B, N, 3,
    H, D) tensor, as a fused projection leaves them. Another seed gives matching tangents.
    """
    kv_heads, m, dv = kv_heads or heads, m or n, dv or d
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)

    if layout == "packed":
        if (kv_heads, m, dv) != (heads, n, d):
            raise ValueError("layout: 'packed' needs k and v in the shape of q")
        q, k, v = normal(batch, n, 3, heads, d).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v
    shapes = ((heads, n, d), (kv_heads, m, d), (kv_heads, m, dv))
    if layout == "bnhd":
        q, k, v = (normal(batch, length, h, width).transpose(1, 2) for h, length, width in shapes)
        return q, k, v
    if layout == "bhnd":
        q, k, v = (normal(batch, h, length, width) for h, length, width in shapes)
        return q, k, v
    raise ValueError(f"layout: expected 'bhnd', 'bnhd' or 'packed', got {layout!r}")


def make_packed(
    queries: Sequence[int], keys: Sequence[int], heads: int = 4, d: int = 64, *, spare: int = 0, **sizes: Any
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, int, int]]:
    """Draw (q, k, v) of packed sequences with these numbers of queries and keys, and (cu_n, cu_m, max_n, max_m).

    q is (1, H, T, D), drawn like that of `make_qkv`. `spare` tokens lie before the first sequence, and as many after
    the last.
    """
    bounds = [torch.tensor([spare, *lengths]).cumsum(0, dtype=torch.int32) for lengths in (queries, keys)]
    cu_n, cu_m = (x.to(sizes.get("device", "cpu")) for x in bounds)
    n, m = (sum(lengths) + 2 * spare for lengths in (queries, keys))
    return make_qkv(1, heads, n, d, m=m, **sizes), (cu_n, cu_m, max(queries), max(keys))


def reference_jvp(
    fn: Callable[..., Tensor], primals: Mapping[str, Tensor | None], tangents: Mapping[str, Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Return (out, t_out) of `fn(**primals)` by `torch.func.jvp`; an absent or None tangent is zero."""
    names, values, directions = _moving(primals, tangents)
    if not names:
        out = fn(**primals)
        return out, torch.zeros_like(out)

    def along(*moving: Tensor) -> Tensor:
        return fn(**{**primals, **dict(zip(names, moving, strict=True))})

    result = torch.func.jvp(along, tuple(values), tuple(directions))
    return result[0], result[1]


def reference_vjp(
    fn: Callable[..., Tensor],
    primals: Mapping[str, Tensor | None],
    tangents: Mapping[str, Tensor | None],
    d_out: Tensor,
    dt_out: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return gradients of <d_out, out> + <dt_out, t_out> by reverse over forward mode, from decomposed formulas.

    The keys are the names of the floating-point primals, and `t_` + name for every tangent.
    """
    leaves = {name: x for name, x in primals.items() if x is not None and x.is_floating_point()}
    leaves |= {f"t_{name}": x for name, x in tangents.items() if x is not None and dt_out is not None}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    point = {name: leaves.get(name, x) for name, x in primals.items()}
    if dt_out is None:
        loss = (fn(**point) * d_out).sum()
    else:
        out, t_out = reference_jvp(fn, point, {name: leaves.get(f"t_{name}") for name in tangents})
        loss = (out * d_out).sum() + (t_out * dt_out).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))


def _moving(
    primals: Mapping[str, Tensor | None], tangents: Mapping[str, Tensor | None]
) -> tuple[list[str], list[Tensor], list[Tensor]]:
    names, values, directions = [], [], []
    for name, tangent in tangents.items():
        primal = primals[name]
        if tangent is not None and primal is not None:
            names.append(name)
            values.append(primal)
            directions.append(tangent)
    return names, values, directions


def cast(tensors: Mapping[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Cast the floating-point entries to another dtype; masks and absent entries stay as they are."""
    return {name: x.to(dtype) if x is not None and x.is_floating_point() else x for name, x in tensors.items()}


class MemoryRecorder(TorchDispatchMode):
    """Record what is allocated inside: `alive` bytes now, `peak` bytes, and the `largest` tensor in elements.

    Only new storages count: views, in-place results and `out=` buffers don't. Memory that a kernel allocates inside
    itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.peak = 0
        self.alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {id_ for x in _tensors((args, kwargs)) if (id_ := _storage_key(x)) is not None}
        for x in _tensors(result):
            key = _storage_key(x)
            if key is not None and key not in inputs and key not in self._known:
                self._track(x, key)
        return result

    def _track(self, x: Tensor, key: int) -> None:
        storage = x.untyped_storage()
        size = storage.nbytes()
        self.largest = max(self.largest, size // x.element_size())
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _storage_key(x: Tensor) -> int | None:
    return None if x.device.type == "meta" else x.untyped_storage()._cdata


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]
