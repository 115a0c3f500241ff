"""Which frames of a video are taken, and at what size; what is asked for is checked here, before a file is opened.

Frames are chosen by presentation time, never by index over an average rate: the frame seen at time t is the last one
whose time is <= t (the first one for an earlier t). No frame is given twice, so an fps above the video's own gives each
frame once, and a corrupted timestamp cannot ask for a billion copies of one frame. Sizes follow qwen-vl-utils and
transformers (`smart_resize`, `total_pixels`).
"""

import math
from dataclasses import dataclass
from inspect import signature

from vamba.errors import VideoReadError
from vamba.modeling import media_limits


MAX_GAP = 3600.0  # seconds between two frames beyond which a timestamp is taken for damage
MAX_ASPECT_RATIO = 200
IMAGE_MIN_TOKENS, IMAGE_MAX_TOKENS = 4, 16384  # qwen-vl-utils' bounds on an explicitly asked size


@dataclass(frozen=True)
class SampleTimes:
    """Evenly spaced instants `start + i * step` for i < count (None = no last one), all before `end`; in seconds."""

    start: float
    step: float
    count: int | None = None
    end: float = math.inf

    @classmethod
    def at_rate(cls, fps, start, end):
        return cls(start, 1.0 / fps, None, math.inf if end is None else end)

    @classmethod
    def spread(cls, num_frames, start, last):
        """`num_frames` instants over [start, last], both ends included, as torch.linspace spreads them."""
        return cls(start, max(last - start, 0.0) / max(num_frames - 1, 1), num_frames)

    @classmethod
    def centers(cls, num_frames, start, end):
        """The middles of `num_frames` equal parts of [start, end]."""
        step = max(end - start, 0.0) / num_frames
        return cls(start + step / 2, step, num_frames)

    def at_or_after(self, time):
        """The first instant >= `time`, or None when all are before it. Constant time, however far the jump."""
        if time > self.start and self.step < 1e-12:  # as good as one instant
            return None
        index = math.ceil((time - self.start) / self.step) if time > self.start else 0
        if self.count is not None and index >= self.count:
            return None
        instant = self.start + index * self.step
        return instant if instant < self.end else None

    def expected(self, start_of_last, native_fps):
        """How many frames to expect of a video whose last frame starts at `start_of_last`; None if that is unknown."""
        if start_of_last is None:
            return self.count
        span = max(min(start_of_last, self.end) - self.start, 0.0)
        asked = math.floor(span / self.step + 1e-6) + 1 if self.count is None else self.count
        return min(asked, math.floor(span * native_fps + 1e-6) + 1) if native_fps else asked


class PresentationClock:
    """Times that never run backwards and never jump by hours, whatever a damaged file says.

    A missing or absurd timestamp is replaced by the previous time plus one frame interval. When the following frames
    agree on the new base (clips glued together, a counter that wrapped), that base is adopted.
    """

    def __init__(self, interval, duration=None):
        self.interval = interval
        self.horizon = duration or 0.0
        self.last = self.candidate = None
        self.offset = 0.0
        self.trusted = True

    def jump(self):
        """Forget the previous time: the next one follows a seek."""
        self.last = None

    def tick(self, raw):
        """The time of the next frame, in seconds, from its timestamp `raw` (seconds or None)."""
        if raw is not None and self.last is None:
            self.last = raw
            return raw
        last = -self.interval if self.last is None else self.last
        if raw is not None:
            for offset in (self.offset, self.candidate):
                if offset is not None and last <= raw + offset <= max(self.horizon, last + MAX_GAP):
                    self.offset, self.candidate, self.last = offset, None, raw + offset
                    return self.last
        self.trusted = False
        self.last = last + self.interval
        self.candidate = None if raw is None else self.last - raw
        return self.last


def number(name, value):
    """`value` as a checked number, or VideoReadError naming the argument. None passes."""
    try:
        return media_limits.number(name, value)
    except ValueError as error:
        raise VideoReadError(str(error)) from error


def check_times(fps, num_frames, start, end):
    """The four arguments of `read_video` as numbers or None."""
    if fps is not None and num_frames is not None:
        raise VideoReadError(f"fps={fps!r} and num_frames={num_frames!r} exclude each other: give one of them")
    fps, num_frames = number("fps", fps), number("num_frames", num_frames)
    start, end = number("start", start) or 0.0, number("end", end)
    if end is not None and end <= start:
        raise VideoReadError(f"end={end:g} must be after start={start:g} (seconds)")
    return fps, num_frames, start, None if end == math.inf else end


def check_sizes(factor, min_pixels, max_pixels, total_pixels, resized_height, resized_width, min_side, max_side):
    """The arguments of `read_video` as those of `target_size`."""
    if (resized_height is None) != (resized_width is None):
        raise VideoReadError("resized_height and resized_width belong together: give both or neither")
    return {
        "factor": number("factor", factor) or 28,
        "min_pixels": number("min_pixels", min_pixels) or 0,
        "max_pixels": number("max_pixels", max_pixels) or math.inf,
        "total_pixels": number("total_pixels", total_pixels),
        "resized_height": number("resized_height", resized_height),
        "resized_width": number("resized_width", resized_width),
        "min_side": number("min_side", min_side) or 1,
        "max_side": number("max_side", max_side) or math.inf,
    }


def check_reading(fps=None, num_frames=None, start=None, end=None, **others):
    """Raises VideoReadError for options of `read_video` that no video can be read with."""
    check_times(fps, num_frames, start, end)
    check_centered(others.get("centered", False))
    check_sizes(**{name: others.get(name) for name in signature(check_sizes).parameters})


def check_centered(centered):
    if type(centered) is not bool:
        raise VideoReadError(f"centered={centered!r:.40} must be True or False")


def target_size(
    height, width, *, factor, min_pixels, max_pixels, total_pixels=None, num_frames=1,
    resized_height=None, resized_width=None, min_side=1, max_side=math.inf,
):  # fmt: skip
    """(height, width) that a frame is brought to: multiples of `factor` within the pixel bounds, nearly the same shape.

    `total_pixels` bounds all `num_frames` frames together, as in qwen-vl-utils. `min_side` and `max_side` bound the
    sides before all else, as `get_resize_output_image_size` of Vamba's original does: a side below `min_side` is
    stretched to it by itself, whatever becomes of the shape.

    Raises VideoReadError for an aspect ratio above 200 and for bounds that exclude each other.
    """
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    if max(height, width) > max_side:
        shape = width / height
        height, width = (int(max_side / shape), max_side) if width >= height else (max_side, int(max_side * shape))
    height, width = max(height, min_side), max(width, min_side)
    if total_pixels is not None:
        max_pixels = max(min(max_pixels, total_pixels / max(num_frames, 1) * 2), int(min_pixels * 1.05))
    if resized_height is not None:
        height, width = resized_height, resized_width
        min_pixels, max_pixels = IMAGE_MIN_TOKENS * factor**2, IMAGE_MAX_TOKENS * factor**2
    if max_pixels < max(min_pixels, factor**2):
        raise VideoReadError(
            f"max_pixels={max_pixels:g} is below {'min_pixels' if min_pixels > factor**2 else 'one patch of'} "
            f"{max(min_pixels, factor**2):g}; raise it or lower min_pixels"
        )
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise VideoReadError(
            f"a frame of {width}x{height} pixels is too long and thin (aspect ratio above {MAX_ASPECT_RATIO}); "
            "crop it or pass resize=False"
        )
    return smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
