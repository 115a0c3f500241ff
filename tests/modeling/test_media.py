"""Which media belong to which row, and cutting them into chunks."""

import pytest
import torch

from vamba.modeling import video_model
from vamba.modeling.media import (
    assign_media,
    list_media,
    media_positions,
    split_frames,
    uncached_media,
    without_seen_grids,
)

import tiny_vamba
import tiny_video_ma2mba


IMAGES = list_media("image", torch.zeros(28, 1), torch.tensor([[1, 4, 6], [1, 2, 2]]))
VIDEOS = list_media("video", torch.zeros(104, 1), torch.tensor([[5, 4, 4], [2, 2, 6]]))


def starts(*counts):
    rows = torch.zeros(len(counts), 8, dtype=torch.bool)
    for row, count in zip(rows, counts):
        row[1 : 1 + 2 * count : 2] = True
    return rows


def kinds_at(mask, *kinds):
    types = torch.zeros(mask.shape, dtype=torch.long)
    types[mask] = torch.tensor(kinds)
    return types


def test_items_know_where_their_patches_lie():
    assert [(item.start, item.num_patches) for item in VIDEOS] == [(0, 80), (80, 24)]


def test_patches_and_grid_must_agree():
    assert list_media("image", None, None) == []
    with pytest.raises(ValueError, match="video_grid_thw announces 80 patches, pixel_values_videos holds 79"):
        list_media("video", torch.zeros(79, 1), torch.tensor([[5, 4, 4]]))
    with pytest.raises(ValueError, match="pixel_values came without image_grid_thw"):
        list_media("image", torch.zeros(4, 1), None)
    with pytest.raises(ValueError, match="video_grid_thw came without pixel_values_videos"):
        list_media("video", None, torch.tensor([[5, 4, 4]]))


@pytest.mark.parametrize("size", [(0, 4, 6), (2, 0, 6)])
def test_an_item_without_frames_or_patches_is_named(size):
    with pytest.raises(ValueError, match=rf"video_grid_thw holds \[{size[0]}, {size[1]}, 6\]"):
        list_media("video", torch.zeros(0, 96), torch.tensor([size]))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_batch_of_one_owns_all_media_whatever_its_text_says(count):
    assert assign_media([], VIDEOS, starts(count), None) == [VIDEOS]
    assert assign_media(IMAGES, VIDEOS, starts(count), None) == [IMAGES + VIDEOS]


def test_the_types_order_images_and_videos():
    mask = starts(4)
    rows = assign_media(IMAGES, VIDEOS, mask, kinds_at(mask, 2, 1, 1, 2))
    assert rows == [[VIDEOS[0], IMAGES[0], IMAGES[1], VIDEOS[1]]]


def test_the_nth_item_belongs_to_the_row_of_the_nth_start():
    assert assign_media([], VIDEOS, starts(0, 2, 0), None) == [[], VIDEOS, []]
    mask = starts(1, 3)
    rows = assign_media(IMAGES, VIDEOS, mask, kinds_at(mask, 1, 2, 1, 2))
    assert rows == [[IMAGES[0]], [VIDEOS[0], IMAGES[1], VIDEOS[1]]]


def test_no_media_are_none_of_any_row():
    assert assign_media([], [], starts(0), None) == [[]]
    assert assign_media([], [], starts(1, 0), None) == [[], []]


def test_a_start_typed_0_is_text():
    mask = starts(2, 1)
    assert assign_media(IMAGES, [], mask, kinds_at(mask, 1, 0, 1)) == [[IMAGES[0]], [IMAGES[1]]]
    assert assign_media([], VIDEOS, mask, kinds_at(mask, 0, 2, 2)) == [[VIDEOS[0]], [VIDEOS[1]]]
    assert assign_media(IMAGES, [], mask, kinds_at(mask, 1, 0, 1)[:, :3]) == [
        [IMAGES[0]],
        [IMAGES[1]],
    ]  # generated since
    mask = starts(2)
    assert assign_media(IMAGES[:1], [], mask, kinds_at(mask, 1, 0)) == [IMAGES[:1]]
    assert assign_media(IMAGES[:1], VIDEOS[:1], mask, kinds_at(mask, 1, 0)) == [[IMAGES[0], VIDEOS[0]]]


def test_grids_of_seen_media_need_no_pixels():
    pixels, grids = {"image": None, "video": None}, {"image": torch.ones(1, 3), "video": torch.ones(2, 3)}
    seen = [[["image", 1, 4, 4]], [["video", 2, 4, 4], ["image", 1, 4, 4]]]
    assert without_seen_grids(pixels, grids, seen) == {"image": None, "video": grids["video"]}
    assert without_seen_grids({"image": torch.zeros(4, 1), "video": None}, grids, seen)["image"] is grids["image"]


def test_a_mismatch_in_a_batch_says_both_counts():
    with pytest.raises(ValueError, match=r"hold 3 .* 0 images and 2 videos"):
        assign_media([], VIDEOS, starts(1, 2), None)


def test_mixing_without_types_in_a_batch_is_an_error():
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        assign_media(IMAGES, VIDEOS, starts(2, 2), None)


def test_media_of_the_cached_text_are_dropped():
    mask = starts(2)  # at 1 and 3
    assert uncached_media([VIDEOS], mask, None, 0) == [VIDEOS]
    assert uncached_media([VIDEOS], mask, None, 2) == [VIDEOS[1:]]
    assert uncached_media([VIDEOS], mask, None, 8) == [[]]
    assert uncached_media([VIDEOS], starts(0), None, 8) == [VIDEOS]  # not written in the text: all are new


@pytest.mark.parametrize("frames", [1, 2, 3, 7, 100])
def test_chunks_cover_each_row_once_and_in_order(frames):
    rows = [[VIDEOS[0], IMAGES[0], VIDEOS[1]], [IMAGES[1]]]
    chunks = list(split_frames(rows, frames))
    for row, items in enumerate(rows):
        runs = [run for chunk in chunks for run in chunk[row]]
        covered = [(r.kind, r.start + f * r.h * r.w) for r in runs for f in range(r.t)]
        assert covered == [(i.kind, i.start + f * i.h * i.w) for i in items for f in range(i.t)]
    assert all(sum(run.t for run in row) <= frames for chunk in chunks for row in chunk)
    assert chunks[0][0][0].first_frame == 0 and sum(run.t for chunk in chunks for run in chunk[0]) == 8


def test_no_media_gives_no_chunk():
    assert list(split_frames([[], []], 4)) == []


def test_positions_count_each_item_from_zero_across_chunks():
    whole = media_positions([VIDEOS], 2)
    pieces = [media_positions(chunk, 2) for chunk in split_frames([VIDEOS], 2)]
    assert torch.equal(torch.cat(pieces, 2), whole)
    assert whole[:, 0, :5].tolist() == [[0, 0, 0, 0, 1], [0, 0, 1, 1, 0], [0, 1, 0, 1, 0]]
    assert whole[:, 0, 20].tolist() == [0, 0, 0]  # the second video starts again


@pytest.mark.parametrize("kind", ["vamba", "video_ma2mba"])
def test_marks_of_media_that_are_not_given_are_warned_of(kind, monkeypatch):
    """In training and in generation; not where there is media, a memory, or no mark."""
    tiny = {"vamba": tiny_vamba, "video_ma2mba": tiny_video_ma2mba}[kind]
    model, told = tiny.tiny_model(), []
    monkeypatch.setattr(video_model.logger, "warning_once", told.append)
    given = tiny_video_ma2mba.video(2)
    if kind == "vamba":
        given = dict(zip(given, tiny_vamba.media((2, 4, 4))))
    ids = tiny.prompt(6, items=1)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    memory = model.encode_video(**given)
    model(tiny.prompt(6), labels=tiny.prompt(6))
    model.train()(ids, labels=ids, **given).loss.backward()
    model.eval().generate(ids, **given, **options)
    model.generate(ids, past_key_values=memory.fork(), **options)
    assert not told
    model.train()(ids, labels=ids).loss.backward()
    assert len(told) == 1 and "<|vision_start|><|vision_end|>, but neither images" in told[0]
    model.eval().generate(ids, **options)
    assert len(told) == 2


@pytest.mark.parametrize("tiny", [tiny_vamba, tiny_video_ma2mba], ids=["vamba", "video_ma2mba"])
def test_a_single_token_asks_nothing_of_its_memory(tiny):
    """A static cache keeps its length on the GPU, so a CUDA graph of text alone could not be recorded otherwise."""

    class OnTheDevice:
        video_length = 0

        def get_seq_length(self):
            raise AssertionError("waits for the device")

    model = tiny.tiny_model().model
    model.warn_of_unseen_media(tiny.prompt(1), OnTheDevice())
    with pytest.raises(AssertionError, match="waits"):
        model.warn_of_unseen_media(tiny.prompt(2), OnTheDevice())
