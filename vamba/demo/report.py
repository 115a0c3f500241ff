"""What the demo shows at its end: a few answers and a picture of what the model saw and said."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from .evaluation import Reply
from .videos import FPS, QUESTIONS


def print_examples(replies: Sequence[Reply], videos: int = 3) -> None:
    for video in list(dict.fromkeys(reply.video for reply in replies))[:videos]:
        print(f"\n{video.name}")
        for reply in (reply for reply in replies if reply.video == video):
            verdict = "" if reply.correct else f"   (wrong: {reply.truth})"
            print(f"  {QUESTIONS[reply.kind]:32} {reply.answer}{verdict}")


def shown(share: float) -> str:
    """Two digits, cut off rather than rounded, so that 0.90 is never less than that."""
    return f"{math.floor(share * 100 + 1e-9) / 100:.2f}"


def draw_report(path: Path, replies: Sequence[Reply], processor, title: str, videos: int = 6) -> None:
    """Writes a PNG about the first `videos` videos in `replies`: the frames as the processor reads them, questions and
    answers beneath. Without matplotlib it says that there is none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"\n{path.name} was not drawn: that needs matplotlib (pip install matplotlib)")
        return
    listed = list(dict.fromkeys(reply.video for reply in replies))[:videos]
    figure = Figure(figsize=(15, 1.9 * len(listed) + 0.6), layout="constrained")
    figure.suptitle(title)
    for axes, video in zip(figure.subplots(len(listed), 1, squeeze=False)[:, 0], listed):
        frames, _ = processor.read_frames(video, fps=FPS)
        framed = torch.nn.functional.pad(frames, (0, 4), value=255)  # (T, 3, H, W), white between
        axes.imshow(framed.permute(2, 0, 3, 1).flatten(1, 2).numpy())
        axes.set_axis_off()
        axes.set_title(video.name, loc="left", fontsize=9)
        for column, reply in enumerate(reply for reply in replies if reply.video == video):
            verdict = "right" if reply.correct else f"wrong: {reply.truth}"
            axes.text(
                column / len(QUESTIONS), -0.12, f"{QUESTIONS[reply.kind]}\n{reply.answer}  ({verdict})",
                transform=axes.transAxes, va="top", fontsize=9, color="black" if reply.correct else "firebrick",
            )  # fmt: skip
    figure.savefig(path, dpi=100)
