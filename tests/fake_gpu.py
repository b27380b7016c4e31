"""A GPU where there is none: tensors without values on a device of their own, and what a step may not do there."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode


class NotOnTheDevice(AssertionError):
    pass


def find_device() -> str:
    """``cuda``; another name where torch was built for CUDA and finds no GPU, so that its backward pass refuses."""
    with FakeTensorMode():
        weight = torch.ones(1, device="cuda", requires_grad=True)
        try:
            torch.autograd.grad(weight.sum(), weight)
        except RuntimeError:
            return "lazy"
    return "cuda"


DEVICE = find_device()


class OnTheDevice(TorchDispatchMode):
    """Raises where a tensor is made on the CPU, or comes from there: a graph cannot hold it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.scalar_tensor.default:  # a number beside a tensor, an argument of the kernel
            return result
        made = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
        if any(t.device.type == "cpu" and t.numel() for t in made):  # one without values is a mark of a checkpoint's
            raise NotOnTheDevice(f"{func.name()} makes a tensor on the CPU")
        given = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func.name().startswith(("aten::_to_copy", "aten::copy_")) and any(t.device.type == "cpu" for t in given):
            raise NotOnTheDevice(f"{func.name()} copies from the CPU")
        return result


class KernelCount(TorchDispatchMode):
    """Counts the operations that start a kernel: those that are no views, and allocate and ask nothing alone."""

    NONE = (
        "alias as_strided detach diagonal empty empty_like empty_strided expand lift_fresh narrow new_empty "
        "new_empty_strided permute scalar_tensor select slice split split_with_sizes squeeze t transpose unbind "
        "unsqueeze view _unsafe_view _reshape_alias"
    ).split()

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        if namespace == "aten" and name.split(".")[0] not in self.NONE:
            self.names[name.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.names.total()


def _autocast(plain: Any, device: str, *args: Any, **options: Any) -> Any:
    return plain("cuda" if device == DEVICE else device, *args, **options)


@contextmanager
def fake_gpu() -> Iterator[None]:
    """While active, tensors are made without values, also those on :data:`DEVICE`."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        if DEVICE != "cuda":  # what torch knows of CUDA it does not know of the other name
            optimizer = sys.modules["torch.optim.optimizer"]
            fused = [*optimizer._get_fused_kernels_supported_devices(), DEVICE]
            patch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: fused)
            devices = [*_foreach_utils._get_foreach_kernels_supported_devices(), DEVICE]
            patch.setattr(_foreach_utils, "_get_foreach_kernels_supported_devices", lambda: devices)
            patch.setattr(torch, DEVICE, torch.cpu, raising=False)  # where checkpoints look for its functions
            for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
                patch.setattr(torch, name, partial(_autocast, getattr(torch, name)))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        patch.setattr(_foreach_utils, "_foreach_supported_types", [torch.Tensor, FakeTensor])
        patch.setattr(torch, "_fused_sgd_", lambda *args, **options: None)  # torch has no shape rule for it
        yield


def move(method: nn.Module) -> nn.Module:
    """What ``method.cuda()`` does; parameters stay the same objects, as they do on a GPU."""
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.utils.weakref, "getweakrefs", lambda tensor: [])  # those of the tables of fake tensors
            return method._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
