"""What the Triton kernels share: which tensors they take, for which modules they stand in, where they are launched."""

import contextlib
import os

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


try:
    import triton
except ImportError:
    triton = None


def on_gpu(t: Tensor) -> bool:
    """Whether kernels can run where `t` is; Triton's interpreter takes the CPU for a GPU."""
    return t.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def are_preferred(t: Tensor) -> bool:
    """Whether kernels are what "auto" stands for where `t` is: on a GPU with Triton, but for float64."""
    return triton is not None and t.is_cuda and t.dtype != torch.float64


def is_unhooked(module: nn.Module) -> bool:
    """Whether nobody wants to see the calls of this module, or of one in it, so that a kernel may take its place."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not _has_any_global_hook() and not any(
        "forward" in part.__dict__ or any(getattr(part, name) for name in hooks) for part in module.modules()
    )


def overwritable(output: Tensor, producer: nn.Module) -> Tensor:
    """A module's output, for a kernel to write into: a copy if somebody may have kept what the module returned."""
    return output if is_unhooked(producer) else output.clone()


def takes(*tensors: Tensor) -> bool:
    """Whether kernels take these together: Triton there, all on one GPU, of one floating type up to 32 bits."""
    first = tensors[0]
    return (
        triton is not None
        and on_gpu(first)
        and first.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(t.dtype == first.dtype and t.device == first.device for t in tensors)
    )


def on_device_of(t: Tensor):
    """Launches on the tensor's GPU; while torch compiles there is one, and the context cannot be traced."""
    if torch.compiler.is_compiling() or not t.is_cuda:
        return contextlib.nullcontext()
    return torch.cuda.device_of(t)


def unit_stride(t: Tensor) -> Tensor:
    """`t`, copied if its last dimension does not lie together."""
    return t if t.stride(-1) == 1 else t.contiguous()
