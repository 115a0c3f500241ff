"""All that needs no video decoder: which frames are taken, at what size, as which pixels; still images and arrays.

Frames are chosen by presentation time, never by index over an average rate: the frame seen at time t is the last one
whose time is <= t (the first one for an earlier t). No frame is ever given twice, so an fps above the video's own
gives each frame once, and a corrupted timestamp cannot ask for a billion copies of one frame.
Sizes follow qwen-vl-utils and transformers (`smart_resize`, `total_pixels`). A kept frame goes to its final size in one
step of swscale (bicubic over the whole footprint, as PIL and torchvision with antialias), rotated upright, transparency
over white as in qwen-vl-utils, and interlaced frames by their top field, which needs no neighbours and so no state.
"""

import math
import os
import re
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from .pyav_versions import quarter_turns, reformat


MAX_SIDE = 16384
MAX_PIXELS = 2**28
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MAX_GAP = 3600.0  # seconds between two frames beyond which a timestamp is taken for damage
MAX_ASPECT_RATIO = 200
IMAGE_MIN_TOKENS, IMAGE_MAX_TOKENS = 4, 16384  # qwen-vl-utils' bounds on an explicitly asked size


class VideoReadError(ValueError):
    """A mistake in what was asked or given: one line that names the source, the value and the remedy."""


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

    def at_or_after(self, time):
        """The first instant >= `time`, or None when all are before it. Constant time, however far the jump."""
        if time <= self.start:
            index = 0
        elif self.step == 0.0:
            return None
        else:
            index = math.ceil((time - self.start) / self.step)
        if self.count is not None and index >= self.count:
            return None
        instant = self.start + index * self.step
        return instant if instant < self.end else None

    def expected(self, start_of_last, native_fps):
        """How many frames to expect of a video whose last frame starts at `start_of_last`; None if that is unknown."""
        if start_of_last is None:
            return self.count
        span = max(min(start_of_last, self.end) - self.start, 0.0)
        available = math.floor(span * native_fps + 1e-6) + 1 if native_fps else None
        if self.count is None:
            asked = math.floor(span / self.step + 1e-6) + 1
        else:
            asked = self.count
        return asked if available is None else min(asked, available)


class PresentationClock:
    """Times that never run backwards and never jump by hours, whatever a damaged file says.

    A missing or absurd timestamp is replaced by the previous time plus one frame interval. When the following frames
    agree on the new base (clips glued together, a counter that wrapped), that base is adopted.
    """

    def __init__(self, interval, duration=None):
        self.interval = interval
        self.horizon = duration or 0.0
        self.last = None
        self.offset = 0.0
        self.candidate = None
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


def natural_key(name):
    """Sort key under which frame10 follows frame9."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", str(name))]


def number(name, value, low=0.0, above=False, integer=False):
    """`value` as a checked number, or VideoReadError naming the argument. None passes."""
    if value is None:
        return None
    try:
        result = int(value) if integer else float(value)
        sound = not isinstance(value, bool) and result == float(value) and (result > low if above else result >= low)
    except (TypeError, ValueError, OverflowError):
        sound = False
    if not sound:
        kind = "an integer" if integer else "a number"
        raise VideoReadError(f"{name} must be {kind} {'above' if above else 'of at least'} {low:g}, got {value!r}")
    return result


def check_times(fps, num_frames, start, end):
    """The four arguments checked for themselves, before any file is opened; returns them as numbers or None."""
    if fps is not None and num_frames is not None:
        raise VideoReadError(f"fps={fps!r} and num_frames={num_frames!r} exclude each other: give one of them")
    fps = number("fps", fps, above=True)
    if fps == math.inf:
        raise VideoReadError("fps must be finite, got inf; a large value such as fps=1000 gives every frame")
    num_frames = number("num_frames", num_frames, low=1, integer=True)
    start = number("start", start)
    end = number("end", end)
    if end is not None and end <= (start or 0.0):
        raise VideoReadError(f"end={end:g} must be after start={start or 0:g} (seconds)")
    return fps, num_frames, start or 0.0, None if end == math.inf else end


def target_size(height, width, *, factor, min_pixels, max_pixels, resized_height=None, resized_width=None):
    """(height, width) that a frame is brought to: multiples of `factor` within the pixel bounds, nearly the same shape.

    Raises VideoReadError for an aspect ratio above 200 and for bounds that exclude each other.
    """
    if (resized_height is None) != (resized_width is None):
        raise VideoReadError("resized_height and resized_width belong together: give both or neither")
    if resized_height is not None:
        height = number("resized_height", resized_height, low=1, integer=True)
        width = number("resized_width", resized_width, low=1, integer=True)
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
    try:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
    except ImportError as error:
        raise VideoReadError(f"resizing needs torchvision ({error}); pip install torchvision") from error
    return smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)


def pixels_per_frame(num_frames, *, min_pixels, max_pixels, total_pixels):
    """`max_pixels` of one frame when all frames together may have `total_pixels`, as in qwen-vl-utils."""
    if total_pixels is None:
        return max_pixels
    return max(min(max_pixels, total_pixels / max(num_frames, 1) * 2), int(min_pixels * 1.05))


def to_rgb(av, reformatter, frame, height, width, threads=0):
    """A PyAV frame upright as uint8 RGB (3, height, width); `reformatter` keeps swscale's tables between frames."""
    turns = quarter_turns(frame)
    if turns % 2:
        height, width = width, height
    if frame.interlaced_frame:
        frame = _top_field(av, frame)
    if any(component.is_alpha for component in frame.format.components):
        frame = _over_white(av, frame)
    planar = reformat(reformatter, frame, width, height, "gbrp", threads)
    green, blue, red = (
        np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:height, :width] for plane in planar.planes
    )
    pixels = np.stack([red, green, blue])
    return np.ascontiguousarray(np.rot90(pixels, turns, axes=(1, 2))) if turns else pixels


def _top_field(av, frame):
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format.name, time_base=frame.time_base or Fraction(1, 1000)
    )
    field, sink = graph.add("field", "type=top"), graph.add("buffersink")
    source.link_to(field)
    field.link_to(sink)
    graph.configure()
    graph.push(frame)
    return graph.pull()


def _over_white(av, frame):
    rgba = frame.to_ndarray(format="rgba").astype(np.uint16)
    color, alpha = rgba[..., :3], rgba[..., 3:]
    blended = (color * alpha + 255 * (255 - alpha) + 127) // 255
    return av.VideoFrame.from_ndarray(blended.astype(np.uint8), format="rgb24")


def import_av(name):
    try:
        import av
    except ImportError as error:
        raise VideoReadError(f"{name}: reading video needs PyAV; pip install av") from error
    return av


def check_picture_size(name, width, height):
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise VideoReadError(
            f"{name}: pictures of {width}x{height} pixels are too large (limit {MAX_SIDE} a side); scale the video down"
        )


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video before it is read. Sizes are those of the upright (rotated) picture."""

    name: str
    duration: float | None
    fps: float | None
    width: int
    height: int
    codec: str
    rotation: int = 0
    total_frames: int | None = None


class StillClip:
    """Images or arrays as a video whose n-th frame stands at n / source_fps; its own stream, nothing has to be open."""

    def __init__(self, name, pictures, source_fps):
        if not len(pictures):
            raise VideoReadError(f"{name}: holds no frames; give at least one")
        self.name, self._pictures, self._rate = name, pictures, source_fps
        height, width = pictures[0].shape[:2]
        check_picture_size(name, width, height)
        count = len(pictures)
        self.info = VideoInfo(name, count / source_fps, source_fps, width, height, "images", 0, count)

    def last_time(self):
        return (len(self._pictures) - 1) / self._rate

    def open(self):
        return StillStream(self.name, self._pictures, self._rate)


class StillStream:
    """One pass over a StillClip: pictures are index numbers, loaded only when rendered."""

    lost = packets = damaged = 0
    tolerance = 1e-6
    end_time = None

    def __init__(self, name, pictures, rate):
        self._av = import_av(name)
        self._pictures, self._rate, self._index = pictures, rate, 0
        self._reformatter = self._av.video.reformatter.VideoReformatter()

    def pictures(self):
        while self._index < len(self._pictures):
            index = self._index
            self._index += 1
            self.end_time = (index + 1) / self._rate
            yield index / self._rate, index

    def skip_to(self, target):
        last = min(math.floor((target + self.tolerance) * self._rate), len(self._pictures) - 1)
        self._index = max(self._index, last)

    def render(self, index, height, width):
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(self._pictures[index]), format="rgb24")
        return to_rgb(self._av, self._reformatter, frame, height, width)

    def missing_from_end(self):
        return 0.0

    def close(self):
        pass


class Images:
    """Image files or PIL images as a sequence of uint8 (H, W, 3) arrays, loaded when asked for."""

    def __init__(self, items, name):
        self._items, self._name = items, name

    def __len__(self):
        return len(self._items)

    def __getitem__(self, index):
        item = self._items[index]
        shown = self._name if hasattr(item, "convert") else item
        try:
            from PIL import Image, ImageOps
        except ImportError as error:
            raise VideoReadError(f"{self._name}: reading images needs Pillow; pip install pillow") from error
        try:
            image = item if hasattr(item, "convert") else Image.open(item)
            check_picture_size(shown, *image.size)
            image = ImageOps.exif_transpose(image).convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return np.asarray(Image.alpha_composite(white, image).convert("RGB"))
        except VideoReadError:
            raise
        except Exception as error:
            raise VideoReadError(f"{shown}: cannot be read as an image ({error})") from error
        finally:
            if not hasattr(item, "convert") and "image" in locals():
                image.close()


def images_of_folder(folder, name):
    try:
        files = [entry for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file()]
    except OSError as error:
        reason = f"the folder cannot be listed ({error.strerror}); check its permissions"
        raise VideoReadError(f"{name}: {reason}") from error
    if not files:
        raise VideoReadError(f"{name}: the folder holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted(files, key=lambda path: natural_key(path.name))


def list_pictures(items, name):
    if items and all(getattr(item, "ndim", None) == 3 for item in items):  # frames one by one
        if len({tuple(item.shape) for item in items}) > 1:
            raise VideoReadError(f"{name}: the frames differ in shape; resize them alike or pass PIL images")
        return array_pictures((torch.stack if torch.is_tensor(items[0]) else np.stack)(list(items)), name)
    for index, item in enumerate(items):
        if not isinstance(item, (str, os.PathLike)) and not hasattr(item, "convert"):
            kind = type(item).__name__
            raise VideoReadError(f"{name}: item {index} is {kind}; a list holds image paths, PIL images or arrays")
    return Images(items, name)


def array_pictures(array, name):
    """(T, H, W, 3) uint8 out of an array or tensor, channels last or first (in doubt: as usual for its kind)."""
    tensor = torch.is_tensor(array)
    array = array.detach().cpu() if tensor else np.asarray(array)
    shape = tuple(array.shape)
    axes = [axis for axis in ((1, 3) if tensor else (3, 1)) if len(shape) == 4 and shape[axis] == 3]
    if not axes or min(shape[1:]) == 0:
        raise VideoReadError(f"{name}: shape {shape} is no video; give (T, H, W, 3) or (T, 3, H, W)")
    if tensor:
        array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    if array.dtype.kind == "f":
        if not (array.min(initial=0) >= 0 and array.max(initial=0) <= 1):
            raise VideoReadError(f"{name}: float frames must lie in [0, 1]; pass uint8 for 0 to 255")
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise VideoReadError(f"{name}: frames are {array.dtype}; give uint8, or floats in [0, 1]")
    return array if axes[0] == 3 else array.transpose(0, 2, 3, 1)
