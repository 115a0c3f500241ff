"""The kernels of text layers and vision towers against plain operations."""

import pytest
import torch
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb, apply_rotary_pos_emb_vision
from triton_interpreter import DEVICE, INTERPRETED, on_a_gpu, precisions, relative, run_interpreted

from vamba.modeling.kernels_elementwise import (
    mix_norm_triton,
    quick_gelu_triton,
    rotate_in_place_triton,
    rotate_triton,
    silu_mul_triton,
    store_token_triton,
    three_linears_triton,
)
from vamba.modeling.kernels_norm import layer_norm_triton

from tiny_vamba import media, prompt, tiny_model


TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def random(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_near(actual, expected, dtype):
    assert actual.dtype == dtype
    assert (actual.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@on_a_gpu
@dtypes
def test_rotation(dtype):
    queries, keys = random(2, 3, 7, 24, dtype=dtype), random(2, 3, 2, 24, dtype=dtype, seed=1)
    angles = random(2, 3, 12, dtype=torch.float64, seed=2).repeat(1, 1, 2)
    expected = apply_rotary_pos_emb(queries.double(), keys.double(), angles.cos(), angles.sin(), unsqueeze_dim=2)
    rotate_triton(queries, keys, angles.cos().to(dtype), angles.sin().to(dtype))
    for actual, reference in zip((queries, keys), expected):
        assert_near(actual, reference, dtype)


@on_a_gpu
@dtypes
@pytest.mark.parametrize("alpha", [None, 0.3, -0.2, 1.7])
def test_mix_and_norm(alpha, dtype):
    residual, attended, crossed = (random(2, 3, 72, dtype=dtype, seed=seed) for seed in range(3))
    weight = random(72, dtype=dtype, seed=3)
    parameter = None if alpha is None else torch.tensor([alpha], device=DEVICE, dtype=dtype)
    mixed, normed = mix_norm_triton(residual, attended, crossed, parameter, weight, 1e-6)
    shares = (1.0, 1.0) if alpha is None else (min(max(alpha, 0), 1), 1 - min(max(alpha, 0), 1))
    expected = residual.double() + shares[0] * attended.double() + shares[1] * crossed.double()
    assert_near(mixed, expected, dtype)
    assert_near(normed, F.rms_norm(mixed.double(), (72,), weight.double(), 1e-6), dtype)


@on_a_gpu
def test_static_cache():
    layers = [StaticLayer(max_cache_len=9) for _ in range(2)]
    for step in range(4):
        keys, values = (random(2, 3, 1, 24, dtype=torch.bfloat16, seed=2 * step + i) for i in range(2))
        assert store_token_triton(keys, values, layers[0]) == (step > 0)
        for layer in layers[0 if step == 0 else 1 :]:
            layer.update(keys, values)
    for name in ("keys", "values", "cumulative_length"):
        assert torch.equal(getattr(layers[0], name), getattr(layers[1], name))
    assert layers[0].cumulative_length == 4
    assert not store_token_triton(keys.repeat(1, 1, 2, 1), values.repeat(1, 1, 2, 1), layers[0])
    assert not store_token_triton(keys, values, DynamicLayer())
    layers[0].keys = layers[0].keys.to("meta")  # as it is offloaded
    assert not store_token_triton(keys, values, layers[0])


@on_a_gpu
def test_a_full_static_cache_is_not_written_beyond():
    keys, values = (random(2, 3, 1, 24, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    layer = StaticLayer(max_cache_len=2)
    for _ in range(2):
        layer.update(keys, values)
    before = layer.keys.clone(), layer.values.clone()
    assert store_token_triton(keys + 1, values + 1, layer)
    assert torch.equal(layer.keys, before[0]) and torch.equal(layer.values, before[1])


@on_a_gpu
@torch.no_grad()
def test_hooks_of_the_norm_are_called():
    layer = tiny_model().to(DEVICE).model.language_model.layers[0]
    tensors, calls = [random(1, 3, 64, dtype=torch.float32, seed=seed) for seed in range(3)], []
    fused = layer._mix(*tensors)
    layer.post_attention_layernorm.register_forward_hook(lambda *_: calls.append(1))
    for actual, expected in zip(layer._mix(*tensors), fused):
        torch.testing.assert_close(actual, expected)
    assert calls


@on_a_gpu
@torch.no_grad()
def test_hooks_keep_what_the_modules_returned():
    model, seen = tiny_model().to(DEVICE), {}
    layer = model.model.language_model.layers[0]
    inner = torch.nn.Sequential(layer.self_attn.k_proj)  # as in an adapter that hands its base's output through
    layer.self_attn.k_proj = inner
    block = model.model.visual.blocks[0]
    for module in (layer.self_attn.q_proj, inner[0], layer.mlp.gate_proj, block.attn.qkv, block.mlp.fc1):
        module.register_forward_hook(lambda m, args, out: seen.update({m: (out, out.clone())}))
    for module in (layer.mlp.act_fn, block.mlp.act):
        module.register_forward_pre_hook(lambda m, args: seen.update({m: (args[0], args[0].clone())}))
    pixels, grid = media((1, 4, 6))
    inputs = {"pixel_values_videos": pixels.to(DEVICE), "video_grid_thw": grid.to(DEVICE)}
    logits = model(prompt(4, 1).to(DEVICE), **inputs).logits
    torch.testing.assert_close(logits, tiny_model().to(DEVICE)(prompt(4, 1).to(DEVICE), **inputs).logits)
    assert len(seen) == 7
    for module, (output, copy) in seen.items():
        assert torch.equal(output, copy), module


@on_a_gpu
@dtypes
def test_gate(dtype):
    gate, up = random(3, 5, 333, dtype=dtype), random(3, 5, 333, dtype=dtype, seed=1)
    expected = F.silu(gate.double()) * up.double()
    assert_near(silu_mul_triton(gate, up), expected, dtype)


@on_a_gpu
@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 300), (2, 3, 64)])
def test_projections(shape, bias):
    x = random(*shape, dtype=torch.bfloat16)
    torch.manual_seed(0)
    modules = [torch.nn.Linear(shape[-1], size, bias=bias).to(DEVICE, torch.bfloat16) for size in (72, 8, 40)]
    for actual, module in zip(three_linears_triton(x, modules), modules):
        assert_near(actual, module.double()(x.double()), torch.bfloat16)


@on_a_gpu
@torch.no_grad()
def test_adapters_hooks_and_long_texts_are_called():
    modules = [torch.nn.Linear(64, 16).to(DEVICE, torch.bfloat16) for _ in range(3)]
    x = random(1, 1, 64, dtype=torch.bfloat16)
    assert three_linears_triton(x, modules) is not None
    assert three_linears_triton(random(1, 17, 64, dtype=torch.bfloat16), modules) is None
    assert three_linears_triton(x.float(), modules) is None
    handle = modules[1].register_forward_hook(lambda *_: None)
    assert three_linears_triton(x, modules) is None
    handle.remove()
    modules[2].forward = modules[2].forward  # as accelerate's hooks do
    assert three_linears_triton(x, modules) is None

    class Adapted(torch.nn.Linear):
        pass

    modules[2] = Adapted(64, 16).to(DEVICE, torch.bfloat16)
    assert three_linears_triton(x, modules) is None

    class Quantised(torch.Tensor):
        pass

    modules[2] = torch.nn.Linear(64, 16).to(DEVICE, torch.bfloat16)
    modules[2].weight = torch.nn.Parameter(modules[2].weight.detach().as_subclass(Quantised))  # as torchao does
    assert three_linears_triton(x, modules) is None


@on_a_gpu
@precisions
@pytest.mark.parametrize(("T", "H", "P"), [(1, 1, 4), (37, 2, 48), (9, 16, 80), (5, 3, 24)])
def test_rotation_within_qkv(T, H, P, dtype, tolerance):
    qkv, cos, sin = random(T, 3 * H * P, dtype=dtype), *random(2, T, P, dtype=torch.float32, seed=1)
    q, k, v = qkv.clone().unflatten(-1, (3, H, P)).unbind(1)
    expected = torch.stack([*apply_rotary_pos_emb_vision(q.double(), k.double(), cos, sin), v.double()], 1)
    rotate_in_place_triton(qkv, cos, sin, H)
    assert relative(qkv, expected.flatten(1)) < tolerance
    assert torch.equal(qkv[:, 2 * H * P :], v.flatten(1))


@on_a_gpu
@precisions
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (9, 512)])
def test_quick_gelu(shape, dtype, tolerance):
    x = random(*shape, dtype=dtype) * 4
    expected = x.double() * torch.sigmoid(1.702 * x.double())
    assert relative(quick_gelu_triton(x, torch.empty_like(x)), expected) < tolerance
    assert quick_gelu_triton(x, x) is x and relative(x, expected) < tolerance


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_beyond_32_bit_offsets():
    """2.3e9 numbers in each of qkv and the norm's input; the last rows must be those of a short copy."""
    pytest.importorskip("triton")
    T, D, H, P = 600_000, 3840, 16, 80
    x = torch.empty(T, D, dtype=torch.bfloat16, device="cuda").normal_()
    weight, bias, (cos, sin) = *random(2, D, dtype=x.dtype), random(2, T, P, dtype=torch.float32, seed=1)
    tail = x[-9:].clone()
    for whole, part in zip(
        layer_norm_triton(x, x, weight, bias, 1e-6),
        layer_norm_triton(tail, tail, weight, bias, 1e-6),
    ):
        assert torch.equal(whole[-9:], part)
        del whole
    for kernel, extra in (
        (lambda x: quick_gelu_triton(x, x), lambda n: ()),
        (rotate_in_place_triton, lambda n: (cos[-n:], sin[-n:], H)),
    ):
        kernel(x, *extra(T))
        kernel(tail, *extra(9))
        assert torch.equal(x[-9:], tail)


def test_in_the_interpreter():
    run_interpreted(__file__)
