"""The private names of PyTorch that the dual protocol needs, in one place.

All of them exist in torch 2.11 to 2.13. `dual_op.py` says what each is for; nothing else may import private names.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch._C import _AutoDispatchBelowAutograd as below_autograd
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction

__all__ = [
    "SingleLevelFunction",
    "apply_function",
    "below_autograd",
    "functorch_active",
    "functorch_level",
    "has_tangent",
    "is_batched",
    "is_legacy_batched",
    "make_dual",
    "redispatching",
    "unpack_dual",
]


def unpack_dual(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Primal and tangent (or None) of `x` at the current functorch level; PyTorch has one forward level, 0."""
    return torch._VF._unpack_dual(x, 0)


def has_tangent(x: torch.Tensor) -> bool:
    """Whether `x` carries a tangent at the current level; under vmap its tangent belongs to another level, unseen."""
    return not torch._C._functorch.is_batchedtensor(x) and unpack_dual(x)[1] is not None


def make_dual(primal: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    """`primal` carrying `tangent` at the current functorch level."""
    return torch._VF._make_dual(primal, tangent, 0)


def is_batched(x: torch.Tensor) -> bool:
    """Whether `x` belongs to a vmap at any level, so that no value of it can be read."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def is_legacy_batched(x: torch.Tensor) -> bool:
    """Whether `x` belongs to the older vmap behind `torch.autograd.functional` and `is_grads_batched`.

    It knows no batching rule for `alias`, which `make_dual` takes of its primal.
    """
    return bool(torch._C._functorch.is_legacy_batchedtensor(x))


def functorch_active() -> bool:
    """Whether a torch.func transform (jvp, grad, vmap, ...) is running."""
    return bool(torch._C._are_functorch_transforms_active())


def functorch_level() -> int:
    """How many torch.func transforms are nested around the caller; 0 outside of all."""
    return int(torch._C._functorch.maybe_current_level() or 0)


def apply_function(function: Any, *args: Any) -> Any:
    """`function.apply(*args)` of a `SingleLevelFunction`, allowed inside torch.func transforms too."""
    if functorch_active():
        with enable_single_level_autograd_function():
            return function.apply(*args)
    return function.apply(*args)


def redispatching() -> AbstractContextManager[Any]:
    """Inside `Function.forward`: dispatch below Autograd, with both grad modes on.

    `Function` switches both modes off; outer functorch levels would then silently record nothing.
    """
    stack = ExitStack()
    stack.enter_context(torch.enable_grad())
    stack.enter_context(_set_fwd_grad_enabled(True))
    stack.enter_context(below_autograd())
    return stack
