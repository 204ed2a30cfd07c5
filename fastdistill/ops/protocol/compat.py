"""Private names of PyTorch that the dual protocol needs, in one place.

All of them exist in torch 2.11 to 2.13, and nothing else may import private names. What is a C function there is bound
here as it is, for a Python function around it would be another call on the way to every launch.
"""

from __future__ import annotations

import torch
from torch._C import _AutoDispatchBelowAutograd as below_autograd
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled as set_forward_grad
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction

__all__ = [
    "SingleLevelFunction",
    "below_autograd",
    "current_cuda_device",
    "enable_single_level_autograd_function",
    "functorch_active",
    "has_tangent",
    "is_batched",
    "is_legacy_batched",
    "make_dual",
    "maybe_current_level",
    "set_forward_grad",
    "unpack_dual",
]


# (x, 0) -> primal and tangent (or None) of x at the current functorch level; PyTorch has one forward level, 0.
unpack_dual = torch._C._VariableFunctions._unpack_dual

# (primal, tangent, 0) -> the primal carrying the tangent at the current functorch level.
make_dual = torch._C._VariableFunctions._make_dual

# Whether a torch.func transform (jvp, grad, vmap, ...) is running.
functorch_active = torch._C._are_functorch_transforms_active

# How many torch.func transforms are nested around the caller; None or 0 outside of all.
maybe_current_level = torch._C._functorch.maybe_current_level

# The index of the thread's GPU. The public one asks each time whether CUDA is initialised, which a tensor's GPU is.
current_cuda_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def has_tangent(x: torch.Tensor) -> bool:
    """Return whether `x` carries a tangent at the current level; one of another level, as under vmap, is unseen."""
    return not torch._C._functorch.is_batchedtensor(x) and unpack_dual(x, 0)[1] is not None


def is_batched(x: torch.Tensor) -> bool:
    """Return whether `x` belongs to a vmap at any level, so that no value of it can be read."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def is_legacy_batched(x: torch.Tensor) -> bool:
    """Return whether `x` belongs to the older vmap behind `torch.autograd.functional` and `is_grads_batched`.

    It knows no batching rule for `alias`, which `make_dual` takes of its primal.
    """
    return bool(torch._C._functorch.is_legacy_batchedtensor(x))
