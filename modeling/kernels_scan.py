"""Triton kernels for the state space duality scan of Mamba-2 (arXiv 2405.21060, section 6), forward and backward.

What is unusual: a sequence is cut into segments of chunks, and one program walks one head's segment with the state in
registers, in float32, so that no state between chunks is written on the way forward. What each segment adds to the
state is summed beforehand, all segments at once, and passed on (`_state_passing`). x, B, C and dt are views of wider
rows, read in place with 64-bit offsets; whole chunks are not masked, which would cost registers. Decays are applied in
float32, as powers of two, dt among them as log2(dt); products are in the inputs' dtype and sum in float32. Backward
walks states and their gradients once more, writes them chunk by chunk, and reads them in two kernels, neither of which
needs more registers than there are. No sum of large terms of opposite sign stands in dt's gradient. The letters of
shapes are explained in kernels.py; `cumsums` (3, B, H, Z, Q) holds three numbers per token, see `_chunk_cumsum`.
"""

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .kernels import require_kernel, tiles, tl, triton, unit_stride


GROUP_TOKENS = 16384  # whose states between chunks backward holds at once; with fewer a GPU idles between kernels
_BLOCK_HEADS = 16


def ssd_scan_triton(x_BSHP, dt_BSH, A_H, B_BSGK, C_BSGK, D_H=None, state_BHPK=None, chunk_size=256):
    """As `ssd_scan_torch`. `chunk_size` is an upper bound: the kernels' own are smaller. Raises as `require_kernel`."""
    require_kernel(x_BSHP)
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
        y, final, cumsums, entering = scan(x, dt, A, Bm, Cm, D, state, chunk_size)
        ctx.save_for_backward(x, A, Bm, Cm, D, cumsums, entering)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        saved = x, _, Bm, Cm, *_ = ctx.saved_tensors  # to be asked for once: a checkpoint gives them once
        dx, dB, dC = (t.new_empty(t.shape) for t in (x, Bm, Cm))
        dy = unit_stride(dy.to(x.dtype))
        ddt, dA, dD, dstate = scan_gradients(*saved, dy, dfinal, dx, dB, dC)
        return dx, ddt, dA, dB, dC, dD, dstate, None


def scan(x, dt, A, Bm, Cm, D, state, chunk_size):
    """y, the last state, and what `scan_gradients` needs: `cumsums` and the states before the segments.

    x, B and C have unit stride along their last dimension; the rest is contiguous.
    """
    (B, S, H, P), (G, K), low = x.shape, Bm.shape[2:], x.dtype != torch.float32
    largest = tiles(x).scan_chunk if low else tiles(x).scan_chunk_float32
    Q = max(16, min(largest, 1 << (chunk_size.bit_length() - 1)))
    with torch.cuda.device_of(x):
        cumsums = _chunk_cumsum(dt, A, Q)
        segment = _segment_chunks(cumsums)
        entering = _state_passing(x, Bm, state, cumsums, segment, reverse=False)
        y, final = x.new_empty(B, S, H, P), torch.empty_like(state)
        _chunk_scan_kernel[(H, entering.shape[1], B)](
            x, Bm, Cm, D, *cumsums[1:], entering, y, final,
            S, cumsums.shape[3], segment, H // G, *x.stride()[:3], *Bm.stride()[:3], *Cm.stride()[:3],
            Q=Q, P=P, K=K, MASKED=S % Q > 0,  # a second copy of the loop's body would spill
            num_warps=4, num_stages=2 if low else 1,
        )  # fmt: skip
    return y, final, cumsums, entering


def scan_gradients(x, A, Bm, Cm, D, cumsums, entering, dy, dfinal, dx, dB, dC):
    """ddt, dA, dD and dstate; dx, dB and dC are written to the given tensors, of x's dtype and unit stride.

    The states between chunks, 57 KB a token for 112 heads of 64 x 128, are there for one group of segments at a time.
    """
    (chunks, Q), segments, segment = cumsums.shape[3:], entering.shape[1], _segment_chunks(cumsums)
    step = triton.cdiv(segments, triton.cdiv(chunks * Q, GROUP_TOKENS))
    with torch.cuda.device_of(x):
        leaving = _state_passing(dy, Cm, dfinal.contiguous(), cumsums, segment, reverse=True)
        parts = []
        for first in range(0, segments, step):
            end = min(first + step, segments)
            # the gradients' segments are in the order of their walk
            states, dstates = entering[:, first:end], leaving[:, segments - end : segments - first]
            tokens = slice(first * segment * Q, end * segment * Q)
            given = (t[:, tokens] for t in (x, Bm, Cm, dy, dx, dB, dC))
            group = cumsums[:, :, :, first * segment : end * segment].contiguous()
            parts.append(_group_gradients(A, D, group, segment, states.contiguous(), dstates.contiguous(), *given))
    if len(parts) == 1:
        return parts[0]
    ddt, dA, dD, dstates = zip(*parts)
    return torch.cat(ddt, 1), sum(dA), sum(dD), dstates[0]


def _group_gradients(A, D, cumsums, segment, entering, leaving, x, Bm, Cm, dy, dx, dB, dC):
    """ddt, dA, dD and the gradient of the state before these segments, from what `_state_passing` gave for them."""
    states, _ = _chunk_states(x, Bm, entering, cumsums, segment, reverse=False)
    dstates, dstate = _chunk_states(dy, Cm, leaving, cumsums, segment, reverse=True)
    (B, S, H, P), (G, K), (chunks, Q) = x.shape, Bm.shape[2:], cumsums.shape[3:]
    dt, dA_cumsum, _ = cumsums
    many, few = tiles(x).scan_backward_heads
    heads = many if B * chunks * G * triton.cdiv(H // G, many) >= tiles(x).scan_backward_programs else few
    blocks = triton.cdiv(H // G, heads)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    ddt, (ddt_direct, ddA), (dA, dD) = empty(B, S, H), empty(2, B, H, chunks * Q), empty(2, B, chunks, H)
    dscores, parts = empty(blocks, B, chunks, G, Q, Q), empty(2, blocks, B, S, G, K)
    x_strides, B_strides, C_strides, dy_strides = (t.stride()[:3] for t in (x, Bm, Cm, dy))
    options = {"HEADS": heads, "Q": Q, "P": P, "K": K, "num_warps": 4}
    options["num_stages"] = 1 if x.dtype == torch.float32 else 2
    _chunk_scan_backward_kernel[(blocks * G, chunks, B)](
        x, Bm, Cm, D, dt, dA_cumsum, dstates, dy, dx, ddt_direct, ddA, dscores, dD,
        S, H, chunks, G, *x_strides, *B_strides, *C_strides, *dy_strides, *dx.stride()[:3], **options,
    )  # fmt: skip
    _chunk_state_backward_kernel[(blocks * G, chunks, B)](
        x, Cm, A, dt, dA_cumsum, states, dstates, dy, ddt_direct, ddA, ddt, *parts, dA,
        S, H, chunks, G, *x_strides, *C_strides, *dy_strides, **options,
    )  # fmt: skip
    _dB_dC_kernel[(G, chunks, B)](
        Bm, Cm, dscores, *parts, dB, dC, S, chunks, G, *B_strides, *C_strides, *dB.stride()[:3], *dC.stride()[:3],
        BLOCKS=blocks, Q=Q, K=K, num_warps=8,
    )  # fmt: skip
    return ddt, dA.sum((0, 1)), dD.sum((0, 1)), dstate


def _chunk_cumsum(dt_BSH: Tensor, A_H: Tensor, Q: int) -> Tensor:
    """dt, dA_cumsum and dA_source of each token, (3, B, H, Z, Q), the last chunk padded with dt = 0.

    dA_cumsum is log2 of the decay from the chunk's start. dA_source is that less log2(dt), so that exp2 of a difference
    of the two is a decay times dt (0 where dt is 0).
    """
    B, S, H = dt_BSH.shape
    chunks = triton.cdiv(S, Q)
    cumsums = torch.empty(3, B, H, chunks, Q, dtype=torch.float32, device=dt_BSH.device)
    _chunk_cumsum_kernel[(chunks, triton.cdiv(H, _BLOCK_HEADS), B)](
        dt_BSH, A_H, *cumsums, S, H, chunks, *dt_BSH.stride(), Q=Q, BLOCK_H=_BLOCK_HEADS, num_warps=4
    )
    return cumsums


def _segment_chunks(cumsums: Tensor) -> int:
    """Chunks of a segment: fewer where a sequence of medium length would make too few programs."""
    (_, B, H, chunks, _), many = cumsums.shape, tiles(cumsums).scan_segment_chunks
    enough = chunks <= 4 * many or B * H * triton.cdiv(chunks, many) >= tiles(cumsums).scan_programs
    return many if enough else many // 2


def _state_passing(v_BSHP, w_BSGK, state_BHPK, cumsums, segment, reverse):
    """The state before each segment, float32 (B, segments, H, P, K), in the order of `_chunk_states`' recurrence."""
    (B, _, H, P), K = v_BSHP.shape, w_BSGK.shape[3]
    segments = triton.cdiv(cumsums.shape[3], segment)
    if segments == 1:
        return state_BHPK.unsqueeze(1)
    entering = torch.empty(B, segments, H, P, K, dtype=torch.float32, device=v_BSHP.device)
    totals = torch.empty(B, segments, H, dtype=torch.float32, device=v_BSHP.device)
    _chunk_state(segments - 1, v_BSHP, w_BSGK, None, cumsums, segment, entering, totals, None, segments, reverse)
    block = min(P * K, 1024)
    _state_passing_kernel[(P * K // block, H, B)](
        state_BHPK, totals, entering, segments, SIZE=P * K, BLOCK=block, num_warps=4
    )
    return entering


def _chunk_states(v_BSHP, w_BSGK, entering, cumsums, segment, reverse):
    """The recurrence over chunks: the state before each, (B, Z, H, K, P) in v's dtype, and the last state in float32.

    Forward, a chunk adds sum_j exp(dA_cumsum_Q - dA_cumsum_j) dt_j v_j w_j^T (v = x, w = B); in reverse, for the
    gradient of the state after each chunk, sum_i exp(dA_cumsum_i) v_i w_i^T (v = dy, w = C).
    """
    (B, _, H, P), K, segments = v_BSHP.shape, w_BSGK.shape[3], entering.shape[1]
    states = torch.empty(B, cumsums.shape[3], H, K, P, dtype=v_BSHP.dtype, device=v_BSHP.device)
    last = torch.empty(B, H, P, K, dtype=torch.float32, device=v_BSHP.device)
    _chunk_state(segments, v_BSHP, w_BSGK, entering, cumsums, segment, last, None, states, segments, reverse)
    return states, last


def _chunk_state(programs, v, w, entering, cumsums, segment, out, totals, states, segments, reverse):
    (B, S, H, P), (G, K), (chunks, Q) = v.shape, w.shape[2:], cumsums.shape[3:]
    _chunk_state_kernel[(H, programs, B)](
        v, w, entering, *cumsums[1:], out, totals, states,
        S, chunks, segments, segment, H // G, *v.stride()[:3], *w.stride()[:3],
        WALK=states is not None, REVERSE=reverse, Q=Q, P=P, K=K,
        num_warps=4, num_stages=3 if v.dtype != torch.float32 else 1,
    )  # fmt: skip


if triton is not None:

    @triton.jit(do_not_specialize=["S", "chunks"])
    def _chunk_cumsum_kernel(
        dt, A, dt_out, dA_cumsum, dA_source, S, H, chunks, stride_b, stride_s, stride_h,
        Q: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        b = tl.program_id(2).to(tl.int64)
        h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        t = tl.program_id(0).to(tl.int64) * Q + tl.arange(0, Q)
        ok = (t < S)[:, None] & (h < H)[None, :]
        value = tl.load(dt + b * stride_b + t[:, None] * stride_s + h[None, :] * stride_h, mask=ok, other=0.0)
        rate = tl.load(A + h, mask=h < H, other=0.0) * 1.4426950408889634  # log2(e), for exp2
        decay = tl.cumsum(value * rate[None, :], 0)
        offset = (b * H + h[None, :]) * chunks * Q + t[:, None]
        tl.store(dt_out + offset, value, mask=(h < H)[None, :])
        tl.store(dA_cumsum + offset, decay, mask=(h < H)[None, :])
        tl.store(dA_source + offset, decay - tl.log2(value), mask=(h < H)[None, :])

    @triton.jit
    def _load_chunk(rows, start, S, stride, Q: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
        q = tl.arange(0, Q)
        pointers = rows + start * stride + (q[:, None] * stride + tl.arange(0, WIDTH)[None, :])
        if MASKED:
            return tl.load(pointers, mask=(q < S - start)[:, None], other=0.0)
        else:
            return tl.load(pointers)

    @triton.jit
    def _next_state(
        state, v, w, dA_cumsum, dA_source, states, c, S, H, stride_vs, stride_ws,
        WALK: tl.constexpr, REVERSE: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
        MASKED: tl.constexpr,
    ):  # fmt: skip
        """The state, [K, P], after chunk c, and log2 of its decay over the chunk."""
        start = tl.cast(c, tl.int64) * Q
        if WALK:
            tile = tl.arange(0, K)[:, None] * P + tl.arange(0, P)[None, :]
            tl.store(states + tl.cast(c, tl.int64) * H * K * P + tile, state.to(states.dtype.element_ty))
        whole = tl.load(dA_cumsum + start + Q - 1)
        if REVERSE:
            weight = tl.exp2(tl.load(dA_cumsum + start + tl.arange(0, Q)))
        else:
            weight = tl.exp2(whole - tl.load(dA_source + start + tl.arange(0, Q)))
        v_tile = _load_chunk(v, start, S, stride_vs, Q, P, MASKED)
        w_tile = _load_chunk(w, start, S, stride_ws, Q, K, MASKED)
        weighted = (v_tile.to(tl.float32) * weight[:, None]).to(v_tile.dtype)
        return tl.dot(tl.trans(w_tile), weighted, state * tl.exp2(whole), input_precision="ieee"), whole

    @triton.jit(do_not_specialize=["S", "chunks", "segments", "segment"])
    def _chunk_state_kernel(
        v, w, entering, dA_cumsum, dA_source, out, totals, states,
        S, chunks, segments, segment, heads_per_group, stride_vb, stride_vs, stride_vh, stride_wb, stride_ws, stride_wg,
        WALK: tl.constexpr, REVERSE: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    ):  # fmt: skip
        """What a segment adds to the state; or, with WALK, the states before its chunks, given that before itself."""
        b, n, h = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0).to(tl.int64)
        H = tl.num_programs(0)
        tile = tl.arange(0, K)[:, None] + tl.arange(0, P)[None, :] * K
        v += b * stride_vb + h * stride_vh
        w += b * stride_wb + (h // heads_per_group) * stride_wg
        dA_cumsum += (b * H + h) * chunks * Q
        dA_source += (b * H + h) * chunks * Q
        if WALK:
            states += (b * chunks * H + h) * K * P
            state = tl.load(entering + ((b * segments + n) * H + h) * P * K + tile)
        else:
            state = tl.zeros([K, P], tl.float32)
        total = 0.0
        first = n * segment
        if REVERSE:
            first = (segments - 1 - n) * segment
        end = tl.minimum(first + segment, chunks)
        full = tl.minimum(end, S // Q)  # the chunks from here on, one at most, are masked
        if REVERSE and full < end:
            state, whole = _next_state(
                state, v, w, dA_cumsum, dA_source, states, full, S, H, stride_vs, stride_ws,
                WALK, REVERSE, Q, P, K, True,
            )  # fmt: skip
            total += whole
        for index in range(first, full):
            c = index
            if REVERSE:
                c = first + full - 1 - index
            state, whole = _next_state(
                state, v, w, dA_cumsum, dA_source, states, c, S, H, stride_vs, stride_ws, WALK, REVERSE, Q, P, K, False
            )
            total += whole
        if not REVERSE and full < end:
            state, whole = _next_state(
                state, v, w, dA_cumsum, dA_source, states, full, S, H, stride_vs, stride_ws,
                WALK, REVERSE, Q, P, K, True,
            )  # fmt: skip
            total += whole
        if WALK:
            if n == segments - 1:
                tl.store(out + (b * H + h) * P * K + tile, state)
        else:
            tl.store(out + ((b * segments + n + 1) * H + h) * P * K + tile, state)
            tl.store(totals + (b * segments + n + 1) * H + h, total)

    @triton.jit(do_not_specialize=["segments"])
    def _state_passing_kernel(state, totals, entering, segments, SIZE: tl.constexpr, BLOCK: tl.constexpr):
        """What the segments add to the state, in place of which the states before the segments are written."""
        b, h, H = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        carried = tl.load(state + (b * H + h) * SIZE + index)
        tl.store(entering + (b * segments * H + h) * SIZE + index, carried)
        for n in range(1, segments):
            row = (b * segments + n) * H + h
            added = tl.load(entering + row * SIZE + index)
            carried = carried * tl.exp2(tl.load(totals + row)) + added
            tl.store(entering + row * SIZE + index, carried)

    @triton.jit
    def _chunk_scan(
        state, x, Bm, Cm, y, dA_cumsum, dA_source, skip, c, S, H, stride_xs, stride_Bs, stride_Cs,
        Q: tl.constexpr, P: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr,
    ):  # fmt: skip
        """Writes the outputs of chunk c and returns the state, [K, P], after it."""
        q, start = tl.arange(0, Q), tl.cast(c, tl.int64) * Q
        decay, source = tl.load(dA_cumsum + start + q), tl.load(dA_source + start + q)
        whole = tl.load(dA_cumsum + start + Q - 1)
        C_tile = _load_chunk(Cm, start, S, stride_Cs, Q, K, MASKED)
        B_tile = _load_chunk(Bm, start, S, stride_Bs, Q, K, MASKED)
        x_tile = _load_chunk(x, start, S, stride_xs, Q, P, MASKED)
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

    @triton.jit(do_not_specialize=["S", "chunks", "segment"])
    def _chunk_scan_kernel(
        x, Bm, Cm, D, dA_cumsum, dA_source, entering, y, final, S, chunks, segment, heads_per_group,
        stride_xb, stride_xs, stride_xh, stride_Bb, stride_Bs, stride_Bg, stride_Cb, stride_Cs, stride_Cg,
        Q: tl.constexpr, P: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr,
    ):  # fmt: skip
        b, n, h = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0).to(tl.int64)
        H, segments, g = tl.num_programs(0), tl.num_programs(1), h // heads_per_group
        tile = tl.arange(0, K)[:, None] + tl.arange(0, P)[None, :] * K
        x += b * stride_xb + h * stride_xh
        Bm += b * stride_Bb + g * stride_Bg
        Cm += b * stride_Cb + g * stride_Cg
        y += (b * S * H + h) * P
        dA_cumsum += (b * H + h) * chunks * Q
        dA_source += (b * H + h) * chunks * Q
        state = tl.load(entering + ((b * segments + n) * H + h) * P * K + tile)
        skip = tl.load(D + h)
        for c in range(n * segment, tl.minimum(n * segment + segment, chunks)):
            state = _chunk_scan(
                state, x, Bm, Cm, y, dA_cumsum, dA_source, skip, c, S, H, stride_xs, stride_Bs, stride_Cs,
                Q, P, K, MASKED,
            )  # fmt: skip
        if n == segments - 1:
            tl.store(final + (b * H + h) * P * K + tile, state)

    # Backward. In both kernels a program takes one chunk and many heads, which share B and C, and sums dB and dC, or
    # the scores' gradient, over them; `_dB_dC_kernel` adds up the programs' sums, in a fixed order.

    @triton.jit
    def _load_head(
        x, dy, dt, dA_cumsum, row, h, ok, stride_xs, stride_xh, stride_dys, stride_dyh, Q: tl.constexpr, P: tl.constexpr
    ):
        """dA_cumsum of a head's chunk, dt, dA_cumsum at the chunk's end, x and dy."""
        q, p = tl.arange(0, Q), tl.arange(0, P)
        decay = tl.load(dA_cumsum + row + q)
        step = tl.load(dt + row + q)
        whole = tl.load(dA_cumsum + row + Q - 1)
        x += tl.cast(h, tl.int64) * stride_xh
        x_tile = tl.load(x + q[:, None] * stride_xs + p[None, :], mask=ok, other=0.0)
        dy += tl.cast(h, tl.int64) * stride_dyh
        dy_tile = tl.load(dy + q[:, None] * stride_dys + p[None, :], mask=ok, other=0.0)
        return decay, step, whole, x_tile, dy_tile

    @triton.jit(do_not_specialize=["S", "chunks"])
    def _chunk_scan_backward_kernel(
        x, Bm, Cm, D, dt, dA_cumsum, dstates, dy, dx, ddt_direct, ddA, dscores, dD, S, H, chunks, G,
        stride_xb, stride_xs, stride_xh, stride_Bb, stride_Bs, stride_Bg, stride_Cb, stride_Cs, stride_Cg,
        stride_dyb, stride_dys, stride_dyh, stride_dxb, stride_dxs, stride_dxh,
        HEADS: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    ):  # fmt: skip
        """All but what goes by the states read. Tiles over pairs are transposed, [j, i] with j the earlier token."""
        b, c, heads = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), H // G
        g, block = tl.program_id(0) % G, tl.program_id(0) // G
        q, p, k = tl.arange(0, Q), tl.arange(0, P), tl.arange(0, K)
        start = c * Q
        ok = (q < S - start)[:, None]
        Bm += b * stride_Bb + g * stride_Bg + start * stride_Bs
        Cm += b * stride_Cb + g * stride_Cg + start * stride_Cs
        B_tile = tl.load(Bm + q[:, None] * stride_Bs + k[None, :], mask=ok, other=0.0)
        C_tile = tl.load(Cm + q[:, None] * stride_Cs + k[None, :], mask=ok, other=0.0)
        scores = tl.dot(B_tile, tl.trans(C_tile), input_precision="ieee")
        causal = q[:, None] <= q[None, :]
        dscores_tile = tl.zeros([Q, Q], tl.float32)
        x += b * stride_xb + start * stride_xs
        dy += b * stride_dyb + start * stride_dys
        dx += b * stride_dxb + start * stride_dxs
        for h in range(g * heads + block * HEADS, g * heads + tl.minimum(block * HEADS + HEADS, heads)):
            row = (b * H + h) * chunks * Q + start
            decay, step, whole, x_tile, dy_tile = _load_head(
                x, dy, dt, dA_cumsum, row, h, ok, stride_xs, stride_xh, stride_dys, stride_dyh, Q, P
            )
            dh_out = tl.load(dstates + ((b * chunks + c) * H + h) * K * P + (k[:, None] * P + p[None, :]))
            # dx_j / dt_j, through the state at the chunk's end and from the same tokens.
            x_exact = x_tile.to(tl.float32)
            dinput = tl.dot(B_tile, dh_out, input_precision="ieee") * tl.exp2(whole - decay)[:, None]
            written = tl.sum(x_exact * dinput, 1) * step
            between = tl.exp2(tl.where(causal, decay[None, :] - decay[:, None], float("-inf")))
            dinput = tl.dot((scores * between).to(dy_tile.dtype), dy_tile, dinput, input_precision="ieee")
            tl.store(ddt_direct + row + q, tl.sum(x_exact * dinput, 1))
            dx_tile = dinput * step[:, None] + dy_tile.to(tl.float32) * tl.load(D + h)
            offset = tl.cast(h, tl.int64) * stride_dxh + q[:, None] * stride_dxs + p[None, :]
            tl.store(dx + offset, dx_tile.to(dx.dtype.element_ty), mask=ok)
            # Tokens of one chunk: y_i += sum_j scores_ji between_ji dt_j x_j; the diagonal of x dy^T is dD's.
            dmixing = tl.dot(x_tile, tl.trans(dy_tile), input_precision="ieee")
            diagonal = tl.sum(tl.where(q[:, None] == q[None, :], dmixing, 0.0), 1)
            tl.store(dD + (b * chunks + c) * H + h, tl.sum(diagonal, 0))
            dmixing *= between * step[:, None]
            dscores_tile += dmixing
            dmixing *= scores
            # dA_cumsum_t sums dt A up to t, so each step collects from t to the chunk's end. Row and column sums come
            # from one and the same float32 tile.
            ddecay = tl.sum(dmixing, 0) - (tl.sum(dmixing, 1) + written)
            tl.store(ddA + row + q, tl.cumsum(ddecay, 0, reverse=True) + tl.sum(written, 0))
        dscores += (((block * tl.num_programs(2) + b) * chunks + c) * G + g) * Q * Q
        tl.store(dscores + q[:, None] * Q + q[None, :], dscores_tile)

    @triton.jit(do_not_specialize=["S", "chunks"])
    def _chunk_state_backward_kernel(
        x, Cm, A, dt, dA_cumsum, states, dstates, dy, ddt_direct, ddA, ddt, dB, dC, dA, S, H, chunks, G,
        stride_xb, stride_xs, stride_xh, stride_Cb, stride_Cs, stride_Cg, stride_dyb, stride_dys, stride_dyh,
        HEADS: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    ):  # fmt: skip
        """dB and dC by way of the states, and ddt and dA, to which `_chunk_scan_backward_kernel` has begun ddA."""
        b, c, heads = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), H // G
        g, block = tl.program_id(0) % G, tl.program_id(0) // G
        q, p, k = tl.arange(0, Q), tl.arange(0, P), tl.arange(0, K)
        start = c * Q
        ok = (q < S - start)[:, None]
        Cm += b * stride_Cb + g * stride_Cg + start * stride_Cs
        C_tile = tl.load(Cm + q[:, None] * stride_Cs + k[None, :], mask=ok, other=0.0)
        dB_tile = tl.zeros([Q, K], tl.float32)
        dC_tile = tl.zeros([Q, K], tl.float32)
        x += b * stride_xb + start * stride_xs
        dy += b * stride_dyb + start * stride_dys
        for h in range(g * heads + block * HEADS, g * heads + tl.minimum(block * HEADS + HEADS, heads)):
            row = (b * H + h) * chunks * Q + start
            decay, step, whole, x_tile, dy_tile = _load_head(
                x, dy, dt, dA_cumsum, row, h, ok, stride_xs, stride_xh, stride_dys, stride_dyh, Q, P
            )
            state = ((b * chunks + c) * H + h) * K * P
            h_in = tl.load(states + state + (k[:, None] * P + p[None, :]))
            dh_out = tl.load(dstates + state + (k[:, None] * P + p[None, :]))
            # The state written: h_out += exp(whole - decay_j) dt_j x_j B_j^T; read: y_i += exp(decay_i) h_in C_i.
            weighted = (x_tile.to(tl.float32) * (tl.exp2(whole - decay) * step)[:, None]).to(x_tile.dtype)
            dB_tile = tl.dot(weighted, tl.trans(dh_out), dB_tile, input_precision="ieee")
            weighted = dy_tile.to(tl.float32) * tl.exp2(decay)[:, None]
            read = tl.dot(C_tile, h_in, input_precision="ieee")
            ddecay = tl.sum(read * weighted, 1)
            dC_tile = tl.dot(weighted.to(x_tile.dtype), tl.trans(h_in), dC_tile, input_precision="ieee")
            # The trace of h_in^T dh_out: as a matrix product, for that needs neither of them in registers.
            kept = tl.dot(tl.trans(h_in), dh_out, input_precision="ieee")
            kept = tl.sum(tl.sum(tl.where(p[:, None] == p[None, :], kept, 0.0), 1), 0) * tl.exp2(whole)
            total = tl.load(ddA + row + q) + tl.cumsum(ddecay, 0, reverse=True) + kept
            value = tl.load(A + h) * total + tl.load(ddt_direct + row + q)
            tl.store(ddt + (b * S + start) * H + h + q * H, value, mask=q < S - start)
            tl.store(dA + (b * chunks + c) * H + h, tl.sum(step * total, 0))
        offset = (((block * tl.num_programs(2) + b) * S + start) * G + g) * K
        tl.store(dB + offset + q[:, None] * (G * K) + k[None, :], dB_tile, mask=ok)
        tl.store(dC + offset + q[:, None] * (G * K) + k[None, :], dC_tile, mask=ok)

    @triton.jit(do_not_specialize=["S", "chunks"])
    def _dB_dC_kernel(
        Bm, Cm, dscores, dB_parts, dC_parts, dB, dC, S, chunks, G,
        stride_Bb, stride_Bs, stride_Bg, stride_Cb, stride_Cs, stride_Cg,
        stride_dBb, stride_dBs, stride_dBg, stride_dCb, stride_dCs, stride_dCg,
        BLOCKS: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
    ):  # fmt: skip
        """dB and dC: the sums over blocks of heads, and what goes by the pairs of tokens of one chunk."""
        b, c, g = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(0)
        q, k = tl.arange(0, Q), tl.arange(0, K)
        start = c * Q
        ok = (q < S - start)[:, None]
        Bm += b * stride_Bb + g * stride_Bg + start * stride_Bs
        Cm += b * stride_Cb + g * stride_Cg + start * stride_Cs
        B_tile = tl.load(Bm + q[:, None] * stride_Bs + k[None, :], mask=ok, other=0.0)
        C_tile = tl.load(Cm + q[:, None] * stride_Cs + k[None, :], mask=ok, other=0.0)
        pairs = tl.zeros([Q, Q], tl.float32)
        for block in range(BLOCKS):
            offset = (((block * tl.num_programs(2) + b) * chunks + c) * G + g) * Q * Q
            pairs += tl.load(dscores + offset + q[:, None] * Q + q[None, :])
        dB_tile = tl.zeros([Q, K], tl.float32)
        dC_tile = tl.zeros([Q, K], tl.float32)
        for block in range(BLOCKS):
            offset = (((block * tl.num_programs(2) + b) * S + start) * G + g) * K + q[:, None] * (G * K) + k[None, :]
            dB_tile += tl.load(dB_parts + offset, mask=ok, other=0.0)
            dC_tile += tl.load(dC_parts + offset, mask=ok, other=0.0)
        pairs = pairs.to(B_tile.dtype)
        dB_tile += tl.dot(pairs, C_tile, input_precision="ieee")
        dC_tile += tl.dot(tl.trans(pairs), B_tile, input_precision="ieee")
        dB += b * stride_dBb + g * stride_dBg + start * stride_dBs
        dC += b * stride_dCb + g * stride_dCg + start * stride_dCs
        tl.store(dB + q[:, None] * stride_dBs + k[None, :], dB_tile.to(dB.dtype.element_ty), mask=ok)
        tl.store(dC + q[:, None] * stride_dCs + k[None, :], dC_tile.to(dC.dtype.element_ty), mask=ok)
