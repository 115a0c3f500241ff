"""What the demo's videos show, and that their questions give nothing away."""

from collections import Counter
from dataclasses import replace

import av
import numpy as np
import torch

from vamba import read_video
from vamba.demo.videos import ANSWERS, COLOURS, FPS, MOMENTS, NUM_FRAMES, SIZE, render, stories, write_video


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


def test_stories_of_several_lengths_use_all_of_their_frames():
    told = stories(300, seed=6, frames=(16, 128))
    assert [story.num_frames for story in told] == [16, 128] * 150
    assert all(len(render(story)) == story.num_frames for story in told[:2])
    ends = [max(stop for _, stop in [*story.flashes, story.visit]) for story in told[1::2]]
    assert 120 < max(ends) < 128 and min(story.flashes[0][0] for story in told[1::2]) < 5
    together = Counter((story.moment, story.num_frames) for story in told)
    assert len(together) == 6 and min(together.values()) > 35  # 50 each if independent


def test_stories_depend_on_the_seed_alone():
    assert stories(10, seed=1) == stories(10, seed=1) != stories(10, seed=2)
