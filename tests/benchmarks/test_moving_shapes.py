"""Videos made as tensors show what their answers say, as the demo's do, and the answers tell nothing of each other."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import BENCHMARKS

from vamba.demo import videos
from vamba.modeling.vision_tower import frames_of


@pytest.fixture
def moving_shapes(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import moving_shapes

    return moving_shapes


def test_videos_show_what_the_answers_say(moving_shapes):
    frames, answers = moving_shapes.make_videos(40, 32, torch.Generator().manual_seed(0))
    assert frames.shape == (40, 32, videos.SIZE, videos.SIZE, 3) and 10 <= frames.min() and frames.max() <= 245
    for video, (first, _, moment) in zip(frames, answers.tolist()):
        background = video.flatten(1, 2).median(1).values
        lit = np.flatnonzero(np.ptp(background.numpy(), axis=1) > 60)
        flashes = np.split(lit, np.flatnonzero(np.diff(lit) > 1) + 1)
        assert [len(flash) in videos.FLASH_FRAMES for flash in flashes] in ([True, True], [True])
        assert background[lit[0]].tolist() == moving_shapes.PALETTE[first].tolist()
        assert background[lit[-1]].tolist() != background[lit[0]].tolist()
        visit = torch.nonzero((video > 200).all(-1).sum((1, 2)) > 50).flatten().tolist()
        assert visit == [*range(visit[0], visit[0] + videos.VISIT_FRAMES)] and not set(visit) & set(lit)
        assert sum(flash[-1] < visit[0] for flash in flashes) == moment
        assert {0, 31}.isdisjoint([*visit, *lit])


def test_shapes_are_the_demos(moving_shapes):
    dy, dx = moving_shapes._distances(torch.tensor([20.3, 31.7]))
    masks = moving_shapes.shape_masks(dy, dx, 15)
    for mask, name in zip(masks, videos.SHAPES):
        assert (mask.numpy() == videos._mask(name, 20.3, 31.7, 15)).all()


def test_the_text_alone_tells_nothing(moving_shapes, monkeypatch):
    generator, count = torch.Generator().manual_seed(0), 6000
    monkeypatch.setattr(moving_shapes, "SIZE", 2)  # pixels, as only the answers are looked at
    _, answers = moving_shapes.make_videos(count, 20, generator)
    for column, number in zip(answers.T.tolist(), moving_shapes.NUM_ANSWERS):
        counts = Counter(column)
        assert set(counts) == set(range(number)) and max(counts.values()) < 1.15 * count / number
    for a, b in combinations(range(3), 2):
        pairs = Counter(map(tuple, answers[:, [a, b]].tolist()))
        expected = count / moving_shapes.NUM_ANSWERS[a] / moving_shapes.NUM_ANSWERS[b]
        assert max(pairs.values()) < 1.4 * expected and min(pairs.values()) > 0.6 * expected


def test_patches_are_in_the_order_of_the_processors(moving_shapes):
    frames, _ = moving_shapes.make_videos(2, 20, torch.Generator().manual_seed(0))
    patches, grid = moving_shapes.patches_of(frames, 12, 1)
    pixels = frames_of(patches, 4, 12).permute(0, 2, 3, 1) * 0.27 + 0.45
    torch.testing.assert_close(255 * pixels.reshape(frames.shape), frames)
    assert grid.tolist() == [[20, 4, 4]] * 2
    pairs, grid = moving_shapes.patches_of(frames, 12, 2)
    torch.testing.assert_close(pairs.view(-1, 16, 3, 2, 12, 12)[:, :, :, 1], patches.view(-1, 2, 16, 3, 12, 12)[:, 1])
    assert grid.tolist() == [[10, 4, 4]] * 2
