"""A picture of what the model saw and said: a strip of frames for each video, questions and answers beneath."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import ProcessorMixin

from .evaluation import Reply
from .videos import FPS, QUESTIONS


def draw_report(path: Path, replies: Sequence[Reply], processor: ProcessorMixin, title: str, videos: int = 6) -> None:
    """Writes a PNG about the first `videos` videos in `replies`, with the frames as the processor reads them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = list(dict.fromkeys(reply.video for reply in replies))[:videos]
    figure = Figure(figsize=(15, 1.9 * len(shown) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever backend is configured
    figure.suptitle(title)
    rows = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, video in zip(rows, shown):
        frames, _ = processor.read_frames(video, fps=FPS)
        axes.imshow(filmstrip(frames).permute(1, 2, 0).numpy())
        axes.set_axis_off()
        axes.set_title(video.name, loc="left", fontsize=9)
        for column, reply in enumerate(reply for reply in replies if reply.video == video):
            verdict = "right" if reply.correct else f"wrong: {reply.truth}"
            axes.text(
                column / len(QUESTIONS), -0.12, f"{QUESTIONS[reply.kind]}\n{reply.answer}  ({verdict})",
                transform=axes.transAxes, va="top", fontsize=9, color="black" if reply.correct else "firebrick",
            )  # fmt: skip
    figure.savefig(path, dpi=100)


def filmstrip(frames: torch.Tensor, gap: int = 4) -> torch.Tensor:
    """uint8 frames (T, 3, H, W) side by side with white between, (3, H, T * (W + gap))."""
    framed = torch.nn.functional.pad(frames, (0, gap), value=255)
    return framed.permute(1, 2, 0, 3).flatten(2)
