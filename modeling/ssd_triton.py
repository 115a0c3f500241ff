"""Triton kernels for the state space duality scan of Mamba-2 (arXiv 2405.21060, section 6): the forward pass.

What is unusual: a sequence is cut into segments of tiles, and one program walks one head's segment with the state in
registers, in float32, so that no state between tiles is written on the way forward. What each segment adds to the
state is summed beforehand, all segments at once, and passed on (`_enter`). x, B, C and dt are read in place from views
of wider rows, with 64-bit offsets; whole tiles are not masked, which would cost registers. Decays are applied in
float32, as powers of two, dt among them as log2(dt); products are in the inputs' dtype and sum in float32.

Shapes: B batch, S tokens, H heads, P head dim, G groups (H is a multiple), K state size, N segments of T tiles, C
tiles of Q tokens.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .ssd_triton_backward import scan_gradients
from .triton_launch import on_gpu, unit_stride


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_SEGMENT_TILES = 16  # of a sequence's many segments; fewer make more programs, and more states between them
_FILLING = 1280  # programs that leave few of a GPU's multiprocessors idle at the end, two running on each of 132
GROUP_TOKENS = 16384  # whose states between tiles backward holds at once; with fewer a GPU idles between kernels
_BLOCK_HEADS = 16
_BLOCK_STATE = 1024


def ssd_scan_triton(x_BSHP, dt_BSH, A_H, B_BSGK, C_BSGK, D_H=None, state_BHPK=None, chunk_size=256):
    """As `ssd_scan_torch`. `chunk_size` is an upper bound: the kernels' own tiles are smaller.

    Raises:
        ImportError: Triton is not installed. ValueError: float64.
    """
    if triton is None:
        raise ImportError("backend='triton' needs Triton: pip install triton, or use backend='torch'.")
    if x_BSHP.dtype == torch.float64:
        raise ValueError("backend='triton' does not compute in float64; use backend='torch'.")
    if not on_gpu(x_BSHP):
        raise ValueError(f"backend='triton' runs on a GPU, the tensors are on {x_BSHP.device}; use backend='torch'.")
    (B, _, H, P), K = x_BSHP.shape, B_BSGK.shape[3]
    D_H = torch.zeros(H, device=x_BSHP.device) if D_H is None else D_H.float()
    if state_BHPK is None:
        state_BHPK = torch.zeros(B, H, P, K, device=x_BSHP.device)
    # Tiles are powers of two from 16; any other size is padded with zeros, which change nothing.
    pad_P, pad_K = (max(16, triton.next_power_of_2(n)) - n for n in (P, K))
    x, Bm, Cm = x_BSHP, B_BSGK.to(x_BSHP.dtype), C_BSGK.to(x_BSHP.dtype)
    state = state_BHPK.float()
    if pad_P or pad_K:
        x, Bm, Cm = F.pad(x, (0, pad_P)), F.pad(Bm, (0, pad_K)), F.pad(Cm, (0, pad_K))
        state = F.pad(state, (0, pad_K, 0, pad_P))
    y, state = _SSDScan.apply(x, dt_BSH.float(), A_H.float(), Bm, Cm, D_H, state, chunk_size)
    return (y[..., :P], state[..., :P, :K]) if pad_P or pad_K else (y, state)


class _SSDScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, Bm, Cm, D, state, chunk_size):
        x, Bm, Cm = (unit_stride(t) for t in (x, Bm, Cm))
        A, D, state = A.contiguous(), D.contiguous(), state.contiguous()
        y, final, times, entering = scan(x, dt, A, Bm, Cm, D, state, chunk_size)
        ctx.save_for_backward(x, A, Bm, Cm, D, times, entering)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        saved = x, _, Bm, Cm, *_ = ctx.saved_tensors  # to be asked for once: a checkpoint gives them once
        dx, dB, dC = (torch.empty(t.shape, dtype=x.dtype, device=x.device) for t in (x, Bm, Cm))
        dy = unit_stride(dy.to(x.dtype))
        ddt, dA, dD, dstate = backward_scan(*saved, dy, dfinal, dx, dB, dC)
        return dx, ddt, dA, dB, dC, dD, dstate, None


def scan(x, dt, A, Bm, Cm, D, state, chunk_size):
    """y, the last state, and what `backward_scan` needs: the tokens' times and the states before the segments.

    x, B and C have unit stride along their last dimension; the rest is contiguous.
    """
    (B, S, H, P), (G, K) = x.shape, Bm.shape[2:]
    low = x.dtype != torch.float32  # float32 products run without tensor cores: small tiles
    Q = max(16, min(64 if low else 16, 1 << (chunk_size.bit_length() - 1)))
    with torch.cuda.device_of(x):
        times = _steps(dt, A, Q)
        T = _segment_tiles(times)
        entering = _enter(x, Bm, state, times, T, reverse=False)
        y, final = torch.empty(B, S, H, P, dtype=x.dtype, device=x.device), torch.empty_like(state)
        _output_kernel[(H, entering.shape[1], B)](
            x,
            Bm,
            Cm,
            D,
            *times[1:],
            entering,
            y,
            final,
            S,
            times.shape[3],
            T,
            H // G,
            *x.stride()[:3],
            *Bm.stride()[:3],
            *Cm.stride()[:3],
            Q=Q,
            P=P,
            K=K,
            MASKED=S % Q > 0,  # a second copy of the loop's body would spill
            num_warps=4,
            num_stages=2 if low else 1,
        )
    return y, final, times, entering


def backward_scan(x, A, Bm, Cm, D, times, entering, dy, dfinal, dx, dB, dC):
    """ddt, dA, dD and dstate; dx, dB and dC are written to the given tensors, of x's dtype and unit stride.

    The states between tiles, 57 KB a token for 112 heads of 64 x 128, are there for one group of segments at a time.
    """
    (C, Q), N, T = times.shape[3:], entering.shape[1], _segment_tiles(times)
    groups = triton.cdiv(C * Q, GROUP_TOKENS)
    segments = triton.cdiv(N, groups)
    with torch.cuda.device_of(x):
        leaving = _enter(dy, Cm, dfinal.contiguous(), times, T, reverse=True)
        parts = []
        for first in range(0, N, segments):
            end = min(first + segments, N)
            tiles, tokens = slice(first * T, end * T), slice(first * T * Q, end * T * Q)
            states = entering[:, first:end], leaving[:, N - end : N - first]  # these in the order of their walk
            given = (t[:, tokens] for t in (x, Bm, Cm, dy, dx, dB, dC))
            parts.append(_backward_segments(A, D, times[:, :, :, tiles].contiguous(), T, *states, *given))
    if len(parts) == 1:
        return parts[0]
    ddt, dA, dD, dstates = zip(*parts)
    return torch.cat(ddt, 1), sum(dA), sum(dD), dstates[0]


def _backward_segments(A, D, times, T, entering, leaving, x, Bm, Cm, dy, dx, dB, dC):
    """ddt, dA, dD and the gradient of the state before these segments, from what `_enter` gave for them."""
    inside, _ = _walk(x, Bm, entering.contiguous(), times, T, reverse=False)
    after, dstate = _walk(dy, Cm, leaving.contiguous(), times, T, reverse=True)
    return *scan_gradients(x, A, Bm, Cm, D, times, inside, after, dy, dx, dB, dC), dstate


def _steps(dt_BSH: Tensor, A_H: Tensor, Q: int) -> Tensor:
    """Three numbers per token, (3, B, H, C, Q), each tile of each head in one row, the last tile padded with dt = 0.

    They are dt; log2 of the decay from the tile's start; and that less log2(dt), so that exp2 of a difference of the
    two is a decay times dt (0 where dt is 0).
    """
    B, S, H = dt_BSH.shape
    C = triton.cdiv(S, Q)
    times = torch.empty(3, B, H, C, Q, dtype=torch.float32, device=dt_BSH.device)
    grid = (C, triton.cdiv(H, _BLOCK_HEADS), B)
    _steps_kernel[grid](dt_BSH, A_H, *times, S, H, C, *dt_BSH.stride(), Q=Q, BLOCK_H=_BLOCK_HEADS, num_warps=4)
    return times


def _segment_tiles(times: Tensor) -> int:
    """Tiles of a segment: fewer where a sequence of medium length would make too few programs."""
    _, B, H, C, _ = times.shape
    many = C <= 4 * _SEGMENT_TILES or B * H * triton.cdiv(C, _SEGMENT_TILES) >= _FILLING
    return _SEGMENT_TILES if many else _SEGMENT_TILES // 2


def _enter(v_BSHP, w_BSGK, state_BHPK, times, T, reverse):
    """The state before each segment, (B, N, H, P, K) float32, in the order of the walk: `_walk`'s recurrence."""
    (B, _, H, P), K = v_BSHP.shape, w_BSGK.shape[3]
    N = triton.cdiv(times.shape[3], T)
    if N == 1:
        return state_BHPK.unsqueeze(1)
    entering = torch.empty(B, N, H, P, K, dtype=torch.float32, device=v_BSHP.device)
    totals = torch.empty(B, N, H, dtype=torch.float32, device=v_BSHP.device)
    _launch_states(N - 1, v_BSHP, w_BSGK, None, times, T, entering, totals, None, N, reverse)
    block = min(P * K, _BLOCK_STATE)
    _pass_kernel[(P * K // block, H, B)](state_BHPK, totals, entering, N, SIZE=P * K, BLOCK=block, num_warps=4)
    return entering


def _walk(v_BSHP, w_BSGK, entering, times, T, reverse):
    """The recurrence over tiles: the state before each, (B, C, H, K, P) in v's dtype, and the last state in float32.

    Forward, tile c adds sum_j exp(cs_Q - cs_j) dt_j v_j w_j^T (v = x, w = B); in reverse, for the gradient of the
    state after each tile, sum_i exp(cs_i) v_i w_i^T (v = dy, w = C).
    """
    (B, _, H, P), K, N = v_BSHP.shape, w_BSGK.shape[3], entering.shape[1]
    states = torch.empty(B, times.shape[3], H, K, P, dtype=v_BSHP.dtype, device=v_BSHP.device)
    last = torch.empty(B, H, P, K, dtype=torch.float32, device=v_BSHP.device)
    _launch_states(N, v_BSHP, w_BSGK, entering, times, T, last, None, states, N, reverse)
    return states, last


def _launch_states(programs, v, w, entering, times, T, out, totals, states, N, reverse):
    (B, S, H, P), (G, K), (C, Q) = v.shape, w.shape[2:], times.shape[3:]
    _states_kernel[(H, programs, B)](
        v,
        w,
        entering,
        *times[1:],
        out,
        totals,
        states,
        S,
        C,
        N,
        T,
        H // G,
        *v.stride()[:3],
        *w.stride()[:3],
        WALK=states is not None,
        REVERSE=reverse,
        Q=Q,
        P=P,
        K=K,
        num_warps=4,
        num_stages=3 if v.dtype != torch.float32 else 1,
    )


if triton is not None:

    @triton.jit(do_not_specialize=["S", "C"])
    def _steps_kernel(
        dt,
        A,
        steps,
        decays,
        sources,
        S,
        H,
        C,
        stride_b,
        stride_s,
        stride_h,
        Q: tl.constexpr,
        BLOCK_H: tl.constexpr,
    ):
        b = tl.program_id(2).to(tl.int64)
        h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        t = tl.program_id(0).to(tl.int64) * Q + tl.arange(0, Q)
        ok = (t < S)[:, None] & (h < H)[None, :]
        value = tl.load(dt + b * stride_b + t[:, None] * stride_s + h[None, :] * stride_h, mask=ok, other=0.0)
        rate = tl.load(A + h, mask=h < H, other=0.0) * 1.4426950408889634  # log2(e), for exp2
        decay = tl.cumsum(value * rate[None, :], 0)
        offset = (b * H + h[None, :]) * C * Q + t[:, None]
        tl.store(steps + offset, value, mask=(h < H)[None, :])
        tl.store(decays + offset, decay, mask=(h < H)[None, :])
        tl.store(sources + offset, decay - tl.log2(value), mask=(h < H)[None, :])

    @triton.jit
    def _load_tile(rows, start, S, stride, Q: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
        q = tl.arange(0, Q)
        pointers = rows + start * stride + (q[:, None] * stride + tl.arange(0, WIDTH)[None, :])
        if MASKED:
            return tl.load(pointers, mask=(q < S - start)[:, None], other=0.0)
        else:
            return tl.load(pointers)

    @triton.jit
    def _next_state(
        state,
        v,
        w,
        decays,
        sources,
        states,
        c,
        S,
        H,
        stride_vs,
        stride_ws,
        WALK: tl.constexpr,
        REVERSE: tl.constexpr,
        Q: tl.constexpr,
        P: tl.constexpr,
        K: tl.constexpr,
        MASKED: tl.constexpr,
    ):
        """The state, [K, P], after tile c, and log2 of its decay over the tile."""
        start = tl.cast(c, tl.int64) * Q
        if WALK:
            tile = tl.arange(0, K)[:, None] * P + tl.arange(0, P)[None, :]
            tl.store(states + tl.cast(c, tl.int64) * H * K * P + tile, state.to(states.dtype.element_ty))
        whole = tl.load(decays + start + Q - 1)
        if REVERSE:
            weight = tl.exp2(tl.load(decays + start + tl.arange(0, Q)))
        else:
            weight = tl.exp2(whole - tl.load(sources + start + tl.arange(0, Q)))
        v_tile = _load_tile(v, start, S, stride_vs, Q, P, MASKED)
        w_tile = _load_tile(w, start, S, stride_ws, Q, K, MASKED)
        weighted = (v_tile.to(tl.float32) * weight[:, None]).to(v_tile.dtype)
        return tl.dot(tl.trans(w_tile), weighted, state * tl.exp2(whole), input_precision="ieee"), whole

    @triton.jit(do_not_specialize=["S", "C", "N", "T"])
    def _states_kernel(
        v,
        w,
        entering,
        decays,
        sources,
        out,
        totals,
        states,
        S,
        C,
        N,
        T,
        heads_per_group,
        stride_vb,
        stride_vs,
        stride_vh,
        stride_wb,
        stride_ws,
        stride_wg,
        WALK: tl.constexpr,
        REVERSE: tl.constexpr,
        Q: tl.constexpr,
        P: tl.constexpr,
        K: tl.constexpr,
    ):
        """What a segment adds to the state; or, with WALK, the states before its tiles, given that before itself."""
        b, n, h = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0).to(tl.int64)
        H = tl.num_programs(0)
        tile = tl.arange(0, K)[:, None] + tl.arange(0, P)[None, :] * K
        v += b * stride_vb + h * stride_vh
        w += b * stride_wb + (h // heads_per_group) * stride_wg
        decays += (b * H + h) * C * Q
        sources += (b * H + h) * C * Q
        if WALK:
            states += (b * C * H + h) * K * P
            state = tl.load(entering + ((b * N + n) * H + h) * P * K + tile)
        else:
            state = tl.zeros([K, P], tl.float32)
        total = 0.0
        first = n * T
        if REVERSE:
            first = (N - 1 - n) * T
        end = tl.minimum(first + T, C)
        full = tl.minimum(end, S // Q)  # the tiles from here on, one at most, are masked
        if REVERSE and full < end:
            state, whole = _next_state(
                state, v, w, decays, sources, states, full, S, H, stride_vs, stride_ws, WALK, REVERSE, Q, P, K, True
            )
            total += whole
        for index in range(first, full):
            c = index
            if REVERSE:
                c = first + full - 1 - index
            state, whole = _next_state(
                state, v, w, decays, sources, states, c, S, H, stride_vs, stride_ws, WALK, REVERSE, Q, P, K, False
            )
            total += whole
        if not REVERSE and full < end:
            state, whole = _next_state(
                state, v, w, decays, sources, states, full, S, H, stride_vs, stride_ws, WALK, REVERSE, Q, P, K, True
            )
            total += whole
        if WALK:
            if n == N - 1:
                tl.store(out + (b * H + h) * P * K + tile, state)
        else:
            tl.store(out + ((b * N + n + 1) * H + h) * P * K + tile, state)
            tl.store(totals + (b * N + n + 1) * H + h, total)

    @triton.jit(do_not_specialize=["N"])
    def _pass_kernel(state, totals, entering, N, SIZE: tl.constexpr, BLOCK: tl.constexpr):
        """What the segments add to the state, in place of which the states before the segments are written."""
        b, h, H = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        carried = tl.load(state + (b * H + h) * SIZE + index)
        tl.store(entering + (b * N * H + h) * SIZE + index, carried)
        for n in range(1, N):
            row = (b * N + n) * H + h
            added = tl.load(entering + row * SIZE + index)
            carried = carried * tl.exp2(tl.load(totals + row)) + added
            tl.store(entering + row * SIZE + index, carried)

    @triton.jit
    def _output_tile(
        state,
        x,
        Bm,
        Cm,
        y,
        decays,
        sources,
        skip,
        c,
        S,
        H,
        stride_xs,
        stride_Bs,
        stride_Cs,
        Q: tl.constexpr,
        P: tl.constexpr,
        K: tl.constexpr,
        MASKED: tl.constexpr,
    ):
        """Writes the outputs of tile c and returns the state, [K, P], after it."""
        q, start = tl.arange(0, Q), tl.cast(c, tl.int64) * Q
        decay, source = tl.load(decays + start + q), tl.load(sources + start + q)
        whole = tl.load(decays + start + Q - 1)
        C_tile = _load_tile(Cm, start, S, stride_Cs, Q, K, MASKED)
        B_tile = _load_tile(Bm, start, S, stride_Bs, Q, K, MASKED)
        x_tile = _load_tile(x, start, S, stride_xs, Q, P, MASKED)
        out = tl.dot(C_tile, state.to(C_tile.dtype), input_precision="ieee") * tl.exp2(decay)[:, None]
        weighted = (x_tile.to(tl.float32) * tl.exp2(whole - source)[:, None]).to(x_tile.dtype)
        state = tl.dot(tl.trans(B_tile), weighted, state * tl.exp2(whole), input_precision="ieee")
        # The state first: its operands' registers are free by now, and the tile over pairs [i, j] needs them.
        scores = tl.dot(C_tile, tl.trans(B_tile), input_precision="ieee")
        between = tl.where(q[:, None] >= q[None, :], decay[:, None] - source[None, :], float("-inf"))
        mixing = (scores * tl.exp2(between)).to(x_tile.dtype)
        out = tl.dot(mixing, x_tile, out, input_precision="ieee") + x_tile.to(tl.float32) * skip
        pointers = y + start * H * P + (q[:, None] * (H * P) + tl.arange(0, P)[None, :])
        if MASKED:
            tl.store(pointers, out.to(y.dtype.element_ty), mask=(q < S - start)[:, None])
        else:
            tl.store(pointers, out.to(y.dtype.element_ty))
        return state

    @triton.jit(do_not_specialize=["S", "C", "T"])
    def _output_kernel(
        x,
        Bm,
        Cm,
        D,
        decays,
        sources,
        entering,
        y,
        final,
        S,
        C,
        T,
        heads_per_group,
        stride_xb,
        stride_xs,
        stride_xh,
        stride_Bb,
        stride_Bs,
        stride_Bg,
        stride_Cb,
        stride_Cs,
        stride_Cg,
        Q: tl.constexpr,
        P: tl.constexpr,
        K: tl.constexpr,
        MASKED: tl.constexpr,
    ):
        b, n, h = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0).to(tl.int64)
        H, N, g = tl.num_programs(0), tl.num_programs(1), h // heads_per_group
        tile = tl.arange(0, K)[:, None] + tl.arange(0, P)[None, :] * K
        x += b * stride_xb + h * stride_xh
        Bm += b * stride_Bb + g * stride_Bg
        Cm += b * stride_Cb + g * stride_Cg
        y += (b * S * H + h) * P
        decays += (b * H + h) * C * Q
        sources += (b * H + h) * C * Q
        state = tl.load(entering + ((b * N + n) * H + h) * P * K + tile)
        skip = tl.load(D + h)
        for c in range(n * T, tl.minimum(n * T + T, C)):
            state = _output_tile(
                state, x, Bm, Cm, y, decays, sources, skip, c, S, H, stride_xs, stride_Bs, stride_Cs, Q, P, K, MASKED
            )
        if n == N - 1:
            tl.store(final + (b * H + h) * P * K + tile, state)
