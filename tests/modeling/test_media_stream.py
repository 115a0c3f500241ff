"""The stream of text and media: its order, its chunks, and where outputs belong."""

import pytest
import torch

from vamba.modeling.media import Run, list_media, media_of_rows, runs_of, split_runs, text_outputs


PER_FRAME = 4
VIDEOS = list_media("video", torch.zeros(128, 1), torch.tensor([[5, 4, 4], [3, 4, 4]]))
IMAGES = list_media("image", torch.zeros(16, 1), torch.tensor([[1, 4, 4]]))


def stream(text: str, items=()) -> list[list[Run]]:
    """Of one row: "." a token, "s" a `<|vision_start|>`, "_" padding or what was seen."""
    unread = torch.tensor([[c != "_" for c in text]])
    return runs_of(unread, torch.tensor([[c == "s" for c in text]]), [list(items)])


def shown(run: Run):
    return run.positions.tolist() if run.item is None else (run.positions.tolist(), run.item.first_frame, run.item.t)


def test_items_follow_their_marks_and_padding_is_left_out():
    (row,) = stream("__..s._.s", VIDEOS)
    assert list(map(shown, row)) == [[2, 3, 4], ([4], 0, 5), [5, 7, 8], ([8], 0, 3)]
    assert list(map(shown, stream("_.s.")[0])) == [[1, 2, 3]]  # a mark without media is a token like any other
    assert stream("___") == [[]]


def test_frames_that_continue_come_first_and_have_no_mark():
    continued = VIDEOS[0]._replace(first_frame=7)
    assert list(map(shown, stream("s.", [continued, VIDEOS[1]])[0])) == [([], 7, 5), [0], ([0], 0, 3), [1]]


@pytest.mark.parametrize("text", ["..", "s.", "sss"])
def test_as_many_marks_as_items(text):
    with pytest.raises(ValueError, match=rf"holds {text.count('s')} <\|vision_start\|> tokens for 2 images"):
        stream(text, VIDEOS)


@pytest.mark.parametrize("tokens", [1, 3, 4, 7, 8, 30, 1000])
def test_chunks_keep_to_their_size_and_the_order(tokens):
    streams = stream("..s......s.", VIDEOS) + stream(".....") + stream("s", VIDEOS[1:])
    seen = [[] for _ in streams]
    for chunk in split_runs(streams, tokens, PER_FRAME):
        for row, runs in zip(seen, chunk):
            length = sum(len(run.positions) if run.item is None else run.item.t * PER_FRAME for run in runs)
            assert length <= max(tokens, PER_FRAME)
            for positions, item in runs:
                if item is None:
                    row += positions.tolist()
                else:
                    row += [(item.start, frame) for frame in range(item.first_frame, item.first_frame + item.t)]
    frames = [[(start, frame) for frame in range(t)] for start, t in ((0, 5), (80, 3))]
    # an item that is cut starts where its first frame's patches do
    seen[0] = [(0 if key[0] < 80 else 80, key[1]) if isinstance(key, tuple) else key for key in seen[0]]
    seen[2] = [(80, key[1]) if isinstance(key, tuple) else key for key in seen[2]]
    assert seen[0] == [0, 1, 2, *frames[0], 3, 4, 5, 6, 7, 8, 9, *frames[1], 10]
    assert seen[1] == [0, 1, 2, 3, 4] and seen[2] == [0, *frames[1]]


def test_cut_items_know_where_their_patches_lie():
    starts = [run.item.start for chunk in split_runs(stream("s", VIDEOS[1:]), 4, 4) for run in chunk[0] if run.item]
    assert starts == [80, 96, 112]


def test_whole_streams_are_one_chunk():
    streams = stream("s.", VIDEOS[:1])
    assert list(split_runs(streams, None, 4)) == [streams] and list(split_runs([[], []], None, 4)) == []


def test_outputs_of_an_item_are_its_last_tokens():
    streams = stream("_.s.", VIDEOS[1:]) + stream("_..")
    rows, places, positions = text_outputs(streams, PER_FRAME)
    assert list(zip(rows.tolist(), places.tolist(), positions.tolist())) == [
        (0, 0, 1), (0, 1 + 12, 2), (0, 14, 3), (1, 0, 1), (1, 1, 2),
    ]  # fmt: skip
    last = list(split_runs(streams[:1], 4, 4))[1:]  # the mark's output moves on with each chunk of the item
    assert [text_outputs(chunk, 4)[1:] for chunk in last[:2]] == [(torch.tensor([3]), torch.tensor([2]))] * 2


def test_images_and_videos_keep_their_order():
    starts = torch.tensor([[True, True]])
    rows = media_of_rows(IMAGES, VIDEOS[:1], starts, torch.tensor([[2, 1]]))
    assert [item.kind for item in rows[0]] == ["video", "image"]
    for types in (None, torch.tensor([[1, 1]]), torch.tensor([[2]])):
        with pytest.raises(ValueError, match="In which order do the 1 images and 1 videos come"):
            media_of_rows(IMAGES, VIDEOS[:1], starts, types)
