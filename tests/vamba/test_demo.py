"""The demo: what its videos show, what its questions give away, and the whole pipeline in a few steps."""

import argparse
import json
from collections import Counter
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from vamba import demo, read_video
from vamba.cli import main as vamba
from vamba.demo import pipeline, training
from vamba.demo.evaluation import Reply, accuracy, chance
from vamba.demo.tiny_checkpoint import SPECIAL_TOKENS, make_tiny_qwen2_vl, mrope_section, tiny_tokenizer
from vamba.demo.videos import ANSWERS, COLOURS, FPS, MOMENTS, NUM_FRAMES, QUESTIONS, SIZE, render, stories, write_video


TINY = {"steps": 2, "train_videos": 8, "test_videos": 3, "batch_size": 4}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A very short run: the output folder and what `run` returned."""
    output = tmp_path_factory.mktemp("runs") / "demo"
    return output, demo.run(output, seed=1, **TINY)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_qwen2_vl(tmp_path_factory.mktemp("tiny"), QUESTIONS.values())


def frames_of(path) -> np.ndarray:
    """(T, H, W, 3), as the reader decodes them."""
    with read_video(path, fps=FPS, resize=False) as reader:
        return torch.cat([chunk.frames for chunk in reader]).permute(0, 2, 3, 1).numpy().astype(int)


def test_videos_are_h264_and_show_what_the_answers_say(tmp_path):
    for index, story in enumerate(stories(12, seed=3)):
        path = tmp_path / f"{index}.mp4"
        write_video(path, render(story))
        with av.open(str(path)) as container:
            assert container.streams.video[0].codec_context.name == "h264"
        frames = frames_of(path)
        assert frames.shape == (NUM_FRAMES, SIZE, SIZE, 3)
        background = np.median(frames.reshape(NUM_FRAMES, -1, 3), axis=1)
        flashing = [nearest_colour(pixel) for pixel in background]
        spans = dict(zip((story.first, story.second), story.flashes))
        for frame, colour in enumerate(flashing):
            expected = [name for name, (start, stop) in spans.items() if start <= frame < stop]
            assert [colour] == (expected or [None])
        white = (frames > 200).all(-1).sum((1, 2))
        visiting = np.isin(np.arange(NUM_FRAMES), range(*story.visit))
        assert (white[visiting] > 50).all() and (white[~visiting] < 10).all()
        assert spans[story.first][1] <= spans[story.second][0]
        assert story.moment == MOMENTS[sum(stop <= story.visit[0] for _, stop in story.flashes)]


def nearest_colour(pixel):
    """The name of the colour of a picture's background, None if it is grey."""
    if np.ptp(pixel) < 60:
        return None
    return min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - pixel).sum())


def test_shapes_differ_and_are_drawn_where_asked():
    story = stories(1, seed=0)[0]
    pictures = [render(replace(story, shape=shape)) for shape in ANSWERS["shape"]]
    for index, picture in enumerate(pictures):
        for other in pictures[:index]:
            changed = (picture != other).any((1, 2, 3))
            assert changed[slice(*story.visit)].all() and changed.sum() == story.visit[1] - story.visit[0]


def test_answers_are_balanced_and_independent():
    told = stories(720, seed=5)
    for kind, answers in ANSWERS.items():
        assert Counter(story.answer(kind) for story in told) == dict.fromkeys(answers, 720 // len(answers))
    assert all(story.first != story.second for story in told)
    together = Counter((story.first, story.moment) for story in told)
    assert len(together) == 18 and max(together.values()) < 70  # 40 each if independent


def test_moments_of_the_events_are_spread():
    told = stories(300, seed=6)
    starts = Counter(story.flashes[0][0] for story in told)
    assert len(starts) > 10
    spans = [sorted([*story.flashes, story.visit]) for story in told]
    assert all(one[1] < two[0] for story in spans for one, two in zip(story, story[1:]))
    assert all(story[0][0] > 0 and story[-1][1] < NUM_FRAMES for story in spans)


def test_stories_depend_on_the_seed_alone():
    assert stories(10, seed=1) == stories(10, seed=1) != stories(10, seed=2)


def test_tiny_checkpoint_is_a_qwen2_vl(checkpoint):
    model, loading = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert isinstance(processor, Qwen2VLProcessor)
    frames = torch.randint(0, 255, (4, 3, 48, 48), dtype=torch.uint8)
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTIONS["first"]}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, videos=[frames], do_sample_frames=False, return_tensors="pt")
    assert inputs["video_grid_thw"].tolist() == [[2, 6, 6]]
    assert (inputs["input_ids"] == model.config.video_token_id).sum() == 2 * 6 * 6 // 4
    output = model.generate(**inputs, max_new_tokens=3)
    assert output.shape[1] > inputs["input_ids"].shape[1]
    assert model.generation_config.eos_token_id[0] == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_tiny_tokenizer_spells_anything_and_knows_its_words():
    tokenizer = tiny_tokenizer(QUESTIONS.values())
    assert len(tokenizer.tokenize(QUESTIONS["first"])) == 5
    for text in ("naïve 视频 🎞️\n\ttabs", QUESTIONS["moment"]):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    for token in SPECIAL_TOKENS.values():
        assert len(tokenizer(token).input_ids) == 1


@pytest.mark.parametrize("head_dim", [8, 16, 32, 128])
def test_mrope_section_fills_the_head(head_dim):
    assert sum(mrope_section(head_dim)) == head_dim // 2 and min(mrope_section(head_dim)) > 0
    assert mrope_section(128) == [16, 24, 24]  # the published models'


def test_only_answers_are_labelled():
    header, end = [1, 2], 9
    ids = [1, 5, 9, 1, 2, 7, 9, 0, 1, 2, 6, 8, 9, 0]
    kept = [label if label != training.IGNORED else None for label in training.answer_labels(ids, header, end)]
    assert kept == [None] * 5 + [7, 9] + [None] * 3 + [6, 8, 9] + [None]


def test_batches_are_conversations_with_their_videos(finished):
    output, _ = finished
    processor = AutoProcessor.from_pretrained(output)
    told = stories(TINY["test_videos"], seed=3)  # the held-out videos of seed 1
    examples = training.read_examples(sorted((output / "videos").iterdir()), told, processor)
    batch = training.Collator(processor, seed=0)(examples * 30)
    start = processor.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    shown = (batch["input_ids"] == start).sum(1)
    assert set(shown.tolist()) == {0, 1}  # some without their video
    assert len(batch["video_grid_thw"]) == shown.sum()
    assert len(batch["pixel_values_videos"]) == batch["video_grid_thw"].prod(1).sum()
    for labels, example in zip(batch["labels"], examples * 30):
        answers = processor.tokenizer.decode(labels[labels != training.IGNORED]).split("<|im_end|>")[:-1]
        assert sorted(answers) == sorted(example["answers"].values())


def test_accuracy_and_chance():
    rows = [("first", "red", "red"), ("first", "red", "blue"), ("first", "red", "red"), ("shape", "cross", "circle")]
    replies = [Reply(None, *row) for row in rows]
    assert accuracy(replies) == 0.5
    assert chance(replies) == (2 + 1) / 4


def test_a_short_run_leaves_checkpoint_picture_and_results(finished, capsys):
    output, results = finished
    assert json.loads((output / "demo.json").read_text()) == results
    assert 0 <= results["accuracy"] <= 1 and 0.15 <= results["chance"] <= 0.7
    assert set(results["accuracy_by_question"]) == set(QUESTIONS.values())
    assert results["steps"] == 2 and np.isfinite(results["loss"])
    with av.open(str(output / "demo.png")) as picture:
        pixels = next(picture.decode(video=0)).to_ndarray(format="rgb24")
    assert pixels.shape[0] > 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    assert len(list((output / "videos").iterdir())) == TINY["test_videos"]
    assert not (output / "work").exists()
    assert [path.name for path in output.parent.iterdir()] == ["demo"]
    model = AutoModelForImageTextToText.from_pretrained(output)
    assert type(model).__name__ == "VambaForConditionalGeneration"


def test_the_last_lines_say_the_accuracy_and_a_second_run_replaces_the_first(tmp_path, capsys):
    output = tmp_path / "runs" / "demo"
    demo.run(output, seed=0, **TINY)
    (output / "left-over").write_text("of the first run")
    capsys.readouterr()
    results = demo.run(output, seed=2, **TINY)
    *_, blind, last = capsys.readouterr().out.splitlines()
    assert last.startswith("demo: accuracy 0.") and f"on {TINY['test_videos']} held-out videos (chance 0." in last
    assert blind.startswith(f"without the video: accuracy {pipeline._shown(results['text_only_accuracy'])}")
    assert not (output / "left-over").exists()
    assert json.loads((output / "demo.json").read_text())["seed"] == 2


def test_training_changes_the_weights(finished, tmp_path):
    output, _ = finished
    before = AutoModelForImageTextToText.from_pretrained(pipeline.make_checkpoint(tmp_path, seed=1)).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(output).state_dict()
    for part in ("model.visual.", "model.video_encoder.", "model.language_model."):
        assert any(key.startswith(part) and not torch.equal(before[key], after[key]) for key in before)


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "fine_tune", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path / "runs" / "demo", **TINY)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_keeps_the_earlier_output(tmp_path, monkeypatch):
    (tmp_path / "demo.json").write_text("{}")
    monkeypatch.setattr(pipeline, "draw_report", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path, **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]
    assert [path for path in tmp_path.parent.iterdir() if path.name.startswith(f"{tmp_path.name}.")] == []


@pytest.mark.parametrize("obstacle", ["a file", "a file above", "something else's folder"])
def test_a_useless_output_folder_is_one_line_and_exit_code_2(tmp_path, capsys, obstacle):
    target = tmp_path / "output"
    if obstacle == "something else's folder":
        target.mkdir()
        (target / "thesis.tex").write_text("years of work")
    else:
        target.write_text("data")
    path = target / "deeper" if obstacle == "a file above" else target
    assert vamba(["demo", f"--output-dir={path}"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and str(path) in captured.err


@pytest.mark.parametrize(("reached", "code"), [(0.899, 1), (0.9, 0), (1.0, 0)])
def test_exit_code_follows_the_accuracy(monkeypatch, reached, code):
    monkeypatch.setattr(demo, "run", lambda output_dir, **options: {"accuracy": reached})
    assert main() == code


def main(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.main(parser.parse_args(arguments))


def test_shown_shares_are_never_rounded_up():
    assert [pipeline._shown(share) for share in (0.8999, 0.9, 0.29, 1.0)] == ["0.89", "0.90", "0.29", "1.00"]
