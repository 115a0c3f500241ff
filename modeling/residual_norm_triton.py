"""Triton kernels for the residual stream of a Mamba-2 block: its RMSNorm, and the sum that leaves the block.

What is unusual: the norm hands its input on beside its output, so that backward adds the gradient of the residual
stream where it makes its own, in one pass over memory. A stream wider than the weights (float32 beside bfloat16) is
rounded, normed, and added to within the kernels; PyTorch's operations of mixed types reach a third of the bandwidth.

Shapes: R rows (all leading dims), D width.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gated_rms_norm_triton import MAX_GROUP, rows_of
from .triton_launch import on_device_of, on_gpu


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_PROGRAMS_BACKWARD = 264  # two on each of the 132 multiprocessors of an H100 or H200
_ELEMENTS = 4096  # of a sum, for one program


def residual_norm_triton(hidden_BSD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The hidden states, to be used from here on in their place, and their RMSNorm in the weight's dtype.

    Raises:
        ImportError: Triton is not installed. ValueError: float64, too wide, or not on a GPU.
    """
    _check(hidden_BSD)
    if torch.is_grad_enabled():
        return _ResidualNorm.apply(hidden_BSD, weight_D, eps)
    return hidden_BSD, rms_norm(hidden_BSD, weight_D, eps)[0]


def add_to_residual_triton(residual_BSD: Tensor, mixed_BSD: Tensor) -> Tensor:
    """Their sum in the residual stream's dtype, without a copy of what is added in it; raises as the norm does."""
    _check(residual_BSD)
    return _AddToResidual.apply(residual_BSD, mixed_BSD)


def _check(hidden_BSD: Tensor) -> None:
    if triton is None:
        raise ImportError("norm_backend='triton' needs Triton: pip install triton, or use norm_backend='torch'.")
    if hidden_BSD.dtype == torch.float64 or hidden_BSD.shape[-1] > MAX_GROUP:
        raise ValueError(
            f"norm_backend='triton' norms up to {MAX_GROUP} numbers and not in float64, got {hidden_BSD.shape[-1]} and "
            f"{hidden_BSD.dtype}; use norm_backend='torch'."
        )
    if not on_gpu(hidden_BSD):
        raise ValueError(
            f"norm_backend='triton' runs on a GPU, the tensors are on {hidden_BSD.device}; use norm_backend='torch'."
        )


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_BSD, weight_D, eps):
        normed_BSD, narrow_BSD = rms_norm(hidden_BSD, weight_D, eps, keeps_narrow=True)
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


def rms_norm(hidden_BSD: Tensor, weight_D: Tensor, eps: float, keeps_narrow: bool = False) -> tuple[Tensor, Tensor]:
    """The norm, and what it is made from if that is kept: the hidden states rounded to the weight's dtype."""
    hidden_BSD = hidden_BSD.contiguous()
    normed_BSD = torch.empty_like(hidden_BSD, dtype=weight_D.dtype)
    rounds = keeps_narrow and torch.promote_types(hidden_BSD.dtype, weight_D.dtype) != weight_D.dtype
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
        x = x * scale * tl.load(weight + offset, mask=ok, other=0.0).to(tl.float32)
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
