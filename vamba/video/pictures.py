"""Decoded frames, images and arrays to RGB of the size that is wanted; images and arrays as a video.

A kept frame goes to its final size in one step of swscale (bicubic over the whole footprint, as PIL and torchvision
with antialias), rotated upright, transparency over white as in qwen-vl-utils, and interlaced frames by their top field,
which needs no neighbours and so no state.
"""

import copy
import math
import os
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from vamba.errors import VideoReadError
from vamba.modeling.images import IMAGE_SUFFIXES, open_image
from vamba.modeling.media_limits import MAX_AREA, MAX_SIDE, check_memory, media_memory

from .pyav_versions import quarter_turns, reformat


PNG_MARK = b"\x89PNG\r\n\x1a\n"  # the first bytes of each
REFERENCES = 5  # pictures that a decoder keeps, besides two for each of its threads
PROCESSED = 6  # bytes per pixel of a finished frame while it is made and put into a chunk


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


def check_picture_size(width, height):
    if max(width, height) > MAX_SIDE or width * height > MAX_AREA:
        raise VideoReadError(
            f"pictures of {width}x{height} pixels are too large (limit {MAX_SIDE} a side); scale the video down"
        )


def few_at_once(size):
    """How many things of `size` bytes may be held at once where one would do: an eighth of the memory for media."""
    return max(media_memory() // 8 // max(size, 1), 1)


def check_decoding(width, height, form):
    """Raises ValueError where pictures of this size and PyAV pixel format (None: unknown) do not fit the memory.

    Returns the bytes of one picture as it is decoded.
    """
    check_picture_size(width, height)
    picture = width * height * (form.padded_bits_per_pixel if form else 32) // 8
    over_white = 7 * width * height if form and _has_alpha(form) else 0
    needed = (REFERENCES + 2) * picture + over_white
    check_memory(f"decoding pictures of {width}x{height} pixels", needed, "scale the video down")
    return picture


def _has_alpha(form):
    return any(component.is_alpha for component in form.components)


def to_rgb(reformatter, frame, height, width, threads=0):
    """A PyAV frame upright as uint8 RGB (3, height, width); `reformatter` keeps swscale's tables between frames."""
    turns = quarter_turns(frame)
    if turns % 2:
        height, width = width, height
    if frame.interlaced_frame:
        frame = _top_field(frame)
    if _has_alpha(frame.format):
        frame = _over_white(frame)
    planar = reformat(reformatter, frame, width, height, "gbrp", threads)
    green, blue, red = (
        np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:height, :width] for plane in planar.planes
    )
    pixels = np.stack([red, green, blue])
    return np.ascontiguousarray(np.rot90(pixels, turns, axes=(1, 2))) if turns else pixels


def _top_field(frame):
    graph = av.filter.Graph()
    size = {"width": frame.width, "height": frame.height, "format": frame.format.name}
    source = graph.add_buffer(**size, time_base=frame.time_base or Fraction(1, 1000))
    graph.link_nodes(source, graph.add("field", "type=top"), graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()


def _over_white(frame):
    """Blends in strips, as a picture in 16 bits would take more than everything else."""
    rgba, opaque = frame.reformat(format="rgba"), av.VideoFrame(frame.width, frame.height, "rgb24")
    source, target = (np.frombuffer(each.planes[0], np.uint8).reshape(frame.height, -1) for each in (rgba, opaque))
    for rows in np.array_split(np.arange(frame.height), -(-frame.height // 64)):
        strip = source[rows, : 4 * frame.width].reshape(len(rows), -1, 4).astype(np.uint16)
        color, alpha = strip[..., :3], strip[..., 3:]
        blended = (color * alpha + 255 * (255 - alpha) + 127) // 255
        target[rows, : 3 * frame.width] = blended.reshape(len(rows), -1)
    return opaque


class ArrayClip:
    """What clips share whose pictures come as RGB arrays: nothing of them is lost, and a clip is its own stream."""

    damaged = lost = packets = 0
    tolerance = 1e-6
    end_time = None

    def open(self):
        stream = copy.copy(self)
        stream._reformatter = VideoReformatter()
        return stream

    def array(self, picture):
        """uint8 (H, W, 3) of what `pictures` has given."""
        raise NotImplementedError

    def render(self, picture, height, width):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(self.array(picture)), format="rgb24")
        return to_rgb(self._reformatter, frame, height, width)

    def missing_from_end(self):
        return 0.0

    def close(self):
        pass


class StillClip(ArrayClip):
    """Images or arrays as a video whose n-th frame stands at n / source_fps; images are loaded when rendered."""

    def __init__(self, name, stills, source_fps):
        if not len(stills):
            raise VideoReadError("holds no frames; give at least one")
        self._stills, self._rate, self._index = stills, source_fps, 0
        height, width = self.array(0).shape[:2]
        check_picture_size(width, height)
        count = len(stills)
        self.info = VideoInfo(name, count / source_fps, source_fps, width, height, "images", 0, count)

    def last_time(self):
        return (len(self._stills) - 1) / self._rate

    def pictures(self):
        while self._index < len(self._stills):
            index = self._index
            self._index += 1
            self.end_time = (index + 1) / self._rate
            yield index / self._rate, index

    def skip_to(self, target):
        last = min(math.floor((target + self.tolerance) * self._rate), len(self._stills) - 1)
        self._index = max(self._index, last)

    def array(self, picture):
        still = self._stills[picture]
        return still if isinstance(still, np.ndarray) else np.asarray(open_image(still, over_white=True))


def is_still_png(source):
    """Whether a file or bytes are a PNG that is not animated, which FFmpeg tells nothing of before it decodes it."""
    if isinstance(source, Path):
        with open(source, "rb") as file:
            source = file.read(2**16)
    return isinstance(source, bytes) and source.startswith(PNG_MARK) and b"acTL" not in source[: 2**16]


def images_of_folder(folder):
    """The image files of a folder, frame9 before frame10."""
    try:
        files = [entry for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file()]
    except OSError as error:
        raise VideoReadError(f"the folder cannot be listed ({error.strerror}); check its permissions") from error
    if not files:
        raise VideoReadError(f"the folder holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return sorted(files, key=lambda path: natural_key(path.name))


def natural_key(name):
    """Sort key under which frame10 follows frame9."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", str(name))]


def stills_of_list(items):
    """A list of image paths and PIL images as it is; one of arrays or tensors (frames one by one) as one array."""
    if items and all(getattr(item, "ndim", None) == 3 for item in items):
        if len({tuple(item.shape) for item in items}) > 1:
            raise VideoReadError("the frames differ in shape; resize them alike or pass PIL images")
        return channels_last((torch.stack if torch.is_tensor(items[0]) else np.stack)(list(items)))
    for index, item in enumerate(items):
        if not isinstance(item, (str, os.PathLike)) and not hasattr(item, "convert"):
            kind = type(item).__name__
            raise VideoReadError(f"item {index} is {kind}; a list holds image paths, PIL images or arrays")
    return items


def channels_last(array):
    """(T, H, W, 3) uint8 out of an array or tensor, channels last or first (in doubt: as usual for its kind)."""
    tensor = torch.is_tensor(array)
    array = array.detach().cpu() if tensor else np.asarray(array)
    shape = tuple(array.shape)
    axes = [axis for axis in ((1, 3) if tensor else (3, 1)) if len(shape) == 4 and shape[axis] == 3]
    if not axes or min(shape[1:]) == 0:
        raise VideoReadError(f"shape {shape} is no video; give (T, H, W, 3) or (T, 3, H, W)")
    if tensor:
        array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    if array.dtype.kind == "f":
        if not (array.min(initial=0) >= 0 and array.max(initial=0) <= 1):
            raise VideoReadError("float frames must lie in [0, 1]; pass uint8 for 0 to 255")
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise VideoReadError(f"frames are {array.dtype}; give uint8, or floats in [0, 1]")
    return array if axes[0] == 3 else array.transpose(0, 2, 3, 1)
