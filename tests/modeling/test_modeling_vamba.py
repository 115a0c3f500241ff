"""The model: batches against rows alone, cached against full, switches, loss, gradients and checkpointing."""

import pytest
import torch
from torch.nn import functional as F
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vamba.modeling import VambaForConditionalGeneration

from tiny_vamba import END, START, media, prompt, tiny_config, tiny_model


VARIANTS = [
    {},
    {"use_alpha_balancing": False},
    {"cross_attn_use_layer_norm": True, "cross_attn_use_position_embeddings": True},
]


def run(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def batch(*rows: torch.Tensor, side: str = "left"):
    """Rows of ids padded to one length, with their attention mask."""
    length = max(row.shape[1] for row in rows)
    ids, mask = torch.full((len(rows), length), 9), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(length - row.shape[1], None) if side == "left" else slice(0, row.shape[1])
        ids[i, place], mask[i, place] = row[0], 1
    return ids, mask


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_its_rows_alone(variant, attention, side):
    """Text only, one video, an image between two videos of other sizes: each row as if it were alone."""
    model = tiny_model(**variant)
    model.set_attn_implementation(attention)
    image, image_grid = media((1, 6, 4), seed=1)
    videos, video_grid = media((3, 4, 6), (2, 4, 4), (1, 8, 4), seed=2)
    rows = [prompt(9), prompt(4, items=1, seed=1), prompt(6, items=3, seed=2)]
    types = [torch.zeros_like(row) for row in rows]
    types[1][0, 0] = 2
    types[2][0, [0, 2, 4]] = torch.tensor([2, 1, 2])
    ids, mask = batch(*rows, side=side)
    mm_token_type_ids, _ = batch(*types, side=side)
    mm_token_type_ids[ids != START] = 0
    together = run(
        model, ids, attention_mask=mask, mm_token_type_ids=mm_token_type_ids,
        pixel_values=image, image_grid_thw=image_grid, pixel_values_videos=videos, video_grid_thw=video_grid,
    )  # fmt: skip
    alone = [
        run(model, rows[0]),
        run(model, rows[1], pixel_values_videos=videos[:72], video_grid_thw=video_grid[:1]),
        run(
            model, rows[2], mm_token_type_ids=types[2], pixel_values=image, image_grid_thw=image_grid,
            pixel_values_videos=videos[72:], video_grid_thw=video_grid[1:],
        ),
    ]  # fmt: skip
    for row, expected in enumerate(alone):
        torch.testing.assert_close(together[row][mask[row] == 1], expected[0], rtol=1e-4, atol=2e-5)


def test_the_order_of_media_matters(model):
    image, image_grid = media((1, 6, 4), seed=1)
    video, video_grid = media((3, 4, 6), seed=2)
    ids = prompt(5, items=2)
    kwargs = {
        "pixel_values": image,
        "image_grid_thw": image_grid,
        "pixel_values_videos": video,
        "video_grid_thw": video_grid,
    }
    image_first, video_first = torch.zeros_like(ids), torch.zeros_like(ids)
    image_first[0, [0, 2]], video_first[0, [0, 2]] = torch.tensor([1, 2]), torch.tensor([2, 1])
    a, b = (run(model, ids, mm_token_type_ids=types, **kwargs) for types in (image_first, video_first))
    assert (a - b).abs().max() > 1e-3
    torch.testing.assert_close(run(model, ids, **kwargs), a)  # without types: images, then videos


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decoding_equals_the_full_forward(variant):
    model = tiny_model(**variant)
    pixels, grid = media((3, 4, 6))
    ids = prompt(12, items=1)
    full = run(model, ids, pixel_values_videos=pixels, video_grid_thw=grid)
    memory, steps = model.encode_video(pixels, grid), []
    for piece in ids.split([3, 1, 1, 4, 1, 4], 1):
        steps.append(run(model, piece, past_key_values=memory, use_cache=True))
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-5)


def test_positions_may_be_two_or_three_dimensional(model):
    ids, positions = prompt(6), torch.arange(6)[None]
    expected = run(model, ids)
    torch.testing.assert_close(run(model, ids, position_ids=positions), expected)
    torch.testing.assert_close(run(model, ids, position_ids=positions.expand(3, 1, 6)), expected)
    assert not torch.allclose(run(model, ids, position_ids=positions * 3), expected, atol=1e-3)


def test_media_mismatch_in_a_batch_names_both_counts(model):
    pixels, grid = media((3, 4, 6))
    with pytest.raises(ValueError, match=r"2 rows of text hold 2 .* 0 images and 1 videos"):
        run(model, torch.cat([prompt(4, items=1)] * 2), pixel_values_videos=pixels, video_grid_thw=grid)


def test_text_only_with_alpha_one_is_qwen2_vl():
    """The language model's weights and alpha at 1: without video nothing of Vamba is left."""
    config = tiny_config()
    text = {
        k: v
        for k, v in config.text_config.to_dict().items()
        if not k.startswith(("use_alpha", "cross_attn", "model_type"))
    }
    qwen = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=config.vision_config.to_dict(), vision_start_token_id=START,
                      vision_end_token_id=END, image_token_id=6, video_token_id=7)
    ).eval()  # fmt: skip
    model = VambaForConditionalGeneration(config).eval()
    model.load_state_dict(qwen.state_dict(), strict=False)
    ids, mask = batch(prompt(9), prompt(5, seed=1))
    kwargs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    assert not torch.allclose(run(model, ids, **kwargs), run(qwen, ids, **kwargs), atol=1e-4)
    for layer in model.model.language_model.layers:
        layer.alpha.data.fill_(1.0)
    torch.testing.assert_close(run(model, ids, **kwargs), run(qwen, ids, **kwargs), rtol=1e-5, atol=1e-6)


def test_alpha_outside_its_range_acts_clamped_and_can_return():
    model = tiny_model()
    pixels, grid = media((2, 4, 6))
    kwargs = {"pixel_values_videos": pixels, "video_grid_thw": grid}
    alpha = model.model.language_model.layers[1].alpha
    alpha.data.fill_(1.0)
    inside = run(model, prompt(5), **kwargs)
    alpha.data.fill_(1.7)
    torch.testing.assert_close(run(model, prompt(5), **kwargs), inside)
    model(prompt(5), labels=prompt(5), **kwargs).loss.backward()
    assert alpha.grad.abs() > 0 and alpha.item() == pytest.approx(1.7)


def test_loss_counts_labels_only_and_logits_can_be_skipped(model):
    ids = prompt(10)
    labels = ids.clone()
    labels[:, :6] = -100
    logits = run(model, ids)
    expected = F.cross_entropy(logits[0, 5:-1], ids[0, 6:])
    with torch.no_grad():
        assert model(ids, labels=labels).loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert model(ids, labels=labels, num_items_in_batch=8).loss.item() == pytest.approx(
            expected.item() / 2, rel=1e-5
        )
    torch.testing.assert_close(run(model, ids, logits_to_keep=2), logits[:, -2:])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    pixels, grid = media((3, 4, 6), (2, 4, 4))
    ids, mask = batch(prompt(9, items=1), prompt(5, items=1, seed=1))
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        kwargs = {"attention_mask": mask, "pixel_values_videos": pixels, "video_grid_thw": grid}
        model(ids, labels=ids.masked_fill(mask == 0, -100), use_cache=False, **kwargs).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(g is not None for g in gradients[0].values())
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("options", [None, {}, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
@pytest.mark.parametrize("trains", [None, "blocks.0.attn.qkv.weight", "merger.ln_q.weight"])
def test_checkpointing_keeps_no_graph_of_a_frozen_tower(options, trains):
    model, recorded, media_recorded = tiny_model().train(), [], []
    model.model.visual.requires_grad_(False)
    if trains:
        model.model.visual.get_parameter(trains).requires_grad_(True)
    model.gradient_checkpointing_enable(options)
    use_reentrant = options is not None and options.get("use_reentrant", True)  # torch's default, not transformers'
    last = model.model.visual.blocks[-1]
    last.register_forward_hook(lambda module, args, output: recorded.append(output.requires_grad))
    model.model.visual.register_forward_hook(
        lambda module, args, output: media_recorded.append(output.pooler_output.requires_grad)
    )
    pixels, grid = media((3, 4, 6))
    ids = prompt(9, items=1)
    model(ids, labels=ids, use_cache=False, pixel_values_videos=pixels, video_grid_thw=grid).loss.backward()
    assert recorded[0] == (trains is not None and trains.startswith("blocks"))
    assert media_recorded[0] == (trains is not None or use_reentrant)  # nobody else reads their gradients
    assert trains is None or model.model.visual.get_parameter(trains).grad.norm() > 0
    assert all(p.grad is not None for p in model.model.video_encoder.parameters())
    model.gradient_checkpointing_disable()
    model.disable_input_require_grads()
    model.model.visual._forward_hooks.popitem()  # that of this test
    hooked = (model.get_input_embeddings(), model.model.visual, model.model.visual.patch_embed)
    assert not any(module._forward_hooks for module in hooked)


def test_chunked_encoding_gives_the_same_gradients():
    """Through keys, values and Mamba states alike, however the frames are cut."""
    model = tiny_model().double()
    pixels, grid = media((5, 4, 6))
    pixels = pixels.double()
    gradients = []
    for chunk_frames in (None, 2, 6):
        model.zero_grad()
        memory = model.model.encode_video(pixels, grid, chunk_frames=chunk_frames)
        model(prompt(6), past_key_values=memory, labels=prompt(6)).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for other in gradients[1:]:
        for a, b in zip(other, gradients[0]):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_flash_attention_reads_each_row_without_its_padding(monkeypatch):
    """A stand-in with flash attention's interface, which knows no mask."""
    read = []

    def flash(module, q, k, v, mask, scaling=None, is_causal=None, **kwargs):
        assert mask is None
        if not hasattr(module, "k_proj") and not hasattr(module, "qkv"):  # the cross-attention
            read.append((q.shape[2], k.shape[2]))
        causal = module.is_causal if is_causal is None else is_causal
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal and q.shape[2] > 1, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    model = tiny_model()
    pixels, grid = media((3, 4, 6), (2, 4, 4))
    ids = torch.cat([prompt(4, items=1), prompt(6), prompt(4, items=1, seed=1)])
    kwargs = {"pixel_values_videos": pixels, "video_grid_thw": grid}
    expected = run(model, ids, **kwargs)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    monkeypatch.setattr(model.model.language_model.config, "_attn_implementation_internal", "flash_attention_2")
    torch.testing.assert_close(run(model, ids, **kwargs), expected, rtol=1e-4, atol=1e-5)
    assert read == [(6, 18), (6, 8)] * 3


def saved_bytes(function) -> int:
    """Of the storages that autograd saves within."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = function()
    return sum(storages.values()) if kept is not None else 0


def test_padded_rows_save_no_more_than_the_rows_alone():
    """Neither padding nor keys and values repeated for the heads of the queries."""
    model = tiny_model(num_key_value_heads=1)
    layer = model.model.language_model.layers[1].cross_attn
    text = torch.randn(2, 3, 64)

    def attend(memory, rows):
        hidden_BND = text[rows].clone().requires_grad_()
        reads = memory.reads(hidden_BND)
        levels = [level.map(lambda t: t.requires_grad_()) for level in memory.level(1).cut(reads)]
        return layer(hidden_BND, [(read.text, level) for read, level in zip(reads, levels)])[0]

    grids = ((30, 4, 6), (12, 4, 6))
    with torch.no_grad():
        padded = model.encode_video(*media(*grids), rows=[0, 1])
        alone = [model.encode_video(*media(grid)) for grid in grids]
    assert padded.num_video_tokens == [180, 72]
    together = saved_bytes(lambda: attend(padded, slice(None)))
    apart = sum(saved_bytes(lambda memory=memory, row=row: attend(memory, [row])) for row, memory in enumerate(alone))
    assert together < 1.1 * apart


def test_attentions_and_hidden_states_are_returned(model):
    pixels, grid = media((3, 4, 6))
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        out = eager(
            prompt(5),
            pixel_values_videos=pixels,
            video_grid_thw=grid,
            output_attentions=True,
            output_hidden_states=True,
        )
    assert [a.shape for a in out.cross_attentions] == [(1, 4, 5, 18)] * 3
    assert [a.shape for a in out.attentions] == [(1, 4, 5, 5)] * 3
    assert len(out.hidden_states) == 4
    torch.testing.assert_close(out.cross_attentions[1].sum(-1), torch.ones(1, 4, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_recurrence_in_float32(tmp_path, dtype):
    tiny_model().save_pretrained(tmp_path)
    model = VambaForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    kept = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {"A_log", "D", "dt_bias"}
    pixels, grid = media((3, 4, 6))
    expected = run(tiny_model(), prompt(6), pixel_values_videos=pixels, video_grid_thw=grid)
    actual = run(model, prompt(6), pixel_values_videos=pixels, video_grid_thw=grid)
    assert actual.dtype == dtype
    assert (actual.float() - expected).norm() / expected.norm() < (0.06 if dtype == torch.bfloat16 else 0.01)


def test_the_last_layer_has_no_mamba_block(model):
    levels = model.model.video_encoder.levels
    assert len(levels) == len(model.model.language_model.layers)
    assert [level.block is None for level in levels] == [False, False, True]


def test_a_qwen2_5_tower_fits_in():
    config = tiny_config()
    vision = {
        "model_type": "qwen2_5_vl_vision", "depth": 2, "hidden_size": 32, "out_hidden_size": 64,
        "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    model = VambaForConditionalGeneration(type(config)(**{**config.to_dict(), "vision_config": vision})).eval()
    pixels, grid = media((4, 4, 8))
    whole = model.encode_video(pixels, grid)
    cut = model.encode_video(pixels, grid, chunk_frames=2)
    assert whole.video_length == 32
    torch.testing.assert_close(cut.video_key_values(2)[0], whole.video_key_values(2)[0], rtol=1e-4, atol=1e-5)


def test_weights_that_accelerate_keeps_elsewhere_give_the_same(model):
    accelerate = pytest.importorskip("accelerate")
    offloaded = tiny_model()
    accelerate.cpu_offload(offloaded, execution_device="cpu")
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    pixels, grid = media((5, 4, 6))
    inputs = {"input_ids": prompt(7, items=1), "pixel_values_videos": pixels, "video_grid_thw": grid}
    with torch.no_grad():
        assert torch.equal(offloaded(**inputs).logits, model(**inputs).logits)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(offloaded.generate(**inputs, **options), model.generate(**inputs, **options))
