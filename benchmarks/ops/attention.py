"""Define the benchmark of attention: its inputs, its costs, and every provider, with a tangent or without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdistill import ops, reference
from fastdistill.benchmarks.ops import packages
from fastdistill.benchmarks.ops.common_providers import (
    DIFFERENCES,
    JVP,
    compiled,
    dual_provider,
    ours,
    plain_floor,
)
from fastdistill.benchmarks.ops.memory import free_bytes
from fastdistill.benchmarks.ops.timed_op import (
    PEER,
    Dual,
    OpForms,
    Provider,
    Tensors,
    TimedCase,
    by_differences,
    by_jvp,
    few,
    last_tokens,
)
from fastdistill.ops.protocol.cases import every_case

MATH_MATRICES = {"forward": 8, "primal": 10, "mixed": 24}  # (N, M) matrices of 4 bytes that math holds at its peak
PADDED = next(row for row in every_case() if row.name == "attention")
SMALL = 512  # tokens at the parity gate
EAGER_FLOPS = 2e13  # the most that our plain torch code is given to do on a GPU
COMPILED_TOKENS = 4608  # longer shapes are left to the others: Inductor fuses no attention, so they only cost time


def _make(case: TimedCase, draw: Callable[..., Tensor]) -> Tensors:
    b, h, n, m, d = (case.size(name) for name in ("batch", "heads", "n", "m", "d"))
    return draw(b, h, n, d), draw(b, h, m, d), draw(b, h, m, d)


def _small(case: TimedCase) -> TimedCase:
    most = 32 if case.quick else SMALL
    sizes = {name: few(case.size(name), most) for name in ("n", "m")}
    return case.resized(batch=1, heads=min(2, case.size("heads")), **sizes)


def _flops(case: TimedCase, floor: bool) -> float:
    sizes = {letter: case.size(name) for letter, name in zip("BHNMD", ("batch", "heads", "n", "m", "d"))}
    return PADDED.flops(sizes, "plain" if floor and case.mode == "forward" else case.mode)


def _pair(case: TimedCase, impl: str) -> Dual:
    def dual(primals: Tensors, tangents: Sequence[Tensor | None], mixed: bool) -> tuple[Tensors, Tensors]:
        o, t_o = ops.attention_jvp(*primals, *tangents, tangent_grad=mixed, impl=impl)
        return (o,), (t_o,)

    return dual


def _sdpa(case: TimedCase) -> Callable[..., Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v)


def _written_out(case: TimedCase) -> Callable[..., Tensor]:
    return lambda q, k, v: torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


def _math() -> Any:
    return sdpa_kernel(SDPBackend.MATH)


def _common(op: OpForms, device: torch.device) -> list[Provider]:
    def too_large(case: TimedCase) -> str | None:
        return matrices_too_large(case, device)

    def refuses_compiled(case: TimedCase) -> str | None:
        if max(case.size("n"), case.size("m")) > COMPILED_TOKENS:
            return f"compiled up to {COMPILED_TOKENS} tokens only"
        return too_large(case)

    def too_slow(case: TimedCase) -> str | None:
        slow = device.type == "cuda" and _flops(case, False) > EAGER_FLOPS
        return "plain torch would take seconds a call here: the kernels are for that" if slow else None

    by_impl = ours(op, device)
    by_impl[0] = replace(by_impl[0], refuses=too_slow)
    return [
        *by_impl,
        dual_provider(f"{JVP}, math", PEER, lambda case: by_jvp(_sdpa(case)), refuses=too_large, context=_math),
        compiled(_written_out, refuses_compiled),
        dual_provider(DIFFERENCES, PEER, lambda case: by_differences(_sdpa(case))),
    ]


def matrices_too_large(case: TimedCase, device: torch.device) -> str | None:
    """Return why a CPU can't hold the (N, M) matrices of a case, or None if it can.

    On a CPU the question must be asked, because running out of memory stops the machine. A GPU simply tries, so None is
    returned.
    """
    if device.type == "cuda":
        return None
    b, h, n, m = (case.size(name) for name in ("batch", "heads", "n", "m"))
    needed, free = 4 * MATH_MATRICES[case.mode] * b * h * n * m, free_bytes(device)
    if free is None or needed <= 0.5 * free:
        return None
    return f"out of memory: about {needed / 2**30:.0f} GiB of (N, M) matrices"


def _more(device: torch.device) -> list[Provider]:
    cuda = None if device.type == "cuda" else "needs a CUDA device"
    jvp_flash = packages.find("jvp_flash_attention.jvp_attention", device)
    xformers = packages.find("xformers.ops", device)
    flash = packages.find("flash_attn", device)

    def by_jvp_flash(case: TimedCase) -> Dual:
        attend = jvp_flash.module.JVPAttn.fwd_dual
        return by_jvp(lambda q, k, v: attend(q, k, v))

    def by_xformers(case: TimedCase) -> Callable[..., Tensor]:
        return _tokens_first(xformers.module.memory_efficient_attention)

    def by_flash(case: TimedCase) -> Callable[..., Tensor]:
        return _tokens_first(flash.module.flash_attn_func)

    def sdpa_by(name: str, backend: SDPBackend) -> Provider:
        return plain_floor(name, _sdpa, absent=cuda, refuses=_sixteen_bits, context=lambda: sdpa_kernel(backend))

    on_cpu = [plain_floor("SDPA, no tangent", _sdpa)] if device.type == "cpu" else []
    return [
        dual_provider(
            "jvp-flash-attention", PEER, by_jvp_flash, absent=jvp_flash.absent, refuses=limit_of_jvp_flash_attention
        ),
        *on_cpu,
        sdpa_by("SDPA flash, no tangent", SDPBackend.FLASH_ATTENTION),
        sdpa_by("SDPA cuDNN, no tangent", SDPBackend.CUDNN_ATTENTION),
        plain_floor("flash-attn, no tangent", by_flash, absent=flash.absent, refuses=_sixteen_bits),
        plain_floor("xformers, no tangent", by_xformers, absent=xformers.absent),
    ]


def _tokens_first(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an attention over (B, H, N, D), made by views alone of one over (B, N, H, D)."""
    return lambda q, k, v: attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _sixteen_bits(case: TimedCase) -> str | None:
    return None if case.torch_dtype.itemsize == 2 else "bfloat16 and float16 only"


def limit_of_jvp_flash_attention(case: TimedCase) -> str | None:
    """Return why version 0.14 can't run a case: what it asserts, and what its backward leaves out."""
    n, m, d = (case.size(name) for name in ("n", "m", "d"))
    if d not in (16, 32, 64, 128, 256):
        return "head dims 16, 32, 64, 128 and 256 only"
    if n % 32 or n != m:
        return "self-attention of lengths that 32 divides only"
    return "its backward drops the cotangent of the tangent" if case.mode == "mixed" else None


def _last(name: str, x: Tensor) -> Tensor:
    """Return the part that the last queries of the last head depend on; they need all keys of that head."""
    return last_tokens(name, x) if name == "q" else x[-1:, -1:]


ATTENTION = OpForms(
    name="attention",
    primals=("q", "k", "v"),
    moving=("q", "k", "v"),
    results=("o",),
    like=("q",),
    make=_make,
    reference=lambda case: reference.attention,
    own=_sdpa,
    pair=_pair,
    flops=_flops,
    small=_small,
    last=_last,
    common=_common,
    more=_more,
)
