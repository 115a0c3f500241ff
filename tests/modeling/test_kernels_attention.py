"""Split-key attention against torch's, on a GPU and, in a subprocess, in Triton's interpreter."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from triton_interpreter import DEVICE, INTERPRETED, on_a_gpu, run_interpreted

from vamba.modeling import modeling_vamba
from vamba.modeling.kernels_attention import can_split_keys, split_key_attention, trained_sdpa
from vamba.modeling.video_memory import FP8, TextSlice, VideoLevel

from tiny_vamba import tiny_model


def inputs(B, H, R, N, M, P, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(B, H * R, N, P, generator=generator)
    keys, values = (torch.randn(B, M, H, P, generator=generator).transpose(1, 2) for _ in range(2))
    return [t.to(DEVICE, dtype) for t in (2 * queries, keys, values)]


def expected(queries, keys, values, scale, mask=None):
    queries, keys, values = (t.double() for t in (queries, keys, values))
    mask = None if mask is None else mask[:, None, None].expand(-1, -1, queries.shape[2], -1)
    output = scaled_dot_product_attention(queries, keys, values, mask, scale=scale, enable_gqa=True)
    return output.transpose(1, 2)


def assert_near(actual, reference):
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[actual.dtype]
    assert (actual.double() - reference).norm() <= tolerance * reference.norm()


SIZES = [(1, 2, 2, 1, 1, 16), (1, 2, 7, 1, 70, 32), (2, 1, 3, 5, 131, 16), (1, 2, 1, 40, 65, 64)]


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_it_equals_torch(sizes, dtype):
    tensors = inputs(*sizes, dtype)
    assert can_split_keys(tensors[0])
    assert_near(split_key_attention(*tensors, 0.25), expected(*tensors, 0.25))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("keys_count", [63, 64, 65, 128, 192])
def test_gradients_where_all_scores_are_far_below_zero(keys_count):
    """As nothing normalises the video: cuDNN gives NaN as gradients of queries for some numbers of keys."""
    generator, found = torch.Generator().manual_seed(0), []
    noise, *others = (torch.randn(2, 4, n, 64, generator=generator) for n in (8, keys_count, keys_count))
    queries, keys, values = 5.0 + 0.1 * noise, -5.0 + 0.1 * others[0], others[1]
    for dtype in (torch.bfloat16, torch.float64):
        tensors = [t.cuda().bfloat16().to(dtype).requires_grad_() for t in (queries, keys, values)]
        with trained_sdpa(tensors[0], keys_count):
            scaled_dot_product_attention(*tensors).square().sum().backward()
        found.append([t.grad.double() for t in tensors])
    for actual, reference, tolerance in zip(*found, (0.4, 0.02, 0.02)):  # -5 times what rounding leaves of a sum of 0
        assert actual.isfinite().all() and (actual - reference).norm() <= tolerance * reference.norm()


@on_a_gpu
def test_masked_keys_are_not_read():
    queries, keys, values = inputs(2, 1, 3, 5, 131, 16, torch.float32)
    mask = torch.rand(2, 131, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.3
    mask[:, :80] = False  # whole blocks without a key
    keys[~mask[:, None].expand(-1, 1, -1)] = 1e4
    assert_near(split_key_attention(queries, keys, values, 0.25, mask), expected(queries, keys, values, 0.25, mask))
    mask[1] = False
    output = split_key_attention(queries, keys, values, 0.25, mask)
    assert torch.equal(output[1], torch.zeros_like(output[1])) and output[0].abs().max() > 0


@on_a_gpu
def test_fp8_is_read_as_what_it_stands_for():
    queries, keys, values = inputs(1, 2, 7, 1, 200, 32, torch.bfloat16)
    level = VideoLevel(50 * keys, values / 100).stored_as(FP8)
    exact = level.stored_as(torch.float32)
    room = [torch.cat([t, t], 2)[:, :, :200] for t in level]  # as in a buffer with room for more
    output = split_key_attention(queries, *room[:2], 0.003, None, *room[2:])
    assert_near(output, expected(queries, exact.keys_BHMP, exact.values_BHMP, 0.003))


@on_a_gpu
@torch.no_grad()
@pytest.mark.parametrize("kept", ["fp8", "fp8 that Triton does not read", "float32"])
def test_a_layer_reads_what_a_memory_keeps(kept, monkeypatch):
    layer = tiny_model().to(DEVICE, torch.bfloat16).model.language_model.layers[0].cross_attn
    _, keys, values = inputs(1, 2, 2, 1, 70, 16, torch.float32)
    hidden = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
    video = VideoLevel(keys.bfloat16().float(), values.bfloat16().float())
    expected = video.stored_as(torch.bfloat16)
    if kept != "float32":
        video = video.stored_as(FP8)
        expected = video.stored_as(torch.bfloat16)
        monkeypatch.setattr(modeling_vamba, "reads_fp8", lambda device: kept == "fp8")
    actual, reference = (layer(hidden, [(TextSlice(), level)])[0] for level in (video, expected))
    assert_near(actual, reference.double())
    assert kept == "fp8" or torch.equal(actual, reference)


@on_a_gpu
@pytest.mark.skipif(INTERPRETED, reason="for a GPU")
@pytest.mark.parametrize("N", [1, 128])
def test_the_sizes_of_the_seven_billion(N):
    tensors = inputs(1, 4, 7, N, 20011, 128, torch.bfloat16)
    assert_near(split_key_attention(*tensors, 128**-0.5), expected(*tensors, 128**-0.5))


@on_a_gpu
@pytest.mark.skipif(INTERPRETED, reason="for a GPU")
def test_keys_beyond_32_bit_offsets():
    keys = torch.zeros(1, 1, 40_000_000, 64, dtype=torch.bfloat16, device=DEVICE)
    values = torch.zeros_like(keys)
    keys[0, 0, -3], values[0, 0, -3] = 8.0, 3.0
    queries = torch.full((1, 2, 1, 64), 8.0, dtype=torch.bfloat16, device=DEVICE)
    output = split_key_attention(queries, keys, values, 1.0)
    assert torch.equal(output, torch.full_like(output, 3.0))


def test_in_the_interpreter():
    run_interpreted(__file__)
