"""PyTorch's own samples and error inputs (OpInfo) of the ops that it has too: values, tangents, mixed gradients.

Importing PyTorch's tables takes about five seconds and the package `expecttest`; the samples themselves under ten.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

import fastdistill as fd
from fastdistill import reference

with warnings.catch_warnings():  # one says that the package hypothesis is not installed
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

# Ours, and plain PyTorch; layer_norm's is decomposed, as the second derivatives of PyTorch's own are less exact.
TWINS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "nn.functional.scaled_dot_product_attention": (
        fd.scaled_dot_product_attention,
        F.scaled_dot_product_attention,
    ),
    "nn.functional.layer_norm": (fd.layer_norm, reference.layer_norm),
    "nn.functional.rms_norm": (fd.rms_norm, F.rms_norm),
    "nn.functional.gelu": (fd.gelu, F.gelu),
    "nn.functional.silu": (fd.silu, F.silu),
    "nn.functional.linear": (fd.linear, F.linear),
}
INFOS = {info.name + info.variant_test_name: info for info in op_db if info.name in TWINS}
REAL = [name for name, info in INFOS.items() if torch.float64 in info.dtypes]
MOST = 40  # samples an op; today's longest list has 25


def samples(name: str) -> Iterator[Any]:
    for i, sample in enumerate(INFOS[name].sample_inputs("cpu", torch.float64, requires_grad=False)):
        assert i < MOST
        yield sample


def refused(name: str, sample: Any, *, moving: bool) -> str | None:
    """Return the argument by which we refuse a sample that PyTorch takes."""
    if "attention" not in name:
        return None
    return "dropout_p" if sample.kwargs.get("dropout_p") and moving else None


def as_function(op: Callable[..., Any], sample: Any, **more: Any) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return the op as a function of the sample's floating-point tensors, and these."""
    leaves, tree = tree_flatten(((sample.input, *sample.args), sample.kwargs))
    at = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]

    def run(*values: Tensor) -> Tensor:
        filled = list(leaves)
        for i, value in zip(at, values):
            filled[i] = value
        args, kwargs = tree_unflatten(filled, tree)
        torch.manual_seed(0)  # of dropout
        return op(*args, **kwargs, **more)

    return run, [leaves[i] for i in at]


def gradients(run: Callable[..., Tensor], point: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in point]
    with sdpa_kernel(SDPBackend.MATH):
        out = run(*leaves)
        return (out.detach(), *torch.autograd.grad(out.sin().sum(), leaves))


def mixed(run: Callable[..., Tensor], point: list[Tensor], direction: list[Tensor]) -> tuple[Tensor, ...]:
    """Return output, tangent, and the gradients of a loss of both with respect to the point and the direction."""
    leaves = [x.clone().requires_grad_() for x in (*point, *direction)]
    with sdpa_kernel(SDPBackend.MATH):
        out, t_out = jvp(run, tuple(leaves[: len(point)]), tuple(leaves[len(point) :]))
        return (out.detach(), t_out.detach(), *torch.autograd.grad((out.sin() * t_out).sum(), leaves))


def assert_same(ours: Any, plain: Any, what: str) -> None:
    """Check that they agree, NaN for NaN too: some samples have a negative eps."""
    message = lambda text: f"{what}: {text}"  # noqa: E731
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10, equal_nan=True, msg=message)


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("name", REAL)
def test_values_tangents_and_gradients_of_every_sample(name: str, impl: str) -> None:
    ours, plain = TWINS[INFOS[name].name]
    for sample in samples(name):
        (run, point), (truth, _) = as_function(ours, sample, impl=impl), as_function(plain, sample)
        direction = [torch.randn_like(x) for x in point]
        for moving in (False, True):
            argument = refused(name, sample, moving=moving or impl != "auto")
            if argument is not None:
                with pytest.raises((ValueError, NotImplementedError), match=argument):
                    mixed(run, point, direction) if moving else gradients(run, point)
            elif moving:
                assert_same(mixed(run, point, direction), mixed(truth, point, direction), sample.summary())
            else:
                assert_same(gradients(run, point), gradients(truth, point), sample.summary())


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("name", [name for name in REAL if INFOS[name].error_inputs_func is not None])
def test_what_pytorch_refuses_we_refuse_by_name(name: str, impl: str) -> None:
    for error in INFOS[name].error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises((TypeError, ValueError), match=r"^\w+: expected"):
            TWINS[name][0](sample.input, *sample.args, **sample.kwargs, impl=impl)


def test_complex_numbers_are_refused() -> None:
    (name,) = set(INFOS) - set(REAL)
    for sample in INFOS[name].sample_inputs("cpu", torch.complex64):
        with pytest.raises(TypeError, match="input: expected a floating-point tensor"):
            fd.silu(sample.input)
