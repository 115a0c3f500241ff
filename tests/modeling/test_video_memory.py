"""The video memory: split encoding, forks, rows, files, and what it refuses."""

import contextlib
import copy
import pickle

import pytest
import torch
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from vamba.modeling import VideoMemory
from vamba.modeling.media import copy_to_gpu
from vamba.modeling.video_levels import FP8, LevelStore, VideoLevel

from tiny_vamba import media, prompt, tiny_config, tiny_model


VIDEO = (9, 4, 6)  # 9 temporal patches of 6 tokens


@pytest.fixture
def memory(model):
    return model.encode_video(*media(VIDEO))


def logits(model, ids, memory, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=memory, use_cache=True, **kwargs).logits


def assert_same(a: VideoMemory, b: VideoMemory, tolerance=1e-5):
    assert a.media == b.media and a.video_length == b.video_length
    for layer in range(3):
        for x, y in zip(a.video_key_values(layer), b.video_key_values(layer)):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
    for x, y in zip(a.states, b.states):
        for p, q in zip(x, y):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def test_it_is_a_cache_whose_length_is_the_text(model, memory):
    assert isinstance(memory, Cache) and memory.get_seq_length() == 0 and memory.video_length == 54
    logits(model, prompt(5), memory)
    assert memory.get_seq_length() == 5 and memory.video_length == 54


@pytest.mark.parametrize("cuts", [(1,) * 9, (4, 5), (8, 1), (2, 3, 4)])
@pytest.mark.parametrize("positions", [False, True])
def test_any_split_of_the_frames_gives_the_same(cuts, positions):
    model = tiny_model(cross_attn_use_position_embeddings=positions, cross_attn_use_layer_norm=positions)
    pixels, grid = media(VIDEO)
    whole, pieces = model.encode_video(pixels, grid), None
    for part, t in zip(pixels.split([t * 24 for t in cuts]), cuts):
        pieces = model.encode_video(part, torch.tensor([[t, 4, 6]]), memory=pieces)
    assert_same(pieces, whole)
    torch.testing.assert_close(logits(model, prompt(7), pieces), logits(model, prompt(7), whole), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("fails_at", [0, 4])
def test_an_error_leaves_a_memory_as_it_was(model, monkeypatch, error, fails_at):
    pixels, grid = media(VIDEO)
    whole = model.encode_video(pixels, grid)
    memory = model.encode_video(pixels[:96], torch.tensor([[4, 4, 6]]), chunk_frames=2)
    before = logits(model, prompt(7), memory.fork())
    calls, forward = iter(range(100)), type(model.model.video_encoder.levels[1]).forward

    def fail(self, *args):  # in the middle of the layers
        if self is model.model.video_encoder.levels[1] and next(calls) == fails_at:
            raise error("no")
        return forward(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(type(model.model.video_encoder.levels[1]), "forward", fail)
        with pytest.raises(error):
            model.encode_video(pixels[96:], torch.tensor([[5, 4, 6]]), memory=memory, chunk_frames=2)
    assert memory.video_length == 24 and memory.media == [[["video", 4, 4, 6]]]
    assert torch.equal(logits(model, prompt(7), memory.fork()), before)
    assert_same(model.encode_video(pixels[96:], torch.tensor([[5, 4, 6]]), memory=memory), whole)


@pytest.mark.parametrize("chunk_frames", [1, 2, 6, 1000])
def test_chunks_give_the_same(model, memory, chunk_frames):
    assert_same(model.encode_video(*media(VIDEO), chunk_frames=chunk_frames), memory)


def test_a_second_video_is_appended_as_in_one_go():
    model = tiny_model(cross_attn_use_position_embeddings=True)
    pixels, grid = media(VIDEO, (2, 8, 4))
    memory = model.encode_video(pixels[:216], grid[:1])
    memory = model.encode_video(pixels[216:], grid[1:], memory=memory)
    assert_same(memory, model.encode_video(pixels, grid))
    same_size, _ = media(VIDEO, VIDEO)
    memory = model.encode_video(same_size[:216], grid[:1])
    memory = model.encode_video(same_size[216:], grid[:1], memory=memory, continue_video=False)
    assert_same(memory, model.encode_video(same_size, torch.tensor([VIDEO, VIDEO])))
    with pytest.raises(ValueError, match="cannot continue"):
        model.encode_video(pixels[216:], grid[1:], memory=memory, continue_video=True)


def test_rows_are_encoded_apart(model):
    pixels, grid = media(VIDEO, (2, 4, 6), (3, 4, 4))
    memory = model.encode_video(pixels, grid, rows=[1, 0, 1], chunk_frames=4)
    assert memory.num_video_tokens == [12, 54 + 12]
    first = model.encode_video(pixels[216:264], grid[1:2])
    second = model.encode_video(torch.cat([pixels[:216], pixels[264:]]), grid[[0, 2]])
    together = logits(model, torch.cat([prompt(6), prompt(6, seed=1)]), memory)
    torch.testing.assert_close(together[:1], logits(model, prompt(6), first), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[1:], logits(model, prompt(6, seed=1), second), rtol=1e-5, atol=1e-5)


def test_forks_share_the_video_and_nothing_else(model, memory):
    before = logits(model, prompt(4), memory.fork())
    fork = memory.fork()
    assert fork.video_key_values(0)[0].data_ptr() == memory.video_key_values(0)[0].data_ptr()
    logits(model, prompt(4), fork)
    model.encode_video(*media((2, 4, 6), seed=3), memory=fork)
    assert (memory.get_seq_length(), memory.video_length, memory.media) == (0, 54, [[["video", *VIDEO]]])
    assert (fork.get_seq_length(), fork.video_length, fork.media) == (4, 66, [[["video", 11, 4, 6]]])
    torch.testing.assert_close(logits(model, prompt(4), memory.fork()), before, rtol=0, atol=0)


def test_a_fork_of_a_conversation_continues_it(model, memory):
    logits(model, prompt(4), memory)
    fork = memory.fork()
    a, b = logits(model, prompt(3, seed=1), fork), logits(model, prompt(3, seed=1), memory)
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert memory.get_seq_length() == fork.get_seq_length() == 7


def test_a_static_fork_gives_the_same(model, memory):
    mask = torch.ones(1, 5, dtype=torch.long)
    static = model.generate(
        prompt(5), attention_mask=mask, past_key_values=memory.fork(max_cache_len=32), max_new_tokens=6
    )
    assert torch.equal(
        static, model.generate(prompt(5), attention_mask=mask, past_key_values=memory.fork(), max_new_tokens=6)
    )
    logits(model, prompt(2), memory)
    with pytest.raises(ValueError, match="without text, not 2"):
        memory.fork(max_cache_len=32)


def test_rows_of_text_share_one_video(model, memory):
    ids = torch.cat([prompt(6, seed=seed) for seed in range(3)])
    together = logits(model, ids, memory.fork())
    for row in range(3):
        torch.testing.assert_close(
            together[row : row + 1], logits(model, ids[row : row + 1], memory.fork()), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("operation", ["reorder", "select", "mask", "repeat"])
def test_row_operations_equal_indexing(model, operation):
    pixels, grid = media(VIDEO, (2, 4, 6), (3, 4, 4))
    ids, next_ids = (torch.cat([prompt(n, seed=seed) for seed in range(3)]) for n in (5, 1))
    memory = model.encode_video(pixels, grid, rows=[0, 1, 2])
    full = logits(model, ids, memory)
    full = logits(model, next_ids, memory.fork())
    rows = {"reorder": [2, 0, 0], "select": [1], "mask": [0, 2], "repeat": [0, 0, 1, 1, 2, 2]}[operation]
    if operation == "reorder":
        memory.reorder_cache(torch.tensor(rows))
    elif operation == "select":
        memory.batch_select_indices(torch.tensor(rows))
    elif operation == "mask":
        memory.batch_select_indices(torch.tensor([True, False, True]))
    else:
        memory.batch_repeat_interleave(2)
    torch.testing.assert_close(logits(model, next_ids[rows], memory), full[rows], rtol=1e-5, atol=1e-5)


def test_saved_and_loaded_it_answers_the_same(model, tmp_path):
    pixels, grid = media(VIDEO, (2, 4, 6))
    memory = model.encode_video(pixels, grid, rows=[0, 1])
    logits(model, torch.cat([prompt(3), prompt(3, seed=1)]), memory)
    memory.save(tmp_path / "talk.safetensors")
    loaded = VideoMemory.load(tmp_path / "talk.safetensors")
    assert_same(loaded, memory, tolerance=0)
    assert [p.name for p in tmp_path.iterdir()] == ["talk.safetensors"]
    ids = torch.cat([prompt(2, seed=2), prompt(2, seed=3)])
    torch.testing.assert_close(logits(model, ids, loaded), logits(model, ids, memory), rtol=0, atol=0)
    more = media((2, 4, 6), seed=9)
    a, b = (model.encode_video(*more, memory=m, rows=[1]) for m in (loaded, memory))
    assert_same(a, b, tolerance=0)


def test_loading_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        VideoMemory.load(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(ValueError, match="damaged or no safetensors"):
        VideoMemory.load(tmp_path / "text.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no memory"):
        VideoMemory.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "options, match",
    [
        ({"video_dtype": torch.int8}, "not kept in torch.int8; give one of torch.bfloat16"),
        ({"video_dtype": "int8"}, "not kept in 'int8'"),
        ({"video_dtype": 8}, "not kept in 8"),
        ({"video_device": "tpu"}, "device='tpu' cannot be used"),
        ({"video_device": "meta"}, "device='meta' cannot be used"),
        ({"video_device": 1.5}, "device=1.5 cannot be used"),
        ({"max_cache_len": -1}, "max_cache_len is -1; give the tokens"),
        ({"max_cache_len": 10**15}, "max_cache_len is 1000000000000000"),
        ({"max_cache_len": "x"}, "max_cache_len is 'x'"),
        ({"text_cache": "x"}, "text_cache is a str"),
    ],
)
def test_arguments_that_make_no_sense(memory, options, match):
    with pytest.raises(ValueError, match=match):
        VideoMemory(tiny_config(), **options)
    if "max_cache_len" in options:
        with pytest.raises(ValueError, match=match):
            memory.fork(**options)
    elif "text_cache" not in options:
        with pytest.raises(ValueError, match=match):
            memory.to(**{name.removeprefix("video_"): value for name, value in options.items()})
    for tokens in (-1, "x", 1.5, None):
        with pytest.raises(ValueError, match="needs a number of tokens"):
            memory.reserve(tokens)


def test_what_is_reserved_is_bounded_by_free_memory(model):
    pixels, grid = media(VIDEO)
    memory = VideoMemory(model.config)
    memory.reserve(10**15)
    first = model.encode_video(pixels[:120], torch.tensor([[5, 4, 6]]), memory=memory)
    assert 0 < memory.expected_length < 10**12
    assert_same(
        model.encode_video(pixels[120:], torch.tensor([[4, 4, 6]]), memory=first), model.encode_video(pixels, grid)
    )


def test_without_room_for_what_is_expected_a_buffer_grows():
    store, level = LevelStore(), VideoLevel(*torch.randn(2, 1, 2, 3, 4))
    for _ in range(3):
        store.append(level, expected=2**60)
    assert store.length == 9 and torch.equal(store.read().keys_BHMP, torch.cat([level.keys_BHMP] * 3, dim=2))


def test_another_models_memory_is_refused(memory):
    other = tiny_model(num_key_value_heads=4)
    with pytest.raises(ValueError, match=r"\(3, 2, 16\), the model \(3, 4, 16\)"):
        logits(other, prompt(3), memory)


def test_a_wrong_number_of_rows_is_refused(model):
    memory = model.encode_video(*media(VIDEO, VIDEO), rows=[0, 1])
    with pytest.raises(ValueError, match="2 rows and the text 3"):
        logits(model, torch.cat([prompt(3)] * 3), memory)
    with pytest.raises(ValueError, match=r"rows=\[0\] for 2 videos"):
        model.encode_video(*media(VIDEO, VIDEO), rows=[0])


def test_reset_forgets_all(model, memory):
    logits(model, prompt(4), memory)
    memory.reset()
    assert (memory.get_seq_length(), memory.video_length, memory.states) == (0, 0, [None, None])
    torch.testing.assert_close(logits(model, prompt(4), memory), logits(model, prompt(4), None), rtol=0, atol=0)


def test_a_plain_cache_is_taken_over(model):
    cache = DynamicCache(config=tiny_config())
    pixels, grid = media(VIDEO)
    with torch.no_grad():
        out = model(prompt(4), pixel_values_videos=pixels, video_grid_thw=grid, past_key_values=cache, use_cache=True)
    assert isinstance(out.past_key_values, VideoMemory) and cache.get_seq_length() == 4
    assert out.past_key_values.video_nbytes == model.encode_video(pixels, grid).video_nbytes > 54 * 3 * 2 * 32 * 4


def test_it_is_of_the_kind_of_its_text_cache(model, memory):
    assert isinstance(memory, DynamicCache) and not isinstance(memory, StaticCache)
    fork = memory.fork(max_cache_len=16)
    assert isinstance(fork, VideoMemory) and isinstance(fork, StaticCache) and not isinstance(fork, DynamicCache)
    output = model.generate(
        prompt(4), max_new_tokens=3, cache_implementation="static", return_dict_in_generate=True, do_sample=False
    )
    assert isinstance(output.past_key_values, StaticCache) and isinstance(output.past_key_values, VideoMemory)


@pytest.mark.parametrize("max_cache_len", [None, 16])
@pytest.mark.parametrize("copy", [copy.deepcopy, lambda memory: pickle.loads(pickle.dumps(memory))])
def test_copies_and_pickles_answer_the_same(model, memory, copy, max_cache_len):
    original = memory.fork(max_cache_len)
    logits(model, prompt(4), original)
    twin = copy(original)
    assert type(twin) is type(original)
    a, b = logits(model, prompt(2, seed=1), twin), logits(model, prompt(2, seed=1), original)
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_memory_of_another_dtype_is_refused(memory):
    with pytest.raises(ValueError, match="torch.float32, the text in torch.bfloat16"):
        logits(tiny_model().bfloat16(), prompt(3), memory)


def test_frames_may_follow_an_answer_decoded_with_unrotated_keys():
    """As checkpoints converted from the original decode: what is appended afterwards must not mix with those keys."""
    model = tiny_model(cross_attn_use_position_embeddings=True)
    pixels, grid = media(VIDEO)
    memory = model.encode_video(pixels[:120], torch.tensor([[5, 4, 6]]))
    model.generation_config.unrotate_video_keys = True
    model.generate(prompt(4), past_key_values=memory, max_new_tokens=3, do_sample=False)
    assert memory.keys_are(rotated=False)
    model.encode_video(pixels[120:], torch.tensor([[4, 4, 6]]), memory=memory)
    assert memory.keys_are(rotated=True)
    assert_same(memory, model.encode_video(pixels, grid))


def test_text_alone_and_what_follows_a_reset_with_unrotated_keys():
    model = tiny_model(cross_attn_use_position_embeddings=True)
    pixels, grid = media(VIDEO)
    plain = model.generate(prompt(5), max_new_tokens=3, do_sample=False)
    model.generation_config.unrotate_video_keys = True
    assert torch.equal(model.generate(prompt(5), max_new_tokens=3, do_sample=False), plain)
    memory = model.encode_video(pixels, grid)
    model.generate(prompt(4), past_key_values=memory, max_new_tokens=3, do_sample=False)
    memory.reset()
    assert_same(model.encode_video(pixels, grid, memory=memory), model.encode_video(pixels, grid))


def test_an_error_while_keys_are_rotated_leaves_none_that_would_be_read_wrongly(tmp_path):
    model = tiny_model(cross_attn_use_position_embeddings=True)
    memory = model.encode_video(*media(VIDEO))
    expected = model.encode_video(*media(VIDEO))
    calls = iter(range(100))

    def fail(module, args, output):  # at the second layer
        if next(calls) == 1:
            raise torch.OutOfMemoryError("no")

    hook = model.model.language_model.rotary_emb.register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        model.model._rotate_video_keys(memory, False)
    hook.remove()
    assert not memory.keys_are(rotated=False) and not memory.keys_are(rotated=True)
    memory.save(tmp_path / "half.safetensors")
    for half in (memory, memory.fork(), VideoMemory.load(tmp_path / "half.safetensors")):
        torch.testing.assert_close(logits(model, prompt(4), half), logits(model, prompt(4), expected.fork()))
        assert half.keys_are(rotated=True)


def test_fp8_keeps_four_bits_of_every_number():
    keys = torch.randn(2, 3, 50, 32) * torch.logspace(-6, 6, 50).view(1, 1, 50, 1)
    keys[0, 0, 7] = 0
    level = VideoLevel(keys, -keys).stored_as(FP8)
    assert level.keys_BHMP.dtype == FP8 and level.key_scales_BHM.shape == (2, 3, 50)
    back = level.stored_as(torch.float32)
    largest = keys.abs().amax(-1, keepdim=True)
    assert ((back.keys_BHMP - keys).abs() <= keys.abs() / 16 + largest * 2**-17).all()
    assert torch.equal(back.values_BHMP, -back.keys_BHMP)
    assert torch.equal(level.stored_as(torch.bfloat16).keys_BHMP.float(), back.keys_BHMP)  # has room for them
    again = back.stored_as(FP8).stored_as(torch.float32)
    assert torch.equal(again.keys_BHMP, back.keys_BHMP)  # what fp8 holds it holds exactly


def test_fp8_memory_takes_half_the_bytes_and_gives_nearly_the_same(model, memory, tmp_path):
    exact = logits(model, prompt(7), memory.fork())
    before = sum(t.nbytes for t in memory.level(0)[:2])
    small = memory.fork().to(dtype=FP8)
    assert memory.level(0).keys_BHMP.dtype == torch.float32  # forks keep theirs
    level = small.level(0)
    assert sum(t.nbytes for t in level) == before / 4 * (1 + 1 / 16)  # a quarter of float32, and a scale for 16 numbers
    rounded = logits(model, prompt(7), small.fork())
    divergence = torch.nn.functional.kl_div(
        rounded.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="sum"
    )
    assert 0 < divergence < 7e-3
    small.save(tmp_path / "small.safetensors")
    loaded = VideoMemory.load(tmp_path / "small.safetensors")
    assert torch.equal(logits(model, prompt(7), loaded), rounded)
    back = small.fork().to(dtype=torch.float32)
    assert_same(back, small)
    torch.testing.assert_close(logits(model, prompt(7), back), rounded)


@pytest.mark.parametrize("positions", [False, True])
def test_video_is_encoded_and_appended_in_fp8(positions):
    model = tiny_model(cross_attn_use_position_embeddings=positions)
    pixels, grid = media(VIDEO)
    whole = model.encode_video(pixels, grid).to(dtype=FP8)
    pieces = model.encode_video(
        pixels[:96], torch.tensor([[4, 4, 6]]), memory=VideoMemory(model.config, video_dtype=FP8)
    )
    pieces = model.encode_video(pixels[96:], torch.tensor([[5, 4, 6]]), memory=pieces)
    assert pieces.video_dtype == FP8 and pieces.level(1).values_BHMP.dtype == FP8
    assert_same(pieces, whole, tolerance=0.1)  # a rounding error may decide how a number is rounded
    generated = model.generate(prompt(5), past_key_values=pieces, max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 8)


def test_frames_in_another_dtype_are_refused(model, memory, tmp_path):
    memory.save(tmp_path / "m.safetensors")
    loaded = VideoMemory.load(tmp_path / "m.safetensors")
    other = tiny_model().bfloat16()
    with pytest.raises(ValueError, match="float32, the new frames in torch.bfloat16"):
        other.encode_video(*media((1, 4, 6)), memory=loaded)
    with torch.autocast("cpu", torch.bfloat16):  # which casts what it likes
        assert model.encode_video(*media((1, 4, 6)), memory=memory).video_length == 60


def test_the_mask_stays_where_it_was_asked_for(model):
    memory = model.encode_video(*media((2, 4, 6), (1, 4, 6)), rows=[0, 1])
    expected = memory.video_mask()
    assert expected.sum(1).tolist() == [12, 6] and memory.fork().video_mask() is expected
    assert memory.video_mask(torch.device("meta")) is memory.video_mask() is memory.fork().video_mask()
    assert memory.video_mask().is_meta


@pytest.mark.parametrize("room", [5, 8])
def test_a_copy_of_a_buffer_is_whole(room):
    whole = torch.randn(2, 3, room, 4)
    for t in (whole[:, :, :5], whole[:, :, :5, 0], whole[:, :, :5].transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(copy_to_gpu(t, torch.device("cpu")), t)


def test_a_static_cache_that_is_too_short_is_said_to_be(model, memory):
    ids = prompt(5)
    for new, said in ((6, None), (7, "room for 10 tokens, and this is token 11: make it longer with max_cache_len")):
        context = pytest.raises(ValueError, match=said) if said else contextlib.nullcontext()
        with context:
            model.generate(ids, past_key_values=memory.fork(max_cache_len=10), max_new_tokens=new, do_sample=False)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_what_a_static_cache_cannot_do_says_what_can(model, memory, options):
    static, greedy = memory.fork(max_cache_len=32), {"max_new_tokens": 3, "do_sample": False}
    first = model.generate(prompt(5), past_key_values=static, **greedy)
    with pytest.raises(ValueError, match=r"fork\(\) without max_cache_len"):
        model.generate(torch.cat([first, prompt(2)], 1), past_key_values=static, **greedy, **options)


def test_a_memory_for_another_dtype_is_refused_in_fp8_too(model, memory):
    with pytest.raises(ValueError, match="float32.*load the model in that dtype"):
        memory.to(dtype=FP8).check(model.config.text_config, 1, torch.bfloat16)
