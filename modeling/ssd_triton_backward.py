"""Triton kernels for the scan of ssd_triton.py: the gradients, from the states between tiles and their gradients.

What is unusual: both kinds of states are walked once more (`ssd_triton._walk`), written tile by tile, and read by two
kernels, neither of which needs more registers than there are: one for dx and whatever goes by pairs of tokens of one
tile, one for what goes by the states. In each a program takes one tile and many heads, which share B and C, and sums
dB and dC, or the scores' gradient, over them; `_sum_kernel` adds up the programs' sums, in a fixed order. No sum of
large terms of opposite sign stands in dt's gradient: row and column sums come from one and the same float32 tile.

Shapes: as in ssd_triton.py.
"""

import torch


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_HEADS = (28, 14)  # of one program: many, which write fewer sums, or fewer where there would be few programs
_FILLING = 660  # programs for which that is many: five for each of a GPU's 132 multiprocessors


def scan_gradients(x, A, Bm, Cm, D, times, inside, leaving, dy, dx, dB, dC):
    """ddt, dA and dD from the states before the tiles and the gradients of those after them, (B, C, H, K, P).

    `times` (3, B, H, C, Q) is `ssd_triton._steps`'s; dy has x's dtype, and so have dx, dB and dC, which are written.
    """
    (B, S, H, P), (G, K), (C, Q) = x.shape, Bm.shape[2:], times.shape[3:]
    steps, decays, _ = times
    many, few = _HEADS
    heads = many if B * C * G * triton.cdiv(H // G, many) >= _FILLING else few
    blocks = triton.cdiv(H // G, heads)

    def empty(*shape):
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    ddt, (direct, dlog), (dA, dD) = empty(B, S, H), empty(2, B, H, C * Q), empty(2, B, C, H)
    dscores, parts = empty(blocks, B, C, G, Q, Q), empty(2, blocks, B, S, G, K)
    x_strides, B_strides, C_strides, dy_strides = (t.stride()[:3] for t in (x, Bm, Cm, dy))
    options = {
        "HEADS": heads,
        "Q": Q,
        "P": P,
        "K": K,
        "num_warps": 4,
        "num_stages": 1 if x.dtype == torch.float32 else 2,
    }
    _dx_kernel[(blocks * G, C, B)](
        x,
        Bm,
        Cm,
        D,
        steps,
        decays,
        leaving,
        dy,
        dx,
        direct,
        dlog,
        dscores,
        dD,
        S,
        H,
        C,
        G,
        *x_strides,
        *B_strides,
        *C_strides,
        *dy_strides,
        *dx.stride()[:3],
        **options,
    )
    _dstates_kernel[(blocks * G, C, B)](
        x,
        Cm,
        A,
        steps,
        decays,
        inside,
        leaving,
        dy,
        direct,
        dlog,
        ddt,
        *parts,
        dA,
        S,
        H,
        C,
        G,
        *x_strides,
        *C_strides,
        *dy_strides,
        **options,
    )
    _sum_kernel[(G, C, B)](
        Bm,
        Cm,
        dscores,
        *parts,
        dB,
        dC,
        S,
        C,
        G,
        *B_strides,
        *C_strides,
        *dB.stride()[:3],
        *dC.stride()[:3],
        BLOCKS=blocks,
        Q=Q,
        K=K,
        num_warps=8,
    )
    return ddt, dA.sum((0, 1)), dD.sum((0, 1))


if triton is not None:

    @triton.jit(do_not_specialize=["S", "C"])
    def _dx_kernel(
        x,
        Bm,
        Cm,
        D,
        steps,
        decays,
        leaving,
        dy,
        dx,
        direct,
        dlog,
        dscores,
        dD,
        S,
        H,
        C,
        G,
        stride_xb,
        stride_xs,
        stride_xh,
        stride_Bb,
        stride_Bs,
        stride_Bg,
        stride_Cb,
        stride_Cs,
        stride_Cg,
        stride_dyb,
        stride_dys,
        stride_dyh,
        stride_dxb,
        stride_dxs,
        stride_dxh,
        HEADS: tl.constexpr,
        Q: tl.constexpr,
        P: tl.constexpr,
        K: tl.constexpr,
    ):
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
            row = (b * H + h) * C * Q + start
            decay = tl.load(decays + row + q)
            step = tl.load(steps + row + q)
            whole = tl.load(decays + row + Q - 1)
            x_tile = tl.load(
                x + tl.cast(h, tl.int64) * stride_xh + q[:, None] * stride_xs + p[None, :], mask=ok, other=0.0
            )
            dy_tile = tl.load(
                dy + tl.cast(h, tl.int64) * stride_dyh + q[:, None] * stride_dys + p[None, :], mask=ok, other=0.0
            )
            dh_out = tl.load(leaving + ((b * C + c) * H + h) * K * P + (k[:, None] * P + p[None, :]))
            # dx_j / dt_j, through the state at the tile's end and from the same tokens.
            x_exact = x_tile.to(tl.float32)
            dinput = tl.dot(B_tile, dh_out, input_precision="ieee") * tl.exp2(whole - decay)[:, None]
            written = tl.sum(x_exact * dinput, 1) * step
            between = tl.exp2(tl.where(causal, decay[None, :] - decay[:, None], float("-inf")))
            dinput = tl.dot((scores * between).to(dy_tile.dtype), dy_tile, dinput, input_precision="ieee")
            tl.store(direct + row + q, tl.sum(x_exact * dinput, 1))
            dx_tile = dinput * step[:, None] + dy_tile.to(tl.float32) * tl.load(D + h)
            offset = tl.cast(h, tl.int64) * stride_dxh + q[:, None] * stride_dxs + p[None, :]
            tl.store(dx + offset, dx_tile.to(dx.dtype.element_ty), mask=ok)
            # Tokens of one tile: y_i += sum_j scores_ji between_ji dt_j x_j; the diagonal of x dy^T is dD's.
            dmixing = tl.dot(x_tile, tl.trans(dy_tile), input_precision="ieee")
            diagonal = tl.sum(tl.where(q[:, None] == q[None, :], dmixing, 0.0), 1)
            tl.store(dD + (b * C + c) * H + h, tl.sum(diagonal, 0))
            dmixing *= between * step[:, None]
            dscores_tile += dmixing
            dmixing *= scores
            # decay_t sums dt A up to t, so each step collects from t to the tile's end.
            ddecay = tl.sum(dmixing, 0) - (tl.sum(dmixing, 1) + written)
            tl.store(dlog + row + q, tl.cumsum(ddecay, 0, reverse=True) + tl.sum(written, 0))
        dscores += (((block * tl.num_programs(2) + b) * C + c) * G + g) * Q * Q
        tl.store(dscores + q[:, None] * Q + q[None, :], dscores_tile)

    @triton.jit(do_not_specialize=["S", "C"])
    def _dstates_kernel(
        x,
        Cm,
        A,
        steps,
        decays,
        inside,
        leaving,
        dy,
        direct,
        dlog,
        ddt,
        dB,
        dC,
        dA,
        S,
        H,
        C,
        G,
        stride_xb,
        stride_xs,
        stride_xh,
        stride_Cb,
        stride_Cs,
        stride_Cg,
        stride_dyb,
        stride_dys,
        stride_dyh,
        HEADS: tl.constexpr,
        Q: tl.constexpr,
        P: tl.constexpr,
        K: tl.constexpr,
    ):
        """dB and dC by way of the states, and ddt and dA, to which `_dx_kernel` has begun dlog."""
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
            row = (b * H + h) * C * Q + start
            decay = tl.load(decays + row + q)
            step = tl.load(steps + row + q)
            whole = tl.load(decays + row + Q - 1)
            x_tile = tl.load(
                x + tl.cast(h, tl.int64) * stride_xh + q[:, None] * stride_xs + p[None, :], mask=ok, other=0.0
            )
            dy_tile = tl.load(
                dy + tl.cast(h, tl.int64) * stride_dyh + q[:, None] * stride_dys + p[None, :], mask=ok, other=0.0
            )
            states = ((b * C + c) * H + h) * K * P
            h_in = tl.load(inside + states + (k[:, None] * P + p[None, :]))
            dh_out = tl.load(leaving + states + (k[:, None] * P + p[None, :]))
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
            total = tl.load(dlog + row + q) + tl.cumsum(ddecay, 0, reverse=True) + kept
            value = tl.load(A + h) * total + tl.load(direct + row + q)
            tl.store(ddt + (b * S + start) * H + h + q * H, value, mask=q < S - start)
            tl.store(dA + (b * C + c) * H + h, tl.sum(step * total, 0))
        offset = (((block * tl.num_programs(2) + b) * S + start) * G + g) * K
        tl.store(dB + offset + q[:, None] * (G * K) + k[None, :], dB_tile, mask=ok)
        tl.store(dC + offset + q[:, None] * (G * K) + k[None, :], dC_tile, mask=ok)

    @triton.jit(do_not_specialize=["S", "C"])
    def _sum_kernel(
        Bm,
        Cm,
        dscores,
        dB_parts,
        dC_parts,
        dB,
        dC,
        S,
        C,
        G,
        stride_Bb,
        stride_Bs,
        stride_Bg,
        stride_Cb,
        stride_Cs,
        stride_Cg,
        stride_dBb,
        stride_dBs,
        stride_dBg,
        stride_dCb,
        stride_dCs,
        stride_dCg,
        BLOCKS: tl.constexpr,
        Q: tl.constexpr,
        K: tl.constexpr,
    ):
        """dB and dC: the sums over blocks of heads, and what goes by the pairs of tokens of one tile."""
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
            offset = (((block * tl.num_programs(2) + b) * C + c) * G + g) * Q * Q
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
