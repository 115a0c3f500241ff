"""What PyAV 18 has and PyAV 14 to 17 lack, for the readers; each lack is told by its absence, not by a version number.

Unusual here: before PyAV 17 colours are converted as if every video were in BT.601 at limited range, whatever its
frames say, so the frame's own matrix and range are handed over there.
"""

import numpy as np


# libswscale's flags by number, as PyAV names them only from 18 on
_BICUBIC, _FULL_CHR_H_INT, _FULL_CHR_H_INP, _ACCURATE_RND = 1 << 2, 1 << 13, 1 << 14, 1 << 18
_EXACT = _BICUBIC | _FULL_CHR_H_INT | _FULL_CHR_H_INP | _ACCURATE_RND
_MATRICES = {1: "ITU709", 4: "FCC", 7: "SMPTE240M", 9: 9, 10: 10}  # by AVColorSpace; all others are BT.601
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG


def reformat(reformatter, frame, width, height, kind, threads=0):
    """`frame` at this size in the pixel format `kind`, bicubic and rounded accurately."""
    try:
        return reformatter.reformat(frame, width, height, kind, interpolation=_EXACT, threads=threads)
    except TypeError:  # before 17: no threads, and no look at the frame's colours
        options = {}
    if (matrix := _MATRICES.get(frame.colorspace)) is not None:
        options |= {"src_colorspace": matrix, "dst_colorspace": "ITU601"}
    if frame.color_range == _FULL_RANGE:
        options |= {"src_color_range": "JPEG", "dst_color_range": "MPEG"}
    try:
        return reformatter.reformat(frame, width, height, kind, interpolation=_EXACT, **options)
    except KeyError:  # 14.0 takes names alone: no BT.2020, no flags, without which RGB loses half its colours' width
        named = {key: value for key, value in options.items() if isinstance(value, str)}
        if frame.format.is_rgb and (width, height) != (frame.width, frame.height):
            frame = reformatter.reformat(frame, format="yuv444p")
        return reformatter.reformat(frame, width, height, kind, interpolation="BICUBIC", **named)


def quarter_turns(frame):
    """Counter-clockwise quarter turns that set the picture upright."""
    rotation = getattr(frame, "rotation", None)
    if rotation is None:  # before 14.1: the matrix itself
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return 0
        first, second = np.frombuffer(matrix, np.int32)[:2]
        rotation = -np.degrees(np.arctan2(float(second), float(first)))
    return round(rotation / 90) % 4


def frame_duration(frame):
    """In units of the time base; 0 where it is unknown, as always before PyAV 15."""
    return getattr(frame, "duration", None) or 0


def key_frame_index(stream):
    """The container's index of the stream; None where it has none, or before PyAV 17."""
    return getattr(stream, "index_entries", None) or None


def is_cover_art(stream):
    """Whether the stream is a picture attached to something else."""
    disposition = getattr(stream, "disposition", None)
    if disposition is not None:
        return bool(disposition & type(disposition).attached_pic)
    return stream.base_rate == 90000  # before 14.1: FFmpeg gives a picture without time the rate of its time base
