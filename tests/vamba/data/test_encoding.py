"""Frames that fit a budget, and images however they are given."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from vamba.data import (
    ConversationEncoder,
    ExampleError,
)
from vamba.errors import UserError

from training_data import as_png, example, video


def tokens(sample):
    return sum(int(sample[name].prod(1).sum()) // 4 for name in ("video_grid_thw", "image_grid_thw") if name in sample)


@pytest.mark.parametrize(("budget", "frames"), [(None, 16), (72, 16), (71, 14), (63, 14), (62, 12), (20, 4), (9, 2)])
def test_frames_are_chosen_so_that_they_fit(budget, frames, processor, clip):
    encoder = ConversationEncoder(processor, fps=8, max_video_tokens=budget)
    plan = encoder.plan(example(video(clip)))
    sample = encoder.encode(plan)
    assert plan.frames == [frames] and sample["video_grid_thw"].tolist() == [[frames // 2, 6, 6]]
    assert plan.video_tokens == tokens(sample) and plan.text_tokens == len(sample["input_ids"])


def test_the_frames_that_remain_are_spread_over_the_video(processor, clip):
    few = ConversationEncoder(processor, max_video_tokens=18)(example(video(clip, fps=8)))
    spread = ConversationEncoder(processor)(example(video(clip, num_frames=4)))
    assert torch.equal(few["pixel_values_videos"], spread["pixel_values_videos"])


def test_videos_of_an_example_share_the_budget_and_images_come_first(processor, clip, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    media = [video(clip), {"type": "image", "image": str(tmp_path / "a.png")}, video(clip, fps=4)]
    encoder = ConversationEncoder(processor, fps=8, max_video_tokens=9 + 9 * 6)
    plan = encoder.plan(example(*media))
    sample = encoder.encode(plan)
    assert plan.frames == [8, 4] and plan.video_tokens == tokens(sample) == 9 + 9 * 6
    assert sample["mm_token_type_ids"][sample["mm_token_type_ids"] > 0].tolist() == [2, 1, 2]


def test_what_does_not_fit_in_two_frames_is_no_example(processor, clip):
    with pytest.raises(
        ExampleError, match="18 video tokens, with two frames of each video, are more than the budget of 17"
    ):
        ConversationEncoder(processor, max_video_tokens=17).plan(example(video(clip), video(clip)))
    with pytest.raises(ExampleError, match="max_length"):
        ConversationEncoder(processor, max_length=5).plan(example())


@pytest.mark.parametrize(("limit", "frames"), [(5, 4), (2, 2), (99, 16)])
def test_max_frames(limit, frames, processor, clip):
    assert ConversationEncoder(processor, fps=8, max_frames=limit).plan(example(video(clip))).frames == [frames]


def test_an_examples_own_options_come_first(processor, clip):
    encoder = ConversationEncoder(processor, fps=8, min_pixels=48 * 48, max_pixels=48 * 48)
    assert encoder.plan(example(video(clip, fps=4))).frames == [8]
    assert encoder.plan(
        example({"type": "video", "video": {"path": str(clip), "start": 1.0, "nframes": 2}})
    ).frames == [2]
    small = encoder(example(video(clip, min_pixels=256, max_pixels=32 * 32)))
    assert small["video_grid_thw"].tolist() == [[8, 4, 4]]


@pytest.mark.parametrize(
    ("bounds", "budget", "frames"),
    [
        ({"fps": 8, "max_frames": 4}, None, 4),
        ({"fps": 8, "max_frames": 4}, 60, 4),
        ({"fps": 8, "max_frames": 12}, 36, 8),
        ({"fps": 1, "min_frames": 12}, None, 12),
        ({"fps": 1, "min_frames": 12}, 36, 8),
        ({"fps": 1, "min_frames": 99}, None, 16),
        ({"num_frames": 6, "min_frames": 8, "max_frames": 2}, None, 6),
    ],
)
def test_an_examples_bounds_on_its_frames(bounds, budget, frames, processor, clip):
    encoder = ConversationEncoder(processor, max_video_tokens=budget)
    plan = encoder.plan(example(video(clip, **bounds)))
    sample = encoder.encode(plan)
    assert plan.frames == [frames] and sample["video_grid_thw"].tolist() == [[frames // 2, 6, 6]]
    assert plan.video_tokens == tokens(sample)
    assert encoder.plan(example(video(clip, **bounds))).messages == plan.messages
    limited = ConversationEncoder(processor, max_frames=4).plan(example(video(clip, **bounds)))
    assert limited.frames == [4]


@pytest.mark.parametrize(("options", "frames"), [({}, 8), ({"fps": 2}, 4), ({"max_frames": 6}, 6)])
def test_frames_with_a_rate_of_their_own(options, frames, processor, tmp_path):
    for index in range(8):
        Image.new("RGB", (64, 64), (30 * index, 0, 0)).save(tmp_path / f"{index}.png")
    files = [str(tmp_path / f"{index}.png") for index in range(8)]
    encoder = ConversationEncoder(processor)
    plan = encoder.plan(example(video(tmp_path) | {"video": files, "sample_fps": 4} | options))
    assert plan.frames == [frames] and plan.video_tokens == tokens(encoder.encode(plan))


def test_keys_that_mean_nothing_are_met_before_anything_is_decoded(processor, clip):
    encoder = ConversationEncoder(processor)
    for item in (video(clip, fpss=3), {"type": "image", "image": "a.png", "fps": 1}, {"text": "a", "id": "q"}):
        with pytest.raises(ExampleError, match="is unknown in an item of type"):
            encoder.plan(example(item))


def test_text_that_looks_like_media_is_no_fault(processor):
    with pytest.raises(ExampleError, match="the processor refuses it: The number of"):
        ConversationEncoder(processor)(example(question="<|video_pad|>"))


def test_a_header_that_lies_does_not_break_the_budget(processor, clip, monkeypatch):
    encoder = ConversationEncoder(processor, fps=8, max_video_tokens=45)
    honest = type(processor).video_reader

    def lying(self, *args, **options):
        reader = honest(self, *args, **options)
        reader.num_frames_expected = 4
        return reader

    monkeypatch.setattr(type(processor), "video_reader", lying)
    plan = encoder.plan(example(video(clip)))
    assert plan.video_tokens == 18 and tokens(encoder.encode(plan)) == 18


def test_a_video_that_says_nothing_of_its_length(processor, clip, monkeypatch):
    honest = type(processor).video_reader

    def silent(self, *args, **options):
        reader = honest(self, *args, **options)
        reader.num_frames_expected = None
        return reader

    monkeypatch.setattr(type(processor), "video_reader", silent)
    assert ConversationEncoder(processor, fps=4).plan(example(video(clip))).frames == [8]


def test_patches_in_half_precision(processor, clip):
    sample = ConversationEncoder(processor, pixel_dtype=torch.bfloat16)(example(video(clip)))
    whole = ConversationEncoder(processor)(example(video(clip)))
    assert torch.equal(sample["pixel_values_videos"], whole["pixel_values_videos"].bfloat16())


@pytest.mark.parametrize("kind", ["bytes", "stored", "data", "base64", "text", "picture", "array", "file", "path"])
def test_images_however_they_are_given(kind, processor, picture, tmp_path):
    (tmp_path / "a.png").write_bytes(png := as_png(picture))
    text = base64.b64encode(png).decode()
    source = {
        "bytes": png, "stored": {"bytes": png, "path": "gone.png"}, "data": f"data:image/png;base64,{text}",
        "base64": {"base64": text}, "text": text, "picture": picture, "array": np.asarray(picture),
        "file": f"file://{tmp_path}/a.png", "path": tmp_path / "a.png",
    }[kind]  # fmt: skip
    encoder = ConversationEncoder(processor, max_video_tokens=12, media_root="/elsewhere")
    plan = encoder.plan(example({"type": "image", "image": source}))
    found = encoder.encode(plan)
    expected = encoder(example({"type": "image", "image": str(tmp_path / "a.png")}))
    assert plan.video_tokens == tokens(found)
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


def test_an_image_at_a_url_counts_as_the_largest(processor):
    """Until the processor has fetched it, which only the caller can allow."""
    encoder = ConversationEncoder(processor, max_pixels=64 * 64, allow_urls=True)
    item = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}
    plan = encoder.plan(example(item))
    assert plan.video_tokens == 16
    with pytest.raises(ExampleError, match="http://127.0.0.1:9/a.png: cannot be read as an image"):
        encoder.encode(plan)
    encoder.allow_urls = False
    with pytest.raises(ExampleError, match="allow_urls"):
        encoder.plan(example(item))


def test_planning_decodes_no_image(processor, picture):
    """The header of this one is whole, and half of its pixels are gone."""
    png = as_png(picture)
    cut = png[: len(png) // 2]
    encoder = ConversationEncoder(processor)
    in_memory = Image.open(io.BytesIO(cut))
    for source in (cut, in_memory):
        plan = encoder.plan(example({"type": "image", "image": source}))
        assert plan.video_tokens == tokens(encoder(example({"type": "image", "image": png})))
        with pytest.raises(ExampleError, match="cannot be read as an image"):
            encoder.encode(plan)


@pytest.mark.parametrize("form", ["BMP", "TIFF", "PPM", "JPEG2000", "WEBP", "GIF"])
def test_every_format_that_is_planned_is_decoded(form, processor, picture, tmp_path):
    picture.save(path := tmp_path / "picture", form)
    encoder = ConversationEncoder(processor)
    plan = encoder.plan(example({"type": "image", "image": str(path)}))
    assert plan.video_tokens == tokens(encoder.encode(plan))


@pytest.mark.parametrize(
    "item",
    [
        {"image": 5}, {"image": [1, 2]}, {"image": {"path": 5}}, {"image": True}, {"image": "/dev/zero"},
        {"image": "http://127.0.0.1:9/a.png"}, {"image": {"url": "http://127.0.0.1:9/a.png", "allow_urls": True}},
        {"image": "a.png", "min_pixels": "100"}, {"image": "a.png", "resized_height": 10**9, "resized_width": 28},
        {"image": "a.png", "resized_height": 28}, {"video": "http://127.0.0.1:9/a.mp4"}, {"video": "a", "fps": 1e308},
        {"video": {"url": "http://127.0.0.1:9/a.mp4", "allow_urls": True}}, {"video": 5}, {"video": [5]},
    ],
    ids=str,
)  # fmt: skip
def test_whatever_is_given_as_media_is_at_most_a_broken_example(item, processor, picture, tmp_path):
    (tmp_path / "a.png").write_bytes(as_png(picture))
    with pytest.raises(UserError) as error:
        ConversationEncoder(processor, media_root=str(tmp_path))(example({"type": next(iter(item)), **item}))
    assert "\n" not in str(error.value)
