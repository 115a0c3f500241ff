"""Footage without colour, so that every colour in a video of the suite is that of a needle."""

from pathlib import Path

import numpy as np

from vamba.demo.videos import write_video


def write_footage(folder: Path, sizes=((72, 128), (128, 72))) -> Path:
    """A video of moving waves, two seconds long, of each size (height, width)."""
    folder.mkdir(parents=True)
    for index, (height, width) in enumerate(sizes):
        waves = 128 + 90 * np.sin(np.arange(width) / (4 + 3 * index)) * np.ones((height, 1))
        grey = waves.astype(np.uint8)[..., None].repeat(3, -1)
        write_video(folder / f"{index}.mp4", (np.roll(grey, 3 * frame, 1) for frame in range(16)))
    return folder
