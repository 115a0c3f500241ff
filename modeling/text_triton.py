"""Triton kernels for what a decoder layer does between its matrix products, without gradient.

What is unusual: when one token is decoded these steps move almost no bytes, but each launch costs two microseconds, and
Qwen2-VL's operations make some 30 of them a layer. Here they are six: the norm, the projections to queries, keys and
values, the rotary embedding of queries and keys, the entry into a static cache, the mix of self- and cross-attention
with residual and norm (equation 4 of arXiv 2503.11579), and the gate of the MLP. All compute in float32.

Shapes: B rows, N tokens, D width, H heads, P head dim, R tokens of all rows, O outputs of a projection.
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from .residual_norm_triton import rms_norm
from .triton_launch import is_unhooked, on_device_of, takes


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_ELEMENTS = 1024  # of the gate, for one program
_MAX_TOKENS = 16  # that one program of the projections takes; with more of them a matrix product is not so small


def fusible(*tensors: Tensor) -> bool:
    """Whether the kernels take these: on one GPU (or in Triton's interpreter), of one dtype, no gradient recorded."""
    return not torch.is_grad_enabled() and takes(*tensors)


def three_linears_triton(x_BND: Tensor, modules: tuple[nn.Linear, nn.Linear, nn.Linear]) -> list[Tensor] | None:
    """The three projections (B, N, O) of a few tokens in one launch; None where the modules have to be called.

    They have to if they are more than `nn.Linear`: adapters, quantised weights, hooks.
    """
    R, D = x_BND.shape[0] * x_BND.shape[1], x_BND.shape[2]
    if R > _MAX_TOKENS or x_BND.dtype == torch.float32 or not all(_is_plain(m, x_BND) for m in modules):
        return None
    x_BND = x_BND.contiguous()
    outputs = [x_BND.new_empty(*x_BND.shape[:2], m.out_features) for m in modules]
    sizes = [m.out_features for m in modules]
    with on_device_of(x_BND):
        _three_linears_kernel[(sum(triton.cdiv(size, 16) for size in sizes),)](
            x_BND, *(t for m, y in zip(modules, outputs) for t in (m.weight, m.bias, y)), *sizes, R,
            D=D, BLOCK_O=16, BLOCK_D=256, num_warps=4, num_stages=4,
        )  # fmt: skip
    return outputs


def _is_plain(module: nn.Module, x: Tensor) -> bool:
    plain = type(module) is nn.Linear and is_unhooked(module) and type(module.weight) in (nn.Parameter, Tensor)
    return plain and fusible(x, module.weight) and module.weight.is_contiguous()


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
    if N != 1 or type(layer) is not StaticLayer or not layer.is_initialized:
        return False
    if layer.dtype != keys_BHNP.dtype or layer.keys.device != keys_BHNP.device:  # offloaded
        return False
    keys_BHNP, values_BHNP = keys_BHNP.contiguous(), values_BHNP.contiguous()
    with on_device_of(keys_BHNP):
        _store_token_kernel[(1,)](
            keys_BHNP, values_BHNP, layer.keys, layer.values, layer.cumulative_length, B * H, layer.max_cache_len,
            P=P, BLOCK=triton.next_power_of_2(P), num_warps=4,
        )  # fmt: skip
    return True


class FusedRMSNorm(nn.RMSNorm):
    """torch's, which in one kernel takes twice as long as it has to for a single token."""

    def forward(self, x: Tensor) -> Tensor:
        if not fusible(x, self.weight):
            return super().forward(x)
        return rms_norm(x, self.weight, self.eps)[0]


def mix_norm_triton(
    residual: Tensor, attended: Tensor, crossed: Tensor, alpha: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """residual + alpha * attended + (1 - alpha) * crossed, and its RMSNorm.

    alpha (1,) is clamped to [0, 1]; without it both are added whole.
    """
    residual, attended, crossed = (t.contiguous() for t in (residual, attended, crossed))
    mixed, normed = torch.empty_like(residual), torch.empty_like(residual)
    D = residual.shape[-1]
    block = triton.next_power_of_2(D)
    with on_device_of(residual):
        _mix_norm_kernel[(residual.numel() // D,)](
            residual, attended, crossed, alpha, weight_D, mixed, normed, eps,
            D=D, BLOCK=block, num_warps=min(max(block // 512, 1), 8),
        )  # fmt: skip
    return mixed, normed


def silu_mul_triton(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in the place of `gate`."""
    gate, up = gate.contiguous(), up.contiguous()
    with on_device_of(gate):
        _silu_mul_kernel[(triton.cdiv(gate.numel(), _ELEMENTS),)](gate, up, gate.numel(), BLOCK=_ELEMENTS, num_warps=4)
    return gate


if triton is not None:

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
        cos_low = tl.load(cos + token * P + index, mask=ok, other=0.0).to(tl.float32)
        cos_high = tl.load(cos + token * P + P // 2 + index, mask=ok, other=0.0).to(tl.float32)
        sin_low = tl.load(sin + token * P + index, mask=ok, other=0.0).to(tl.float32)
        sin_high = tl.load(sin + token * P + P // 2 + index, mask=ok, other=0.0).to(tl.float32)
        if head < H:
            low_at = queries + (token * H + head) * P + index
        else:
            low_at = keys + (token * KV + head - H) * P + index
        high_at = low_at + P // 2
        low = tl.load(low_at, mask=ok, other=0.0).to(tl.float32)
        high = tl.load(high_at, mask=ok, other=0.0).to(tl.float32)
        tl.store(low_at, (low * cos_low - high * sin_low).to(queries.dtype.element_ty), mask=ok)
        tl.store(high_at, (high * cos_high + low * sin_high).to(queries.dtype.element_ty), mask=ok)

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
        a = tl.load(attended + offset, mask=ok, other=0.0).to(tl.float32)
        c = tl.load(crossed + offset, mask=ok, other=0.0).to(tl.float32)
        if alpha is not None:
            share = tl.minimum(tl.maximum(tl.load(alpha).to(tl.float32), 0.0), 1.0)
            a = share * a
            c = (1 - share) * c
        total = tl.load(residual + offset, mask=ok, other=0.0).to(tl.float32) + a + c
        rounded = total.to(mixed.dtype.element_ty)  # the norm sees what the MLP's output will be added to
        tl.store(mixed + offset, rounded, mask=ok)
        total = rounded.to(tl.float32)
        scale = tl.rsqrt(tl.sum(total * total, 0) / D + eps)
        w = tl.load(weight + column, mask=ok, other=0.0).to(tl.float32)
        tl.store(normed + offset, (total * scale * w).to(normed.dtype.element_ty), mask=ok)

    @triton.jit(do_not_specialize=["count"])
    def _silu_mul_kernel(gate, up, count, BLOCK: tl.constexpr):
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        ok = offset < count
        g = tl.load(gate + offset, mask=ok, other=0.0).to(tl.float32)
        u = tl.load(up + offset, mask=ok, other=0.0).to(tl.float32)
        tl.store(gate + offset, (g * tl.sigmoid(g) * u).to(gate.dtype.element_ty), mask=ok)
