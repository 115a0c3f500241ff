"""`read_video`: the frames of any source in chunks, of any length in constant memory, chosen by presentation time.

Unusual here: one pass decodes in order and converts only the frames that are kept, straight to their final size. What
was damaged on the way is passed over, counted, and told of once. Errors get the name of the source here, in one place.
Not done: sample aspect ratio is ignored, HDR is not tone mapped. Transparency is shown over white, interlaced frames
are made of their top field, and rotation metadata is applied.
"""

import math
import os
import warnings
import weakref
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from vamba.errors import VideoReadError
from vamba.modeling.media_limits import check_memory, check_regular_file, describe, is_url, path_or_bytes

from .decoding import NO_FRAMES, PyavClip, TorchcodecClip
from .pictures import (
    PROCESSED,
    StillClip,
    channels_last,
    few_at_once,
    images_of_folder,
    is_still_png,
    stills_of_list,
)
from .selection import SampleTimes, check_centered, check_sizes, check_times, number, target_size


DEFAULT_FPS = 1.0
BACKENDS = {"pyav": PyavClip, "torchcodec": TorchcodecClip}


@dataclass
class VideoChunk:
    """Frames in order, uint8 (T, 3, H, W), and their times in seconds, float64 (T,).

    `lost_packets` could not be decoded on the way to them; `damaged_frames` of them show traces of damage.
    """

    frames: torch.Tensor
    timestamps: torch.Tensor
    lost_packets: int = 0
    damaged_frames: int = 0

    def __len__(self):
        return len(self.frames)


def read_video(
    source, *, fps=None, num_frames=None, centered=False, start=None, end=None,
    min_pixels=128 * 28 * 28, max_pixels=768 * 28 * 28, total_pixels=None, resized_height=None, resized_width=None,
    min_side=None, max_side=None, factor=28, resize=True, chunk_frames=64, backend="pyav", allow_urls=False, threads=0,
    source_fps=None,
):  # fmt: skip
    """Open a video for reading in chunks; a `VideoReader` that can be iterated as often as wanted.

    Args:
        source: path, `file://` or `data:` URL, bytes, seekable binary file, folder or list of images (paths or PIL),
            array (T, H, W, 3) or tensor (T, 3, H, W), uint8 or floats in [0, 1]. Other URLs need `allow_urls=True`.
        fps: instants start, start + 1/fps, ... before the end; the default is 1.0. Excludes `num_frames`.
        num_frames: instants spread evenly from start to end, both included. A frame is never given twice, so a clip
            with fewer frames (or one that holds a frame over several instants) gives fewer.
        centered: take the middles of `num_frames` equal parts instead, as Vamba was evaluated.
        start, end: seconds from the first frame; `end` is clipped to the video's own.
        min_pixels, max_pixels, total_pixels, resized_height, resized_width, factor: as in qwen-vl-utils, `factor`
            being patch_size * merge_size. `resize=False` keeps the native size.
        min_side, max_side: pixels; the longer side is first shrunk to `max_side`, then each side stretched to at least
            `min_side`, as Vamba was evaluated.
        chunk_frames: the most frames in one chunk.
        backend: "pyav" or "torchcodec".
        threads: decoding threads, 0 = as many as FFmpeg thinks right.
        source_fps: rate of a source without clock (images, arrays); the default is `fps`, so that all are taken, or 1.

    Raises:
        VideoReadError: for every mistake in the arguments or the source, here or (damage further in) while iterating.
    """
    name = describe(source)
    with _naming(name):
        times = check_times(fps, num_frames, start, end)
        sizes = check_sizes(
            factor, min_pixels, max_pixels, total_pixels, resized_height, resized_width, min_side, max_side
        )
        check_centered(centered)
        chunk_frames, threads = number("chunk_frames", chunk_frames), number("threads", threads)
        source_fps = number("source_fps", source_fps) or times[0] or 1.0
        clip = _open_source(source, name, backend, allow_urls, threads or 0, source_fps)
        return VideoReader(clip, times, sizes if resize else None, chunk_frames or 64, centered)


@contextmanager
def _naming(name):
    """Puts before the errors of the block what source they are about, and makes VideoReadErrors of them."""
    try:
        yield
    except ValueError as error:
        told = isinstance(error, VideoReadError)
        raise VideoReadError(f"{name}: {error}") from (error.__cause__ if told else error)


def load_video(source, **options):
    """All of `read_video(source, **options)` at once: frames uint8 (T, 3, H, W), timestamps float64 (T,) in seconds."""
    return load_with_metadata(source, **options)[:2]


def load_with_metadata(source, **options):
    """`load_video`, and third the fields of transformers' `VideoMetadata`, which qwen-vl-utils knows as well.

    Understands `min_frames` and `max_frames` besides the options of `read_video`; see `frames_asked_for`.
    """
    if options.keys() & {"min_frames", "max_frames"}:
        options, _, _ = frames_asked_for(source, options)
    with read_video(source, **options) as reader:
        chunks, about = list(reader), reader.metadata
    frames = torch.cat([chunk.frames for chunk in chunks])
    times = torch.cat([chunk.timestamps for chunk in chunks])
    rate = about.fps or 1.0
    metadata = {
        "total_num_frames": about.total_frames or len(frames),
        "fps": rate,
        "width": about.width,
        "height": about.height,
        "duration": about.duration,
        "video_backend": options.get("backend", "pyav"),
        "frames_indices": (times * rate).round().long().tolist(),
    }
    return frames, times, metadata


def frames_asked_for(source, options, open_video=read_video):
    """How many frames a message's or an example's options ask for; opens the video, decodes nothing.

    Args:
        options: of `read_video`, and `min_frames` and `max_frames`, which bound the frames that `fps` gives.
        open_video: `read_video` or a processor's `video_reader`.

    Returns:
        The options of `read_video` alone, with `num_frames` where a bound holds; how many frames are due then; their
        height and width.
    """
    options = dict(options)
    with _naming(describe(source)):
        low, high = (number(name, options.pop(name, None)) for name in ("min_frames", "max_frames"))
    if "num_frames" in options:
        options.pop("fps", None)
        low = high = None
    with open_video(source, **options) as reader:
        frames, size, step = reader.num_frames_expected, reader.frame_size, reader.seconds_per_frame
    if frames is None:  # neither length nor number of frames is declared: look at the last packets
        kept = {key: options[key] for key in ("start", "end", "backend", "allow_urls", "source_fps") if key in options}
        with read_video(source, num_frames=2**20, **kept) as reader:
            frames = int((reader.num_frames_expected - 1) / (reader.metadata.fps or 1.0) / step) + 1
    wanted = min(max(frames, low or 1), high or math.inf)
    if wanted != max(frames, 1):
        options = {key: value for key, value in options.items() if key != "fps"} | {"num_frames": wanted}
        return frames_asked_for(source, options, open_video)
    return options, max(frames, 1), size


class VideoReader:
    """Iterable of `VideoChunk`; every `iter()` opens the source afresh. Also a context manager that closes it all.

    `metadata` (VideoInfo), `frame_size` (H, W of what it yields) and `num_frames_expected` (an estimate or None) are
    known at once; `lost_packets`, `damaged_frames` and `read_packets` count the latest pass.
    """

    def __init__(self, clip, times, sizes, chunk_frames, centered=False):
        self.metadata = clip.info
        self.lost_packets = self.damaged_frames = self.read_packets = 0
        self._clip = clip
        self._passes = weakref.WeakSet()
        fps, num_frames, start, end = times
        last = clip.last_time() if num_frames is not None or (sizes and sizes["total_pixels"]) else None
        declared = clip.info.duration
        if last is None and declared is not None:
            last = max(declared - 1 / (clip.info.fps or 1.0), 0.0)
        span = None if last is None else max(last + 1 / (clip.info.fps or 1.0), declared or 0.0)
        if start > 0 and span is not None and start >= span:
            raise VideoReadError(f"start={start:g} is past the end of the video ({span:.3f} s)")
        if num_frames is None:
            self._times = SampleTimes.at_rate(fps or DEFAULT_FPS, start, end)
        elif centered:
            final = last + 1 / (clip.info.fps or 1.0)
            self._times = SampleTimes.centers(num_frames, start, final if end is None else min(end, final))
        else:
            final = last if end is None else min(end, last)
            self._times = SampleTimes.spread(num_frames, start, final)
        self.seconds_per_frame = self._times.step
        self.num_frames_expected = self.len_estimate = self._times.expected(last, clip.info.fps)
        self.frame_size = clip.info.height, clip.info.width
        if sizes:
            self.frame_size = target_size(*self.frame_size, num_frames=self.num_frames_expected or 1, **sizes)
        height, width = self.frame_size
        frame = PROCESSED * height * width
        check_memory(f"frames of {width}x{height} pixels", frame, "lower factor, min_pixels or resized_*")
        self.chunk_frames = min(chunk_frames, few_at_once(frame))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """End every iteration under way and release its file."""
        for running in list(self._passes):
            running.close()

    def __iter__(self):
        running = self._chunks()
        self._passes.add(running)
        return running

    def _chunks(self):
        total, lost, damaged = 0, 0, 0
        with _naming(self.metadata.name), closing(self._clip.open()) as stream:
            frames = (
                (torch.from_numpy(rgb), time)
                for time, picture in _chosen(stream, self._times)
                if (rgb := stream.render(picture, *self.frame_size)) is not None
            )
            try:
                while chunk := list(islice(frames, self.chunk_frames)):
                    total += len(chunk)
                    pixels, times = torch.stack([rgb for rgb, _ in chunk]), [time for _, time in chunk]
                    harm = stream.lost - lost, stream.damaged - damaged
                    yield VideoChunk(pixels, torch.tensor(times, dtype=torch.float64), *harm)
                    lost, damaged = stream.lost, stream.damaged
            finally:
                self.lost_packets, self.damaged_frames, self.read_packets = stream.lost, stream.damaged, stream.packets
            self._report(stream, total)

    def _report(self, stream, chosen):
        """Once per finished pass: an error when there was nothing to see, a warning when something was lost."""
        if not chosen:
            if stream.end_time is not None and self._times.start >= stream.end_time - stream.tolerance:
                end = f"{stream.end_time:.3f} s"
                raise VideoReadError(f"start={self._times.start:g} is past the end of the video ({end})")
            raise VideoReadError(NO_FRAMES)
        harm = [f"{stream.lost} of {stream.packets} packets could not be decoded"] if stream.lost else []
        if stream.damaged:
            harm.append(f"{stream.damaged} of the {chosen} frames taken are damaged")
        missing = stream.missing_from_end()
        if missing:
            harm.append(f"the last {missing:.1f} s that it declares are missing")
        if harm:
            warnings.warn(f"{self.metadata.name}: {' and '.join(harm)}; continuing with the rest", stacklevel=3)


def _chosen(stream, times):
    """The (time, picture) pairs that are on screen at the instants `times`, each picture once."""
    target = times.at_or_after(0.0)
    pending = None
    for time, picture in stream.pictures():
        if pending is not None and time - stream.tolerance > target:
            yield pending
            target = times.at_or_after(time - stream.tolerance)
        if target is None:
            return
        pending = time, picture
        stream.skip_to(target)
    if pending is not None and (times.count is not None or target < stream.end_time - stream.tolerance):
        yield pending


def _open_source(source, name, backend, allow_urls, threads, source_fps):
    """Sort out what `source` is: a clip with `info`, `open()` and `last_time()`."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise VideoReadError(f"backend={backend!r:.40} is unknown; use 'pyav' or 'torchcodec'")
    if isinstance(source, (str, os.PathLike)):
        source = _locate(os.fspath(source), allow_urls)
        if isinstance(source, Path) and source.is_dir():
            source = images_of_folder(source)
    elif isinstance(source, (bytearray, memoryview)):
        source = bytes(source)
    if isinstance(source, (list, tuple)) or hasattr(source, "shape"):
        stills = channels_last(source) if hasattr(source, "shape") else stills_of_list(source)
        return StillClip(name, stills, source_fps)
    if not isinstance(source, (str, Path, bytes)) and not (hasattr(source, "read") and hasattr(source, "seek")):
        raise VideoReadError(
            f"cannot read video from {type(source).__name__}; give a path, bytes, a seekable binary file, "
            "a folder or list of images, or an array"
        )
    if hasattr(source, "read") and not isinstance(source.read(0), bytes):
        raise VideoReadError("the file is open in text mode; open it with mode 'rb'")
    if is_still_png(source):
        return StillClip(name, [source], source_fps)
    if source == b"":
        raise VideoReadError("there are no bytes; the upload or download is incomplete")
    return BACKENDS[backend](name, source, threads)


def _locate(text, allow_urls):
    """A path or URL as what it stands for: a Path that can be read, the bytes of a data: URL, or an allowed URL."""
    found = path_or_bytes(os.fsdecode(text), allow_urls)
    if isinstance(found, bytes) or is_url(found):
        return found
    path = Path(found)
    try:
        about = path.stat()
    except OSError as error:
        raise VideoReadError(f"{error.strerror or error}; check the path") from error
    if path.is_dir():
        return path
    check_regular_file(about)
    if not os.access(path, os.R_OK):
        raise VideoReadError("permission denied; make it readable for this user")
    if about.st_size == 0:
        raise VideoReadError("the file is empty (0 bytes); the copy or download is incomplete")
    return path
