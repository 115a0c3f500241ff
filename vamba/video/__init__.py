"""Reading video: `read_video` gives the frames of any source in chunks, `load_video` all of them at once.

    with vamba.video.read_video("talk.mp4", fps=2.0) as reader:
        for chunk in reader:
            chunk.frames, chunk.timestamps

`reading` opens a source; `selection` says which frames are taken at what size; `decoding` gets them out of video files,
`pictures` out of images and arrays, and brings them to their size; `streaming` reads ahead in a thread.
"""

from vamba.errors import VideoReadError

from .reading import VideoChunk, VideoReader, frames_asked_for, load_video, load_with_metadata, read_video
from .selection import check_reading
from .streaming import patch_times, read_ahead


__all__ = [
    "VideoChunk",
    "VideoReadError",
    "VideoReader",
    "check_reading",
    "frames_asked_for",
    "load_video",
    "load_with_metadata",
    "patch_times",
    "read_ahead",
    "read_video",
]
