"""Synthetic H.264 videos in which three brief things happen, and what may be asked about them.

Two coloured balls bounce through the picture all the time. At random moments, one after the other and in any order,
the picture flashes in two different colours and a white shape comes in from one side and leaves again. The balls have
the colours of the flashes, so a colour that is seen somewhere tells nothing: one has to notice what was brief, and what
came before what. Who sees the frames but not their order cannot tell which of two colours flashed first.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, cycle, islice, permutations
from pathlib import Path

import av
import numpy as np


SIZE = 48  # pixels, both ways
FPS = 8
NUM_FRAMES = 24  # at least 16, so that everything finds its place
FLASH_FRAMES = (2, 3)
VISIT_FRAMES = 6
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 80, 235),
    "yellow": (240, 220, 40),
    "purple": (170, 50, 210),
    "cyan": (60, 215, 225),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
MOMENTS = ("before the flashes", "between the flashes", "after the flashes")
QUESTIONS = {
    "first": "Which colour flashed first?",
    "shape": "Which shape came in?",
    "moment": "When did the shape come in?",
}
ANSWERS = {"first": tuple(COLOURS), "shape": SHAPES, "moment": MOMENTS}
Span = tuple[int, int]  # first frame, and the frame after the last


@dataclass(frozen=True)
class Story:
    """What happens in one video, and when. `first`, `shape` and `moment` are the answers to the questions."""

    first: str
    second: str
    shape: str
    moment: str
    flashes: tuple[Span, Span]
    visit: Span
    num_frames: int
    seed: int

    def answer(self, kind: str) -> str:
        return getattr(self, kind)


def stories(count: int, seed: int, frames: Sequence[int] = (NUM_FRAMES,)) -> list[Story]:
    """`count` stories: every answer to a question is as frequent as every other, and none goes with another.

    They have these numbers of frames in turn.
    """
    rng = random.Random(seed)

    def balanced(values):
        values = list(values)
        rng.shuffle(values)  # so that a remainder does not always favour the same ones
        chosen = list(islice(cycle(values), count))
        rng.shuffle(chosen)
        return chosen

    columns = zip(balanced(permutations(COLOURS, 2)), balanced(SHAPES), balanced(MOMENTS), cycle(frames))
    return [_story(*pair, shape, moment, num_frames, rng) for pair, shape, moment, num_frames in columns]


def _story(first: str, second: str, shape: str, moment: str, num_frames: int, rng: random.Random) -> Story:
    """Spreads the three events over the video, with at least one quiet frame around each."""
    lengths = [rng.choice(FLASH_FRAMES), rng.choice(FLASH_FRAMES)]
    lengths.insert(MOMENTS.index(moment), VISIT_FRAMES)
    slack = num_frames - sum(lengths) - 4
    cuts = sorted(rng.randint(0, slack) for _ in lengths)
    spans, frame = [], 0
    for length, now, earlier in zip(lengths, cuts, [0, *cuts]):
        start = frame + 1 + now - earlier
        frame = start + length
        spans.append((start, frame))
    visit = spans.pop(MOMENTS.index(moment))
    return Story(first, second, shape, moment, tuple(spans), visit, num_frames, rng.randrange(2**32))


def render(story: Story) -> np.ndarray:
    """The frames, uint8 (story.num_frames, SIZE, SIZE, 3)."""
    rng = np.random.default_rng(story.seed)
    frames = np.empty((story.num_frames, SIZE, SIZE, 3), np.uint8)
    frames[:] = rng.integers(10, 60)
    for (start, stop), colour in zip(story.flashes, (story.first, story.second)):
        frames[start:stop] = COLOURS[colour]
    for path, colour in _balls(rng, story.num_frames):
        for frame, (y, x) in zip(frames, path):
            frame[_mask("circle", y, x, 5)] = colour
    for index, (y, x) in zip(range(*story.visit), _visit(rng)):
        frames[index][_mask(story.shape, y, x, 15)] = 245
    return frames


def _balls(rng: np.random.Generator, num_frames: int) -> Iterator[tuple[np.ndarray, tuple[int, int, int]]]:
    """Two balls: the centres (num_frames, 2), reflected at the borders, and the colour of each."""
    palette = list(COLOURS.values())
    for colour in rng.choice(len(palette), 2, replace=False):
        start, speed = rng.uniform(0, 2 * SIZE, 2), rng.uniform(-3, 3, 2)
        path = (start + speed * np.arange(num_frames)[:, None]) % (2 * SIZE)
        yield np.minimum(path, 2 * SIZE - path), palette[colour]


def _visit(rng: np.random.Generator) -> np.ndarray:
    """The way of the shape, (VISIT_FRAMES, 2): from beyond one side to near the middle, and back."""
    middle = SIZE / 2 + rng.uniform(-4, 4, 2)
    outside = middle.copy()
    outside[rng.integers(2)] = rng.choice([-8, SIZE + 8])
    nearness = np.array([0.35, 0.9, 1.0, 1.0, 0.9, 0.35])
    return outside + nearness[:, None] * (middle - outside)


def _mask(shape: str, y: float, x: float, radius: float) -> np.ndarray:
    """The pixels of a shape around (y, x), bool (SIZE, SIZE)."""
    dy, dx = np.mgrid[:SIZE, :SIZE] - np.array([y, x])[:, None, None]
    if shape == "circle":
        return dy**2 + dx**2 <= radius**2
    if shape == "square":
        return np.maximum(abs(dy), abs(dx)) <= 0.85 * radius
    if shape == "triangle":
        return (abs(dx) <= (dy + radius) / 2) & (dy <= 0.8 * radius)
    if shape == "ring":
        return (dy**2 + dx**2 <= radius**2) & (dy**2 + dx**2 >= (0.55 * radius) ** 2)
    if shape == "bar":
        return (abs(dy) <= 0.3 * radius) & (abs(dx) <= radius)
    return (np.minimum(abs(dy), abs(dx)) <= 0.3 * radius) & (np.maximum(abs(dy), abs(dx)) <= radius)


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int = FPS, crf: int = 18) -> Path:
    """Encodes uint8 (H, W, 3) frames as H.264 in an mp4 file; returns its path."""
    frames = iter(frames)
    first = next(frames)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "veryfast", "crf": f"{crf}"})
        stream.height, stream.width = first.shape[:2]
        stream.codec_context.thread_count = 1  # starting threads takes longer than encoding so small a video
        stream.codec_context.time_base = Fraction(1, fps)
        for frame in chain([first], frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path
