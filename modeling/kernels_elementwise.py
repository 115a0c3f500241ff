"""Triton kernels for what text layers and vision towers do between their matrix products; forward only.

What is unusual: when one token is decoded these steps move almost no bytes, but each launch costs two microseconds, and
Qwen2-VL's operations make some 30 of them a layer. Here they are six: the norm (kernels_norm.py), the projections to
queries, keys and values, the rotary embedding, the entry into a static cache, the mix of self- and cross-attention with
residual and norm (equation 4 of arXiv 2503.11579), and the gate of the MLP. In a vision tower such steps move bytes and
compute little, so each passes over its rows once, in place where nobody else reads. All compute in float32 and round
where the plain operations round to memory; offsets are 64-bit. The letters of shapes are explained in kernels.py.
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from .kernels import can_use_inference_kernel, is_plain, on_device_of, row_options, tl, triton


_GATE_ELEMENTS, _GELU_ELEMENTS = 1024, 2048  # for one program
_MAX_TOKENS = 16  # that one program of the projections takes; with more of them a matrix product is not so small


def three_linears_triton(x_BND: Tensor, modules: tuple[nn.Linear, nn.Linear, nn.Linear]) -> list[Tensor] | None:
    """The three projections (B, N, O) of a few tokens in one launch; None where the modules have to be called.

    They have to if they are more than `nn.Linear`: adapters, quantised weights, hooks.
    """
    R, D = x_BND.shape[0] * x_BND.shape[1], x_BND.shape[2]
    if R > _MAX_TOKENS or x_BND.dtype == torch.float32:
        return None
    weights = [m.weight for m in modules if is_plain(m, nn.Linear) and m.weight.is_contiguous()]
    if len(weights) < len(modules) or not can_use_inference_kernel(x_BND, *weights):
        return None
    x_BND = x_BND.contiguous()
    sizes = [m.out_features for m in modules]
    outputs = [x_BND.new_empty(*x_BND.shape[:2], size) for size in sizes]
    with on_device_of(x_BND):
        _three_linears_kernel[(sum(triton.cdiv(size, 16) for size in sizes),)](
            x_BND, *(t for m, y in zip(modules, outputs) for t in (m.weight, m.bias, y)), *sizes, R,
            D=D, BLOCK_O=16, BLOCK_D=256, num_warps=4, num_stages=4,
        )  # fmt: skip
    return outputs


def rotate_triton(queries_BNHP: Tensor, keys_BNHP: Tensor, cos_BNP: Tensor, sin_BNP: Tensor) -> None:
    """The rotary embedding by halves, in place. Heads of a token must lie next to each other."""
    B, N, H, P = queries_BNHP.shape
    with on_device_of(queries_BNHP):
        _rotate_kernel[(B * N, H + keys_BNHP.shape[2])](
            queries_BNHP, keys_BNHP, cos_BNP.contiguous(), sin_BNP.contiguous(), H, keys_BNHP.shape[2],
            P=P, BLOCK=triton.next_power_of_2(P // 2), num_warps=1,
        )  # fmt: skip


def store_token_triton(keys_BHNP: Tensor, values_BHNP: Tensor, layer: CacheLayerMixin) -> bool:
    """`layer.update` in one launch, for one token of each row and a plain static layer; else False, and call it."""
    B, H, N, P = keys_BHNP.shape
    static = type(layer) is StaticLayer and layer.is_initialized
    if N != 1 or not static or layer.dtype != keys_BHNP.dtype or layer.keys.device != keys_BHNP.device:  # offloaded
        return False
    keys_BHNP, values_BHNP = keys_BHNP.contiguous(), values_BHNP.contiguous()
    with on_device_of(keys_BHNP):
        _store_token_kernel[(1,)](
            keys_BHNP, values_BHNP, layer.keys, layer.values, layer.cumulative_length, B * H, layer.max_cache_len,
            P=P, BLOCK=triton.next_power_of_2(P), num_warps=4,
        )  # fmt: skip
    return True


def mix_norm_triton(
    residual: Tensor, attended: Tensor, crossed: Tensor, alpha: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """residual + alpha * attended + (1 - alpha) * crossed, and its RMSNorm.

    alpha (1,) is clamped to [0, 1]; without it both are added whole.
    """
    residual, attended, crossed = (t.contiguous() for t in (residual, attended, crossed))
    mixed, normed = torch.empty_like(residual), torch.empty_like(residual)
    D = residual.shape[-1]
    with on_device_of(residual):
        _mix_norm_kernel[(residual.numel() // D,)](
            residual, attended, crossed, alpha, weight_D, mixed, normed, eps, D=D, **row_options(D)
        )
    return mixed, normed


def silu_mul_triton(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in the place of `gate`."""
    gate, up = gate.contiguous(), up.contiguous()
    with on_device_of(gate):
        _silu_mul_kernel[(triton.cdiv(gate.numel(), _GATE_ELEMENTS),)](
            gate, up, gate.numel(), BLOCK=_GATE_ELEMENTS, num_warps=4
        )
    return gate


def rotate_in_place_triton(qkv_RD: Tensor, cos_RP: Tensor, sin_RP: Tensor, num_heads: int) -> None:
    """The rotary embedding, by halves, of the queries and keys in rows of [q, k, v], each of H heads of P."""
    R, P = cos_RP.shape
    with on_device_of(qkv_RD):
        _rotate_qkv_kernel[(R,)](
            qkv_RD, cos_RP.contiguous(), sin_RP.contiguous(), HEADS=2 * num_heads, P=P,
            BLOCK_HEADS=triton.next_power_of_2(2 * num_heads), BLOCK_HALF=triton.next_power_of_2(P // 2), num_warps=2,
        )  # fmt: skip


def quick_gelu_triton(x: Tensor, out: Tensor) -> Tensor:
    """`out`, which may be x itself, becomes x * sigmoid(1.702 * x). Both are contiguous."""
    with on_device_of(x):
        _quick_gelu_kernel[(triton.cdiv(x.numel(), _GELU_ELEMENTS),)](
            x, out, x.numel(), BLOCK=_GELU_ELEMENTS, num_warps=4
        )
    return out


if triton is not None:
    from .kernels import load_float32, rms_scale, rotate_halves

    @triton.jit
    def _three_linears_kernel(
        x, w0, b0, y0, w1, b1, y1, w2, b2, y2, O0, O1, O2, R,
        D: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        block = tl.program_id(0)
        blocks0, blocks1 = tl.cdiv(O0, BLOCK_O), tl.cdiv(O1, BLOCK_O)
        if block < blocks0:
            _linear(x, w0, b0, y0, block, O0, R, D, BLOCK_O, BLOCK_D)
        elif block < blocks0 + blocks1:
            _linear(x, w1, b1, y1, block - blocks0, O1, R, D, BLOCK_O, BLOCK_D)
        else:
            _linear(x, w2, b2, y2, block - blocks0 - blocks1, O2, R, D, BLOCK_O, BLOCK_D)

    @triton.jit
    def _linear(x, w, b, y, block, O, R, D: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr):  # noqa: E741
        """Outputs of one block of rows of the weight, for up to 16 tokens."""
        o = block * BLOCK_O + tl.arange(0, BLOCK_O)
        r = tl.arange(0, 16)
        d = tl.arange(0, BLOCK_D)
        acc = tl.zeros([BLOCK_O, 16], tl.float32)
        for start in range(0, D, BLOCK_D):
            inside = start + d < D
            rows = tl.load(
                w + o[:, None].to(tl.int64) * D + start + d[None, :], mask=(o < O)[:, None] & inside[None, :], other=0.0
            )
            tokens = tl.load(
                x + r[None, :] * D + start + d[:, None], mask=(r < R)[None, :] & inside[:, None], other=0.0
            )
            acc = tl.dot(rows, tokens, acc)
        if b is not None:
            acc += tl.load(b + o, mask=o < O, other=0.0).to(tl.float32)[:, None]
        tl.store(y + r[None, :] * O + o[:, None], acc.to(y.dtype.element_ty), mask=(o < O)[:, None] & (r < R)[None, :])

    @triton.jit
    def _rotate_kernel(queries, keys, cos, sin, H, KV, P: tl.constexpr, BLOCK: tl.constexpr):
        token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        index = tl.arange(0, BLOCK)
        ok = index < P // 2
        if head < H:
            low_at = queries + (token * H + head) * P + index
        else:
            low_at = keys + (token * KV + head - H) * P + index
        rotate_halves(low_at, cos, sin, token * P + index, ok, ok, P // 2)

    @triton.jit
    def _rotate_qkv_kernel(
        qkv, cos, sin, HEADS: tl.constexpr, P: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr
    ):
        token = tl.program_id(0).to(tl.int64)
        head = tl.arange(0, BLOCK_HEADS)[:, None]
        index = tl.arange(0, BLOCK_HALF)[None, :]
        ok = index < P // 2
        low_at = qkv + token * (HEADS // 2 * 3 * P) + head * P + index
        rotate_halves(low_at, cos, sin, token * P + index, ok, ok & (head < HEADS), P // 2)

    @triton.jit(do_not_specialize=["rows", "capacity"])
    def _store_token_kernel(
        keys, values, cached_keys, cached_values, length, rows, capacity, P: tl.constexpr, BLOCK: tl.constexpr
    ):
        """One program for all rows, as it also counts the token in; one for which there is no room is not written."""
        place = tl.load(length)
        p = tl.arange(0, BLOCK)
        ok = p < tl.where(place < capacity, P, 0)
        for row in range(rows):
            target = (tl.cast(row, tl.int64) * capacity + place) * P + p
            tl.store(cached_keys + target, tl.load(keys + row * P + p, mask=ok), mask=ok)
            tl.store(cached_values + target, tl.load(values + row * P + p, mask=ok), mask=ok)
        tl.store(length, place + 1)

    @triton.jit
    def _mix_norm_kernel(
        residual, attended, crossed, alpha, weight, mixed, normed, eps, D: tl.constexpr, BLOCK: tl.constexpr
    ):
        column = tl.arange(0, BLOCK)
        ok = column < D
        offset = tl.program_id(0).to(tl.int64) * D + column
        a = load_float32(attended + offset, ok)
        c = load_float32(crossed + offset, ok)
        if alpha is not None:
            share = tl.minimum(tl.maximum(tl.load(alpha).to(tl.float32), 0.0), 1.0)
            a = share * a
            c = (1 - share) * c
        total = load_float32(residual + offset, ok) + a + c
        rounded = total.to(mixed.dtype.element_ty)  # the norm sees what the MLP's output will be added to
        tl.store(mixed + offset, rounded, mask=ok)
        total = rounded.to(tl.float32)
        scale = rms_scale(total, D, eps)
        w = load_float32(weight + column, ok)
        tl.store(normed + offset, (total * scale * w).to(normed.dtype.element_ty), mask=ok)

    @triton.jit(do_not_specialize=["count"])
    def _silu_mul_kernel(gate, up, count, BLOCK: tl.constexpr):
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        ok = offset < count
        g = load_float32(gate + offset, ok)
        u = load_float32(up + offset, ok)
        tl.store(gate + offset, (g * tl.sigmoid(g) * u).to(gate.dtype.element_ty), mask=ok)

    @triton.jit
    def _quick_gelu_kernel(x, out, count, BLOCK: tl.constexpr):  # a count known to divide by 16 gives wide loads
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        ok = offset < count
        value = load_float32(x + offset, ok)
        tl.store(out + offset, (value * tl.sigmoid(1.702 * value)).to(x.dtype.element_ty), mask=ok)
