"""`None` in a dispatcher schema, whose results are all tensors: an empty tensor of one dimension stands for it."""

from __future__ import annotations

from torch import Tensor


def packed(tensor: Tensor | None, like: Tensor, *, contiguous: bool = True) -> Tensor:
    """`None` as the empty tensor that stands for it in a dispatcher schema."""
    if tensor is None:
        return like.new_empty(0)
    return tensor.contiguous() if contiguous else tensor


def is_absent(tensor: Tensor) -> bool:
    """Whether `tensor` is the stand-in for `None`."""
    return tensor.dim() == 1 and tensor.shape[0] == 0


def unpacked(tensor: Tensor) -> Tensor | None:
    """Inverse of `packed`."""
    return None if is_absent(tensor) else tensor
