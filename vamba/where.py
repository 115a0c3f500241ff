"""Where did it look? The attention of an answer over the time and the frames of what was watched.

What is unusual: it is computed when it is asked for, from the ids of the answer (see `attention_map`); until then an
answer costs nothing more. Frames are read again from where they came from, a few for a report; what cannot be read
again (arrays, memories from files) is a grey tile with its time, or is shown from a `video` that is named.

Shapes: T temporal patches of one medium, each of h x w video tokens; A answer tokens.
"""

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .attention_map import Heads, attention_map
from .errors import MissingPathError, UserError, VideoReadError, opening
from .modeling import StateMemory, VideoMemory
from .modeling.images import is_image, open_image
from .video import read_video


if TYPE_CHECKING:
    from .chat import VideoChat

WIDTH = 480  # pixels of the picture of a moment
HALF = 0.5  # a moment reaches as far as the curve stays above this share of its peak
LEAST = 0.01  # of the highest peak; a lower one is no moment


class Source(NamedTuple):
    """Where some frames of a medium came from, to be read again."""

    medium: int  # counted from 0 in the memory
    first: int  # temporal patch of the medium
    shift: float  # seconds from the clock of the source to that of the memory
    video: Any
    options: dict[str, Any]
    stamp: tuple[int, int] | None = None  # size and time of change of a file; None of anything else

    @property
    def can_be_read(self) -> bool:
        """Whether it is still what was watched."""
        return self.video is not None and self.stamp in (None, _stamp(self.video))


class Answer(NamedTuple):
    """What `where` needs of an answer: ids (1, N) of the prompt and (1, A) of the answer without what
    ends it, on the CPU, and the memory that was asked with the media it held then; its video is not kept for this."""

    question: str
    text: str
    prompt: Tensor
    ids: Tensor
    memory: "weakref.ref[VideoMemory | StateMemory]"
    media: list[list[list]]


class Curve(NamedTuple):
    """Of one medium: the span of each temporal patch in seconds, float64 (T, 2), NaN where it is unknown; its share of
    all that was looked at, float32 (T,), which sums to the medium's share; and that of each token, (T, h, w)."""

    kind: str
    seconds: Tensor
    weights: Tensor
    heat: Tensor

    @property
    def heights(self) -> Tensor:
        """`weights` (T,) by the time they last: per patch of the usual length."""
        lasting = self.seconds[:, 1] - self.seconds[:, 0]
        usual = lasting[lasting > 0].median() if (lasting > 0).any() else torch.tensor(1.0)
        return self.weights * torch.where(lasting > 0, usual / lasting, 1.0).to(self.weights)


class Moment(NamedTuple):
    """Where a curve peaks: from `start` to `end` in seconds (NaN where unknown), the share of what was looked at there,
    the medium, and in it the temporal patches `patches.start` to `patches.stop`, of which `peak` is the highest."""

    start: float
    end: float
    share: float
    medium: int
    patches: tuple[int, int]
    peak: int

    @property
    def when(self) -> str:
        """From when to when, to be read."""
        known = self.start == self.start and self.end == self.end
        return f"{clock(self.start)} – {clock(self.end)}" if known else f"frame {self.peak + 1}, time unknown"

    def __str__(self) -> str:
        return f"{self.when}  {self.share:.0%}"


def source_of(
    memory: VideoMemory | StateMemory, video: Any, options: dict, spans: Tensor | None = None, fps: float | None = None
) -> Source:
    """Of what was just watched into a memory: an image, or frames with these `spans` by their own clock.

    Only paths, URLs and images are kept: an array would be held as long as the memory is, and a stream is gone.
    """
    medium, times = len(memory.media[0]) - 1, memory.times[0][-1]
    first = 0 if spans is None else len(times) - len(spans)
    shift = 0.0 if spans is None else float(times[first, 0] - spans[0, 0])
    is_name = isinstance(video, (str, os.PathLike)) and not os.fspath(video).startswith("data:")
    kept = {name: options[name] for name in ("allow_urls", "backend") if name in options}
    source_fps = {"source_fps": fps} if fps else {}  # of a folder of images
    video = video if is_name or isinstance(video, Image.Image) else None
    return Source(medium, first, shift, video, kept | source_fps, _stamp(video))


def _stamp(video: Any) -> tuple[int, int] | None:
    """Size and time of the last change where this is the path of something; None otherwise."""
    if not isinstance(video, (str, os.PathLike)):
        return None
    try:
        about = os.stat(os.fspath(video).removeprefix("file://") if isinstance(video, str) else video)
    except (OSError, ValueError):  # a URL; or it is gone
        return None
    return about.st_size, about.st_mtime_ns


class Where:
    """Where an answer looked. `VideoChat.where` makes it.

    Attributes:
        question, answer: the texts.
        reduction: how layers, heads and tokens became one number, in a sentence.
        curves: a `Curve` for each medium, in order.
        by_token: float32 (A, sum of T): the share of each temporal patch for each token of the answer; all sum to 1.
    """

    def __init__(
        self, question: str, answer: str, reduction: str, curves: list[Curve], by_token: Tensor, sources: list[Source]
    ):
        self.question, self.answer, self.reduction = question, answer, reduction
        self.curves, self.by_token, self._sources = curves, by_token, sources

    def moments(self, count: int = 5) -> list[Moment]:
        """At most `count` peaks, the highest first, none within another.

        A peak is no lower than its neighbours, nor than a hundredth of the highest; its moment reaches to where the
        curve falls below half of it, or to another moment.
        """
        found: list[Moment] = []
        taken = [torch.zeros(len(curve.weights), dtype=torch.bool) for curve in self.curves]
        heights = [curve.heights for curve in self.curves]
        peaks = [(float(heights[i][at]), i, at) for i in range(len(heights)) for at in _peaks(heights[i])]
        highest = max(peaks, default=(0.0,))[0]
        for height, medium, at in sorted(peaks, key=lambda peak: -peak[0]):
            if len(found) == count or height < LEAST * highest:
                break
            if taken[medium][at]:
                continue
            free = (heights[medium] >= HALF * height) & ~taken[medium]
            start, stop = _run(free, at)
            taken[medium][start:stop] = True
            seconds, weights = self.curves[medium].seconds, self.curves[medium].weights
            share = float(weights[start:stop].sum())
            span = float(seconds[start, 0]), float(seconds[stop - 1, 1])
            found.append(Moment(*span, share, medium, (start, stop), at))
        return found

    def picture(self, moment: Moment, video: Any = None, width: int = WIDTH) -> Image.Image:
        """The first frame of the moment's peak with its heat map over it, RGB, `width` pixels wide.

        Args:
            video: where to read the frame instead, e.g. the path of the file that a loaded memory was made of.
        """
        frame = self.frame(moment.medium, moment.peak, video, width)
        return overlaid(frame, self.curves[moment.medium].heat[moment.peak])

    def frame(self, medium: int, patch: int, video: Any = None, width: int = WIDTH) -> Image.Image:
        """The first frame of a temporal patch, RGB; a grey tile with its time where it cannot be read again."""
        curve = self.curves[medium]
        start = float(curve.seconds[patch, 0])
        found = [source for source in self._sources if source.medium == medium and source.first <= patch]
        if video is not None and (curve.kind == "image") == is_image(video):
            found = [Source(medium, 0, 0.0, video, {}, _stamp(video))]
        if found and found[-1].can_be_read:
            try:
                frame = _read_again(curve.kind, start, found[-1])
                size = width, max(1, round(width * frame.height / frame.width))
                return frame.resize(size, Image.Resampling.LANCZOS)
            except ValueError:
                if video is not None:
                    raise
        h, w = curve.heat.shape[1:]
        tile = Image.new("RGB", (width, max(1, round(width * h / w))), (128, 128, 128))
        text = "image" if curve.kind == "image" else clock(start)
        middle = width / 2, tile.height / 2
        ImageDraw.Draw(tile).text(middle, text, "white", anchor="mm", font_size=max(10, width // 8))
        return tile

    @property
    def unread(self) -> bool:
        """Whether frames of some medium have no source that they could be read from again."""
        told = {source.medium for source in self._sources}
        return told != set(range(len(self.curves))) or not all(source.can_be_read for source in self._sources)

    def save(self, path: str | os.PathLike, video: Any = None) -> None:
        """Writes a report: one self-contained .html page, or a .png, which needs matplotlib.

        Args:
            video: the file to take the frames of the video from, where it cannot be read again.

        Raises:
            UserError: another ending, no matplotlib, or one file for several videos. OSError: it cannot be written.
        """
        from .where_report import save

        if video is not None and (count := sum(curve.kind == "video" for curve in self.curves)) > 1:
            raise UserError(f"One file is named for {count} videos; `frame` takes one for each medium.")
        save(self, path, video)


def check_report_path(path: str | os.PathLike) -> Path:
    """Raises UserError where no report can be written to `path`; before anything is watched, say."""
    path = Path(path)
    if path.suffix.lower() not in (".html", ".png"):
        raise UserError(f"{os.fspath(path)!r:.80} is neither .html nor .png; give a name that ends so.")
    with opening(path):
        if not path.parent.is_dir():
            raise MissingPathError(f"{path} cannot be written: there is no such folder; make it first.")
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UserError(f"{path} cannot be written; give another name.")
    if path.suffix.lower() == ".png":
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError as error:
            raise UserError("A .png needs matplotlib (pip install 'vamba[plots]'); or give a .html.") from error
    return path


def look(
    chat: "VideoChat",
    answer: int = -1,
    layers: Sequence[int] | None = None,
    heads: Heads = "mean",
    by: str = "contribution",
) -> Where:
    """See `VideoChat.where`."""
    memory = chat.memory
    if memory is None:
        raise UserError("Nothing was watched yet, so nobody looked anywhere; watch and ask first.")
    if not isinstance(memory, VideoMemory):
        raise UserError("A Video-Ma2mba has no attention that could tell where it looked; ask a Vamba.")
    try:
        told = chat.answers[answer]
    except (IndexError, TypeError) as error:
        raise UserError(f"answer={answer!r:.40}: {len(chat.answers)} answers are known; ask first.") from error
    row = memory.video_rows[0] if memory.video_rows else 0
    if told.memory() is not memory or told.media != memory.media:
        raise UserError("What was watched has changed since this answer; ask again.")
    lengths = [t for _, t, _, _ in memory.media[row]]
    patches_M = memory.token_patches(row)
    ids = [ids.to(chat.model.device) for ids in (told.prompt, told.ids)]
    options: dict[str, Any] = {"layers": layers, "heads": heads, "by": by}
    by_video, by_token = attention_map(chat.model, memory.fork(), *ids, patches_M, **options)
    of_media = by_video.split(torch.bincount(_media_of_patches(lengths)[patches_M], minlength=len(lengths)).tolist())
    curves = []
    for (kind, t, h, w), seconds, weights in zip(memory.media[row], memory.times[row], of_media):
        side = (h * w // (len(weights) // t)) ** 0.5  # patches merged along each side
        heat = weights.view(t, round(h / side), round(w / side))
        curves.append(Curve(kind, seconds, heat.sum((1, 2)), heat))
    sources = getattr(memory, "sources", [])
    return Where(told.question, told.text, _in_words(layers, heads, by), curves, by_token, sources)


def _read_again(kind: str, start: float, source: Source) -> Image.Image:
    if kind == "image":
        return open_image(source.video, allow_urls=source.options.get("allow_urls", False))
    if start != start:
        raise VideoReadError("nobody knows when the frame was shown")
    at = max(0.0, start - source.shift)
    with read_video(source.video, fps=1.0, start=at, resize=False, chunk_frames=1, **source.options) as reader:
        return Image.fromarray(next(iter(reader)).frames[0].permute(1, 2, 0).numpy())


def _media_of_patches(lengths: list[int]) -> Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def _in_words(layers: Sequence[int] | None, heads: Heads, by: str) -> str:
    of = "all layers" if layers is None else f"layers {', '.join(map(str, layers))}"
    over = {"mean": "the mean over heads", "max": "the largest of the heads"}
    how = over[heads] if isinstance(heads, str) else f"the mean over heads {', '.join(map(str, heads))}"
    what = "squared length of what each brings (weight times value after the output projection, times 1 - alpha)"
    return f"Cross-attention of the answer's tokens, {what if by == 'contribution' else 'weights'}; {how}, over {of}."


def _peaks(heights: Tensor) -> list[int]:
    """Where a curve is no lower than beside it; of equal neighbours the first."""
    padded = torch.nn.functional.pad(heights, (1, 1), value=-1.0)
    return ((heights > padded[:-2]) & (heights >= padded[2:]) & (heights > 0)).nonzero().flatten().tolist()


def _run(free: Tensor, at: int) -> tuple[int, int]:
    """The first and the place after the last of the neighbours of `at` that are all `free`."""
    blocked = (~free).nonzero().flatten()
    before, after = blocked[blocked < at], blocked[blocked > at]
    return int(before[-1]) + 1 if len(before) else 0, int(after[0]) if len(after) else len(free)


def overlaid(frame: Image.Image, heat: Tensor, most: Tensor | None = None) -> Image.Image:
    """A frame darkened where nothing was looked at, and warm where most was; `heat` (h, w) is stretched over it.

    `most` is the heat that counts as all; None for the frame's own.
    """
    strength = (heat / (heat.max() if most is None else most).clamp(min=1e-12) * 255).byte().numpy()
    mask = Image.fromarray(strength).resize(frame.size, Image.Resampling.BICUBIC)
    warm = Image.new("RGB", frame.size, (255, 96, 0))
    dark = Image.blend(frame, Image.new("RGB", frame.size, (0, 0, 0)), 0.35)
    bright = Image.blend(frame, warm, 0.45)
    return Image.composite(bright, dark, mask)


def clock(seconds: float) -> str:
    """h:mm:ss, with tenths within the first minute; "?" for NaN."""
    if seconds != seconds:
        return "?"
    minutes, rest = divmod(round(seconds, 1), 60)
    shown = f"{rest:04.1f}" if minutes == 0 else f"{int(rest):02}"
    return f"{int(minutes // 60)}:{int(minutes % 60):02}:{shown}"
