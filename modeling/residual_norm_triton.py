"""Triton kernels for the residual stream of a Mamba-2 block: its RMSNorm, and the sum that leaves the block.

What is unusual: the norm hands its input on beside its output, so that backward adds the gradient of the residual
stream where it makes its own, in one pass over memory. A stream wider than the weights (float32 beside bfloat16) is
rounded, normed, and added to within the kernels; PyTorch's operations of mixed types reach a third of the bandwidth.

Shapes: R rows (all leading dims), D width.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .gated_rms_norm_triton import rows_of
from .triton_launch import are_preferred, is_unhooked, on_device_of, on_gpu


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MAX_WIDTH = 16384  # numbers that one program holds in registers
_PROGRAMS_BACKWARD = 264  # two on each of the 132 multiprocessors of an H100 or H200
_ELEMENTS = 4096  # of a sum, for one program


def residual_norm(hidden_BSD: Tensor, norm: nn.RMSNorm, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`hidden_BSD`, to be used from here on in its place, and `norm` of it in the dtype of the norm's weight."""
    plain = type(norm) is nn.RMSNorm and norm.eps is not None and is_unhooked(norm)
    if not plain or not _kernels_take(backend, hidden_BSD, norm.weight):
        return hidden_BSD, norm(hidden_BSD.to(norm.weight.dtype))
    if torch.is_grad_enabled():
        return _ResidualNorm.apply(hidden_BSD, norm.weight, norm.eps)
    return hidden_BSD, _norm(hidden_BSD, norm.weight, norm.eps)[0]


def add_to_residual(residual_BSD: Tensor, mixed_BSD: Tensor, backend: str = "auto") -> Tensor:
    """Their sum; in float32 without a copy of what is added, where only the residual stream has it."""
    widens = mixed_BSD.dtype != residual_BSD.dtype == torch.float32
    if widens and _kernels_take(backend, residual_BSD, mixed_BSD):
        return _AddToResidual.apply(residual_BSD, mixed_BSD)
    return residual_BSD + mixed_BSD


def _kernels_take(backend: str, *tensors: Tensor) -> bool:
    if backend == "torch" or triton is None or any(t.dtype == torch.float64 for t in tensors):
        return False
    fits = tensors[0].shape[-1] <= MAX_WIDTH and all(type(t) in (Tensor, nn.Parameter) for t in tensors)
    return fits and (on_gpu if backend == "triton" else are_preferred)(tensors[0])


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_BSD, weight_D, eps):
        normed_BSD, narrow_BSD = _norm(hidden_BSD, weight_D, eps, keeps_narrow=True)
        ctx.save_for_backward(narrow_BSD, weight_D)
        ctx.eps = eps
        return hidden_BSD, normed_BSD

    @staticmethod
    @once_differentiable
    def backward(ctx, dhidden_BSD, dnormed_BSD):
        narrow_BSD, weight_D = ctx.saved_tensors
        shape, D = dhidden_BSD.shape, dhidden_BSD.shape[-1]
        x_RD, dresidual_RD, dnormed_RD = (rows_of(t).contiguous() for t in (narrow_BSD, dhidden_BSD, dnormed_BSD))
        R, block = x_RD.shape[0], triton.next_power_of_2(D)
        dx_RD, programs = torch.empty_like(dresidual_RD), min(R, _PROGRAMS_BACKWARD)
        partial = torch.empty(programs, D, dtype=torch.float32, device=x_RD.device)
        if R:
            with on_device_of(x_RD):
                _backward_kernel[(programs,)](
                    x_RD, weight_D, dnormed_RD, dresidual_RD, dx_RD, partial, R, ctx.eps,
                    D=D, BLOCK=block, STAGES=2 if x_RD.is_cuda else 1, num_warps=_num_warps(block),
                )  # fmt: skip
        return dx_RD.view(shape), partial.sum(0).to(weight_D.dtype), None


def _norm(hidden_BSD: Tensor, weight_D: Tensor, eps: float, keeps_narrow: bool = False) -> tuple[Tensor, Tensor]:
    """The norm, and what it is made from if that is kept: the hidden states rounded to the weight's dtype."""
    hidden_BSD = hidden_BSD.contiguous()
    normed_BSD = torch.empty_like(hidden_BSD, dtype=weight_D.dtype)
    rounds = keeps_narrow and hidden_BSD.dtype != weight_D.dtype
    narrow_BSD = torch.empty_like(normed_BSD) if rounds else hidden_BSD
    D = hidden_BSD.shape[-1]
    block = triton.next_power_of_2(D)
    if hidden_BSD.numel():
        with on_device_of(hidden_BSD):
            _forward_kernel[(hidden_BSD.numel() // D,)](
                hidden_BSD, weight_D, narrow_BSD, normed_BSD, eps,
                D=D, BLOCK=block, KEEPS=rounds, num_warps=_num_warps(block),
            )  # fmt: skip
    return normed_BSD, narrow_BSD


class _AddToResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual_BSD, mixed_BSD):
        residual_BSD, mixed_BSD = residual_BSD.contiguous(), mixed_BSD.contiguous()
        ctx.narrow, total_BSD = mixed_BSD.dtype, torch.empty_like(residual_BSD)
        with on_device_of(residual_BSD):
            _add_kernel[(triton.cdiv(total_BSD.numel(), _ELEMENTS),)](
                residual_BSD, mixed_BSD, total_BSD, total_BSD.numel(), BLOCK=_ELEMENTS, num_warps=4
            )
        return total_BSD

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal_BSD):
        return dtotal_BSD, dtotal_BSD.to(ctx.narrow)


def _num_warps(block: int) -> int:
    return min(max(block // 512, 1), 8)


if triton is not None:

    @triton.jit
    def _forward_kernel(hidden, weight, narrow, normed, eps, D: tl.constexpr, BLOCK: tl.constexpr, KEEPS: tl.constexpr):
        offset, row = tl.arange(0, BLOCK), tl.program_id(0).to(tl.int64) * D
        ok = offset < D
        x = tl.load(hidden + row + offset, mask=ok, other=0.0).to(narrow.dtype.element_ty)
        if KEEPS:
            tl.store(narrow + row + offset, x, mask=ok)
        x = x.to(normed.dtype.element_ty).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        x *= scale * tl.load(weight + offset, mask=ok, other=0.0).to(tl.float32)
        tl.store(normed + row + offset, x.to(normed.dtype.element_ty), mask=ok)

    @triton.jit(do_not_specialize=["R"])
    def _backward_kernel(
        x,
        weight,
        dnormed,
        dresidual,
        dx,
        partial,
        R,
        eps,
        D: tl.constexpr,
        BLOCK: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        offset = tl.arange(0, BLOCK)
        ok = offset < D
        dweight = tl.zeros([BLOCK], tl.float32)
        factor = tl.load(weight + offset, mask=ok, other=0.0).to(tl.float32)
        for index in tl.range(tl.program_id(0), R, tl.num_programs(0), num_stages=STAGES):
            row = tl.cast(index, tl.int64) * D
            x_row = tl.load(x + row + offset, mask=ok, other=0.0).to(tl.float32)
            d = tl.load(dnormed + row + offset, mask=ok, other=0.0).to(tl.float32)
            total = tl.load(dresidual + row + offset, mask=ok, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(x_row * x_row, 0) / D + eps)
            dweight += d * x_row * scale
            d *= factor
            mean = tl.sum(d * x_row, 0) * scale * scale / D
            total += scale * (d - x_row * mean)
            tl.store(dx + row + offset, total.to(dx.dtype.element_ty), mask=ok)
        tl.store(partial + tl.program_id(0).to(tl.int64) * D + offset, dweight, mask=ok)

    @triton.jit(do_not_specialize=["n"])
    def _add_kernel(residual, mixed, total, n, BLOCK: tl.constexpr):
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        ok = offset < n
        added = tl.load(residual + offset, mask=ok) + tl.load(mixed + offset, mask=ok).to(residual.dtype.element_ty)
        tl.store(total + offset, added, mask=ok)
