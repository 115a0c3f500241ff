"""Triton kernels for what Qwen2-VL's vision tower does between its matrix products; forward only.

What is unusual: this work moves bytes and computes little, so each kernel passes over its rows once and writes in place
where nobody else reads: residual sum and LayerNorm together, the rotary embedding of queries and keys inside the fused
qkv, quick_gelu. All compute in float32 and round where the plain operations round to memory; offsets are 64-bit.

Shapes: T patches, D width, H heads, P head dim.
"""

import torch
from torch import Tensor

from .triton_launch import on_device_of, takes


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_ELEMENTS = 2048  # that one program of quick_gelu handles


def fusible(*tensors: Tensor) -> bool:
    """Whether the kernels can take these tensors: all on one GPU, of one floating type, and no gradient recorded."""
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not recorded and takes(*tensors) and all(t.is_contiguous() for t in tensors)


def layer_norm_triton(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """residual + x, or x itself without a residual, and the LayerNorm of it."""
    T, D = x_TD.shape
    stream_TD = x_TD if residual_TD is None else torch.empty_like(x_TD)
    normed_TD = torch.empty_like(x_TD)
    block = triton.next_power_of_2(D)
    with on_device_of(x_TD):
        _layer_norm_kernel[(T,)](
            x_TD,
            x_TD if residual_TD is None else residual_TD,
            weight_D,
            bias_D,
            stream_TD,
            normed_TD,
            eps,
            ADD=residual_TD is not None,
            D=D,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 8),
        )
    return stream_TD, normed_TD


def rotate_in_place_triton(qkv_TD: Tensor, cos_TP: Tensor, sin_TP: Tensor, num_heads: int) -> None:
    """The rotary embedding, by halves, of the queries and keys in rows of [q, k, v], each of H heads of P."""
    T, P = cos_TP.shape
    with on_device_of(qkv_TD):
        _rotate_kernel[(T,)](
            qkv_TD,
            cos_TP.contiguous(),
            sin_TP.contiguous(),
            HEADS=2 * num_heads,
            P=P,
            BLOCK_HEADS=triton.next_power_of_2(2 * num_heads),
            BLOCK_HALF=triton.next_power_of_2(P // 2),
            num_warps=2,
        )


def quick_gelu_triton(x: Tensor, out: Tensor) -> Tensor:
    """`out`, which may be x itself, becomes x * sigmoid(1.702 * x). Both are contiguous."""
    with on_device_of(x):
        _quick_gelu_kernel[(triton.cdiv(x.numel(), _ELEMENTS),)](x, out, x.numel(), BLOCK=_ELEMENTS, num_warps=4)
    return out


if triton is not None:

    @triton.jit
    def _layer_norm_kernel(
        x, residual, weight, bias, stream, normed, eps, ADD: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
    ):
        column = tl.arange(0, BLOCK)
        ok = column < D
        offset = tl.program_id(0).to(tl.int64) * D + column
        value = tl.load(x + offset, mask=ok, other=0.0).to(tl.float32)
        if ADD:
            value += tl.load(residual + offset, mask=ok, other=0.0).to(tl.float32)
            rounded = value.to(stream.dtype.element_ty)  # the norm sees what the next residual sum will see
            tl.store(stream + offset, rounded, mask=ok)
            value = rounded.to(tl.float32)
        centered = tl.where(ok, value - tl.sum(value, 0) / D, 0.0)
        centered *= tl.rsqrt(tl.sum(centered * centered, 0) / D + eps)
        scale = tl.load(weight + column, mask=ok, other=0.0).to(tl.float32)
        shift = tl.load(bias + column, mask=ok, other=0.0).to(tl.float32)
        tl.store(normed + offset, (centered * scale + shift).to(normed.dtype.element_ty), mask=ok)

    @triton.jit
    def _rotate_kernel(
        qkv, cos, sin, HEADS: tl.constexpr, P: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr
    ):
        token = tl.program_id(0).to(tl.int64)
        head = tl.arange(0, BLOCK_HEADS)[:, None]
        index = tl.arange(0, BLOCK_HALF)[None, :]
        ok = index < P // 2
        angles = token * P + index
        cos_low = tl.load(cos + angles, mask=ok, other=0.0).to(tl.float32)
        cos_high = tl.load(cos + angles + P // 2, mask=ok, other=0.0).to(tl.float32)
        sin_low = tl.load(sin + angles, mask=ok, other=0.0).to(tl.float32)
        sin_high = tl.load(sin + angles + P // 2, mask=ok, other=0.0).to(tl.float32)
        ok = ok & (head < HEADS)
        low_at = qkv + token * (HEADS // 2 * 3 * P) + head * P + index
        high_at = low_at + P // 2
        low = tl.load(low_at, mask=ok, other=0.0).to(tl.float32)
        high = tl.load(high_at, mask=ok, other=0.0).to(tl.float32)
        tl.store(low_at, (low * cos_low - high * sin_low).to(qkv.dtype.element_ty), mask=ok)
        tl.store(high_at, (high * cos_high + low * sin_high).to(qkv.dtype.element_ty), mask=ok)

    @triton.jit
    def _quick_gelu_kernel(x, out, count, BLOCK: tl.constexpr):  # a count known to divide by 16 gives wide loads
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        ok = offset < count
        value = tl.load(x + offset, mask=ok, other=0.0).to(tl.float32)
        tl.store(out + offset, (value * tl.sigmoid(1.702 * value)).to(x.dtype.element_ty), mask=ok)
