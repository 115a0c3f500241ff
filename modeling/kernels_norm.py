"""Triton kernels that normalise rows: Mamba-2's gated RMSNorm, the norm of its residual stream, and plain norms.

What is unusual: one program normalises one row, or one group of it, held in registers, in float32; where there is a
backward it recomputes the norm, and a fixed number of programs walks the rows, the next ones on their way, so that
dweight is a short sum of partial sums. The residual stream's norm hands its input on beside its output, so that
backward adds the gradient of the stream where it makes its own, in one pass over memory. A stream wider than the
weights (float32 beside bfloat16) is rounded, normed, and added to within the kernels; PyTorch's operations of mixed
types reach a third of the bandwidth. The gate may be a view of wider rows (in_proj's output) and is not copied; offsets
are 64-bit. The letters of shapes are explained in kernels.py.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .kernels import can_use_inference_kernel, on_device_of, require_kernel, row_options, rows_of, tiles, tl, triton


MAX_GROUP = 16384  # numbers that one program holds in registers
_ELEMENTS = 4096  # of a sum, for one program


def gated_rms_norm_triton(y_BSD: Tensor, gate_BSD: Tensor, weight_D: Tensor, n_groups: int, eps: float) -> Tensor:
    """RMSNorm(y * silu(gate)) * weight in y's dtype, each of `n_groups` groups of the last dim normalised by itself.

    Raises as `require_kernel`, also for groups too wide for the kernel.
    """
    require_kernel(y_BSD, y_BSD.shape[-1] // n_groups, MAX_GROUP, "numbers")
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
        dgate_RD, dout_RD = gate_RD.new_empty(gate_RD.shape), rows_of(dout_BSD)
        dy_RD, dweight_D = gated_norm_gradients(y_RD, gate_RD, weight_D, ctx.n_groups, ctx.eps, dout_RD, dgate_RD)
        return dy_RD.view(ctx.shape), dgate_RD.view(ctx.shape), dweight_D, None, None


def gated_norm(y_RD: Tensor, gate_RD: Tensor, weight_D: Tensor, n_groups: int, eps: float) -> Tensor:
    """The forward pass over rows as `rows_of` makes them; the weight is contiguous."""
    (R, D), width = y_RD.shape, y_RD.shape[1] // n_groups
    out_RD = y_RD.new_empty(R, D)
    with torch.cuda.device_of(y_RD):
        _gated_norm_kernel[(R, n_groups)](
            y_RD, gate_RD, weight_D, out_RD, D, width, eps, y_RD.stride(0), gate_RD.stride(0),
            **row_options(width, 1024),
        )  # fmt: skip
    return out_RD


def gated_norm_gradients(y_RD, gate_RD, weight_D, n_groups, eps, dout_RD, dgate_RD):
    """dy and dweight; dgate is written to `dgate_RD`, whose columns lie together."""
    (R, D), width = y_RD.shape, y_RD.shape[1] // n_groups
    dy_RD, programs = y_RD.new_empty(R, D), min(R, tiles(y_RD).norm_backward_programs)
    partial = torch.empty(programs, D, dtype=torch.float32, device=y_RD.device)
    options = row_options(width, 1024)
    options["num_warps"] *= 2
    with torch.cuda.device_of(y_RD):
        _gated_norm_backward_kernel[(programs, n_groups)](
            y_RD, gate_RD, weight_D, dout_RD, dy_RD, dgate_RD, partial,
            R, D, width, eps, y_RD.stride(0), gate_RD.stride(0), dout_RD.stride(0), dgate_RD.stride(0),
            STAGES=_stages(y_RD, options["BLOCK"]), **options,
        )  # fmt: skip
    return dy_RD, partial.sum(0).to(weight_D.dtype)


def _stages(rows: Tensor, block: int) -> int:
    """Rows in flight per program of the backward, up to 3: of y, gate, dout and weight, in shared memory."""
    if not rows.is_cuda:
        return 1
    room = torch.cuda.get_device_properties(rows.device).shared_memory_per_block_optin - 2**14
    return 1 + min(2, room // (4 * block * rows.element_size()))


def residual_norm_triton(hidden_BSD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The hidden states, to be used from here on in their place, and their RMSNorm in the weight's dtype.

    Raises as `require_kernel`, also for rows too wide for the kernel.
    """
    require_kernel(hidden_BSD, hidden_BSD.shape[-1], MAX_GROUP, "numbers", option="norm_backend")
    if torch.is_grad_enabled():
        return _ResidualNorm.apply(hidden_BSD, weight_D, eps)
    return hidden_BSD, rms_norm(hidden_BSD, weight_D, eps)[0]


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
        R, dx_RD = x_RD.shape[0], torch.empty_like(dresidual_RD)
        programs = min(R, tiles(x_RD).norm_backward_programs)
        partial = torch.empty(programs, D, dtype=torch.float32, device=x_RD.device)
        if R:
            with on_device_of(x_RD):
                _residual_norm_backward_kernel[(programs,)](
                    x_RD, weight_D, dnormed_RD, dresidual_RD, dx_RD, partial, R, ctx.eps,
                    D=D, STAGES=2 if x_RD.is_cuda else 1, **row_options(D),
                )  # fmt: skip
        return dx_RD.view(shape), partial.sum(0).to(weight_D.dtype), None


def rms_norm(hidden_BSD: Tensor, weight_D: Tensor, eps: float, keeps_narrow: bool = False) -> tuple[Tensor, Tensor]:
    """The norm, and what it is made from if that is kept: the hidden states rounded to the weight's dtype."""
    hidden_BSD = hidden_BSD.contiguous()
    normed_BSD = torch.empty_like(hidden_BSD, dtype=weight_D.dtype)
    rounds = keeps_narrow and torch.promote_types(hidden_BSD.dtype, weight_D.dtype) != weight_D.dtype
    narrow_BSD = torch.empty_like(normed_BSD) if rounds else hidden_BSD
    D = hidden_BSD.shape[-1]
    if hidden_BSD.numel():
        with on_device_of(hidden_BSD):
            _rms_norm_kernel[(hidden_BSD.numel() // D,)](
                hidden_BSD, weight_D, narrow_BSD, normed_BSD, eps, D=D, KEEPS=rounds, **row_options(D)
            )
    return normed_BSD, narrow_BSD


class FusedRMSNorm(nn.RMSNorm):
    """torch's, which in one kernel takes twice as long as it has to for a single token."""

    def forward(self, x: Tensor) -> Tensor:
        if not can_use_inference_kernel(x, self.weight):
            return super().forward(x)
        return rms_norm(x, self.weight, self.eps)[0]


def add_to_residual_triton(residual_BSD: Tensor, mixed_BSD: Tensor) -> Tensor:
    """Their sum in the residual stream's dtype, without a copy of what is added in it; raises as the norm does."""
    require_kernel(residual_BSD, residual_BSD.shape[-1], MAX_GROUP, "numbers", option="norm_backend")
    return _AddToResidual.apply(residual_BSD, mixed_BSD)


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


def layer_norm_triton(
    x_RD: Tensor, residual_RD: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """residual + x, or x itself without a residual, and the LayerNorm of it; forward only."""
    R, D = x_RD.shape
    stream_RD = x_RD if residual_RD is None else torch.empty_like(x_RD)
    normed_RD = torch.empty_like(x_RD)
    with on_device_of(x_RD):
        _layer_norm_kernel[(R,)](
            x_RD, x_RD if residual_RD is None else residual_RD, weight_D, bias_D, stream_RD, normed_RD, eps,
            ADD=residual_RD is not None, D=D, **row_options(D),
        )  # fmt: skip
    return stream_RD, normed_RD


if triton is not None:
    from .kernels import load_float32, rms_scale, sigmoid

    @triton.jit
    def _rms_gradient(d, x, scale, width):
        """Of x, from d, the gradient of x * scale."""
        mean = tl.sum(d * x, 0) * scale * scale / width
        return scale * (d - x * mean)

    @triton.jit
    def _gated_norm_kernel(y, gate, weight, out, D, width, eps, stride_y, stride_gate, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        offset = tl.arange(0, BLOCK)
        ok = offset < width
        start = tl.program_id(1) * width
        y = load_float32(y + row * stride_y + start + offset, ok)
        gate = load_float32(gate + row * stride_gate + start + offset, ok)
        weight = load_float32(weight + start + offset, ok)
        gated = y * gate * sigmoid(gate)
        scale = rms_scale(gated, width, eps)
        out += row * D + start + offset
        tl.store(out, (gated * scale * weight).to(out.dtype.element_ty), mask=ok)

    @triton.jit(do_not_specialize=["R"])
    def _gated_norm_backward_kernel(
        y, gate, weight, dout, dy, dgate, partial,
        R, D, width, eps, stride_y, stride_gate, stride_dout, stride_dgate, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        offset = tl.arange(0, BLOCK)
        ok = offset < width
        offset += tl.program_id(1) * width
        dweight = tl.zeros([BLOCK], tl.float32)
        for index in tl.range(tl.program_id(0), R, tl.num_programs(0), num_stages=STAGES):
            row = tl.cast(index, tl.int64)
            y_row = load_float32(y + row * stride_y + offset, ok)
            z = load_float32(gate + row * stride_gate + offset, ok)
            d = load_float32(dout + row * stride_dout + offset, ok)
            s = sigmoid(z)
            silu = z * s
            gated = y_row * silu
            scale = rms_scale(gated, width, eps)
            dweight += d * gated * scale
            d *= load_float32(weight + offset, ok)
            dgated = _rms_gradient(d, gated, scale, width)
            tl.store(dy + row * D + offset, (dgated * silu).to(dy.dtype.element_ty), mask=ok)
            dz = dgated * y_row * s * (1 + z * (1 - s))
            tl.store(dgate + row * stride_dgate + offset, dz.to(dgate.dtype.element_ty), mask=ok)
        tl.store(partial + tl.program_id(0).to(tl.int64) * D + offset, dweight, mask=ok)

    @triton.jit
    def _rms_norm_kernel(
        hidden, weight, narrow, normed, eps, D: tl.constexpr, BLOCK: tl.constexpr, KEEPS: tl.constexpr
    ):
        offset, row = tl.arange(0, BLOCK), tl.program_id(0).to(tl.int64) * D
        ok = offset < D
        x = tl.load(hidden + row + offset, mask=ok, other=0.0).to(narrow.dtype.element_ty)
        if KEEPS:
            tl.store(narrow + row + offset, x, mask=ok)
        x = x.to(normed.dtype.element_ty).to(tl.float32)
        scale = rms_scale(x, D, eps)
        x = x * scale * load_float32(weight + offset, ok)
        tl.store(normed + row + offset, x.to(normed.dtype.element_ty), mask=ok)

    @triton.jit(do_not_specialize=["R"])
    def _residual_norm_backward_kernel(
        x, weight, dnormed, dresidual, dx, partial, R, eps, D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
    ):
        offset = tl.arange(0, BLOCK)
        ok = offset < D
        dweight = tl.zeros([BLOCK], tl.float32)
        factor = load_float32(weight + offset, ok)
        for index in tl.range(tl.program_id(0), R, tl.num_programs(0), num_stages=STAGES):
            row = tl.cast(index, tl.int64) * D
            x_row = load_float32(x + row + offset, ok)
            d = load_float32(dnormed + row + offset, ok)
            total = load_float32(dresidual + row + offset, ok)
            scale = rms_scale(x_row, D, eps)
            dweight += d * x_row * scale
            d *= factor
            total += _rms_gradient(d, x_row, scale, D)
            tl.store(dx + row + offset, total.to(dx.dtype.element_ty), mask=ok)
        tl.store(partial + tl.program_id(0).to(tl.int64) * D + offset, dweight, mask=ok)

    @triton.jit(do_not_specialize=["n"])
    def _add_kernel(residual, mixed, total, n, BLOCK: tl.constexpr):
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        ok = offset < n
        added = tl.load(residual + offset, mask=ok) + tl.load(mixed + offset, mask=ok).to(residual.dtype.element_ty)
        tl.store(total + offset, added, mask=ok)

    @triton.jit
    def _layer_norm_kernel(
        x, residual, weight, bias, stream, normed, eps, ADD: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
    ):
        column = tl.arange(0, BLOCK)
        ok = column < D
        offset = tl.program_id(0).to(tl.int64) * D + column
        value = load_float32(x + offset, ok)
        if ADD:
            value += load_float32(residual + offset, ok)
            rounded = value.to(stream.dtype.element_ty)  # the norm sees what the next residual sum will see
            tl.store(stream + offset, rounded, mask=ok)
            value = rounded.to(tl.float32)
        centered = tl.where(ok, value - tl.sum(value, 0) / D, 0.0)
        centered *= rms_scale(centered, D, eps)
        scale, shift = load_float32(weight + column, ok), load_float32(bias + column, ok)
        tl.store(normed + offset, (centered * scale + shift).to(normed.dtype.element_ty), mask=ok)
