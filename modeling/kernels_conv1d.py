"""Triton kernels for the depthwise causal convolution + SiLU, forward and backward, for token-major views.

What is unusual: x may be a view of wider rows (in_proj's output), so nothing is copied or transposed; the inputs
before the first token are the state; offsets are 64-bit, for a video's rows exceed 2**31 numbers. A program walks some
channels down the rows, with the rows that the taps still need in registers, so that each number is read and written
once; the backward recomputes the pre-activation and sums dweight and dbias per program. The letters of shapes are
explained in kernels.py; here W is at most 4.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import require_kernel, tiles, tl, triton, unit_stride


MAX_WIDTH = 4


def causal_conv1d_triton(x_BSC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, state_BTC: Tensor) -> Tensor:
    """As `causal_conv1d_torch`: y_BSC in x's dtype, computed in float32, for W <= 4; raises as `require_kernel`."""
    require_kernel(x_BSC, weight_CW.shape[1], MAX_WIDTH, "taps")
    return _CausalConv1d.apply(x_BSC, weight_CW, bias_C, state_BTC.to(x_BSC.dtype))


def last_inputs(x_BSC: Tensor, state_BTC: Tensor, lengths_B: Tensor | None) -> Tensor:
    """The T inputs before each row's end, (B, T, C) in x's dtype: the next state."""
    S, T = x_BSC.shape[1], state_BTC.shape[1]
    if lengths_B is None:
        recent = x_BSC[:, max(S - T, 0) :]
        return torch.cat([state_BTC[:, recent.shape[1] :].to(x_BSC.dtype), recent], 1)
    index_BT1 = last_places(x_BSC, state_BTC, lengths_B)
    from_state, from_x = (
        t_BSC.gather(1, index.clamp(0, max(t_BSC.shape[1] - 1, 0)).expand(-1, -1, t_BSC.shape[2]))
        for t_BSC, index in ((state_BTC, index_BT1), (x_BSC, index_BT1 - T))
    )
    return torch.where(index_BT1 < T, from_state.to(x_BSC.dtype), from_x)


def last_places(x_BSC: Tensor, state_BTC: Tensor, lengths_B: Tensor | None) -> Tensor:
    """(B, T, 1) int64: where in `cat([state, x], 1)` each row's last T inputs stand."""
    (B, S, _), T = x_BSC.shape, state_BTC.shape[1]
    ends_B1 = torch.full((B, 1), S, device=x_BSC.device) if lengths_B is None else lengths_B.unsqueeze(1)
    return (ends_B1 + torch.arange(T, device=x_BSC.device)).unsqueeze(-1)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BSC, weight_CW, bias_C, state_BTC):
        x_BSC, weight_CW, state_BTC = unit_stride(x_BSC), weight_CW.contiguous(), state_BTC.contiguous()
        ctx.save_for_backward(x_BSC, weight_CW, bias_C, state_BTC)
        return convolve(x_BSC, weight_CW, bias_C, state_BTC)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BSC):
        saved = x_BSC, *_ = ctx.saved_tensors  # to be asked for once: a checkpoint gives them once
        dx_BSC = x_BSC.new_empty(x_BSC.shape)
        return dx_BSC, *convolution_gradients(*saved, unit_stride(dy_BSC), dx_BSC)


def convolve(x_BSC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, state_BTC: Tensor) -> Tensor:
    """The forward pass; x's channels lie together, weight and state are contiguous."""
    (B, S, C), W = x_BSC.shape, weight_CW.shape[1]
    y_BSC = x_BSC.new_empty(x_BSC.shape)
    block, rows, warps = tiles(x_BSC).conv1d_forward
    with torch.cuda.device_of(x_BSC):
        _forward_kernel[(triton.cdiv(C, block) * triton.cdiv(S, rows), B)](
            x_BSC, weight_CW, weight_CW if bias_C is None else bias_C.contiguous(), state_BTC, y_BSC,
            S, C, *x_BSC.stride()[:2],
            W=W, HAS_BIAS=bias_C is not None, ROWS=rows, BLOCK_C=block, num_warps=warps,
        )  # fmt: skip
    return y_BSC


def convolution_gradients(x_BSC, weight_CW, bias_C, state_BTC, dy_BSC, dx_BSC):
    """dweight, dbias and dstate; dx is written to `dx_BSC`, whose channels lie together, as those of x and dy."""
    (B, S, C), W = x_BSC.shape, weight_CW.shape[1]
    block, rows, warps = tiles(x_BSC).conv1d_backward
    programs = triton.cdiv(S + MAX_WIDTH - 1, rows)
    dstate_BTC = torch.empty_like(state_BTC)
    partial = torch.empty(B * programs, 1 + MAX_WIDTH, C, dtype=torch.float32, device=x_BSC.device)
    with torch.cuda.device_of(x_BSC):
        _backward_kernel[(triton.cdiv(C, block) * programs, B)](
            x_BSC, weight_CW, weight_CW if bias_C is None else bias_C.contiguous(), state_BTC,
            dy_BSC, dx_BSC, dstate_BTC, partial,
            S, C, programs, *x_BSC.stride()[:2], *dy_BSC.stride()[:2], *dx_BSC.stride()[:2],
            W=W, HAS_BIAS=bias_C is not None, ROWS=rows, BLOCK_C=block, num_warps=warps,
        )  # fmt: skip
    sums = partial.sum(0)
    dweight_CW = sums[1 + MAX_WIDTH - W :].t().to(weight_CW.dtype)
    return dweight_CW, None if bias_C is None else sums[0].to(bias_C.dtype), dstate_BTC


if triton is not None:
    from .kernels import sigmoid

    @triton.jit
    def _load_token(x, t, c, S, C, stride_s):
        """Row t in float32; zero outside the sequence."""
        return tl.load(x + t * stride_s + c, mask=c < tl.where((t >= 0) & (t < S), C, 0), other=0.0).to(tl.float32)

    @triton.jit
    def _load_row(x, state, t, c, S, C, stride_s, W: tl.constexpr):
        """Input t of the sequence, which begins with the state at -T; zero outside."""
        row = _load_token(x, t, c, S, C, stride_s)
        before = c < tl.where((t < 0) & (t >= 1 - W), C, 0)
        return row + tl.load(state + (t + W - 1) * C + c, mask=before, other=0.0).to(tl.float32)

    @triton.jit
    def _load_three(x, state, t, c, S, C, stride_s, W: tl.constexpr):
        """The inputs from t on."""
        row0 = _load_row(x, state, t, c, S, C, stride_s, W)
        row1 = _load_row(x, state, t + 1, c, S, C, stride_s, W)
        row2 = _load_row(x, state, t + 2, c, S, C, stride_s, W)
        return row0, row1, row2

    @triton.jit
    def _load_tap(weight, c, C, W: tl.constexpr, TAP: tl.constexpr):
        """Tap 0..3 of a convolution of width 4, to which a narrower one is extended by zeros on the left."""
        index: tl.constexpr = TAP + W - 4
        tap = tl.zeros_like(c).to(tl.float32)
        if index >= 0:
            tap += tl.load(weight + c * W + index, mask=c < C, other=0.0).to(tl.float32)
        return tap

    @triton.jit
    def _load_weights(weight, bias, c, C, W: tl.constexpr, HAS_BIAS: tl.constexpr):
        """The four taps, and the bias or zeros."""
        w0, w1 = _load_tap(weight, c, C, W, 0), _load_tap(weight, c, C, W, 1)
        w2, w3 = _load_tap(weight, c, C, W, 2), _load_tap(weight, c, C, W, 3)
        value = tl.zeros_like(c).to(tl.float32)
        if HAS_BIAS:
            value += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
        return w0, w1, w2, w3, value

    @triton.jit
    def _store_silu(y, x0, x1, x2, x3, w0, w1, w2, w3, bias, t, c, S, C):
        a = bias + x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3
        tl.store(y + t * C + c, (a * sigmoid(a)).to(y.dtype.element_ty), mask=c < tl.where(t < S, C, 0))

    @triton.jit(do_not_specialize=["S"])
    def _forward_kernel(
        x, weight, bias, state, y, S, C, stride_xb, stride_xs,
        W: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        blocks_c = tl.cdiv(C, BLOCK_C)
        b = tl.program_id(1).to(tl.int64)
        c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
        first = (tl.program_id(0) // blocks_c).to(tl.int64) * ROWS
        x += b * stride_xb
        y += b * S * C
        state += b * (W - 1) * C
        w0, w1, w2, w3, bias = _load_weights(weight, bias, c, C, W, HAS_BIAS)
        x0, x1, x2 = _load_three(x, state, first - 3, c, S, C, stride_xs, W)
        for index in range(0, tl.minimum(ROWS, S - first), 4):
            t = first + index
            # All loads come before the stores, across which the compiler would not move them.
            x3, x4 = _load_token(x, t, c, S, C, stride_xs), _load_token(x, t + 1, c, S, C, stride_xs)
            x5, x6 = _load_token(x, t + 2, c, S, C, stride_xs), _load_token(x, t + 3, c, S, C, stride_xs)
            _store_silu(y, x0, x1, x2, x3, w0, w1, w2, w3, bias, t, c, S, C)
            _store_silu(y, x1, x2, x3, x4, w0, w1, w2, w3, bias, t + 1, c, S, C)
            _store_silu(y, x2, x3, x4, x5, w0, w1, w2, w3, bias, t + 2, c, S, C)
            _store_silu(y, x3, x4, x5, x6, w0, w1, w2, w3, bias, t + 3, c, S, C)
            x0, x1, x2 = x4, x5, x6

    @triton.jit
    def _gradient(x0, x1, x2, x3, w0, w1, w2, w3, bias, dy):
        """Of one token's pre-activation."""
        a = bias + x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3
        s = sigmoid(a)
        return dy * s * (1 + a * (1 - s))

    @triton.jit
    def _store_dx(dx, dstate, g0, g1, g2, g3, w0, w1, w2, w3, t, c, S, C, stride_s, W: tl.constexpr):
        """Of input t, seen by tokens t to t + 3, whose gradients are g0 to g3; before the first it is the state's."""
        value = (g0 * w3 + g1 * w2 + g2 * w1 + g3 * w0).to(dx.dtype.element_ty)
        tl.store(dx + t * stride_s + c, value, mask=c < tl.where((t >= 0) & (t < S), C, 0))
        if t < 0:
            tl.store(dstate + (t + W - 1) * C + c, value, mask=c < tl.where(t >= 1 - W, C, 0))

    @triton.jit(do_not_specialize=["S", "programs"])
    def _backward_kernel(
        x, weight, bias, state, dy, dx, dstate, partial,
        S, C, programs, stride_xb, stride_xs, stride_dyb, stride_dys, stride_dxb, stride_dxs,
        W: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        """Walks tokens t, and with each writes the gradient of the last input that it finishes, t - 3."""
        blocks_c = tl.cdiv(C, BLOCK_C)
        b = tl.program_id(1).to(tl.int64)
        program = tl.program_id(0) // blocks_c
        c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
        first = program.to(tl.int64) * ROWS
        x += b * stride_xb
        dy += b * stride_dyb
        dx += b * stride_dxb
        state += b * (W - 1) * C
        dstate += b * (W - 1) * C
        w0, w1, w2, w3, bias = _load_weights(weight, bias, c, C, W, HAS_BIAS)
        dbias, dw0, dw1, dw2, dw3 = bias * 0, bias * 0, bias * 0, bias * 0, bias * 0
        before0, before1, before2 = _load_three(x, state, first - 6, c, S, C, stride_xs, W)
        x0, x1, x2 = _load_three(x, state, first - 3, c, S, C, stride_xs, W)
        dy0, dy1 = _load_token(dy, first - 3, c, S, C, stride_dys), _load_token(dy, first - 2, c, S, C, stride_dys)
        g0 = _gradient(before0, before1, before2, x0, w0, w1, w2, w3, bias, dy0)
        g1 = _gradient(before1, before2, x0, x1, w0, w1, w2, w3, bias, dy1)
        g2 = _gradient(before2, x0, x1, x2, w0, w1, w2, w3, bias, _load_token(dy, first - 1, c, S, C, stride_dys))
        for index in range(0, tl.minimum(ROWS, S + 3 - first), 4):
            t = first + index
            # All loads come before the stores, across which the compiler would not move them.
            x3, x4 = _load_token(x, t, c, S, C, stride_xs), _load_token(x, t + 1, c, S, C, stride_xs)
            x5, x6 = _load_token(x, t + 2, c, S, C, stride_xs), _load_token(x, t + 3, c, S, C, stride_xs)
            dy3, dy4 = _load_token(dy, t, c, S, C, stride_dys), _load_token(dy, t + 1, c, S, C, stride_dys)
            dy5, dy6 = _load_token(dy, t + 2, c, S, C, stride_dys), _load_token(dy, t + 3, c, S, C, stride_dys)
            g3 = _gradient(x0, x1, x2, x3, w0, w1, w2, w3, bias, dy3)
            g4 = _gradient(x1, x2, x3, x4, w0, w1, w2, w3, bias, dy4)
            g5 = _gradient(x2, x3, x4, x5, w0, w1, w2, w3, bias, dy5)
            g6 = _gradient(x3, x4, x5, x6, w0, w1, w2, w3, bias, dy6)
            dbias += (g3 + g4) + (g5 + g6)
            dw0 += g3 * x0 + g4 * x1 + g5 * x2 + g6 * x3
            dw1 += g3 * x1 + g4 * x2 + g5 * x3 + g6 * x4
            dw2 += g3 * x2 + g4 * x3 + g5 * x4 + g6 * x5
            dw3 += g3 * x3 + g4 * x4 + g5 * x5 + g6 * x6
            _store_dx(dx, dstate, g0, g1, g2, g3, w0, w1, w2, w3, t - 3, c, S, C, stride_dxs, W)
            _store_dx(dx, dstate, g1, g2, g3, g4, w0, w1, w2, w3, t - 2, c, S, C, stride_dxs, W)
            _store_dx(dx, dstate, g2, g3, g4, g5, w0, w1, w2, w3, t - 1, c, S, C, stride_dxs, W)
            _store_dx(dx, dstate, g3, g4, g5, g6, w0, w1, w2, w3, t, c, S, C, stride_dxs, W)
            x0, x1, x2 = x4, x5, x6
            g0, g1, g2 = g4, g5, g6
        partial += (b * programs + program) * 5 * C + c
        tl.store(partial, dbias, mask=c < C)
        tl.store(partial + C, dw0, mask=c < C)
        tl.store(partial + 2 * C, dw1, mask=c < C)
        tl.store(partial + 3 * C, dw2, mask=c < C)
        tl.store(partial + 4 * C, dw3, mask=c < C)
