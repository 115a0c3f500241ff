"""Triton kernels for Mamba-2's gated RMSNorm, weight * RMSNorm(y * silu(z)), forward and backward.

What is unusual: the gate z may be a view of wider rows (in_proj's output) and is not copied; offsets are 64-bit. One
program normalises one group of one row, held in registers, in float32; the backward recomputes the norm, and a fixed
number of programs walks the rows, the next ones on their way, so that dweight is a short sum of partial sums.

Shapes: R rows (all leading dims), N groups, D / N numbers per group.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .triton_launch import on_gpu


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MAX_GROUP = 16384  # numbers that one program holds in registers
_PROGRAMS_BACKWARD = 264  # two on each of the 132 multiprocessors of an H100 or H200


def gated_rms_norm_triton(y_BSD: Tensor, gate_BSD: Tensor, weight_D: Tensor, n_groups: int, eps: float) -> Tensor:
    """RMSNorm(y * silu(gate)) * weight in y's dtype, each of `n_groups` groups of the last dim normalised by itself.

    Raises:
        ImportError: Triton is not installed. ValueError: float64, or groups too wide for the kernel.
    """
    if triton is None:
        raise ImportError("backend='triton' needs Triton: pip install triton, or use backend='torch'.")
    if y_BSD.dtype == torch.float64 or y_BSD.shape[-1] // n_groups > MAX_GROUP:
        raise ValueError(
            f"backend='triton' normalises up to {MAX_GROUP} numbers and not in float64, got "
            f"{y_BSD.shape[-1] // n_groups} and {y_BSD.dtype}; use backend='torch'."
        )
    if not on_gpu(y_BSD):
        raise ValueError(f"backend='triton' runs on a GPU, the tensors are on {y_BSD.device}; use backend='torch'.")
    return _GatedRMSNorm.apply(y_BSD, gate_BSD, weight_D, n_groups, eps)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_BSD, gate_BSD, weight_D, n_groups, eps):
        y_RD, gate_RD, weight_D = rows_of(y_BSD), rows_of(gate_BSD), weight_D.contiguous()
        ctx.save_for_backward(y_RD, gate_RD, weight_D)
        ctx.n_groups, ctx.eps, ctx.shape = n_groups, eps, y_BSD.shape
        return gated_norm(y_RD, gate_RD, weight_D, n_groups, eps).view(y_BSD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_BSD):
        y_RD, gate_RD, weight_D = ctx.saved_tensors
        dgate_RD = torch.empty(gate_RD.shape, dtype=gate_RD.dtype, device=gate_RD.device)
        dout_RD = rows_of(dout_BSD)
        dy_RD, dweight_D = norm_gradients(y_RD, gate_RD, weight_D, ctx.n_groups, ctx.eps, dout_RD, dgate_RD)
        return dy_RD.view(ctx.shape), dgate_RD.view(ctx.shape), dweight_D, None, None


def gated_norm(y_RD: Tensor, gate_RD: Tensor, weight_D: Tensor, n_groups: int, eps: float) -> Tensor:
    """The forward pass over rows as `rows_of` makes them; the weight is contiguous."""
    (R, D), width = y_RD.shape, y_RD.shape[1] // n_groups
    out_RD = torch.empty(R, D, dtype=y_RD.dtype, device=y_RD.device)
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(y_RD):
        _forward_kernel[(R, n_groups)](
            y_RD,
            gate_RD,
            weight_D,
            out_RD,
            D,
            width,
            eps,
            y_RD.stride(0),
            gate_RD.stride(0),
            BLOCK=block,
            num_warps=_num_warps(block),
        )
    return out_RD


def norm_gradients(y_RD, gate_RD, weight_D, n_groups, eps, dout_RD, dgate_RD):
    """dy and dweight; dgate is written to `dgate_RD`, whose columns lie together."""
    (R, D), width = y_RD.shape, y_RD.shape[1] // n_groups
    dy_RD = torch.empty(R, D, dtype=y_RD.dtype, device=y_RD.device)
    programs = min(R, _PROGRAMS_BACKWARD)
    partial = torch.empty(programs, D, dtype=torch.float32, device=y_RD.device)
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(y_RD):
        _backward_kernel[(programs, n_groups)](
            y_RD,
            gate_RD,
            weight_D,
            dout_RD,
            dy_RD,
            dgate_RD,
            partial,
            R,
            D,
            width,
            eps,
            y_RD.stride(0),
            gate_RD.stride(0),
            dout_RD.stride(0),
            dgate_RD.stride(0),
            BLOCK=block,
            STAGES=_stages(y_RD, block),
            num_warps=2 * _num_warps(block),
        )
    return dy_RD, partial.sum(0).to(weight_D.dtype)


def rows_of(t: Tensor) -> Tensor:
    """(..., D) -> (R, D) with one stride for all rows: a view wherever the layout allows, otherwise a copy."""
    if t.stride(-1) != 1:
        t = t.contiguous()
    return t.reshape(-1, t.shape[-1])


def _stages(rows: Tensor, block: int) -> int:
    """Rows in flight per program of the backward, up to 3: of y, gate, dout and weight, in shared memory."""
    if not rows.is_cuda:
        return 1
    room = torch.cuda.get_device_properties(rows.device).shared_memory_per_block_optin - 2**14
    return 1 + min(2, room // (4 * block * rows.element_size()))


def _num_warps(block: int) -> int:
    return min(max(block // 1024, 1), 8)


if triton is not None:

    @triton.jit
    def _sigmoid(z):
        """1 / (1 + exp(-z)); the division as a squared reciprocal root halves the instructions, which bind here."""
        root = tl.rsqrt(1 + tl.exp2(-1.4426950408889634 * z))
        return root * root

    @triton.jit
    def _forward_kernel(y, gate, weight, out, D, width, eps, stride_y, stride_gate, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        offset = tl.arange(0, BLOCK)
        ok = offset < width
        start = tl.program_id(1) * width
        y = tl.load(y + row * stride_y + start + offset, mask=ok, other=0.0).to(tl.float32)
        gate = tl.load(gate + row * stride_gate + start + offset, mask=ok, other=0.0).to(tl.float32)
        weight = tl.load(weight + start + offset, mask=ok, other=0.0).to(tl.float32)
        gated = y * gate * _sigmoid(gate)
        scale = tl.rsqrt(tl.sum(gated * gated, 0) / width + eps)
        out += row * D + start + offset
        tl.store(out, (gated * scale * weight).to(out.dtype.element_ty), mask=ok)

    @triton.jit(do_not_specialize=["R"])
    def _backward_kernel(
        y,
        gate,
        weight,
        dout,
        dy,
        dgate,
        partial,
        R,
        D,
        width,
        eps,
        stride_y,
        stride_gate,
        stride_dout,
        stride_dgate,
        BLOCK: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        offset = tl.arange(0, BLOCK)
        ok = offset < width
        offset += tl.program_id(1) * width
        dweight = tl.zeros([BLOCK], tl.float32)
        for index in tl.range(tl.program_id(0), R, tl.num_programs(0), num_stages=STAGES):
            row = tl.cast(index, tl.int64)
            y_row = tl.load(y + row * stride_y + offset, mask=ok, other=0.0).to(tl.float32)
            z = tl.load(gate + row * stride_gate + offset, mask=ok, other=0.0).to(tl.float32)
            d = tl.load(dout + row * stride_dout + offset, mask=ok, other=0.0).to(tl.float32)
            sigmoid = _sigmoid(z)
            silu = z * sigmoid
            gated = y_row * silu
            scale = tl.rsqrt(tl.sum(gated * gated, 0) / width + eps)
            dweight += d * gated * scale
            d *= tl.load(weight + offset, mask=ok, other=0.0).to(tl.float32)
            mean = tl.sum(d * gated, 0) * scale * scale / width
            dgated = scale * (d - gated * mean)
            tl.store(dy + row * D + offset, (dgated * silu).to(dy.dtype.element_ty), mask=ok)
            dz = dgated * y_row * sigmoid * (1 + z * (1 - sigmoid))
            tl.store(dgate + row * stride_dgate + offset, dz.to(dgate.dtype.element_ty), mask=ok)
        tl.store(partial + tl.program_id(0).to(tl.int64) * D + offset, dweight, mask=ok)
