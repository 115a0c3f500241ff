"""Videos made for the tests, whose frames say which one they are: frame i is a grey of level i."""

import io
import struct
from fractions import Fraction

import av
import numpy as np

from vamba.video import decoding, load_video


FORMATS = {
    "mp4": ("mp4", "libx264", "yuv420p"),
    "mov": ("mov", "mpeg4", "yuv420p"),
    "mkv": ("matroska", "libx264", "yuv420p"),
    "webm": ("webm", "libvpx", "yuv420p"),
    "avi": ("avi", "mpeg4", "yuv420p"),
    "ts": ("mpegts", "libx264", "yuv420p"),
    "gif": ("gif", "gif", "rgb8"),
    "h264": ("h264", "libx264", "yuv420p"),
}


def level(index):
    return 16 + 6 * index % 224


def encode(
    count=20,
    kind="mp4",
    rate=10,
    size=(32, 32),
    times=None,
    picture=None,
    gop=5,
    options=None,
    codec=None,
    pix_fmt=None,
    rotation=None,
    audio=False,
):
    """Bytes of a small video; `times` in seconds replace i / rate, `picture(i)` replaces the grey of level(i)."""
    container_name, default_codec, default_format = FORMATS[kind]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_name) as container:
        stream = container.add_stream(codec or default_codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt or default_format
        stream.gop_size = gop
        if (codec or default_codec) == "libx264":
            stream.options = {"bf": "2", "preset": "ultrafast", "crf": "10", "x264-params": "scenecut=0"}
        stream.options = {**stream.options, **(options or {})}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(count):
            array = np.full((*size, 3), level(index), np.uint8) if picture is None else picture(index)
            frame = av.VideoFrame.from_ndarray(array, format="rgb24" if array.shape[-1] == 3 else "rgba")
            frame = frame.reformat(format=stream.pix_fmt)
            if times is not None:
                frame.pts, frame.time_base = round(times[index] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return turned(buffer.getvalue(), rotation) if rotation else buffer.getvalue()


def turned(mp4, rotation):
    """The file with a display matrix in its track header: quarter turns counter-clockwise, in degrees."""
    cosine, sine = {90: (0, 1), 180: (-1, 0), -90: (0, -1)}[rotation]
    matrix = [cosine << 16, -sine << 16, 0, sine << 16, cosine << 16, 0, 0, 0, 1 << 30]
    start = mp4.index(b"tkhd") + 4 + 40
    assert mp4[start - 44 + 4] == 0  # version 0: 40 bytes stand before the matrix
    return mp4[:start] + struct.pack(">9i", *matrix) + mp4[start + 36 :]


def shown(frames):
    """Index of the frame that each grey picture is."""
    return [round((value - 16) / 6) for value in frames.float().mean((1, 2, 3)).tolist()]


def indices(source, **options):
    frames, times = load_video(source, resize=False, **options)
    return shown(frames), [round(time, 3) for time in times.tolist()]


def gradient(index, height=96, width=160):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y + 3 * index) % 256], -1).astype(np.uint8)


def corner(index, height=64, width=96):
    array = np.zeros((height, width, 3), np.uint8)
    array[: height // 2, : width // 2] = 250
    return array


def spy_on_seeks(monkeypatch):
    seeks = []
    original = decoding.PyavStream._seek
    monkeypatch.setattr(decoding.PyavStream, "_seek", lambda self, time: seeks.append(time) or original(self, time))
    return seeks
