"""`qwen_vl_utils.process_vision_info` with the reader of this package.

What is unusual: qwen-vl-utils 0.0.14 reads files with torchcodec, decord or `torchvision.io.read_video`. The last is
gone from torchvision, and without the other two every path fails, which is the state a plain install is in.
"""

from vamba.errors import UserError

from .reading import load_with_metadata


def register_with_qwen_vl_utils() -> None:
    """Has qwen-vl-utils read video files with `read_video`, from here on in this process."""
    try:
        from qwen_vl_utils import vision_process
    except ImportError as error:
        raise UserError("qwen-vl-utils is not installed; pip install qwen-vl-utils") from error

    # under both names, as it tries torchvision's after any error of the chosen one
    vision_process.VIDEO_READER_BACKENDS |= dict.fromkeys(("vamba", "torchvision"), _read)
    vision_process.FORCE_QWENVL_VIDEO_READER = "vamba"
    vision_process.get_video_reader_backend.cache_clear()


def _read(item: dict) -> tuple:
    """Frames (T, 3, H, W) of their own size, what they are, and how many a second, for an item of a message."""
    item = {name: value for name, value in item.items() if value is not None}
    names = {"video_start": "start", "video_end": "end", "nframes": "num_frames"}
    options = {"resize": False} | {own: item[theirs] for theirs, own in names.items() if theirs in item}
    if "num_frames" not in options:
        options |= {"fps": 2.0} | {name: item[name] for name in ("fps", "min_frames", "max_frames") if name in item}
    frames, times, metadata = load_with_metadata(item["video"], **options)
    span = float(times[-1] - times[0])
    return frames, metadata, (len(frames) - 1) / span if span else options.get("fps", metadata["fps"])
