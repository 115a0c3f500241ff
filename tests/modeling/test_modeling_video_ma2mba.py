"""Video-Ma2mba: equal to what transformers has of its parts, and equal to itself however the stream is cut."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, CLIPVisionModel, Mamba2Config
from transformers import Mamba2ForCausalLM as TransformersMamba2

from vamba.modeling import StateMemory, VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration, VideoMa2mbaModel

from tiny_video_ma2mba import END, PATCH_SIZE, PATCHES, PER_FRAME, START, image, prompt, tiny_config, tiny_model, video


CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def as_mamba2(model, **changes) -> TransformersMamba2:
    """transformers' Mamba-2 with the weights of our language model."""
    text = model.config.text_config
    names = (
        "vocab_size hidden_size num_hidden_layers num_heads head_dim state_size n_groups chunk_size residual_in_fp32"
    )
    config = Mamba2Config(**{name: getattr(text, name) for name in names.split()}, tie_word_embeddings=True)
    reference = TransformersMamba2(config).eval()
    renamed = (
        ("model.language_model.", "backbone."),
        ("embed_tokens", "embeddings"),
        (".norm.weight", ".norm_f.weight"),
    )
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith(("model.language_model.", "lm_head")):
            key = key.replace(*renamed[0]).replace(*renamed[1])
            state[key.replace(*renamed[2]) if "layers" not in key else key] = value
    reference.load_state_dict(state)
    return reference


def frames(patches: torch.Tensor) -> torch.Tensor:
    """(F, 3, 16, 16) out of the patches of the video processor, one by one."""
    F, size = len(patches) // PATCHES, PATCH_SIZE
    pictures = torch.zeros(F, 3, 16, 16)
    for index, patch in enumerate(patches.view(-1, 3, size, size)):
        frame, place = divmod(index, PATCHES)
        block, inner = divmod(place, 4)
        row, column = 2 * (block // 2) + inner // 2, 2 * (block % 2) + inner % 2
        pictures[frame, :, row * size : (row + 1) * size, column * size : (column + 1) * size] = patch
    return pictures


# --- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 15, 16, 45])
def test_text_logits_are_those_of_transformers(model, length):
    ids = prompt(length)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, as_mamba2(model)(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_bfloat16_rounds_where_transformers_does(residual_in_fp32):
    model = tiny_model(residual_in_fp32=residual_in_fp32).bfloat16()
    reference, ids = as_mamba2(model.float()).bfloat16(), prompt(20)
    model.bfloat16()
    streams = []
    model.model.language_model.layers[1].register_forward_hook(lambda module, args, output: streams.append(output[0]))
    with torch.no_grad():
        ours, theirs = model(ids).logits.float(), reference(ids).logits
    assert streams[0].dtype == (torch.float32 if residual_in_fp32 else torch.bfloat16)
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_vision_features_are_clips_penultimate(model):
    given = video(3)
    clip = CLIPVisionModel(model.config.vision_config).eval()
    missing, unexpected = clip.load_state_dict(model.model.visual.state_dict(), strict=False)
    assert all(key.startswith(("encoder.layers.2.", "post_layernorm")) for key in missing) and not unexpected
    with torch.no_grad():
        patches = clip(frames(given["pixel_values_videos"]), output_hidden_states=True).hidden_states[-2][:, 1:]
        output = model.get_video_features(**given, return_dict=True)
        torch.testing.assert_close(output.last_hidden_state, patches.flatten(0, 1), **CLOSE)
        # 2 x 2 neighbours are averaged, row by row, then projected
        pooled = patches.view(3, 2, 2, 2, 2, -1).mean((2, 4)).view(3 * PER_FRAME, -1)
        linear, _, out = model.model.projector
        expected = out(torch.nn.functional.gelu(linear(pooled)))
    torch.testing.assert_close(output.pooler_output[0], expected, **CLOSE)
    assert not any("encoder.layers.2" in name for name, _ in model.named_parameters())


def test_an_image_is_one_frame(model):
    still = image(2)
    as_video = {"pixel_values_videos": still["pixel_values"], "video_grid_thw": still["image_grid_thw"]}
    with torch.no_grad():
        a = model.get_image_features(**still, return_dict=True).pooler_output
        b = model.get_video_features(**as_video, return_dict=True).pooler_output
        assert [len(tokens) for tokens in a] == [PER_FRAME] * 2 and all(map(torch.equal, a, b))
        ids = prompt(5, 1)
        assert torch.equal(
            model(ids, **image(1)).logits,
            model(ids, pixel_values_videos=image(1)["pixel_values"], video_grid_thw=torch.tensor([[1, 4, 4]])).logits,
        )


def test_the_stream_is_text_then_video_then_text(model):
    """The whole stream given to transformers as embeddings, media in their places."""
    ids = torch.cat([prompt(3), torch.tensor([[START, END]]), prompt(4, seed=1), torch.tensor([[START, END]])], 1)
    given = video(2, 3)
    with torch.no_grad():
        media = model.get_video_features(**given, return_dict=True).pooler_output
        text = model.get_input_embeddings()(ids)[0]
        stream = torch.cat([text[:4], media[0], text[4 : 10 - 1 + 1], media[1], text[10:]])
        expected = as_mamba2(model)(inputs_embeds=stream[None]).logits[0]
        logits = model(ids, **given).logits[0]
    first, second = 4 + 2 * PER_FRAME, 10 + 5 * PER_FRAME
    own = [0, 1, 2, first - 1, *range(first, first + 5), second - 1, second]
    torch.testing.assert_close(logits, expected[own], **CLOSE)


# --- however it is cut -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_frames", [1, 2, 3])
@pytest.mark.parametrize("lengths", [(7,), (1, 4)])
def test_streamed_is_at_once(model, chunk_frames, lengths):
    ids, given = prompt(7, len(lengths)), video(*lengths)
    streamed = model.encode_video(**given, chunk_frames=chunk_frames)
    with torch.no_grad():
        expected = model(ids, **given)
        rest = model(ids[:, streamed.get_seq_length() :], past_key_values=streamed)
    torch.testing.assert_close(rest.logits, expected.logits[:, 2 * len(lengths) - 1 :], **CLOSE)
    for ours, theirs in zip(streamed.states, expected.past_key_values.states):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert streamed.media == expected.past_key_values.media == [[["video", t, 4, 4] for t in lengths]]


def test_text_in_chunks_is_text_at_once(model, monkeypatch):
    ids, given = torch.cat([prompt(9), prompt(31, 1, seed=2), prompt(3, 1)], 1), video(5) | image(1)
    types = torch.zeros_like(ids)
    types[ids == START] = torch.tensor([2, 1])
    expected = model.eval()(ids, mm_token_type_ids=types, **given)  # gradients are recorded: at once
    monkeypatch.setattr("vamba.modeling.modeling_video_ma2mba.default_chunk_frames", lambda model, patches: 1)
    with torch.no_grad():
        chunked = model(ids, mm_token_type_ids=types, **given)
    torch.testing.assert_close(chunked.logits, expected.logits, **CLOSE)


def test_step_by_step_is_at_once(model):
    ids, given = prompt(9, 1), video(3)
    with torch.no_grad():
        expected = model(ids, **given).logits
        output = model(ids[:, :3], **given)
        steps, memory = [output.logits], output.past_key_values
        for index in range(3, ids.shape[1]):
            steps.append(model(ids[:, index : index + 1], past_key_values=memory).logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, **CLOSE)
    assert memory.get_seq_length() == ids.shape[1]


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows as a batch and its mask; padding holds tokens that would do harm if they were read."""
    length = max(row.shape[1] for row in rows)
    ids, mask = torch.full((len(rows), length), 77), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(0, row.shape[1]) if side == "right" else slice(length - row.shape[1], length)
        ids[index, place], mask[index, place] = row[0], 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows(model, side):
    rows = [prompt(6, 1, seed=1), prompt(13, 2, seed=2), prompt(4, 0, seed=3)]
    ids, mask = padded(rows, side)
    given = video(4, 1, 2)
    per_row = [video(4), {k: v[1:] if "grid" in k else v[4 * PATCHES :] for k, v in given.items()}, {}]
    per_row[0] = {k: v[:1] if "grid" in k else v[: 4 * PATCHES] for k, v in given.items()}
    with torch.no_grad():
        output = model(ids, attention_mask=mask, **given)
        for index, (row, media) in enumerate(zip(rows, per_row)):
            alone = model(row, **media)
            torch.testing.assert_close(output.logits[index][mask[index].bool()], alone.logits[0], **CLOSE)
            for together, single in zip(output.past_key_values.states, alone.past_key_values.states):
                torch.testing.assert_close(together.ssm_BHPK[index], single.ssm_BHPK[0], **CLOSE)
                torch.testing.assert_close(together.conv_BTC[index], single.conv_BTC[0], **CLOSE)
    assert output.logits.shape[:2] == ids.shape and (output.past_key_values.text_tokens_B == mask.sum(1)).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_token_by_token_through_padding(model, side):
    rows = [prompt(3, seed=1), prompt(6, seed=2)]
    ids, mask = padded(rows, side)
    memory = StateMemory(model.config)
    with torch.no_grad():
        for index in range(ids.shape[1]):
            now = {"input_ids": ids[:, index : index + 1], "attention_mask": mask[:, : index + 1]}
            model(**now, past_key_values=memory)
        alone = [model(row).past_key_values for row in rows]
    for layer, state in enumerate(memory.states):
        expected = torch.cat([cache.states[layer].ssm_BHPK for cache in alone])
        torch.testing.assert_close(state.ssm_BHPK, expected, **CLOSE)


def test_uint8_patches_are_normalised_in_the_model(model):
    patches = torch.randint(0, 256, (2 * PATCHES, 3 * PATCH_SIZE**2), dtype=torch.uint8)
    mean, std = (
        torch.tensor(v).repeat_interleave(PATCH_SIZE**2) for v in (model.config.image_mean, model.config.image_std)
    )
    grid = torch.tensor([[2, 4, 4]])
    given = (patches, (patches / 255 - mean) / std)
    a, b = (model.encode_video(each, grid) for each in given)
    torch.testing.assert_close(a.states[-1], b.states[-1], **CLOSE)
    a, b = (model.get_video_features(each, grid, return_dict=True).pooler_output for each in given)
    torch.testing.assert_close(a, b, **CLOSE)


def test_what_enters_the_first_block_is_as_narrow_as_the_weights():
    """The residual stream is widened in the block, so that backward keeps the embeddings as they are."""
    model, widths = tiny_model().bfloat16(), []
    for block in model.model.language_model.layers:
        block.register_forward_hook(lambda module, args, output: widths.append((args[0].dtype, output[0].dtype)))
    with torch.no_grad():
        model(prompt(5))
    wide = (torch.float32, torch.float32)
    assert widths == [(torch.bfloat16, torch.float32), wide, wide]


# --- gradients and loss ----------------------------------------------------------------------------------------------


def test_gradients_reach_every_parameter_and_equal_those_of_chunks():
    model = tiny_model().double().train()
    ids, given = prompt(6, 1), video(5)
    given["pixel_values_videos"] = given["pixel_values_videos"].double()

    def gradients(**options):
        model.zero_grad()
        runs = model.model.read
        model.model.read = lambda *args, **kwargs: runs(*args, **kwargs | options)
        loss = model(ids, labels=ids, **given).loss
        model.model.read = runs
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    whole, cut = gradients(), gradients(chunk_frames=2)
    assert all(gradient.abs().sum() > 0 for name, gradient in whole.items() if "k_proj.bias" not in name)
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-9, atol=1e-12)
    model.gradient_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("checkpointing", ["none", "layers", "cells"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_tower_takes_many_frames_in_passes(monkeypatch, checkpointing, frozen):
    """Two frames at a time, across videos; once more in backward where it trains and gradients are checkpointed."""
    model = tiny_model().double().train()
    model.model.visual.requires_grad_(not frozen)
    ids, given = prompt(6, 2), video(5, 2)
    given["pixel_values_videos"] = given["pixel_values_videos"].double()
    passes = []

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, **given).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}

    whole = gradients()
    monkeypatch.setattr("vamba.modeling.video_model.MAX_CHUNK_FRAMES", 2)
    if checkpointing == "layers":
        model.gradient_checkpointing_enable()
    elif checkpointing == "cells":
        model.enable_multi_axis_checkpointing(2, 7)
    model.model.visual.register_forward_hook(
        lambda module, args, output: passes.append((len(args[0]), output.last_hidden_state.requires_grad))
    )
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-9, atol=1e-12)
    again = 1 if frozen or checkpointing == "none" else 2
    assert sorted(passes) == sorted([(n, not frozen) for n in (2, 2, 2, 1)] * again)


@pytest.mark.parametrize("given", [{}, video(3)])
def test_ranks_that_share_weights_make_as_many_passes(monkeypatch, given):
    """Another rank has 5 passes of two frames: this one runs black frames in their place, which change nothing."""
    model, passes = tiny_model().double().train(), []
    ids = prompt(6, len(given) // 2)
    given = given and given | {"pixel_values_videos": given["pixel_values_videos"].double()}

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, **given).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    alone = {name: None if gradient is None else gradient.clone() for name, gradient in gradients().items()}
    monkeypatch.setattr("vamba.modeling.video_model.MAX_CHUNK_FRAMES", 2)
    monkeypatch.setattr("vamba.modeling.video_model.agree_on_calls", lambda module, passes, device: [5])
    monkeypatch.setattr("vamba.modeling.video_model.calls_are_shared", lambda module: True)
    model.model.visual.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    for name, gradient in gradients().items():
        expected = torch.zeros_like(gradient) if alone[name] is None else alone[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert passes == ([2, 1, 1, 1, 1] if given else [1] * 5)


def test_the_loss_is_that_of_the_text_after_what_was_seen(model):
    ids, given = prompt(6, 1), video(3)
    labels = ids.clone()
    labels[:, :2] = -100
    with torch.no_grad():
        output = model(ids, labels=labels, **given)
    expected = torch.nn.functional.cross_entropy(output.logits[0, 1:-1], ids[0, 2:])
    torch.testing.assert_close(output.loss, expected)
    with torch.no_grad():  # what comes after <|vision_start|> is predicted from the end of the video
        one, other = (model(ids[:, :1], **video(3, seed=seed)).logits for seed in (0, 5))
    assert (one - other).abs().max() > 1e-3


def test_outputs_can_be_chosen(model):
    ids, given = prompt(6, 1), video(3)
    with torch.no_grad():
        full = model(ids, **given, output_hidden_states=True)
        torch.testing.assert_close(model(ids, **given, logits_to_keep=2).logits, full.logits[:, -2:])
        assert model(ids, **given, use_cache=False).past_key_values is None
        embeds = model.get_input_embeddings()(ids)
        torch.testing.assert_close(model(inputs_embeds=embeds, **given).logits, full.logits)
    assert len(full.hidden_states) == 4 and {level.shape for level in full.hidden_states} == {(1, 8, 32)}
    assert torch.equal(full.hidden_states[0][:, 1:], embeds[:, 1:])  # the first place is the video's last token


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["text_config", None])
def test_levels_that_a_configuration_asks_for(model, part):
    given = {"input_ids": prompt(5, 1), **video(3)}
    expected = model(**given, output_hidden_states=True).hidden_states
    asking = tiny_model()
    (getattr(asking.config, part) if part else asking.config).output_hidden_states = True
    for inputs in (given, {"input_ids": prompt(5)}):
        assert len(asking(**inputs).hidden_states) == 4
        assert asking(**inputs, output_hidden_states=False).hidden_states is None
    for level, wanted in zip(asking(**given).hidden_states, expected, strict=True):
        torch.testing.assert_close(level, wanted)
    assert asking.encode_video(**video(3)).video_length == 12
    assert asking.generate(**given, max_new_tokens=2, do_sample=False).shape == (1, 9)


def test_media_and_marks_must_agree(model):
    with pytest.raises(ValueError, match="holds 2 <|vision_start|> tokens for 1 images and videos"):
        model(prompt(3, 2), **video(2))
    with pytest.raises(ValueError, match="holds 0 <|vision_start|> tokens for 1"):
        model(prompt(3), **video(2))
    with pytest.raises(ValueError, match="1 <|vision_start|> tokens, but 0 images and 2 videos"):
        model(torch.cat([prompt(4), prompt(2, 1)]), **video(1, 1))


@pytest.mark.parametrize("types", [None, [2, 2], [1, 0]])
def test_the_order_of_images_and_videos_must_be_told(model, types):
    ids = prompt(3, 2)
    told = None if types is None else torch.tensor([[types[0], 0, types[1], 0, 0, 0, 0]])
    with pytest.raises(ValueError, match="In which order do the 1 images and 1 videos come"):
        model(ids, mm_token_type_ids=told, **video(2), **image(1))


def test_frames_of_another_size_are_refused(model):
    with pytest.raises(ValueError, match="2 x 8 patches and the vision tower takes 4 x 4: .* 16 pixels"):
        model(prompt(3, 1), pixel_values_videos=torch.zeros(16, 48), video_grid_thw=torch.tensor([[1, 2, 8]]))


def test_configurations():
    assert VideoMa2mbaConfig().tokens_per_frame == 144 and VideoMa2mbaConfig().vision_config.hidden_size == 1024
    sizes = {name: VideoMa2mbaConfig.of_size(name).text_config for name in ("370m", "1.3b", "2.7b")}
    assert [(text.num_hidden_layers, text.hidden_size, text.num_heads) for text in sizes.values()] == [
        (48, 1024, 32), (48, 2048, 64), (64, 2560, 80),
    ]  # fmt: skip
    assert {text.vocab_size for text in sizes.values()} == {50288}
    with pytest.raises(ValueError, match="no size '7b'; choose one of 370m, 1.3b, 2.7b"):
        VideoMa2mbaConfig.of_size("7b")
    with pytest.raises(StrictDataclassError, match="even number of patches"):
        VideoMa2mbaConfig(vision_config={"image_size": 42})
    with torch.device("meta"):  # 2.7 billion, as the name says, and CLIP-ViT-L
        count = VideoMa2mbaForConditionalGeneration(VideoMa2mbaConfig.of_size("2.7b")).num_parameters()
    assert 2.98e9 < count < 3.03e9


# --- loading ---------------------------------------------------------------------------------------------------------


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is VideoMa2mbaConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is VideoMa2mbaModel
    for cls in (AutoModelForImageTextToText, VideoMa2mbaForConditionalGeneration):
        loaded = cls.from_pretrained(tmp_path).eval()
        assert type(loaded) is VideoMa2mbaForConditionalGeneration
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
        with torch.no_grad():
            assert torch.equal(loaded(prompt(5, 1), **video(2)).logits, model(prompt(5, 1), **video(2)).logits)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {name for name, parameter in half.named_parameters() if parameter.dtype == torch.float32}
    assert kept and all(name.endswith(("mixer.A_log", "mixer.D", "mixer.dt_bias")) for name in kept)


def test_initial_weights_are_mambas():
    model = VideoMa2mbaForConditionalGeneration(tiny_config())
    mixer = model.model.language_model.layers[0].mixer
    assert (mixer.D == 1).all() and (mixer.A_log.exp() >= 1).all() and (mixer.A_log.exp() <= 16).all()
    assert 0.01 < model.model.language_model.embed_tokens.weight.std() < 0.03
    for linear in (model.model.projector[0], model.model.projector[2]):
        bound = linear.in_features**-0.5
        assert linear.bias.abs().max() == 0 and 0.9 * bound < linear.weight.abs().max() <= bound
        assert linear.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_a_start_typed_0_is_text(model):
    """One that somebody typed, before and behind that of an image, changes what is read but opens nothing."""
    typed, seen = torch.tensor([[START]]), image()
    ids = torch.cat([typed, prompt(4, 1), typed, prompt(3, seed=1)], 1)
    types = torch.zeros_like(ids)
    types[0, 1] = 1
    output = model(ids, mm_token_type_ids=types, **seen)
    memory = model(typed).past_key_values
    rest = model(prompt(4, 1), **seen, past_key_values=memory)
    rest = model(torch.cat([typed, prompt(3, seed=1)], 1), past_key_values=rest.past_key_values)
    torch.testing.assert_close(output.logits[:, -4:], rest.logits, **CLOSE)
    answers = [
        model.generate(ids, mm_token_type_ids=types, **seen, max_new_tokens=3, do_sample=False, output_logits=True,
                       return_dict_in_generate=True)
    ]  # fmt: skip
    torch.testing.assert_close(answers[0].logits[0], output.logits[:, -1], **CLOSE)
    turn, grown = answers[0].sequences, torch.nn.functional.pad(types, (0, 3))
    for media in ({}, seen):  # the next turn, without the media or with all of them
        memory = answers[0].past_key_values.fork()
        following = {"past_key_values": memory, "max_new_tokens": 2, "do_sample": False, **media}
        assert model.generate(turn, mm_token_type_ids=grown, **following).shape[1] == turn.shape[1] + 2
        assert memory.num_video_tokens == answers[0].past_key_values.num_video_tokens


def test_samples_in_one_row_are_refused(model):
    flat = torch.cat([prompt(3), prompt(4)], 1)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    for told in ({"position_ids": positions}, {"cu_seq_lens_q": starts}, {"packed_lengths": [3, 4]}):
        with pytest.raises(ValueError, match="consists of 2 samples.*row of its own, padded"):
            model(flat, **told)
    one = {"position_ids": torch.arange(7)[None], "cu_seq_lens_q": starts[::2], "packed_lengths": [7]}
    torch.testing.assert_close(model(flat, **one).logits, model(flat).logits)
