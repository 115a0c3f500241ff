"""VideoChat: streamed watching equals watching at once; questions continue a conversation, or are one of their own."""

import logging
import os
import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, StaticCache

import vamba
import vamba.chat as chat_module


@pytest.fixture
def chat(checkpoint):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    return vamba.VideoChat(model, AutoProcessor.from_pretrained(checkpoint))


def test_watching_in_chunks_equals_the_processor_at_once(chat, clip):
    content = [{"type": "video", "video": str(clip), "fps": 8.0}, {"type": "text", "text": "What happens?"}]
    inputs = chat.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    expected = chat.model.encode_video(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    for chunk_frames in (2, 6, 64):
        memory = chat.watch(clip, fps=8, chunk_frames=chunk_frames, progress=False)
        assert memory.media == expected.media and "16 frames (2 s)" in repr(memory)
        for layer in range(3):
            for a, b in zip(memory.video_key_values(layer), expected.video_key_values(layer)):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    output = chat.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = chat.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    assert chat.ask("What happens?", max_new_tokens=8, do_sample=False) == answer.strip()


@pytest.mark.parametrize("chunk_frames", [4, None])
def test_watching_ahead_changes_nothing(chat, clip, chunk_frames):
    """Bit for bit what reading, processing and encoding chunk after chunk gives."""
    expected = None
    for chunk in chat.processor.video_reader(clip, fps=8, chunk_frames=chunk_frames or 64):
        inputs = chat.processor.video_processor([chunk.frames], do_resize=False, return_tensors="pt")
        expected = chat.model.encode_video(**inputs, memory=expected)
    memory = chat.watch(clip, fps=8, chunk_frames=chunk_frames, progress=False)
    assert memory.media == expected.media
    for layer in range(3):
        for a, b in zip(memory.video_key_values(layer), expected.video_key_values(layer)):
            assert torch.equal(a, b)
    for a, b in zip(memory.states, expected.states):
        assert torch.equal(a.ssm_BHPK, b.ssm_BHPK) and torch.equal(a.conv_BTC, b.conv_BTC)


def test_a_memory_knows_when_its_frames_were_shown(chat, clip, tmp_path):
    """Two frames to a span, which ends where the next begins; a second video counts by its own clock."""
    eighths = [[index / 4, index / 4 + 0.25] for index in range(8)]
    assert chat.watch(clip, fps=8, chunk_frames=6, progress=False).times[0][0].tolist() == eighths
    assert chat.watch(clip, fps=4, start=0.5, progress=False).times[0][0].tolist() == [[0.5, 1], [1, 1.5], [1.5, 2]]
    chat.watch(clip, num_frames=3, end=1.0, append=True, progress=False)  # an odd last frame
    assert chat.memory.times[0][1].tolist() == [[0, 1.0], [1.0, 1.5]] and len(chat.memory.times[0]) == 2
    assert chat.memory.token_times().shape == (chat.memory.video_length, 2)
    chat.memory.save(tmp_path / "m.safetensors")
    assert torch.equal(type(chat.memory).load(tmp_path / "m.safetensors").token_times(), chat.memory.token_times())


def said(*turns):
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * len(turns), turns)]


def test_a_second_question_continues_the_conversation(chat, clip):
    chat.watch(clip, progress=False)
    options = {"max_new_tokens": 8, "do_sample": False}
    first = chat.ask("What happens?", **options)
    for stream in (False, True):
        chat.history = said("What happens?", first)
        answer = chat.ask("And then?", stream=stream, **options)
        answer = "".join(answer).strip() if stream else answer
        assert chat.history == said("What happens?", first, "And then?", answer)
        assert answer == chat.ask(said("What happens?", first, "And then?"), **options)
    kept = chat.history
    with pytest.raises(vamba.UserError):
        chat.ask("What?", max_new_tokens=-5)
    assert chat.history == kept  # neither by what fails nor by a conversation of its own
    chat.reset()
    assert not chat.history and chat.ask("What happens?", **options) == first
    chat.watch(clip, append=True, progress=False)
    assert chat.history == said("What happens?", first)
    chat.watch(clip, progress=False)
    assert not chat.history


def test_a_system_prompt_begins_the_conversation(chat, clip):
    chat.watch(clip, progress=False)
    chat.system = "Be brief."
    try:
        answer = chat.ask("What happens?", max_new_tokens=8, do_sample=False)
    finally:
        chat.system = None
    messages = [{"role": "system", "content": "Be brief."}, *said("What happens?")]
    assert answer == chat.ask(messages, max_new_tokens=8, do_sample=False) and chat.history == said(
        "What happens?", answer
    )


@pytest.mark.parametrize("kind", ["checkpoint", "ma2mba"])
def test_images_and_videos_in_one_memory(kind, clip, tmp_path, request):
    """What was watched stands in the prompt as if all of it had been given at once."""
    folder = request.getfixturevalue(kind)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    chat = vamba.VideoChat(model, processor)
    picture = Image.new("RGB", (56, 84), "red")
    picture.save(tmp_path / "red.png")
    chat.watch(tmp_path / "red.png")
    chat.watch(clip, num_frames=4, append=True, progress=False)
    chat.watch(picture, append=True)
    assert [item[0] for item in chat.memory.media[0]] == ["image", "video", "image"] and chat.memory.seconds > 0
    content = [
        {"type": "image", "image": picture}, {"type": "video", "video": str(clip), "num_frames": 4},
        {"type": "image", "image": picture}, {"type": "text", "text": "What happens?"},
    ]  # fmt: skip
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert (
        chat.ask("What happens?", max_new_tokens=8, do_sample=False)
        == processor.tokenizer.decode(output, skip_special_tokens=True).strip()
    )


def test_a_broken_image_is_told_as_a_broken_video(chat, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(vamba.VideoReadError, match="broken.jpg"):
        chat.watch(tmp_path / "broken.jpg", progress=False)


def test_a_live_stream_goes_on_while_it_is_asked(chat, clip):
    """Frames that are appended between two questions are those of one video."""
    frames, _ = vamba.load_video(clip, fps=8)
    expected = chat.watch(frames, source_fps=8, fps=8, progress=False)
    chat.watch(frames[:4], source_fps=8, fps=8, progress=False)
    chat.ask("What happens?", max_new_tokens=2)
    for start in range(4, len(frames), 4):
        part = frames[start : start + 4]
        chat.watch(part, append=True, continue_video=True, source_fps=8, fps=8, progress=False)
    assert chat.memory.media == expected.media and len(chat.history) == 2 and chat.memory.seconds == expected.seconds
    for a, b in zip(chat.memory.states, expected.states):
        torch.testing.assert_close(a.ssm_BHPK, b.ssm_BHPK)
    with pytest.raises(ValueError, match="append=True"):
        chat.watch(frames, continue_video=True)
    with pytest.raises(ValueError, match="cannot continue"):
        chat.watch(torch.zeros(2, 3, 112, 56, dtype=torch.uint8), append=True, continue_video=True, progress=False)


def test_progress_is_told_to_a_function_which_may_end_it(chat, clip):
    told = []
    memory = chat.watch(clip, fps=8, chunk_frames=4, progress=lambda done, total: told.append((done, total)))
    assert told == [(4, 16), (8, 16), (12, 16), (16, 16)]

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.watch(clip, fps=8, progress=stop)
    assert chat.memory is memory
    assert chat.memory.get_seq_length() == 0


def test_streamed_pieces_make_up_the_answer(chat, clip):
    chat.watch(clip, progress=False)
    pieces = list(chat.ask(said("What happens?"), stream=True, max_new_tokens=8, do_sample=False))
    assert "".join(pieces).strip() == chat.ask(said("What happens?"), max_new_tokens=8, do_sample=False)


def test_an_error_while_streaming_reaches_the_reader(chat, clip):
    chat.watch(clip, progress=False)
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(chat.ask(said("What happens?"), stream=True, max_new_tokens=-5))


def test_an_abandoned_answer_ends_its_thread(chat, clip):
    chat.watch(clip, progress=False)
    before = threading.active_count()
    pieces = chat.ask(said("What happens?"), stream=True, max_new_tokens=100_000, min_new_tokens=100_000)
    next(pieces)
    pieces.close()
    assert threading.active_count() == before


def test_an_answer_belongs_to_the_conversation_it_was_begun_in(chat, clip):
    chat.watch(clip, progress=False)
    pieces = chat.ask("What happens?", stream=True, max_new_tokens=4)
    chat.reset()
    assert "".join(pieces) and chat.history == []


def test_no_answer_is_empty(chat, clip):
    """Even where the model would end at once."""
    chat.watch(clip, progress=False)
    first = chat.processor.tokenizer(chat.ask(said("What?"), max_new_tokens=1, do_sample=False)).input_ids[:1]
    assert first and chat.ask(said("What?"), max_new_tokens=3, do_sample=False, eos_token_id=first[0])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_a_generation_config_says_how_long_an_answer_is(chat, clip, monkeypatch, stream, graphs):
    chat.watch(clip, progress=False)
    monkeypatch.setattr(chat_module.GraphedDecoding, "suits", lambda model: graphs)
    expected = chat.ask(said("What?"), max_new_tokens=1, do_sample=False)
    assert expected != chat.ask(said("What?"), max_new_tokens=30, do_sample=False)
    prompt = chat._prompt("What?")["input_ids"].shape[1]
    for length in ({"max_new_tokens": 1}, {"max_length": prompt + 1}):
        config = GenerationConfig(**{**chat.model.generation_config.to_dict(), "do_sample": False, **length})
        answer = chat.ask(said("What?"), generation_config=config, stream=stream)
        assert ("".join(answer).strip() if stream else answer) == expected
    config.max_new_tokens = 30
    generation_logger = logging.getLogger("transformers.generation.utils")
    warned = []
    monkeypatch.setattr(generation_logger, "warning_once", lambda message, *_: warned.append(message), raising=False)
    assert chat.ask(said("What?"), generation_config=config, max_new_tokens=1) == expected  # what is said outright wins
    assert warned == [] and config.max_new_tokens == 30 and config.min_new_tokens is None


def test_a_checkpoint_may_say_how_it_samples(chat, clip):
    chat.processor.video_processor.fps = 8
    assert chat.watch(clip, progress=False).media[0][0][1] == 8  # 16 frames, two a temporal patch
    assert chat.watch(clip, fps=4, progress=False).media[0][0][1] == 4


def test_frames_one_by_one_are_a_video(chat):
    frames = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    whole = chat.watch(frames, progress=False).video_key_values(1)[0]
    for video in (list(frames), [frame.permute(1, 2, 0).numpy() for frame in frames]):
        assert torch.equal(chat.watch(video, progress=False).video_key_values(1)[0], whole)
    with pytest.raises(vamba.VideoReadError, match="differ in shape"):
        chat.watch([frames[0], frames[1, :, 8:]], progress=False)


def test_append_adds_a_second_video(chat, clip):
    one = chat.watch(clip, progress=False).video_length
    chat.watch(clip, append=True, progress=False)
    assert chat.memory.video_length == 2 * one and len(chat.memory.media[0]) == 2
    assert chat._prompt("What?")["input_ids"].eq(chat.model.config.vision_start_token_id).sum() == 2


def test_a_failed_watch_leaves_the_memory(chat, clip, tmp_path):
    before = chat.watch(clip, progress=False)
    (tmp_path / "text.mp4").write_text("this is no video")
    with pytest.raises(vamba.VideoReadError, match="text.mp4"):
        chat.watch(tmp_path / "text.mp4", append=True, progress=False)
    assert chat.memory is before


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_watch_leaves_the_memory_and_nothing_open(chat, clip, monkeypatch, append, error):
    before = chat.watch(clip, progress=False)
    answer = chat.ask(said("What happens?"), max_new_tokens=8, do_sample=False)
    length, states = before.video_length, [state.ssm_BHPK.clone() for state in before.states]
    threads, files = threading.active_count(), _open_files()
    encode, encoded = chat.model.encode_video, []

    def interrupted(*args, **kwargs):
        if len(encoded) == 2:
            raise error
        encoded.append(encode(*args, **kwargs))
        return encoded[-1]

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(chat.model, "encode_video", interrupted)
        chat.watch(clip, fps=8, chunk_frames=2, append=append, progress=False)
    assert (threading.active_count(), _open_files()) == (threads, files) and len(encoded) == 2
    assert chat.memory is before and before.video_length == length
    assert all(torch.equal(state.ssm_BHPK, old) for state, old in zip(before.states, states))
    assert chat.ask(said("What happens?"), max_new_tokens=8, do_sample=False) == answer


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def test_damage_further_in_reaches_the_caller(chat, clip, monkeypatch):
    """Raised in the thread that decodes, after a chunk was encoded."""
    from vamba.video import VideoReader

    def damaged(self):
        chunks = whole(self)
        yield next(chunks)
        raise vamba.VideoReadError("clip.mp4: not one more frame")

    before, whole = chat.watch(clip, progress=False), VideoReader._chunks
    monkeypatch.setattr(VideoReader, "_chunks", damaged)
    with pytest.raises(vamba.VideoReadError, match="not one more frame"):
        chat.watch(clip, fps=8, chunk_frames=2, progress=False)
    assert chat.memory is before


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 2}, {"num_beams": 2}])
def test_room_for_the_answer_is_set_aside_where_graphs_can_be_used(chat, clip, monkeypatch, options):
    chat.watch(clip, progress=False)
    expected = chat.ask(said("What happens?"), max_new_tokens=8, do_sample=False, **options)
    monkeypatch.setattr(chat_module.GraphedDecoding, "suits", lambda model: True)
    fork = chat._fork(chat._prompt("What happens?"), {"max_new_tokens": 8, **options})
    assert isinstance(fork, StaticCache) == ("prompt_lookup_num_tokens" not in options)  # which takes tokens back
    assert chat.ask(said("What happens?"), max_new_tokens=8, do_sample=False, **options) == expected


def test_options_of_a_memory_that_the_model_has_not_are_refused():
    model = SimpleNamespace(config=SimpleNamespace(model_type="video_ma2mba"))
    with pytest.raises(ValueError, match="'video_dtype'.*leave them out"):
        vamba.VideoChat(model, None, video_dtype=torch.float8_e4m3fn)


def test_asking_before_watching_says_what_to_do(chat):
    with pytest.raises(ValueError, match=r"watch\(video\) before ask"):
        chat.ask(said("What?"))


def test_an_odd_chunk_is_refused(chat, clip):
    with pytest.raises(ValueError, match="chunk_frames=3 must be a positive multiple"):
        chat.watch(clip, chunk_frames=3)


@pytest.mark.parametrize("question", [None, 5, b"x", "", " ", "\udcff", "x " * 4000, "x" * 2**21])
def test_what_is_no_question_is_refused(chat, clip, question):
    chat.watch(clip, progress=False)
    with pytest.raises(ValueError, match="^The question "):
        chat.ask(question)


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": n} for n in (0, -1, "x", 1.5)]
    + [{"temperature": float("nan")}, {"generation_config": 5}, {"num_beams": 0}, {"streamer": 5}, {"no_option": 1}]
    + [{"past_key_values": 5}, {"input_ids": 5}, {"return_dict_in_generate": True}, {"streamer": []}],
)
def test_what_generate_cannot_use_is_refused(chat, clip, options):
    chat.watch(clip, progress=False)
    with pytest.raises(ValueError, match=next(iter(options))):
        chat.ask(said("What?"), **options)


def test_weights_that_compute_nan_are_told(chat, clip):
    chat.watch(clip, progress=False)
    norm = chat.model.model.language_model.norm.weight
    before = norm.detach().clone()
    with torch.no_grad():
        norm.fill_(float("inf"))
    try:
        with pytest.raises(ValueError, match="weights have changed|computes NaN"):
            chat.ask(said("What?"))
    finally:
        with torch.no_grad():
            norm.copy_(before)


def test_a_conversation_goes_on_where_its_last_turn_ends(chat, clip):
    chat.watch(clip, fps=8, progress=False)
    turns = [("system", "Be brief."), ("user", "What happens?"), ("assistant", "It moves."), ("user", "Where?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    with_video = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
    with_video[1]["content"].insert(0, {"type": "video", "video": str(clip), "fps": 8.0})
    inputs = chat.processor.apply_chat_template(
        with_video, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = chat.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = chat.processor.tokenizer.decode(output, skip_special_tokens=True).strip()
    assert chat.ask(messages, max_new_tokens=8, do_sample=False) == answer


def test_a_state_reads_the_video_before_any_turn(ma2mba, clip):
    model = AutoModelForImageTextToText.from_pretrained(ma2mba).eval()
    chat = vamba.VideoChat(model, AutoProcessor.from_pretrained(ma2mba))
    chat.watch(clip, num_frames=4, progress=False)
    asked = {"role": "user", "content": "What happens?"}
    for ask in (chat.ask, lambda question: chat.log_likelihoods(question, ["It moves."])):
        with pytest.raises(vamba.UserError, match="begins with a turn of the assistant.* let the user's come first"):
            ask([{"role": "assistant", "content": "It moves."}, asked])
    brief = chat.ask([{"role": "system", "content": "Be brief."}, asked], max_new_tokens=8, do_sample=False)
    folded = [{"role": "user", "content": "Be brief.\n\nWhat happens?"}]
    assert brief == chat.ask(folded, max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize(
    "question",
    [
        [],
        [{"role": "assistant", "content": "It moves."}],
        [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}],
        [{"role": "nobody", "content": "What?"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": []}],
        ["What?"],
    ],
)
def test_what_is_no_conversation(chat, clip, question):
    chat.watch(clip, progress=False)
    with pytest.raises(vamba.UserError, match="turn"):
        chat.ask(question)


@pytest.mark.parametrize("kind", ["checkpoint", "ma2mba"])
def test_likelihoods_of_answers_equal_a_full_forward_pass(kind, clip, request):
    folder = request.getfixturevalue(kind)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    chat = vamba.VideoChat(model, AutoProcessor.from_pretrained(folder))
    chat.watch(clip, num_frames=8, progress=False)
    answers = ["B", "It moves.", "A long story about nothing"]
    greedy = chat.ask(said("What happens?"), max_new_tokens=4, do_sample=False)
    found = chat.log_likelihoods("What happens?", answers)
    content = [{"type": "video", "video": str(clip), "num_frames": 8}, {"type": "text", "text": "What happens?"}]
    inputs = chat.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    length = inputs["input_ids"].shape[1]
    for answer, likelihood in zip(answers, found, strict=True):
        tokens = chat.processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
        extra = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        extra["mm_token_type_ids"] = torch.zeros_like(tokens)
        whole = {name: torch.cat([value, extra[name]], 1) if name in extra else value for name, value in inputs.items()}
        with torch.no_grad():
            logits = model(**whole, use_cache=False).logits[0, length - 1 : -1].log_softmax(-1)
        expected = logits.gather(1, tokens[0][:, None]).sum().item()
        assert likelihood.total == pytest.approx(expected, rel=1e-4)
        assert likelihood.is_greedy == bool((logits.argmax(-1) == tokens[0]).all())
    (ended,) = chat.log_likelihoods("What happens?", answers[1:2], ended=True)
    end = model.generation_config.eos_token_id
    text = chat.processor.tokenizer.decode(end[0] if isinstance(end, list) else end)
    assert ended.total == pytest.approx(chat.log_likelihoods("What happens?", [answers[1] + text])[0].total)
    assert chat.memory.get_seq_length() == chat.memory.fork().get_seq_length()
    assert chat.ask(said("What happens?"), max_new_tokens=4, do_sample=False) == greedy  # the memory is as it was
    with pytest.raises(vamba.UserError, match="makes no token"):
        chat.log_likelihoods("What happens?", [""])
