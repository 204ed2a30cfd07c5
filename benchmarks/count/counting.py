"""Count launched kernels and moved bytes: of PyTorch's ops by a dispatch mode, of Triton's kernels at their launch.

A PyTorch op is one kernel unless it is a view or an allocation. It reads or writes each tensor once; of a broadcast
tensor, only the stored elements count. A Triton launch moves each tensor among its arguments once. Less is not
possible, and a kernel that reads a tile again finds it in a cache, if all goes well. So the bytes are those of a
machine without reuse between kernels, and with perfect reuse inside each.

On CPU tensors Triton's kernels are not run: the results are garbage then, and the counts are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from fastdistill.kernels import configs
from fastdistill.ops.protocol.dual_op import DualOp

TORCH_ONLY = ("linear",)  # The op has no kernel of ours, and refuses impl="triton".
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_efficientzerotensor"}
OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_"}  # These work in place without reading the old values.


class Kernel(NamedTuple):
    """Describe one launch: the name of an op, or of a Triton kernel as module.name, and the bytes that it moves."""

    name: str
    bytes: int


class Counter(TorchDispatchMode):
    """Collect the `kernels` that run inside; our ops are opened, and run as `impl`, "torch" or "triton".

    Triton's kernels are added by `counted`.
    """

    def __init__(self, impl: str) -> None:
        super().__init__()
        self.impl = impl
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastdistill":
            return self._opened(func, args)
        with self:  # Where autograd is below them, linear, matmul and their like come undecomposed.
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        result = func(*args, **kwargs)
        if launches(func, (args, kwargs), result):
            name = func.overloadpacket.__name__
            self.kernels.append(Kernel(name, moved(name, func._schema.is_mutable, (args, kwargs), result)))
        return result

    def _opened(self, func: Any, args: Sequence[Any]) -> Any:
        """Run an op of ours inside the mode, which is off while it handles an op, and would miss its calls."""
        name = func.overloadpacket.__name__
        family = max((n for n in dual_ops() if name == n or name.startswith(f"{n}_")), key=len)
        op, part = dual_ops()[family], name.removeprefix(family)
        run: Callable[..., Any] = {"": op._plain, "_dual": op._dual, "_backward": op._backward}[part]
        given = list(args)
        if family not in TORCH_ONLY:
            names = [argument.name for argument in func._schema.arguments]
            given[names.index("impl")] = self.impl
        with self:
            return run(*given)


def dual_ops() -> dict[str, DualOp]:
    """Return every op under the dual protocol, by name."""
    modules = [module for name, module in sys.modules.items() if name.startswith("fastdistill.ops.")]
    return {x.name: x for module in modules for x in vars(module).values() if isinstance(x, DualOp)}


def launches(func: Any, inputs: Any, result: Any) -> bool:
    """Return whether an op was a kernel, and not an allocation, a view, or arithmetic with structural zeros."""
    if func.overloadpacket.__name__ in ALLOCATIONS:
        return False
    if func._schema.is_mutable:
        return True
    # Meta tensors only find out shapes.
    real = [x for x in _tensors(result) if not x._is_zerotensor() and not x.is_meta]
    known = {x.untyped_storage()._cdata for x in _tensors(inputs) if not x._is_zerotensor()}
    return any(x.untyped_storage()._cdata not in known for x in real)


def moved(name: str, mutable: bool, inputs: Any, result: Any) -> int:
    """Return the bytes that an op reads and writes."""
    read = sum(size(x) for x in _tensors(inputs))
    written = sum(size(x) for x in _tensors(result))
    return read if mutable and name in OVERWRITES else read + written


def size(x: Tensor) -> int:
    """Return the bytes of the stored elements: a broadcast dimension has one, a structural zero none."""
    if x._is_zerotensor():
        return 0
    elements = 1
    for length, stride in zip(x.shape, x.stride()):
        elements *= length if stride or not length else 1
    return elements * x.element_size()


@contextmanager
def counted(impl: str, device: str = "cpu") -> Iterator[list[Kernel]]:
    """Collect the kernels that run inside on tensors of this device, with our ops as `impl`."""
    counter = Counter(impl)
    with ExitStack() as stack:
        if impl == "triton":
            stack.enter_context(_launches_noted(counter.kernels, device))
        stack.enter_context(counter)
        yield counter.kernels


@contextmanager
def _launches_noted(kernels: list[Kernel], device: str) -> Iterator[None]:
    """Record Triton's launches. On a GPU they also happen; on a CPU the configs are those of a Hopper GPU."""
    launch = JITFunction.run

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        tensors = _tensors(args)
        # Several descriptors may be parts of one tensor.
        different = {(x.data_ptr(), x.shape, x.stride()): x for x in tensors}
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.__name__.strip('_').removesuffix('_kernel')}"
        kernels.append(Kernel(name, sum(map(size, different.values()))))
        if device != "cpu":
            launch(self, *args, grid=grid, warmup=warmup, **options)

    with ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(configs.forced(90, {}))
        stack.enter_context(mock.patch.object(JITFunction, "run", note))
        yield


def _tensors(tree: Any) -> list[Tensor]:
    """Return the tensors of a tree, including those to which tensor descriptors point."""
    leaves = [getattr(x, "base", x) if type(x).__name__ == "TensorDescriptor" else x for x in tree_leaves(tree)]
    return [x for x in leaves if isinstance(x, Tensor)]
