"""VideoChat: streamed watching equals watching at once; every question starts anew."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vamba


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
        assert memory.media == expected.media
        for layer in range(3):
            for a, b in zip(memory.video_key_values(layer), expected.video_key_values(layer)):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    output = chat.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = chat.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    assert chat.ask("What happens?", max_new_tokens=8, do_sample=False) == answer.strip()


def test_questions_do_not_see_each_other(chat, clip):
    chat.watch(clip, progress=False)
    first = chat.ask("What happens?", max_new_tokens=8, do_sample=False)
    chat.ask("Something else entirely?", max_new_tokens=8, do_sample=False)
    assert chat.ask("What happens?", max_new_tokens=8, do_sample=False) == first
    assert chat.memory.get_seq_length() == 0


def test_streamed_pieces_make_up_the_answer(chat, clip):
    chat.watch(clip, progress=False)
    pieces = list(chat.ask("What happens?", stream=True, max_new_tokens=8, do_sample=False))
    assert "".join(pieces).strip() == chat.ask("What happens?", max_new_tokens=8, do_sample=False)


def test_an_error_while_streaming_reaches_the_reader(chat, clip):
    chat.watch(clip, progress=False)
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(chat.ask("What happens?", stream=True, max_new_tokens=-5))


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


def test_asking_before_watching_says_what_to_do(chat):
    with pytest.raises(ValueError, match=r"watch\(video\) before ask"):
        chat.ask("What?")


def test_an_odd_chunk_is_refused(chat, clip):
    with pytest.raises(ValueError, match="chunk_frames=3 must be a positive multiple"):
        chat.watch(clip, chunk_frames=3)
