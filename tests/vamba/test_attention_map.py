"""The attention of an answer, computed in parts, equals what eager attention reports for the same tokens."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model

import vamba
from vamba import attention_map as module
from vamba.attention_map import attention_map
from vamba.modeling import VideoMemory

from tiny_vamba import media, prompt, tiny_model


CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def eager_twin(model):
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


def reference(model, memory, asked, answer):
    """Weights (L, H, A, M) that predict the answer, and the norms (L, H, M) of what they bring."""
    text = torch.cat([asked, answer[:, :-1]], 1)
    with torch.no_grad():
        output = model(text, past_key_values=memory.fork(), output_attentions=True)
    weights_LHAM = torch.stack([w[0, :, asked.shape[1] - 1 :] for w in output.cross_attentions])
    norms = []
    for index, layer in enumerate(m for m in model.modules() if hasattr(m, "cross_attn")):
        values_KMP = memory.video_key_values(index)[1][0]
        weight_DHP = layer.cross_attn.o_proj.weight.detach().unflatten(1, (weights_LHAM.shape[1], -1))
        values_HMP = values_KMP.repeat_interleave(weights_LHAM.shape[1] // len(values_KMP), 0)
        alpha = 0 if layer.alpha is None else layer.alpha.item()
        norms.append(torch.einsum("dhp,hmp->hmd", weight_DHP, values_HMP).norm(dim=-1) * (1 - alpha))
    return weights_LHAM, torch.stack(norms)


def watched(model, **options):
    """A video of several chunks and one of another size: 9 temporal patches of 6 tokens, 2 of 4; and which is whose."""
    pixels, grid = media((9, 4, 6), (2, 4, 4))
    memory = model.encode_video(pixels, grid, memory=VideoMemory(model.config, **options), chunk_frames=8)
    return memory, torch.arange(11).repeat_interleave(torch.tensor([6] * 9 + [4] * 2))


VARIANTS = {
    "plain": ({}, {}),
    "rotated keys": ({"cross_attn_use_position_embeddings": True}, {}),
    "layer norm": ({"cross_attn_use_layer_norm": True}, {}),
    "no alpha": ({"use_alpha_balancing": False}, {}),
    "fp8": ({}, {"video_dtype": torch.float8_e4m3fn}),
    "on the CPU": ({}, {"video_device": "cpu"}),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("at_once", [2**24, 200])
def test_parts_equal_the_whole(name, at_once, monkeypatch):
    text, kept = VARIANTS[name]
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    model = tiny_model(**text)
    memory, patches = watched(model, **kept)
    asked, answer = prompt(5, 2), prompt(4, seed=3)
    weights, norms = reference(eager_twin(model), memory, asked, answer)
    tokens, by_token = attention_map(model, memory.fork(), asked, answer, patches, by="weights")
    torch.testing.assert_close(tokens, weights.mean((0, 1, 2)), **CLOSE)
    expected = torch.zeros(4, 11).index_add_(1, patches, weights.mean((0, 1))) / 4
    torch.testing.assert_close(by_token, expected, **CLOSE)
    brought = (weights * norms[:, :, None]).square().mean((0, 1, 2))
    tokens, _ = attention_map(model, memory.fork(), asked, answer, patches)
    torch.testing.assert_close(tokens, brought / brought.sum(), **CLOSE)
    tokens, _ = attention_map(model, memory.fork(), asked, answer, patches, layers=[2, 0], heads=[1], by="weights")
    torch.testing.assert_close(tokens, weights[[0, 2], 1].mean((0, 1)), **CLOSE)
    tokens, _ = attention_map(model, memory.fork(), asked, answer, patches, heads="max", by="weights")
    largest = weights.amax(1).mean((0, 1))
    torch.testing.assert_close(tokens, largest / largest.sum(), **CLOSE)


def test_adapters_and_offloaded_weights():
    """LoRA on the projections of queries and of outputs counts; weights may lie elsewhere."""
    model = tiny_model()
    memory, patches = watched(model)
    asked, answer = prompt(5, 2), prompt(3, seed=3)
    plain, _ = attention_map(model, memory.fork(), asked, answer, patches)
    offloaded = cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert next(offloaded.model.language_model.layers[0].cross_attn.q_proj.parameters()).is_meta
    tokens, _ = attention_map(offloaded, memory.fork(), asked, answer, patches)
    torch.testing.assert_close(tokens, plain, **CLOSE)
    adapted = get_peft_model(
        model, LoraConfig(target_modules=r".*cross_attn\.(q|o)_proj", r=4, init_lora_weights=False)
    )
    tokens, _ = attention_map(adapted.eval(), memory.fork(), asked, answer, patches)
    merged = eager_twin(adapted).merge_and_unload()
    weights, norms = reference(merged, memory, asked, answer)
    brought = (weights * norms[:, :, None]).square().mean((0, 1, 2))
    torch.testing.assert_close(tokens, brought / brought.sum(), rtol=1e-4, atol=1e-5)
    assert (tokens - plain).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_within_a_row_is_nobody_s(attention):
    """A row that is read with a mask, or cut to what is not padding, gives what it gives by itself."""
    model = tiny_model()
    model.set_attn_implementation(attention)
    pixels, grid = media((2, 4, 4), (3, 4, 4))
    both = model.encode_video(pixels, grid, rows=[0, 1], chunk_frames=4)
    both.batch_select_indices(torch.tensor([0]))
    alone = model.encode_video(pixels[:32], grid[:1])
    patches = torch.arange(2).repeat_interleave(4)
    asked, answer = prompt(5, 1), prompt(3, seed=3)
    expected, _ = attention_map(model, alone, asked, answer, patches)
    tokens, _ = attention_map(model, both, asked, answer, patches)
    torch.testing.assert_close(tokens, expected, **CLOSE)


def test_keys_that_are_not_rotated_while_decoding():
    """As the original generates: the first token of an answer reads rotated keys, the others plain ones."""
    model = tiny_model(cross_attn_use_position_embeddings=True)
    memory, patches = watched(model)
    asked, answer = prompt(5, 2), prompt(4, seed=3)
    rotated, _ = reference(eager_twin(model), memory, asked, answer)
    model.generation_config.unrotate_video_keys = True
    _, by_token = attention_map(model, memory.fork(), asked, answer, patches, layers=[0], by="weights")
    expected = torch.zeros(4, 11).index_add_(1, patches, rotated[0].mean(0)) / 4
    torch.testing.assert_close(by_token[0], expected[0], **CLOSE)
    assert (by_token[1:] - expected[1:]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "wrong",
    [{"layers": [3]}, {"layers": []}, {"layers": 1}, {"heads": [4]}, {"heads": "most"}, {"by": "norm"}, {"heads": 2}],
)
def test_what_there_is_not(model, wrong):
    memory, patches = watched(model)
    with pytest.raises(vamba.UserError, match=f"{next(iter(wrong))} is .*give"):
        attention_map(model, memory, prompt(5, 2), prompt(2), patches, **wrong)
