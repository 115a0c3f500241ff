"""The memory of Video-Ma2mba: a prefix that can be forked, extended, saved, and asked by `generate`."""

import copy
import os
import pickle

import pytest
import torch
from transformers import DynamicCache

from vamba.modeling import StateMemory, VideoMemory
from vamba.modeling.memory_files import write_memory

from tiny_video_ma2mba import END, START, image, prompt, tiny_model, video


CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def states_equal(one: StateMemory, other: StateMemory) -> bool:
    return all(torch.equal(a, b) for x, y in zip(one.states, other.states) for a, b in zip(x, y))


# --- watching --------------------------------------------------------------------------------------------------------


def test_frames_appended_continue_the_video(model):
    given, ids = video(7), prompt(6, 1)
    patches = given["pixel_values_videos"].view(7, -1, 48)
    memory = None
    for part in patches.split([1, 3, 3]):
        memory = model.encode_video(part.flatten(0, 1), torch.tensor([[len(part), 4, 4]]), memory=memory)
    assert memory.media == [[["video", 7, 4, 4]]] and memory.get_seq_length() == 1 and memory.video_length == 28
    expected = model.generate(ids, **given, **GREEDY)
    assert torch.equal(model.generate(ids, past_key_values=memory.fork(), **GREEDY), expected)


def test_a_second_video_is_a_second_item(model):
    first, second, ids = video(3, seed=1), video(2, seed=2), prompt(6, 2)
    memory = model.encode_video(**first)
    memory = model.encode_video(**second, memory=memory, continue_video=False)
    assert memory.media == [[["video", 3, 4, 4], ["video", 2, 4, 4]]] and memory.get_seq_length() == 3
    both = {"pixel_values_videos": torch.cat([first["pixel_values_videos"], second["pixel_values_videos"]])}
    both["video_grid_thw"] = torch.cat([first["video_grid_thw"], second["video_grid_thw"]])
    expected = model.generate(ids, **both, **GREEDY)
    assert torch.equal(model.generate(ids, past_key_values=memory.fork(), **GREEDY), expected)
    # all media may come again with the prompt: those that were seen are passed over
    memory = model.encode_video(**first)
    assert torch.equal(model.generate(ids, past_key_values=memory.fork(), **both, **GREEDY), expected)
    assert torch.equal(model.generate(ids, past_key_values=memory.fork(), **second, **GREEDY), expected)


def test_a_conversation_goes_on_and_sees_another_clip(model):
    """Question, answer, a further clip and a further question: one stream, read once."""
    first, second = video(3, seed=1), video(2, seed=2)
    memory = model.encode_video(**first)
    said = model.generate(prompt(5, 1), past_key_values=memory, **GREEDY)
    more = torch.cat([said, torch.tensor([[START, END]]), prompt(4, seed=3)], 1)
    answer = model.generate(more, past_key_values=memory, **second, **GREEDY)
    both = {name: torch.cat([first[name], second[name]]) for name in first}
    assert torch.equal(answer, model.generate(more, **both, **GREEDY))
    assert [t for _, t, *_ in memory.media[0]] == [3, 2]
    with pytest.raises(ValueError, match="no video to continue"):
        model.encode_video(**first, memory=memory, continue_video=True)
    model.encode_video(**second, memory=memory)  # of its own accord it is another video
    assert len(memory.media[0]) == 3


def test_rows_may_have_seen_more_or_less(model):
    given = video(2, 3, 1)
    memory = model.encode_video(**given, rows=[1, 0, 1])
    assert [[t for _, t, *_ in row] for row in memory.media] == [[3], [2, 1]] and memory.get_seq_length() == 1
    rows = [prompt(4, 1, seed=1), prompt(4, 2, seed=2)]
    alone = [
        model.generate(rows[0], **pick(given, [1]), **GREEDY),
        model.generate(rows[1], **pick(given, [0, 2]), **GREEDY),
    ]
    ids = torch.zeros(2, 8, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, 8 - row.shape[1] :], mask[index, 8 - row.shape[1] :] = row[0], 1
    answers = model.generate(ids, attention_mask=mask, past_key_values=memory.fork(), **GREEDY)
    for index, expected in enumerate(alone):
        assert torch.equal(answers[index, 8:], expected[0, -6:])
    # prompts of equal length, which need no mask
    rows[0] = prompt(6, 1, seed=1)
    answers = model.generate(torch.cat(rows), past_key_values=memory.fork(), **GREEDY)
    assert torch.equal(answers[0, 8:], model.generate(rows[0], **pick(given, [1]), **GREEDY)[0, 8:])
    assert torch.equal(answers[1, 8:], alone[1][0, 8:])


def pick(given: dict, items: list[int]) -> dict:
    """Some of the videos."""
    parts = given["pixel_values_videos"].split((given["video_grid_thw"].prod(1)).tolist())
    return {
        "pixel_values_videos": torch.cat([parts[index] for index in items]),
        "video_grid_thw": given["video_grid_thw"][items],
    }


def test_many_questions_about_one_video(model):
    given, questions = video(4), [prompt(n, 1, seed=n) for n in (3, 7, 5)]
    memory = model.encode_video(**given)
    length = max(row.shape[1] for row in questions)
    ids, mask = torch.full((3, length), 77), torch.zeros(3, length, dtype=torch.long)
    for index, row in enumerate(questions):
        ids[index, length - row.shape[1] :], mask[index, length - row.shape[1] :] = row[0], 1
    answers = model.generate(ids, attention_mask=mask, past_key_values=memory.fork(), **GREEDY)
    for index, row in enumerate(questions):
        assert torch.equal(answers[index, length:], model.generate(row, **given, **GREEDY)[0, -6:])
    assert memory.batch_size == 1 and memory.get_seq_length() == 1


# --- generation ------------------------------------------------------------------------------------------------------


def full_forward(model, ids, given, steps=6):
    for _ in range(steps):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, **given).logits[:, -1:].argmax(-1)], 1)
    return ids


def test_generation_is_the_full_forward_pass_repeated(model):
    for ids, given in ((prompt(5, 1), video(4)), (prompt(5), {}), (prompt(2, 2), video(1, 3)), (prompt(1, 1), image())):
        expected = full_forward(model, ids, given)
        assert torch.equal(model.generate(ids, **given, **GREEDY), expected)
        assert torch.equal(model.generate(ids, **given, **GREEDY, use_cache=False), expected)
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model.generate(inputs_embeds=embeds, **given, **GREEDY), expected[:, ids.shape[1] :])


@pytest.mark.parametrize("items", [0, 1])
@pytest.mark.parametrize("beams", [1, 2])
def test_hidden_states_are_those_of_the_whole_prompt(model, items, beams):
    ids, given = prompt(5, items), video(4) if items else {}
    options = {"output_hidden_states": True, "return_dict_in_generate": True, "num_beams": beams}
    first, second = model.generate(ids, **given, **GREEDY | {"max_new_tokens": 2}, **options).hidden_states
    expected = model(ids, **given, output_hidden_states=True).hidden_states
    assert len(first) == len(expected) and second[0].shape == (beams, 1, 32)
    for level, wanted in zip(first, expected):
        torch.testing.assert_close(level, wanted.expand(beams, -1, -1), **CLOSE)


@pytest.mark.parametrize("items", [0, 1])
def test_continuing_with_grids_but_no_pixels(model, items):
    ids, given = prompt(5, items), video(4) if items else {}
    expected = model.generate(ids, **given, **GREEDY)
    part = model.generate(ids, **given, **GREEDY | {"max_new_tokens": 3}, return_dict_in_generate=True)
    given.pop("pixel_values_videos", None)
    memory = part.past_key_values
    assert torch.equal(model.generate(part.sequences, past_key_values=memory.fork(), **given, max_new_tokens=3,
                                      do_sample=False), expected)  # fmt: skip
    logits = model(part.sequences[:, -1:], past_key_values=memory.fork(), **given).logits
    assert logits.argmax(-1).item() == expected[0, part.sequences.shape[1]]
    with pytest.raises(ValueError, match="image_grid_thw came without pixel_values"):
        model(part.sequences[:, -1:], past_key_values=memory, image_grid_thw=torch.tensor([[1, 4, 4]]))


def test_a_prompt_padded_on_the_right_is_refused(model):
    ids, mask = prompt(4).repeat(2, 1), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    for asked in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(ValueError, match="padded on the right.*padding_side='left'"):
            model.generate(**asked, attention_mask=mask, **GREEDY)


def test_a_layer_is_a_state(model):
    memory = model(prompt(4)).past_key_values
    assert len(memory) == len(memory.layers) == len(memory.states) == 3 and memory.layers[0] is memory.states[0]
    memory.reset()
    assert len(memory) == len(memory.layers) == 3 and not memory.is_compileable and memory


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_equal_those_of_a_memory_and_of_rows_alone(model, options):
    given, rows = video(4, 2), [prompt(5, 1, seed=1), prompt(5, 1, seed=2)]
    together = model.generate(torch.cat(rows), **given, **GREEDY, **options)
    alone = [model.generate(row, **pick(given, [index]), **GREEDY, **options) for index, row in enumerate(rows)]
    assert torch.equal(together, torch.cat(alone))
    memory = model.encode_video(**pick(given, [0]))
    assert torch.equal(model.generate(rows[0], past_key_values=memory.fork(), **GREEDY, **options), alone[0])


def test_samples_are_drawn_for_each_row(model):
    torch.manual_seed(0)
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 5}
    output = model.generate(prompt(4, 1), **video(3), **options, return_dict_in_generate=True)
    assert output.sequences.shape == (3, 11) and output.past_key_values.batch_size == 3
    assert len(set(map(tuple, output.sequences.tolist()))) > 1


def test_prompts_that_do_not_fit_the_memory_are_refused(model):
    memory = model.encode_video(**video(3))
    with pytest.raises(ValueError, match=r"has seen \[1\] images and videos.* names \[0\].*begins with one"):
        model.generate(prompt(6), past_key_values=memory.fork(), **GREEDY)
    with pytest.raises(ValueError, match="has read 1 tokens of text and the prompt has 1"):
        model.generate(prompt(1), past_key_values=memory.fork(), **GREEDY)
    with pytest.raises(ValueError, match="ends with <|vision_start|>"):
        model.generate(torch.tensor([[5, START]]), **video(3), **GREEDY)
    with pytest.raises(ValueError, match="holds 0 <|vision_start|> tokens for 1"):
        model.generate(prompt(4), **video(3), **GREEDY)
    with pytest.raises(ValueError, match="this model remembers in a StateMemory"):
        model(prompt(4), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="'static' is for keys and values"):
        model.generate(prompt(4), cache_implementation="static", **GREEDY)
    with pytest.raises(ValueError, match=r"must be \(batch, 3\) for the tokens given, or \(batch, 4\)"):
        model(prompt(3), attention_mask=torch.ones(1, 9), past_key_values=memory.fork())


def test_a_memory_of_another_model_is_refused(model):
    memory = tiny_model(num_hidden_layers=2).encode_video(**video(1))
    with pytest.raises(ValueError, match="layers, heads, head dim, state size"):
        model(prompt(3), past_key_values=memory)
    two = model.encode_video(**video(1, 1), rows=[0, 1])
    for rows in (3, 4):
        with pytest.raises(ValueError, match=f"2 rows and the text {rows}"):
            model(torch.cat([prompt(3)] * rows), past_key_values=two)


def test_an_error_leaves_a_memory_as_it_was(model):
    memory = model.encode_video(**video(2))
    before, calls = copy.deepcopy(memory), iter(range(100))

    def fail(module, args, output):  # in the second layer, at the second chunk
        if next(calls) == 1:
            raise torch.OutOfMemoryError("no")

    for act in (
        lambda: model.encode_video(**video(6), memory=memory, chunk_frames=2),
        lambda: model(prompt(5), past_key_values=memory),
    ):
        hook = model.model.language_model.layers[1].register_forward_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            act()
        hook.remove()
        calls = iter(range(1, 100))  # text is one chunk
        assert states_equal(memory, before)
        assert {**vars(memory), "layers": 0} == {**vars(before), "layers": 0}
        assert [[len(times) for times in row] for row in memory.times] == [[2]]


# --- copies and files ------------------------------------------------------------------------------------------------


def test_forks_share_the_states_and_go_their_own_ways(model):
    memory = model.encode_video(**video(3))
    before = copy.deepcopy(memory)
    fork = memory.fork()
    assert all(a is b for x, y in zip(memory.states, fork.states) for a, b in zip(x, y))
    model.encode_video(**video(2, seed=4), memory=fork)
    model.generate(prompt(5, 1), past_key_values=memory.fork(), **GREEDY)
    assert states_equal(memory, before) and memory.media == before.media == [[["video", 3, 4, 4]]]
    assert fork.media == [[["video", 5, 4, 4]]] and memory.get_seq_length() == 1 and not states_equal(fork, memory)


def test_a_step_copies_no_state(model):
    memory = model.encode_video(**video(3))
    before = list(memory.states)
    memory.expand_rows(1)
    assert all(a is b for a, b in zip(memory.states, before))


def test_an_hour_is_one_item(model):
    """Nothing is kept per frame or per chunk, however often frames are appended."""
    memory = None
    for index in range(20):
        memory = model.encode_video(**video(2, seed=index), memory=memory)
    assert memory.media == [[["video", 40, 4, 4]]] and memory.is_open == [True] and memory.get_seq_length() == 1
    assert memory.text_tokens_B.shape == (1,) and memory.text_tokens_B.item() == 1


def test_the_memory_does_not_grow(model):
    short, long = model.encode_video(**video(1)), model.encode_video(**video(50))
    text = model.config.text_config
    per_layer = 4 * (text.num_heads * text.head_dim * text.state_size + 3 * text.conv_dim)
    assert short.video_nbytes == long.video_nbytes == 3 * per_layer
    assert long.num_video_tokens == [200] and len(long) == 3


def test_rows_are_selected_repeated_and_reordered(model):
    memory = model.encode_video(**video(1, 2), rows=[0, 1])
    one, two = (model.encode_video(**pick(video(1, 2), [index])) for index in (0, 1))
    memory.batch_repeat_interleave(2)
    memory.reorder_cache(torch.tensor([3, 0, 1, 2]))
    assert [row[0][1] for row in memory.media] == [2, 1, 1, 2]
    memory.batch_select_indices(torch.tensor([True, True, False, False]))
    for layer in range(3):
        expected = torch.cat([two.states[layer].ssm_BHPK, one.states[layer].ssm_BHPK])
        torch.testing.assert_close(memory.states[layer].ssm_BHPK, expected, **CLOSE)
    with pytest.raises(ValueError, match="cannot forget its last tokens"):
        memory.crop(1)
    memory.reset()
    assert memory.batch_size == -1 and memory.media == [] and memory.get_seq_length() == 0
    assert states_equal(model.encode_video(**video(4), memory=memory), model.encode_video(**video(4)))


@pytest.mark.parametrize("how", ["file", "pickle", "to"])
def test_saved_and_loaded(model, tmp_path, how):
    memory = model.encode_video(**video(2, 3, 1), rows=[1, 0, 1])
    if how == "file":
        memory.save(tmp_path / "talk.safetensors")
        loaded = StateMemory.load(tmp_path / "talk.safetensors")
    else:
        loaded = pickle.loads(pickle.dumps(memory)) if how == "pickle" else memory.fork().to("cpu")
    assert states_equal(loaded, memory) and torch.equal(loaded.text_tokens_B, memory.text_tokens_B)
    tensors = {"layers": 0, "text_tokens_B": 0}
    assert {**vars(loaded), **tensors} == {**vars(memory), **tensors}
    ids = torch.cat([prompt(6, 1, seed=1), prompt(4, 2)])
    assert torch.equal(*(model.generate(ids, past_key_values=m.fork(), **GREEDY) for m in (loaded, memory)))


def test_an_empty_memory_can_be_saved(model, tmp_path):
    StateMemory(model.config).save(tmp_path / "nothing.safetensors")
    loaded = StateMemory.load(tmp_path / "nothing.safetensors")
    assert loaded.states == [None] * 3 and loaded.text_tokens_B is None


def test_bad_files_are_named(model, tmp_path, monkeypatch):
    good = tmp_path / "good.safetensors"
    memory = model.encode_video(**video(1))
    memory.save(good)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        StateMemory.load(tmp_path / "nowhere")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="damaged or no safetensors"):
        StateMemory.load(tmp_path / "text")
    write_memory(tmp_path / "other", "vamba.video_memory.1", {}, {})
    with pytest.raises(ValueError, match="memory of another kind of model"):
        StateMemory.load(tmp_path / "other")
    with pytest.raises(ValueError):
        VideoMemory.load(good)
    before = good.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.encode_video(**video(1), memory=memory).save(good)
    assert good.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["good.safetensors", "other", "text"]
    with pytest.raises(OSError, match="cannot be written"):
        memory.save(tmp_path / "no" / "folder")
