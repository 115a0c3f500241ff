"""`generate` in all its ways against one judge: the full forward pass, without a cache, over everything so far.

The points are those of transformers' GenerationTesterMixin (tests/generation/test_utils.py, not in its packages), and
those of the video memory. Greedy tokens are compared exactly: the weights are large, so that no two logits are close.
"""

import pytest
import torch
from transformers import CompileConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import StaticLayer
from transformers.generation.streamers import BaseStreamer

from vamba.demo.tiny_checkpoints import SPECIAL_TOKENS, tiny_tokenizer
from vamba.modeling import VambaConfig, VambaForConditionalGeneration, VideoMemory


LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 3, 4, 2, 16, 64
NEW = 5  # tokens to generate
TOLERANCE = 1e-5  # float32, of the largest logit


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(["what happens in the video"])


def make_model(tokenizer, seed=7, layers=LAYERS, **text_options):
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}
    config = VambaConfig(
        text_config={
            "hidden_size": HIDDEN,
            "intermediate_size": 96,
            "num_hidden_layers": layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": ids["pad"],
            **text_options,
        },
        vision_config={
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": HIDDEN,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 4,
        },
        mamba_config={"hidden_size": HIDDEN, "state_size": 16, "head_dim": 16, "chunk_size": 8},
        **{f"{name}_token_id": ids[name] for name in ("image", "video", "vision_start", "vision_end")},
    )
    torch.manual_seed(seed)
    model = VambaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "visual" not in name:
                parameter.normal_(std=1.0 if "embed_tokens" in name or "lm_head" in name else 0.2)
    model.generation_config.pad_token_id = ids["pad"]
    # media tokens are kept from being generated, as in transformers' own tests of models with images
    model.generation_config.suppress_tokens = list(ids.values())
    return model


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


def make_inputs(model, lengths=(9, 7), seed=1):
    """Row 0: an image and a video; row 1: a larger video; left-padded."""
    generator = torch.Generator().manual_seed(seed)
    config, width = model.config, max(lengths)
    ids = torch.randint(20, 90, (len(lengths), width), generator=generator)
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : width - length], mask[row, : width - length] = config.text_config.pad_token_id, 0
        for start, kind in [(1, 1), (3, 2)] if row == 0 else [(2, 2)]:
            at = width - length + start
            ids[row, at], ids[row, at + 1] = config.vision_start_token_id, config.vision_end_token_id
            types[row, at] = kind
    videos = torch.tensor([[2, 4, 4], [3, 4, 6]])[: len(lengths)]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": types,
        "pixel_values": torch.randn(16, 96, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "pixel_values_videos": torch.randn(int(videos.prod(1).sum()), 96, generator=generator),
        "video_grid_thw": videos,
    }


@pytest.fixture(scope="module")
def inputs(model):
    return make_inputs(model)


def row_of(inputs, row):
    """One row of `inputs` by itself, without its padding."""
    kept = inputs["attention_mask"][row].bool()
    alone = {key: inputs[key][row : row + 1, kept] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
    first = int(inputs["video_grid_thw"][0].prod())
    alone["pixel_values_videos"] = (
        inputs["pixel_values_videos"][:first] if row == 0 else inputs["pixel_values_videos"][first:]
    )
    alone["video_grid_thw"] = inputs["video_grid_thw"][row : row + 1]
    if row == 0:
        alone |= {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}
    return alone


@torch.no_grad()
def full_forward(model, inputs, sequences):
    """Logits (B, N, vocab) over whole sequences, media and all, nothing cached."""
    grown = sequences.shape[1] - inputs["input_ids"].shape[1]
    pad = torch.nn.functional.pad
    return model(
        **(inputs | {"input_ids": sequences})
        | {"attention_mask": pad(inputs["attention_mask"], (0, grown), value=1)}
        | {"mm_token_type_ids": pad(inputs["mm_token_type_ids"], (0, grown)), "use_cache": False},
    ).logits


def judge(model, inputs, new=NEW):
    """Greedy ids by one full forward pass per token."""
    sequences = inputs["input_ids"]
    for _ in range(new):
        logits = full_forward(model, inputs, sequences)[:, -1]
        logits[:, model.generation_config.suppress_tokens] = -torch.inf
        sequences = torch.cat([sequences, logits.argmax(-1, keepdim=True)], 1)
    return sequences


@pytest.fixture(scope="module")
def expected(model, inputs):
    sequences = judge(model, inputs)
    logits = full_forward(model, inputs, sequences)
    logits[..., model.generation_config.suppress_tokens] = -torch.inf
    best = logits.topk(2).values
    assert (best[..., 0] - best[..., 1])[:, -NEW - 1 :].min() > 1e-2  # or the comparison of tokens would mean little
    blind = {key: value for key, value in inputs.items() if "pixel" not in key and "grid" not in key}
    assert not torch.equal(judge(model, blind), sequences)  # the answer depends on the media
    return sequences


def generate(model, inputs, **options):
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False} | options)


def assert_close(logits, expected):
    assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()


def repeat(inputs, times):
    """Each row of `inputs` with its media `times` times."""
    rows = [row_of(inputs, row) for row in range(2)]
    width = inputs["input_ids"].shape[1]
    merged = {}
    for alone in [alone for alone in rows for _ in range(times)]:
        left = width - alone["input_ids"].shape[1]
        for key, value in alone.items():
            if "pixel" not in key and "grid" not in key:
                value = torch.nn.functional.pad(value, (left, 0))
            merged.setdefault(key, []).append(value)
    return {key: torch.cat(values) for key, values in merged.items()}


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy(tokenizer, inputs, expected, attention, use_cache):
    model = make_model(tokenizer)
    model.set_attn_implementation(attention)
    assert generate(model, inputs, use_cache=use_cache).tolist() == expected.tolist()


@pytest.mark.parametrize("row", [0, 1])
def test_left_padding_changes_nothing(model, inputs, expected, row):
    alone = row_of(inputs, row)
    answer = generate(model, alone)[0, alone["input_ids"].shape[1] :]
    assert answer.tolist() == expected[row, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("row", [0, 1])
def test_left_padding_where_positions_count(tokenizer, inputs, row):
    model = make_model(tokenizer, cross_attn_use_position_embeddings=True)
    alone, N = row_of(inputs, row), inputs["input_ids"].shape[1]
    answer = judge(model, alone)
    assert generate(model, inputs)[row, N:].tolist() == answer[0, -NEW:].tolist()
    kept = alone["input_ids"].shape[1]
    with torch.no_grad():
        assert_close(model(**inputs).logits[row, -kept:], full_forward(model, alone, alone["input_ids"])[0])


def test_text_only_and_rows_without_media(model, inputs):
    text = {"input_ids": torch.randint(20, 90, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    text["mm_token_type_ids"] = torch.zeros(2, 6, dtype=torch.long)
    assert generate(model, text).tolist() == judge(model, text).tolist()
    half = row_of(inputs, 1)
    ids = torch.cat([half["input_ids"], torch.randint(20, 90, half["input_ids"].shape)])
    types = torch.cat([half["mm_token_type_ids"], torch.zeros_like(half["mm_token_type_ids"])])
    half |= {"input_ids": ids, "mm_token_type_ids": types, "attention_mask": torch.ones_like(ids)}
    assert generate(model, half).tolist() == judge(model, half).tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_dict_outputs(tokenizer, inputs, expected, use_cache):
    model = make_model(tokenizer)
    model.set_attn_implementation("eager")
    out = generate(
        model, inputs, use_cache=use_cache, return_dict_in_generate=True, output_scores=True, output_logits=True,
        output_attentions=True, output_hidden_states=True,
    )  # fmt: skip
    N = inputs["input_ids"].shape[1]
    assert out.sequences.tolist() == expected.tolist()
    logits = full_forward(model, inputs, expected)
    for step in range(NEW):
        assert_close(out.logits[step], logits[:, N + step - 1])
        keys = N + step
        queries = 1 if use_cache and step else keys
        assert [a.shape for a in out.attentions[step]] == [(2, HEADS, queries, keys)] * LAYERS
        assert [h.shape for h in out.hidden_states[step]] == [(2, queries, HIDDEN)] * (LAYERS + 1)
        scores = out.logits[step].index_fill(1, torch.tensor(model.generation_config.suppress_tokens), -torch.inf)
        assert torch.equal(out.scores[step], scores)
    if not use_cache:
        assert out.past_key_values is None
        return
    cache = out.past_key_values
    assert isinstance(cache, VideoMemory) and len(cache.layers) == len(cache) == LAYERS
    assert cache.get_seq_length() == N + NEW - 1
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (2, KV_HEADS, N + NEW - 1, HEAD_DIM)
    assert cache.num_video_tokens == [16 // 4 + 32 // 4, 72 // 4]


def test_cross_attentions_of_the_forward_pass(tokenizer, inputs):
    model = make_model(tokenizer)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
    assert [weights.shape for weights in out.cross_attentions] == [
        (2, HEADS, inputs["input_ids"].shape[1], 18)
    ] * LAYERS
    for weights in out.cross_attentions:
        assert not weights[0, ..., 12:].any()  # row 0 has 12 video tokens, the rest is padding
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize("use_cache", [True, False])
def test_samples_follow_the_full_forward(model, inputs, use_cache):
    torch.manual_seed(0)
    out = generate(
        model, inputs, do_sample=True, temperature=3.0, top_k=0, num_return_sequences=3, use_cache=use_cache,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    assert len(set(map(tuple, out.sequences.tolist()))) > 2
    logits = full_forward(model, repeat(inputs, 3), out.sequences)[:, -NEW - 1 : -1]
    assert_close(torch.stack(out.logits, 1), logits)


def sequence_scores(model, inputs, sequences, copies):
    """Mean log-probability of the new tokens of each returned sequence."""
    logits = full_forward(model, repeat(inputs, copies), sequences)[:, -NEW - 1 : -1]
    new = sequences[:, -NEW:].unsqueeze(-1)
    return logits.log_softmax(-1).gather(-1, new).squeeze(-1).sum(1) / NEW


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"do_sample": True}])
def test_beams(model, inputs, options):
    torch.manual_seed(0)
    beams = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 1.0, "top_k": 0}
    out = generate(model, inputs, return_dict_in_generate=True, output_scores=True, **beams, **options)
    assert out.sequences.shape[0] == 4
    torch.testing.assert_close(out.sequences_scores, sequence_scores(model, inputs, out.sequences, 2))
    if options and "do_sample" not in options:
        assert out.sequences.tolist() == generate(model, inputs, **beams).tolist()


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_from_inputs_embeds(model, inputs, with_ids, num_beams):
    expected = generate(model, inputs, num_beams=num_beams)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = inputs | {"inputs_embeds": embeds}
    if not with_ids:
        given.pop("input_ids")
    out = generate(model, given, num_beams=num_beams)
    new = out[:, inputs["input_ids"].shape[1] :] if with_ids else out
    assert new.tolist() == expected[:, inputs["input_ids"].shape[1] :].tolist()


def test_inputs_embeds_win_over_ids(model, inputs):
    other = inputs | {"inputs_embeds": torch.randn(2, inputs["input_ids"].shape[1], HIDDEN)}
    out, N = generate(model, other), inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :N], inputs["input_ids"])
    assert (out[:, N:] != generate(model, inputs)[:, N:]).any(1).all()
    assert generate(model, other, use_cache=False).tolist() == out.tolist()


def test_a_start_typed_0_is_text(model, inputs):
    """One that somebody typed behind those of the media: every row still sees its own."""
    typed = inputs | {"input_ids": inputs["input_ids"].clone()}
    typed["input_ids"][:, -2] = model.config.vision_start_token_id
    logits = model(**typed).logits
    for row in range(2):
        alone = row_of(typed, row)
        torch.testing.assert_close(logits[row : row + 1, -3:], model(**alone).logits[:, -3:], rtol=1e-4, atol=1e-4)
    first = generate(model, typed, max_new_tokens=2, return_dict_in_generate=True)
    seen = first.past_key_values.num_video_tokens
    again = typed | {"input_ids": first.sequences, "past_key_values": first.past_key_values}
    for name in ("attention_mask", "mm_token_type_ids"):  # the next turn comes with all media, of which all are seen
        again[name] = torch.nn.functional.pad(typed[name], (0, 2), value=int(name == "attention_mask"))
    assert generate(model, again, max_new_tokens=1).shape[0] == 2
    assert first.past_key_values.num_video_tokens == seen


@pytest.mark.parametrize("again", ["with the media", "with the grids", "without the media"])
def test_continue_from_past_key_values(model, inputs, expected, again):
    first = generate(model, inputs, max_new_tokens=2, return_dict_in_generate=True)
    grown = first.sequences.shape[1] - inputs["input_ids"].shape[1]
    follow = {"input_ids": first.sequences, "past_key_values": first.past_key_values}
    follow["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, grown), value=1)
    if again != "without the media":
        types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, grown))
        follow = inputs | follow | {"mm_token_type_ids": types}
    if again == "with the grids":
        follow = {name: value for name, value in follow.items() if not name.startswith("pixel")}
    assert generate(model, follow, max_new_tokens=NEW - 2).tolist() == expected.tolist()


def test_grids_of_media_never_seen_need_pixels(model, inputs):
    memory = model(prompt := inputs["input_ids"][:1]).past_key_values
    with pytest.raises(ValueError, match="image_grid_thw came without pixel_values"):
        model(prompt, past_key_values=memory, image_grid_thw=inputs["image_grid_thw"])


@pytest.mark.parametrize("again", ["with the media", "without the media"])
def test_continue_from_inputs_embeds(model, inputs, expected, again):
    embed, N = model.get_input_embeddings(), inputs["input_ids"].shape[1]
    given = inputs | {"inputs_embeds": embed(inputs["input_ids"])}
    given.pop("input_ids")
    first = generate(model, given, max_new_tokens=2, return_dict_in_generate=True)
    embeds = torch.cat([given["inputs_embeds"], embed(first.sequences)], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    follow = {"inputs_embeds": embeds, "attention_mask": mask, "past_key_values": first.past_key_values}
    if again == "with the media":
        given["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 2))
        follow = given | follow
    second = generate(model, follow, max_new_tokens=NEW - 2)
    assert torch.cat([first.sequences, second], 1).tolist() == expected[:, N:].tolist()


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("how", ["other model", "same model", "prompt lookup"])
def test_assisted_decoding(model, tokenizer, inputs, expected, row, how):
    alone = row_of(inputs, row)
    options = {
        "other model": {"assistant_model": make_model(tokenizer, seed=5, layers=2)},
        "same model": {"assistant_model": make_model(tokenizer)},
        "prompt lookup": {"prompt_lookup_num_tokens": 2},
    }[how]
    answer = generate(model, alone, **options)[0, alone["input_ids"].shape[1] :]
    assert answer.tolist() == expected[row, inputs["input_ids"].shape[1] :].tolist()


# --- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_cache_len", [None, 40])
def test_static_cache(model, inputs, expected, max_cache_len):
    N = inputs["input_ids"].shape[1]
    options = {} if max_cache_len is None else {"max_cache_len": max_cache_len}
    out = generate(model, inputs, cache_implementation="static", return_dict_in_generate=True, **options)
    assert out.sequences.tolist() == expected.tolist()
    cache = out.past_key_values
    assert all(isinstance(layer, StaticLayer) for layer in cache.layers) and cache.is_compileable
    assert cache.layers[0].keys.shape == (2, KV_HEADS, max_cache_len or N + NEW - 1, HEAD_DIM)
    other = generate(model, make_inputs(model, seed=7), cache_implementation="static")  # the cache is used again
    assert other.tolist() == judge(model, make_inputs(model, seed=7)).tolist()


def test_static_fork(model, inputs):
    alone = row_of(inputs, 1)
    memory = model.encode_video(alone["pixel_values_videos"], alone["video_grid_thw"])
    question = {"input_ids": alone["input_ids"], "attention_mask": alone["attention_mask"]}
    for _ in range(2):
        out = generate(model, question, past_key_values=memory.fork(max_cache_len=20))
        assert out.tolist() == judge(model, alone).tolist()


def test_compiled(tokenizer, inputs, expected):
    model = make_model(tokenizer)
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    for _ in range(2):
        out = generate(model, inputs, cache_implementation="static", compile_config=config)
        assert out.tolist() == expected.tolist()
    assert model._compiled_call is not None


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunked_prefill(model, inputs, expected, chunk):
    assert generate(model, inputs, prefill_chunk_size=chunk).tolist() == expected.tolist()


def test_quantized_cache(model, inputs, expected):
    pytest.importorskip("optimum.quanto")
    out = generate(model, inputs, cache_implementation="quantized", return_dict_in_generate=True)
    assert out.sequences.shape == expected.shape and out.past_key_values.num_video_tokens == [12, 18]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading needs an accelerator")
def test_offloaded_caches(tokenizer, inputs, expected):
    model = make_model(tokenizer).cuda()
    there = {key: value.cuda() for key, value in inputs.items()}
    for name in ("offloaded", "offloaded_static"):
        # not compiled: transformers' offloading takes a torch.Stream through dynamo, which crashes PyTorch 2.11
        out = generate(model, there, cache_implementation=name, disable_compile=True)
        assert out.tolist() == expected.tolist()
    alone = {key: value.cuda() for key, value in row_of(inputs, 1).items()}
    memory = model.encode_video(alone.pop("pixel_values_videos"), alone.pop("video_grid_thw")).to("cpu")
    out = generate(model, alone, past_key_values=memory.fork())
    assert out.tolist() == judge(make_model(tokenizer), row_of(inputs, 1)).tolist()


# --- streamers and stopping ------------------------------------------------------------------------------------------


def test_streamer(model, inputs):
    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer, alone = Collect(), row_of(inputs, 0)
    out = generate(model, alone, streamer=streamer)
    assert streamer.tokens == out[0].tolist() and streamer.ended


def test_stopping(model, tokenizer, inputs, expected):
    alone, N = row_of(inputs, 1), inputs["input_ids"].shape[1]
    answer = expected[1, N:].tolist()
    word = tokenizer.decode(answer[2])
    stop = next(i for i in range(NEW) if word in tokenizer.decode(answer[: i + 1]))
    out = generate(model, alone, stop_strings=[word], tokenizer=tokenizer)
    assert out[0, alone["input_ids"].shape[1] :].tolist() == answer[: stop + 1]
    out = generate(model, alone, eos_token_id=answer[1])
    assert out[0, alone["input_ids"].shape[1] :].tolist() == answer[: answer.index(answer[1]) + 1]

    class AfterTwo(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= N + 2)

    out = generate(model, inputs, stopping_criteria=StoppingCriteriaList([AfterTwo()]))
    assert out.tolist() == expected[:, : N + 2].tolist()


# --- the video memory ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def video(model, inputs):
    return row_of(inputs, 1)


@pytest.fixture
def memory(model, video):
    return model.encode_video(video["pixel_values_videos"], video["video_grid_thw"])


def questions(count, length=6):
    ids = torch.randint(20, 90, (count, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row in range(1, count):
        mask[row, : row % 3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def about(question, row, video):
    """One question by itself with the video, for the judge; a single row owns all media whatever its text says."""
    kept = question["attention_mask"][row].bool()
    ids = question["input_ids"][row : row + 1, kept]
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": torch.zeros_like(ids)}
    return alone | {key: video[key] for key in ("pixel_values_videos", "video_grid_thw")}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}])
def test_many_questions_about_one_memory(model, memory, video, options):
    asked = questions(4)
    out = generate(model, asked, past_key_values=memory.fork(), **options)
    copies = options.get("num_return_sequences", 1)
    for row in range(4):
        alone = about(asked, row, video)
        single = generate(model, alone, **options)[:, -NEW:]
        assert out[row * copies : (row + 1) * copies, -NEW:].tolist() == single.tolist()
        if not options:
            assert single.tolist() == judge(model, alone)[:, -NEW:].tolist()
    assert memory.get_seq_length() == 0 and memory.num_video_rows == 1


def test_beams_over_a_memory_of_many_rows(model, inputs):
    rows = [row_of(inputs, 1), row_of(make_inputs(model, seed=9), 1)]
    memory = model.encode_video(
        torch.cat([row["pixel_values_videos"] for row in rows]),
        torch.cat([row["video_grid_thw"] for row in rows]),
        rows=[0, 1],
    )
    asked = questions(2)
    for options in ({"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 2, "num_beams": 2}):
        out = generate(model, asked, past_key_values=memory.fork(), **options)
        for row in range(2):
            single = generate(model, about(asked, row, rows[row]), **options)
            assert out[2 * row : 2 * row + 2, -NEW:].tolist() == single[:, -NEW:].tolist()


def test_forks_are_independent(model, memory, video):
    asked = questions(1)
    expected = judge(model, about(asked, 0, video)).tolist()
    first = memory.fork()
    assert generate(model, asked, past_key_values=first).tolist() == expected
    second = first.fork()  # carries the text on
    more = video["pixel_values_videos"].flip(0)
    model.encode_video(more, video["video_grid_thw"], memory=second)
    assert (memory.num_video_tokens, first.num_video_tokens, second.num_video_tokens) == ([18], [18], [36])
    assert first.get_seq_length() == second.get_seq_length() == 6 + NEW - 1
    assert generate(model, asked, past_key_values=memory.fork()).tolist() == expected
    assert generate(model, asked, past_key_values=memory.fork(), num_beams=2).shape[0] == 1
    both = {key: torch.cat([video[key]] * 2) for key in ("video_grid_thw",)}
    both["pixel_values_videos"] = torch.cat([video["pixel_values_videos"], more])
    longer = generate(
        model, asked, past_key_values=model.encode_video(more, video["video_grid_thw"], memory=memory.fork())
    )
    assert longer.tolist() == judge(model, about(asked, 0, both)).tolist() != expected


@pytest.mark.parametrize("with_text", [False, True])
def test_save_load_then_ask(model, memory, video, tmp_path, with_text):
    asked = questions(1)
    expected = judge(model, about(asked, 0, video))
    if with_text:
        generate(model, asked, past_key_values=memory, max_new_tokens=2)
        asked = {"input_ids": expected[:, :-3], "attention_mask": torch.ones_like(expected[:, :-3])}
    memory.save(tmp_path / "memory.safetensors")
    loaded = VideoMemory.load(tmp_path / "memory.safetensors")
    assert loaded.get_seq_length() == memory.get_seq_length() == (7 if with_text else 0)
    out = generate(model, asked, past_key_values=loaded, max_new_tokens=expected.shape[1] - asked["input_ids"].shape[1])
    assert out.tolist() == expected.tolist()


def second_turn(model, first_out, follow):
    """The ids of both turns with what belongs to them."""
    ids = torch.cat([first_out.sequences, torch.tensor([follow])], 1)
    types = 2 * (ids == model.config.vision_start_token_id)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}


@pytest.mark.parametrize("media_again", [True, False])
def test_second_turn_with_the_cache_of_the_first(model, video, media_again):
    out = generate(model, video, return_dict_in_generate=True)
    second = second_turn(model, out, [40, 41, 42, 43])
    media = {key: video[key] for key in ("pixel_values_videos", "video_grid_thw")}
    given = second | (media if media_again else {})
    again = generate(model, given, past_key_values=out.past_key_values, return_dict_in_generate=True)
    assert again.sequences.tolist() == judge(model, second | media).tolist()
    assert again.past_key_values.num_video_tokens == [18]


def test_many_questions_about_a_memory_that_holds_a_turn(model, memory, video):
    first = model.generate(questions(1)["input_ids"], past_key_values=memory, max_new_tokens=3, do_sample=False)
    asked = torch.cat([torch.cat([first, follow], 1) for follow in questions(3, length=4)["input_ids"].split(1)])
    options = {"max_new_tokens": NEW, "do_sample": False}
    alone = [model.generate(row, past_key_values=memory.fork(), **options) for row in asked.split(1)]
    assert torch.equal(model.generate(asked, past_key_values=memory.fork(), **options), torch.cat(alone))
    twice = model.generate(asked, past_key_values=memory.fork(), **options, num_beams=2, num_return_sequences=2)
    assert twice.shape[0] == 6
    forked = memory.fork()
    new = asked[:, memory.get_seq_length() :]
    last = model(new, past_key_values=forked).logits[:, -1].argmax(-1)  # the plain forward pass does it as well
    assert torch.equal(last, torch.cat(alone)[:, asked.shape[1]]) and memory.layers[0].keys.shape[0] == 1
    with pytest.raises(ValueError, match="holds 3 rows of text and is asked by 2"):
        model(new[:2], past_key_values=forked)


@pytest.mark.parametrize("given", ["all media again", "the new ones", "the new ones, no types"])
def test_a_new_video_in_the_second_turn(model, video, given):
    """Text in the cache has not seen it, all later text sees both; judged by forward passes over a memory."""
    out = generate(model, video, return_dict_in_generate=True)
    marks = [model.config.vision_start_token_id, model.config.vision_end_token_id]
    second = second_turn(model, out, [40, *marks, 42, 43])
    pixels, grid = torch.randn(32, 96, generator=torch.Generator().manual_seed(4)), torch.tensor([[2, 4, 4]])
    memory = model.encode_video(video["pixel_values_videos"], video["video_grid_thw"])
    sequences, seen = second["input_ids"], out.sequences.shape[1] - 1
    with torch.no_grad():
        model(input_ids=sequences[:, :seen], past_key_values=memory)
        memory = model.encode_video(pixels, grid, memory=memory)
        for _ in range(NEW):
            fork = memory.fork()
            logits = model(input_ids=sequences[:, seen:], past_key_values=fork).logits[:, -1]
            logits[:, model.generation_config.suppress_tokens] = -torch.inf
            sequences = torch.cat([sequences, logits.argmax(-1, keepdim=True)], 1)
    old = (
        [video["pixel_values_videos"], video["video_grid_thw"]]
        if given == "all media again"
        else [pixels[:0], grid[:0]]
    )
    second |= {"pixel_values_videos": torch.cat([old[0], pixels]), "video_grid_thw": torch.cat([old[1], grid])}
    if given == "the new ones, no types":
        second.pop("mm_token_type_ids")
    again = generate(model, second, past_key_values=out.past_key_values, return_dict_in_generate=True)
    assert again.sequences.tolist() == sequences.tolist()
    assert again.past_key_values.num_video_tokens == [18 + 8]


def test_a_memory_of_another_model_is_refused(model, tokenizer, memory):
    other = make_model(tokenizer, layers=2)
    with pytest.raises(ValueError, match="encode the video with the model that is asked"):
        generate(other, questions(1), past_key_values=memory)
    many = model.encode_video(torch.randn(48, 96), torch.tensor([[1, 4, 4]] * 3), rows=[0, 1, 2])
    with pytest.raises(ValueError, match="has 3 rows and the text 2"):
        generate(model, questions(2), past_key_values=many)
