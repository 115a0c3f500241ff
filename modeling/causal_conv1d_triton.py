"""Triton kernels for the depthwise causal convolution + SiLU, forward and backward, for token-major views.

What is unusual: x may be a view of wider rows (in_proj's output), so nothing is copied or transposed; the inputs
before the first token are the state; offsets are 64-bit, for a video's rows exceed 2**31 numbers. The forward reads
and writes each number once; the backward recomputes the pre-activation and sums dweight and dbias per program.

Shapes: B batch, S tokens, C channels, W width of the convolution (at most 4), T = W - 1 remembered inputs.
"""

import os

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MAX_WIDTH = 4
# Small tiles: the neighbours of a row come from the L1 cache, and registers bound how many programs run at once.
_BLOCK_C, _BLOCK_S = 128, 16
_BLOCK_S_BACKWARD, _TILES_BACKWARD = 8, 16


def causal_conv1d_triton(x_BSC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, state_BTC: Tensor) -> Tensor:
    """As `causal_conv1d_torch`: y_BSC in x's dtype, computed in float32, for W <= 4.

    Raises:
        ImportError: Triton is not installed. ValueError: a wider convolution, or float64.
    """
    if triton is None:
        raise ImportError("backend='triton' needs Triton: pip install triton, or use backend='torch'.")
    if weight_CW.shape[1] > MAX_WIDTH or x_BSC.dtype == torch.float64:
        raise ValueError(
            f"backend='triton' convolves at most {MAX_WIDTH} taps and not in float64, got {weight_CW.shape[1]} taps "
            f"and {x_BSC.dtype}; use backend='torch'."
        )
    if not x_BSC.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend='triton' runs on a GPU, the tensors are on {x_BSC.device}; use backend='torch'.")
    return _CausalConv1d.apply(x_BSC, weight_CW, bias_C, state_BTC.to(x_BSC.dtype))


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BSC, weight_CW, bias_C, state_BTC):
        x_BSC, weight_CW, state_BTC = _unit_stride(x_BSC), weight_CW.contiguous(), state_BTC.contiguous()
        ctx.save_for_backward(x_BSC, weight_CW, bias_C, state_BTC)
        (B, S, C), W = x_BSC.shape, weight_CW.shape[1]
        y_BSC = torch.empty(B, S, C, dtype=x_BSC.dtype, device=x_BSC.device)
        grid = (triton.cdiv(C, _BLOCK_C) * triton.cdiv(S, _BLOCK_S), B)
        with torch.cuda.device_of(x_BSC):
            _forward_kernel[grid](
                x_BSC,
                weight_CW,
                weight_CW if bias_C is None else bias_C.contiguous(),
                state_BTC,
                y_BSC,
                S,
                C,
                x_BSC.stride(0),
                x_BSC.stride(1),
                W=W,
                HAS_BIAS=bias_C is not None,
                BLOCK_S=_BLOCK_S,
                BLOCK_C=_BLOCK_C,
                num_warps=4,
            )
        return y_BSC

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BSC):
        x_BSC, weight_CW, bias_C, state_BTC = ctx.saved_tensors
        dy_BSC = _unit_stride(dy_BSC)
        (B, S, C), W = x_BSC.shape, weight_CW.shape[1]
        programs = triton.cdiv(S + W - 1, _BLOCK_S_BACKWARD * _TILES_BACKWARD)
        dx_BSC = torch.empty(B, S, C, dtype=x_BSC.dtype, device=x_BSC.device)
        dstate_BTC = torch.empty_like(state_BTC)
        partial = torch.empty(B * programs, 1 + MAX_WIDTH, C, dtype=torch.float32, device=x_BSC.device)
        with torch.cuda.device_of(x_BSC):
            _backward_kernel[(triton.cdiv(C, _BLOCK_C) * programs, B)](
                x_BSC,
                weight_CW,
                weight_CW if bias_C is None else bias_C.contiguous(),
                state_BTC,
                dy_BSC,
                dx_BSC,
                dstate_BTC,
                partial,
                S,
                C,
                programs,
                x_BSC.stride(0),
                x_BSC.stride(1),
                dy_BSC.stride(0),
                dy_BSC.stride(1),
                W=W,
                HAS_BIAS=bias_C is not None,
                BLOCK_S=_BLOCK_S_BACKWARD,
                BLOCK_C=_BLOCK_C,
                TILES=_TILES_BACKWARD,
                num_warps=8,
            )
        sums = partial.sum(0)
        dweight_CW = sums[1 + MAX_WIDTH - W :].t().to(weight_CW.dtype)
        return dx_BSC, dweight_CW, None if bias_C is None else sums[0].to(bias_C.dtype), dstate_BTC


def _unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


if triton is not None:

    @triton.jit
    def _load_input(x, state, t, c, S, C, stride_s, W: tl.constexpr):
        """Inputs t of the sequence, which begins with the state at -T; zero outside."""
        c_ok = (c < C)[None, :]
        rows = t[:, None]
        inside = (rows >= 0) & (rows < S) & c_ok
        value = tl.load(x + rows.to(tl.int64) * stride_s + c[None, :], mask=inside, other=0.0).to(tl.float32)
        before = (rows < 0) & (rows >= 1 - W) & c_ok
        value += tl.load(state + (rows + W - 1) * C + c[None, :], mask=before, other=0.0).to(tl.float32)
        return value

    @triton.jit
    def _load_tap(weight, c, C, W: tl.constexpr, TAP: tl.constexpr):
        """Tap 0..3 of a convolution of width 4, to which a narrower one is extended by zeros on the left."""
        index: tl.constexpr = TAP + W - 4
        tap = tl.zeros_like(c).to(tl.float32)
        if index >= 0:
            tap += tl.load(weight + c * W + index, mask=c < C, other=0.0).to(tl.float32)
        return tap

    @triton.jit
    def _preactivation(x0, x1, x2, x3, w0, w1, w2, w3, bias):
        return bias[None, :] + x0 * w0[None, :] + x1 * w1[None, :] + x2 * w2[None, :] + x3 * w3[None, :]

    @triton.jit(do_not_specialize=["S"])
    def _forward_kernel(
        x,
        weight,
        bias,
        state,
        y,
        S,
        C,
        stride_xb,
        stride_xs,
        W: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        BLOCK_S: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        blocks_c = tl.cdiv(C, BLOCK_C)
        b = tl.program_id(1).to(tl.int64)
        c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
        t = (tl.program_id(0) // blocks_c) * BLOCK_S + tl.arange(0, BLOCK_S)
        x += b * stride_xb
        state += b * (W - 1) * C
        x0 = _load_input(x, state, t - 3, c, S, C, stride_xs, W)
        x1 = _load_input(x, state, t - 2, c, S, C, stride_xs, W)
        x2 = _load_input(x, state, t - 1, c, S, C, stride_xs, W)
        x3 = _load_input(x, state, t, c, S, C, stride_xs, W)
        w0 = _load_tap(weight, c, C, W, 0)
        w1 = _load_tap(weight, c, C, W, 1)
        w2 = _load_tap(weight, c, C, W, 2)
        w3 = _load_tap(weight, c, C, W, 3)
        bias_C = tl.zeros_like(w3)
        if HAS_BIAS:
            bias_C += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
        a = _preactivation(x0, x1, x2, x3, w0, w1, w2, w3, bias_C)
        y += b * S * C + t[:, None].to(tl.int64) * C + c[None, :]
        tl.store(y, (a * tl.sigmoid(a)).to(y.dtype.element_ty), mask=(t < S)[:, None] & (c < C)[None, :])

    @triton.jit
    def _gradient(x0, x1, x2, x3, w0, w1, w2, w3, bias, dy, t, c, S, C, stride_s):
        """Of the pre-activation of tokens t; zero outside the sequence."""
        inside = (t >= 0)[:, None] & (t < S)[:, None] & (c < C)[None, :]
        dy = tl.load(dy + t[:, None].to(tl.int64) * stride_s + c[None, :], mask=inside, other=0.0).to(tl.float32)
        a = _preactivation(x0, x1, x2, x3, w0, w1, w2, w3, bias)
        sigmoid = tl.sigmoid(a)
        return dy * sigmoid * (1 + a * (1 - sigmoid))

    @triton.jit(do_not_specialize=["S", "programs"])
    def _backward_kernel(
        x,
        weight,
        bias,
        state,
        dy,
        dx,
        dstate,
        partial,
        S,
        C,
        programs,
        stride_xb,
        stride_xs,
        stride_dyb,
        stride_dys,
        W: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        BLOCK_S: tl.constexpr,
        BLOCK_C: tl.constexpr,
        TILES: tl.constexpr,
    ):
        blocks_c = tl.cdiv(C, BLOCK_C)
        b = tl.program_id(1).to(tl.int64)
        program = tl.program_id(0) // blocks_c
        c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
        x += b * stride_xb
        dy += b * stride_dyb
        dx += b * S * C
        state += b * (W - 1) * C
        dstate += b * (W - 1) * C
        w0 = _load_tap(weight, c, C, W, 0)
        w1 = _load_tap(weight, c, C, W, 1)
        w2 = _load_tap(weight, c, C, W, 2)
        w3 = _load_tap(weight, c, C, W, 3)
        bias_C = tl.zeros_like(w3)
        if HAS_BIAS:
            bias_C += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
        # Whole tiles, summed over their rows once, after the loop.
        dbias = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
        dw0 = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
        dw1 = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
        dw2 = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
        dw3 = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
        for tile in range(TILES):
            # Rows start at the state's first, whose gradient comes from the first tokens just as dx does.
            t = (program * TILES + tile) * BLOCK_S + tl.arange(0, BLOCK_S) - (W - 1)
            x0 = _load_input(x, state, t - 3, c, S, C, stride_xs, W)
            x1 = _load_input(x, state, t - 2, c, S, C, stride_xs, W)
            x2 = _load_input(x, state, t - 1, c, S, C, stride_xs, W)
            x3 = _load_input(x, state, t, c, S, C, stride_xs, W)
            g = _gradient(x0, x1, x2, x3, w0, w1, w2, w3, bias_C, dy, t, c, S, C, stride_dys)
            dbias += g
            dw0 += g * x0
            dw1 += g * x1
            dw2 += g * x2
            dw3 += g * x3
            dx_tile = g * w3[None, :]
            x4 = _load_input(x, state, t + 1, c, S, C, stride_xs, W)
            g = _gradient(x1, x2, x3, x4, w0, w1, w2, w3, bias_C, dy, t + 1, c, S, C, stride_dys)
            dx_tile += g * w2[None, :]
            x5 = _load_input(x, state, t + 2, c, S, C, stride_xs, W)
            g = _gradient(x2, x3, x4, x5, w0, w1, w2, w3, bias_C, dy, t + 2, c, S, C, stride_dys)
            dx_tile += g * w1[None, :]
            x6 = _load_input(x, state, t + 3, c, S, C, stride_xs, W)
            g = _gradient(x3, x4, x5, x6, w0, w1, w2, w3, bias_C, dy, t + 3, c, S, C, stride_dys)
            dx_tile += g * w0[None, :]
            rows = t[:, None].to(tl.int64)
            c_ok = (c < C)[None, :]
            dx_tile = dx_tile.to(dx.dtype.element_ty)
            tl.store(dx + rows * C + c[None, :], dx_tile, mask=(rows >= 0) & (rows < S) & c_ok)
            tl.store(dstate + (rows + W - 1) * C + c[None, :], dx_tile, mask=(rows < 0) & c_ok)
        partial += (b * programs + program) * 5 * C + c
        tl.store(partial, tl.sum(dbias, 0), mask=c < C)
        tl.store(partial + C, tl.sum(dw0, 0), mask=c < C)
        tl.store(partial + 2 * C, tl.sum(dw1, 0), mask=c < C)
        tl.store(partial + 3 * C, tl.sum(dw2, 0), mask=c < C)
        tl.store(partial + 4 * C, tl.sum(dw3, 0), mask=c < C)
