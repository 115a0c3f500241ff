"""Attention of few queries over very many keys, for the text that reads a video: split over the keys, in Triton.

What is unusual: the query heads that share a key/value head, and all text rows and tokens that read one video row, are
folded into the rows of one tile, so that keys and values are read once; enough splits of the keys fill the GPU however
few queries there are (flash attention gives 128 queries 28 blocks). Keys and values may be fp8 with a power of two per
token and head (`VideoLevel`), widened in registers. Offsets are 64-bit. A row of video without any token reads zeros.
The letters of shapes are explained in kernels.py; here H counts key/value heads, and B rows of video.
"""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

from .kernels import can_use_kernel, gpu_properties, on_device_of, tl, triton


MAX_HEAD_DIM = 256
_LOG2_E = 1.4426950408889634


def can_split_keys(queries_BHNP: Tensor) -> bool:
    """Whether the kernel takes these queries: on a GPU, or in Triton's interpreter, and not in float64."""
    return can_use_kernel(queries_BHNP) and queries_BHNP.shape[-1] in (16, 32, 64, 128, MAX_HEAD_DIM)


@functools.cache
def reads_fp8(device: torch.device) -> bool:
    """Whether Triton converts this fp8 on a device: NVIDIA's GPUs before compute capability 8.9 cannot."""
    return device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 9)


def cudnn_first() -> AbstractContextManager:
    """A context in which PyTorch's attention prefers cuDNN; disabled backends stay disabled."""
    cudnn = [SDPBackend.CUDNN_ATTENTION] if cuda.cudnn_sdp_enabled() else []
    return sdpa_kernel([*cudnn, *_others()], set_priority=True)


def trained_sdpa(like: Tensor, keys: int) -> AbstractContextManager:
    """A context in which PyTorch's attention to so many keys has right gradients; mostly it changes nothing.

    cuDNN's gradients of queries are NaN on Hopper where the number of keys is an odd multiple of 64 and all scores of a
    query are below about -88 (NVIDIA/cudnn-frontend#628, pytorch#196678). A Vamba's may be, as nothing normalises the
    video that it reads.
    """
    if keys % 128 != 64 or not like.is_cuda or not torch.is_grad_enabled():
        return nullcontext()
    return sdpa_kernel(_others() or [SDPBackend.MATH])


def _others() -> list[SDPBackend]:
    """The backends besides cuDNN that are enabled."""
    enabled = {
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: cuda.math_sdp_enabled(),
    }
    return [backend for backend, is_enabled in enabled.items() if is_enabled]


def split_key_attention(
    queries_BHNP: Tensor,
    keys_BHMP: Tensor,
    values_BHMP: Tensor,
    scale: float,
    mask_BM: Tensor | None = None,
    key_scales_BHM: Tensor | None = None,
    value_scales_BHM: Tensor | None = None,
) -> Tensor:
    """softmax(scale * Q K^T) V without gradient, as `scaled_dot_product_attention(..., enable_gqa=True)` computes it.

    Args:
        queries_BHNP: (B, H times the heads that share a key, N, P).
        keys_BHMP, values_BHMP: (B, H, M, P), in the queries' dtype, or fp8 with scales.
        scale: of the scores. mask_BM: bool, False on keys that are not to be read; None reads all.
        key_scales_BHM, value_scales_BHM: int8 exponents of two, for fp8.

    Returns:
        (B, N, query heads, P) in the queries' dtype, contiguous.
    """
    (B, heads, N, P), (H, M) = queries_BHNP.shape, keys_BHMP.shape[1:3]
    rows = heads // H * N
    fp8 = key_scales_BHM is not None
    block_rows, block_keys, resident, num_warps, num_stages = attention_tiles(rows, P, queries_BHNP.dtype, fp8)
    blocks = triton.cdiv(rows, block_rows)
    # as many splits whatever the number of keys: a CUDA graph or compiled step for another video is the same
    device = queries_BHNP.device
    multiprocessors = gpu_properties(device).multi_processor_count if queries_BHNP.is_cuda else 1
    splits = max(1, min(256, multiprocessors * resident // (B * H * blocks)))
    partial = torch.empty(B, H, splits, rows, P, dtype=torch.float32, device=device)
    sums = torch.empty(2, B, H, splits, rows, dtype=torch.float32, device=device)
    output = torch.empty(B, N, heads, P, dtype=queries_BHNP.dtype, device=device)
    mask_BM = mask_BM.contiguous() if mask_BM is not None else None
    scale_strides = (0, 0) if not fp8 else key_scales_BHM.stride()[:2]
    if fp8 and (key_scales_BHM.stride() != value_scales_BHM.stride() or key_scales_BHM.stride(2) != 1):
        raise ValueError("The scales of keys and values must lie alike, with the tokens of a head next to each other.")
    with on_device_of(queries_BHNP):
        _partial_kernel[(splits, blocks, B * H)](
            queries_BHNP, keys_BHMP, values_BHMP, mask_BM, key_scales_BHM, value_scales_BHM, partial, sums,
            scale * _LOG2_E, H, N, M, rows,
            *queries_BHNP.stride(), *keys_BHMP.stride()[:3], *values_BHMP.stride()[:3], *scale_strides,
            FP8=fp8, P=P, BLOCK_ROWS=block_rows, BLOCK_KEYS=block_keys, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        _combine_kernel[(rows, B * H)](
            partial, sums, output, H, N, rows, splits, P=P, SPLITS=triton.next_power_of_2(splits), num_warps=4
        )
    return output


def attention_tiles(rows: int, P: int, dtype: torch.dtype, fp8: bool) -> tuple[int, int, int, int, int]:
    """Rows and keys of a tile, programs that share a multiprocessor, warps and pipeline stages, tried on an H200."""
    if dtype == torch.float32:
        return min(32, max(16, triton.next_power_of_2(rows))), 32, 2, 4, 1
    block_rows = min(128, max(16, triton.next_power_of_2(rows)))
    if block_rows < 64 and P < MAX_HEAD_DIM:
        return block_rows, 128, 2, 4, 3
    return block_rows, 32, 2, 8 if block_rows == 128 else 4, 3


if triton is not None:

    @triton.jit(do_not_specialize=["M"])
    def _partial_kernel(
        queries, keys, values, mask, key_scales, value_scales, partial, sums, scale, H, N, M, rows,
        stride_qb, stride_qh, stride_qn, stride_qp, stride_kb, stride_kh, stride_km, stride_vb, stride_vh, stride_vm,
        stride_sb, stride_sh, FP8: tl.constexpr, P: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    ):  # fmt: skip
        """One block of rows over one split of the keys: the unnormalised output, its sum and its largest score."""
        split = tl.program_id(0)
        bh = tl.program_id(2).to(tl.int64)
        b, h = bh // H, bh % H
        row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        p = tl.arange(0, P)
        head = h * (rows // N) + row // N  # rows are (query head of this key/value head, token)
        queries += b * stride_qb + head[:, None] * stride_qh + (row % N)[:, None] * stride_qn + p[None, :] * stride_qp
        q = tl.load(queries, mask=(row < rows)[:, None], other=0.0)
        if FP8:  # to which the conversion of fp8 is exact and one instruction
            q = q.to(tl.float16)
        blocks = tl.cdiv(M, BLOCK_KEYS)
        first = (blocks.to(tl.int64) * split // tl.num_programs(0)) * BLOCK_KEYS
        last = (blocks.to(tl.int64) * (split + 1) // tl.num_programs(0)) * BLOCK_KEYS
        keys += b * stride_kb + h * stride_kh + p[None, :]
        values += b * stride_vb + h * stride_vh + p[None, :]
        largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        acc = tl.zeros([BLOCK_ROWS, P], tl.float32)
        highest = -128.0
        if FP8:
            key_scales += b * stride_sb + h * stride_sh
            value_scales += b * stride_sb + h * stride_sh
            # a value's power of two goes to its weight, relative to the split's highest: float16 has little range
            for start in range(first, last, 1024):
                m = start + tl.arange(0, 1024)
                exponent = tl.load(value_scales + m, mask=m < tl.minimum(last, M), other=-128)
                highest = tl.maximum(highest, tl.max(exponent.to(tl.float32), 0))
        for start in range(first, last, BLOCK_KEYS):
            m = start + tl.arange(0, BLOCK_KEYS)
            inside = m < M
            k = tl.load(keys + m[:, None] * stride_km, mask=inside[:, None], other=0.0)
            v = tl.load(values + m[:, None] * stride_vm, mask=inside[:, None], other=0.0)
            if FP8:
                k = k.to(tl.float16)
                v = v.to(tl.float16)
            # Compiled by torch, the scale is float64.
            scores = (tl.dot(q, tl.trans(k), input_precision="ieee") * scale).to(tl.float32)
            if FP8:
                scores *= tl.exp2(tl.load(key_scales + m, mask=inside, other=0).to(tl.float32))[None, :]
            if mask is not None:
                inside = inside & tl.load(mask + b * M + m, mask=inside, other=0).to(tl.int1)
            scores = tl.where(inside[None, :], scores, float("-inf"))
            higher = tl.maximum(largest, tl.max(scores, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)  # nothing to read yet: no inf - inf
            weights = tl.exp2(scores - shift[:, None])
            rescale = tl.exp2(largest - shift)
            largest = higher
            total = total * rescale + tl.sum(weights, 1)
            if FP8:
                exponent = tl.load(value_scales + m, mask=m < M, other=-128).to(tl.float32)
                weights *= tl.exp2(exponent - highest)[None, :]
            acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        if FP8:
            acc *= tl.exp2(highest)
        ok = row < rows
        line = (bh * tl.num_programs(0) + split) * rows + row
        tl.store(partial + line[:, None] * P + p[None, :], acc, mask=ok[:, None])
        tl.store(sums + line, total, mask=ok)
        tl.store(sums + tl.num_programs(2).to(tl.int64) * tl.num_programs(0) * rows + line, largest, mask=ok)

    @triton.jit
    def _combine_kernel(partial, sums, output, H, N, rows, splits, P: tl.constexpr, SPLITS: tl.constexpr):
        row = tl.program_id(0)
        bh = tl.program_id(1).to(tl.int64)
        s = tl.arange(0, SPLITS)
        p = tl.arange(0, P)
        ok = s < splits
        line = (bh * splits + s) * rows + row
        total = tl.load(sums + line, mask=ok, other=0.0)
        largest = tl.load(sums + tl.num_programs(1).to(tl.int64) * splits * rows + line, mask=ok, other=float("-inf"))
        highest = tl.max(largest, 0)
        weight = tl.exp2(largest - tl.where(highest == float("-inf"), 0.0, highest))
        parts = tl.load(partial + line[:, None] * P + p[None, :], mask=ok[:, None], other=0.0)
        whole = tl.sum(weight * total, 0)
        out = tl.sum(parts * weight[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
        head = (bh % H) * (rows // N) + row // N
        offset = ((bh // H * N + row % N) * (H * (rows // N)) + head) * P
        tl.store(output + offset + p, out.to(output.dtype.element_ty))
