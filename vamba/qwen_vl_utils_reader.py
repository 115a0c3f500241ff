"""`qwen_vl_utils.process_vision_info` with the reader of this package.

What is unusual: qwen-vl-utils 0.0.14 reads files with torchcodec, decord or `torchvision.io.read_video`. The last is
gone from torchvision, and without the other two every path fails, which is the state a plain install is in.
"""

from .errors import UserError


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
    from .modeling import load_video, read_video

    options = {"start": item.get("video_start"), "end": item.get("video_end"), "resize": False}
    item = {name: value for name, value in item.items() if value is not None}
    sampling = {"num_frames": item["nframes"]} if "nframes" in item else {"fps": item.get("fps", 2.0)}
    with read_video(item["video"], **options, **sampling) as reader:
        count, about = reader.num_frames_expected or 1, reader.metadata
    bounded = min(max(count, item.get("min_frames", 1)), item.get("max_frames", count))
    if "nframes" not in item and bounded != count:
        sampling = {"num_frames": bounded}
    frames, times = load_video(item["video"], **options, **sampling)
    rate = about.fps or 1.0
    metadata = {
        "fps": rate,
        "frames_indices": (times * rate).round().long().tolist(),
        "total_num_frames": about.total_frames or len(frames),
        "video_backend": "pyav",
    }
    span = float(times[-1] - times[0])
    return frames, metadata, (len(frames) - 1) / span if span else sampling.get("fps", rate)
