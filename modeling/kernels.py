"""What all Triton kernels share: which tensors and modules they may take, who computes a part by name, tile sizes.

`wants_kernel` answers the option "auto"; `can_use_kernel` says whether kernels can take tensors, and `is_plain` and
`has_hooks` whether one may stand in for a module: it may not where an adapter, a quantised weight, a hook or a wrapper
would be passed over. The kernels are in kernels_*.py, beside whose functions stand plain references (mamba2.py's, or
transformers' own modules). This file and those import without Triton. Another GPU's tile sizes go into `TILES`.

Shapes, in mamba2.py and all kernels: B batch, M video tokens, N text tokens, S tokens of a sequence, D hidden, H heads,
P head dim, G groups, K state size, C convolution channels, W its width, T = W - 1 inputs that it remembers, Z chunks of
Q tokens, R rows (all leading dims as one), E outputs of in_proj, O outputs of another projection.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


class Tiles(NamedTuple):
    """Sizes that suit one generation of GPUs; those of attention stand in `kernels_attention.attention_tiles`."""

    # Channels, rows and warps of a program, each thread 8 bytes of a row: wider loads cost registers, and with them
    # programs in flight. More rows mean fewer read twice, and fewer partial sums.
    conv1d_forward: tuple[int, int, int] = (256, 64, 2)
    conv1d_backward: tuple[int, int, int] = (128, 128, 1)
    norm_backward_programs: int = 264  # two on each of 132 multiprocessors
    scan_chunk: int = 64  # tokens of one, in half precision; float32 products run without tensor cores: small tiles
    scan_chunk_float32: int = 16
    scan_segment_chunks: int = 16  # of a long sequence; fewer make more programs, and more states between them
    scan_programs: int = 1280  # leave few multiprocessors idle at the end, two programs running on each of 132
    scan_backward_heads: tuple[int, int] = (28, 14)  # of one program: many write fewer sums, few make more programs
    scan_backward_programs: int = 660  # for which many heads are taken: five for each of 132 multiprocessors


TILES = {9: Tiles()}  # by major compute capability: 9 is Hopper's, tried on an H200


def tiles(t: Tensor) -> Tiles:
    """For the tensor's GPU; a generation that nobody has tried takes Hopper's."""
    return TILES.get(gpu_properties(t.device).major, TILES[9]) if t.is_cuda else TILES[9]


@functools.cache
def gpu_properties(device: torch.device):
    return torch.cuda.get_device_properties(device)


def on_gpu(t: Tensor) -> bool:
    """Whether kernels can run where `t` is; Triton's interpreter takes the CPU for a GPU."""
    return t.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def can_use_kernel(*tensors: Tensor) -> bool:
    """Whether kernels take these together: Triton there, all on one GPU, of one floating type up to 32 bits."""
    first = tensors[0]
    return (
        triton is not None
        and on_gpu(first)
        and first.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(t.dtype == first.dtype and t.device == first.device for t in tensors)
    )


def can_use_inference_kernel(*tensors: Tensor) -> bool:
    """Whether kernels without a backward take these in the place of modules, whose weights may want gradients too."""
    return not torch.is_grad_enabled() and can_use_kernel(*tensors)


def can_use_forward_kernel(*tensors: Tensor) -> bool:
    """Whether kernels without a backward take these, contiguous and all that enters: none wants a gradient."""
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not recorded and can_use_kernel(*tensors) and all(t.is_contiguous() for t in tensors)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see the calls of this module, or of one in it, so that no kernel may take its place."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return _has_any_global_hook() or any(
        "forward" in part.__dict__ or any(getattr(part, name) for name in hooks) for part in module.modules()
    )


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether a kernel may stand in for the module: exactly of this class, with ordinary parameters, and no hooks."""
    ordinary = all(type(p) in (nn.Parameter, Tensor) for p in module._parameters.values() if p is not None)
    return type(module) is kind and ordinary and not has_hooks(module)


def overwritable(output: Tensor, producer: nn.Module) -> Tensor:
    """A module's output, for a kernel to write into: a copy if somebody may have kept what the module returned."""
    return output.clone() if has_hooks(producer) else output


def wants_kernel(backend: str, t: Tensor, fits: bool = True) -> bool:
    """Whether this option asks for our kernels: by name, or as "auto" on a GPU with Triton, where `fits` is true."""
    preferred = triton is not None and t.is_cuda and t.dtype != torch.float64 and fits
    return backend == "triton" or (backend == "auto" and preferred)


def choose_backend(part: str, backend: str, backends: dict[str, Callable], t: Tensor, fits: bool = True) -> Callable:
    """Who computes a part of the model; "auto" is "triton" where `wants_kernel`, else "torch", the reference.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in ("auto", *backends):
        raise ValueError(f"Unknown {part} backend {backend!r}; choose one of {['auto', *backends]}.")
    if backend == "auto":
        backend = "triton" if wants_kernel(backend, t, fits) else "torch"
    return backends[backend]


def require_kernel(t: Tensor, size: int = 0, limit: int | None = None, unit: str = "", option: str = "backend") -> None:
    """Raises what keeps a kernel that was asked for by name from taking `t`, of which it takes up to `limit` `unit`s.

    Raises:
        ImportError: Triton is not installed. ValueError: float64, too large, or not on a GPU.
    """
    instead = f"use {option}='torch'"
    if triton is None:
        raise ImportError(f"{option}='triton' needs Triton: pip install triton, or {instead}.")
    if t.dtype == torch.float64 or (limit is not None and size > limit):
        limits, got = (f"up to {limit} {unit} and ", f"{size} {unit} and ") if limit is not None else ("", "")
        raise ValueError(f"{option}='triton' computes with {limits}not in float64, got {got}{t.dtype}; {instead}.")
    if not on_gpu(t):
        raise ValueError(f"{option}='triton' runs on a GPU, the tensors are on {t.device}; {instead}.")


@functools.cache
def find_optional(module: str, name: str) -> Callable | None:
    """A function of an optional package, or None; a package that is there but does not import is told of once."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        warnings.warn(f"{package} is installed but does not import ({error}); it is not used.", stacklevel=3)
        return None


def require_optional(module: str, name: str) -> Callable:
    """`find_optional`, for a backend called like the package; raises ImportError where it is not there."""
    function, package = find_optional(module, name), module.partition(".")[0]
    if function is None:
        raise ImportError(
            f"backend={package!r} needs {package.replace('_', '-')}: pip install 'vamba[mamba-ssm]', or use "
            "backend='torch'."
        )
    return function


def on_device_of(t: Tensor):
    """Launches on the tensor's GPU; while torch compiles there is one, and the context cannot be traced."""
    if torch.compiler.is_compiling() or not t.is_cuda:
        return contextlib.nullcontext()
    return torch.cuda.device_of(t)


def unit_stride(t: Tensor) -> Tensor:
    """`t`, copied if its last dimension does not lie together."""
    return t if t.stride(-1) == 1 else t.contiguous()


def rows_of(t: Tensor) -> Tensor:
    """(..., D) -> (R, D) with one stride for all rows: a view wherever the layout allows, otherwise a copy."""
    return unit_stride(t).reshape(-1, t.shape[-1])


def row_options(width: int, numbers: int = 512) -> dict[str, int]:
    """For a program that holds a row of this width: a power of two, and warps for about so many `numbers` each."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // numbers, 1), 8)}


if triton is not None:

    @triton.jit
    def load_float32(pointers, mask):
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def sigmoid(z):
        """1 / (1 + exp(-z)); the division as a squared reciprocal root halves the instructions, which bind here."""
        root = tl.rsqrt(1 + tl.exp2(-1.4426950408889634 * z))
        return root * root

    @triton.jit
    def rms_scale(x, width, eps):
        """1 / RMS(x) of one row, which is zero beyond its width."""
        return tl.rsqrt(tl.sum(x * x, 0) / width + eps)

    @triton.jit
    def rotate_halves(low_at, cos, sin, angle, ok_angle, ok, half):
        """The rotary embedding in place: number i of a head's first half, at `low_at`, goes with that `half` further.

        `angle` are the places of the first half's cosines and sines.
        """
        cos_low, cos_high = load_float32(cos + angle, ok_angle), load_float32(cos + angle + half, ok_angle)
        sin_low, sin_high = load_float32(sin + angle, ok_angle), load_float32(sin + angle + half, ok_angle)
        low, high = load_float32(low_at, ok), load_float32(low_at + half, ok)
        tl.store(low_at, (low * cos_low - high * sin_low).to(low_at.dtype.element_ty), mask=ok)
        tl.store(low_at + half, (high * cos_high + low * sin_high).to(low_at.dtype.element_ty), mask=ok)
