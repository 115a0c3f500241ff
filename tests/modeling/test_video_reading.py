"""The video reader against frames that say which one they are: frame i of a test video is a grey of level i."""

import io
import os
import struct
import sys
import threading
import types
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch


av = pytest.importorskip("av")

from vamba.modeling import video_decoding  # noqa: E402
from vamba.modeling.frame_selection import PresentationClock, SampleTimes, natural_key  # noqa: E402
from vamba.modeling.video_reading import VideoReadError, load_video, read_video  # noqa: E402


MAGIC = Path(__file__).resolve().parents[3] / "shared" / "videos" / "magic_1080p_6s.mp4"
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


@pytest.fixture(scope="module")
def clip():
    return encode(20)  # 2 s at 10 fps


@pytest.fixture(scope="module")
def long_clip():
    """40 s at 10 fps with a key frame every 2 s: long enough for jumps to pay."""
    return encode(400, gop=20, picture=lambda index: np.full((32, 32, 3), 20 + index // 2, np.uint8))


# Which frames


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_every_container_gives_every_frame_once_and_in_order(kind):
    rate = 25 if kind == "h264" else 10
    found, times = indices(encode(12, kind, rate=rate), fps=1000)
    assert found == list(range(12))
    assert times == pytest.approx([index / rate for index in range(12)], abs=0.011)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "webm", "avi", "ts"])
@pytest.mark.parametrize("rate", [24, 30, Fraction(30000, 1001)])
def test_the_own_rate_gives_every_frame_although_containers_round_times(kind, rate):
    assert indices(encode(30, kind, rate=rate), fps=float(rate))[0] == list(range(30))


def test_fps_takes_the_last_frame_at_or_before_each_instant(clip):
    assert indices(clip, fps=4) == ([0, 2, 5, 7, 10, 12, 15, 17], [0.0, 0.2, 0.5, 0.7, 1.0, 1.2, 1.5, 1.7])
    assert indices(clip) == ([0, 10], [0.0, 1.0])  # the default is 1 fps, and nothing is taken at the end, 2.0
    assert indices(clip, fps=0.25) == ([0], [0.0])


def test_an_fps_above_the_videos_own_repeats_nothing(clip):
    for fps in (10, 11, 30, 1e9):
        assert indices(clip, fps=fps)[0] == list(range(20)), fps


def test_start_and_end(clip):
    assert indices(clip, fps=5, start=0.5, end=1.1) == ([5, 7, 9], [0.5, 0.7, 0.9])
    assert indices(clip, fps=5, start=0.55, end=0.6) == ([5], [0.5])
    assert indices(clip, fps=5, start=1.6, end=99) == ([16, 18], [1.6, 1.8])
    assert indices(clip, fps=5, start=1.6, end=float("inf")) == ([16, 18], [1.6, 1.8])


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi", "ts", "gif"])
def test_num_frames_spreads_over_both_ends(kind):
    video = encode(20, kind)
    assert indices(video, num_frames=2)[0] == [0, 19]
    assert indices(video, num_frames=1)[0] == [0]
    assert indices(video, num_frames=20)[0] == list(range(20))
    assert indices(video, num_frames=5)[0] == [0, 4, 9, 14, 19]


def test_num_frames_over_a_part_and_more_than_there_are(clip):
    assert indices(clip, num_frames=3, start=0.5, end=1.5)[0] == [5, 10, 15]
    assert indices(clip, num_frames=100)[0] == list(range(20))
    assert indices(clip, num_frames=3, start=1.0)[0] == [10, 14, 19]


def test_num_frames_without_any_timestamps_or_duration():
    assert indices(encode(12, "h264", rate=25), num_frames=3)[0] == [0, 5, 11]


def test_variable_frame_rate_goes_by_time_and_gives_a_long_frame_once():
    times = [0, 0.1, 0.2, 0.3, 3.0, 3.1, 7.2, 7.3]
    for kind in ("mp4", "mkv"):
        found, stamps = indices(encode(8, kind, times=times), fps=1)
        assert found == [0, 3, 4, 5], kind
        assert stamps == [0.0, 0.3, 3.0, 3.1]
    assert indices(encode(8, times=times), num_frames=4)[0] == [0, 3, 5, 7]


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts"])
def test_times_count_from_the_streams_own_start(kind):
    shifted = encode(20, kind, times=[5 + index / 10 for index in range(20)])
    assert indices(shifted, fps=2) == ([0, 5, 10, 15], [0.0, 0.5, 1.0, 1.5])


def test_chunks_have_bounded_size_and_all_frames(clip):
    reader = read_video(clip, fps=10, chunk_frames=7)
    chunks = list(reader)
    assert [len(chunk) for chunk in chunks] == [7, 7, 6]
    assert shown(torch.cat([chunk.frames for chunk in chunks])) == list(range(20))
    for chunk in chunks:
        assert chunk.frames.dtype == torch.uint8 and chunk.timestamps.dtype == torch.float64
        assert chunk.frames.shape == (len(chunk), 3, *reader.frame_size)
        assert chunk.frames.untyped_storage().nbytes() == chunk.frames.numel()


def test_a_reader_can_be_iterated_again_and_tells_how_much_comes(clip):
    reader = read_video(clip, fps=4)
    assert shown(torch.cat([chunk.frames for chunk in reader])) == shown(torch.cat([chunk.frames for chunk in reader]))
    assert reader.num_frames_expected == reader.len_estimate == 8
    assert reader.read_packets == 20 and reader.lost_packets == 0
    assert read_video(clip, num_frames=6).num_frames_expected == 6
    assert read_video(clip, num_frames=100).num_frames_expected == 20
    assert read_video(clip, fps=1000).num_frames_expected == 20
    assert read_video(clip, fps=4, start=1.0, end=1.5).num_frames_expected in (2, 3)


# Jumps


def spy_on_seeks(monkeypatch):
    seeks = []
    original = video_decoding.PyavStream._seek
    monkeypatch.setattr(
        video_decoding.PyavStream, "_seek", lambda self, time: seeks.append(time) or original(self, time)
    )
    return seeks


@pytest.mark.parametrize("kind", ["mp4", "mkv", "webm"])
@pytest.mark.parametrize(
    "options", [{"num_frames": 4}, {"fps": 0.3}, {"start": 33.3}, {"fps": 1, "start": 7.7, "end": 21}]
)
def test_jumping_gives_the_frames_of_sequential_reading(kind, options, monkeypatch):
    video = encode(400, kind, gop=20, picture=lambda index: np.full((16, 16, 3), 20 + index // 2, np.uint8))
    seeks = spy_on_seeks(monkeypatch)
    jumped = load_video(video, resize=False, **options)
    assert seeks
    monkeypatch.setattr(video_decoding.PyavStream, "skip_to", lambda self, target: None)
    straight = load_video(video, resize=False, **options)
    assert torch.equal(jumped[1], straight[1]) and torch.equal(jumped[0], straight[0])


def test_sparse_reading_decodes_little(long_clip):
    reader = read_video(long_clip, num_frames=4, resize=False)
    assert sum(len(chunk) for chunk in reader) == 4
    assert reader.read_packets < 150  # of 400


def test_one_key_frame_only_still_reads_right(monkeypatch):
    for kind in ("mp4", "mkv"):
        video = encode(200, kind, gop=1000, picture=lambda index: np.full((16, 16, 3), 20 + index, np.uint8))
        jumped = load_video(video, resize=False, num_frames=4)
        with monkeypatch.context() as patch:
            patch.setattr(video_decoding.PyavStream, "skip_to", lambda self, target: None)
            straight = load_video(video, resize=False, num_frames=4)
        assert jumped[1].tolist() == straight[1].tolist() and len(jumped[1]) == 4
        assert torch.equal(jumped[0], straight[0])


@pytest.mark.parametrize("wrong_by", [3.0, -3.0, 1000.0])
def test_a_seek_that_lands_wrong_changes_nothing(long_clip, monkeypatch, wrong_by):
    straight = load_video(long_clip, resize=False, num_frames=4)
    original = video_decoding.PyavStream._seek
    monkeypatch.setattr(video_decoding.PyavStream, "_seek", lambda self, time: original(self, max(time + wrong_by, 0)))
    wrong = load_video(long_clip, resize=False, num_frames=4)
    assert torch.equal(straight[1], wrong[1]) and torch.equal(straight[0], wrong[0])


def test_open_groups_of_pictures(monkeypatch):
    options = {"x264-params": "scenecut=0:open-gop=1:bframes=3:b-adapt=0:keyint=20:min-keyint=20"}
    for kind in ("mp4", "mkv"):
        video = encode(
            300, kind, gop=20, options=options, picture=lambda index: np.full((16, 16, 3), index % 200, np.uint8)
        )
        for start in (9.7, 9.8, 9.9, 10.0, 10.1):
            jumped = load_video(video, resize=False, fps=0.15, start=start)
            with monkeypatch.context() as patch:
                patch.setattr(video_decoding.PyavStream, "skip_to", lambda self, target: None)
                straight = load_video(video, resize=False, fps=0.15, start=start)
            assert torch.equal(jumped[1], straight[1]) and torch.equal(jumped[0], straight[0]), (kind, start)


# Pixels


def gradient(index, height=96, width=160):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y + 3 * index) % 256], -1).astype(np.uint8)


def corner(index, height=64, width=96):
    array = np.zeros((height, width, 3), np.uint8)
    array[: height // 2, : width // 2] = 250
    return array


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_rotation_metadata_is_applied(rotation):
    video = encode(3, picture=corner, size=(64, 96), rotation=rotation)
    reader = read_video(video, resize=False, fps=100)
    frames = next(iter(reader)).frames
    turns = rotation // 90 % 4
    expected = np.rot90(corner(0), turns)
    assert frames.shape[2:] == expected.shape[:2] == reader.frame_size
    assert (reader.metadata.height, reader.metadata.width) == expected.shape[:2]
    assert reader.metadata.rotation == turns * 90
    assert np.abs(frames[0].permute(1, 2, 0).numpy().astype(int) - expected).mean() < 6
    resized = read_video(video, resized_height=112, resized_width=56, fps=100)
    assert next(iter(resized)).frames.shape == (3, 3, 112, 56)


def test_conversion_is_close_to_decoding_at_full_size_and_pil_bicubic():
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (96, 160, 1), dtype=np.uint8).repeat(3, -1)
    video = encode(2, picture=lambda index: noise, size=(96, 160), options={"crf": "1"})
    frames, _ = load_video(video, fps=100, resized_height=56, resized_width=84)
    full = next(av.open(io.BytesIO(video)).decode(video=0)).to_ndarray(format="rgb24")
    reference = np.asarray(Image.fromarray(full).resize((84, 56), Image.BICUBIC)).astype(int)
    assert np.abs(frames[0].permute(1, 2, 0).numpy() - reference).mean() < 3
    nearest = np.asarray(Image.fromarray(full).resize((84, 56), Image.NEAREST)).astype(int)
    assert np.abs(nearest - reference).mean() > 3  # the bound above tells a wrong filter


def test_still_images_resize_as_pil_does_with_antialias():
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (1, 360, 640, 3), dtype=np.uint8)
    frames, _ = load_video(noise, resized_height=140, resized_width=252)
    reference = np.asarray(Image.fromarray(noise[0]).resize((252, 140), Image.BICUBIC)).astype(int)
    assert np.abs(frames[0].permute(1, 2, 0).numpy() - reference).mean() < 1


def test_sizes_follow_smart_resize_and_the_pixel_budget():
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    array = np.zeros((40, 360, 640, 3), np.uint8)
    assert read_video(array).frame_size == smart_resize(360, 640, 28, 128 * 28 * 28, 768 * 28 * 28)
    assert read_video(array, max_pixels=40000, min_pixels=0).frame_size == smart_resize(360, 640, 28, 0, 40000)
    assert read_video(array, factor=32).frame_size == smart_resize(360, 640, 32, 128 * 28 * 28, 768 * 28 * 28)
    budget = read_video(array, total_pixels=40 * 60000, min_pixels=50000).frame_size
    assert budget == smart_resize(360, 640, 28, 50000, 120000)
    tight = read_video(array, total_pixels=1000, min_pixels=50000).frame_size
    assert tight == smart_resize(360, 640, 28, 50000, 52500)
    assert read_video(array, resized_height=100, resized_width=200).frame_size == (112, 196)
    assert read_video(array, resize=False).frame_size == (360, 640)


@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv444p", "yuv422p"])
def test_other_pixel_formats_and_odd_sizes(pix_fmt):
    size = (33, 47) if pix_fmt == "yuv444p" else (34, 46)
    frames, _ = load_video(encode(4, size=size, pix_fmt=pix_fmt), resize=False, fps=100)
    assert frames.shape == (4, 3, *size) and shown(frames) == [0, 1, 2, 3]


def test_colour_matrix_of_the_file_is_used():
    def blue(index):
        return np.broadcast_to(np.array([20, 60, 200], np.uint8), (32, 32, 3)).copy()

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt, stream.options = "yuv444p", {"crf": "1"}
        stream.codec_context.colorspace = 1
        frame = av.VideoFrame.from_ndarray(blue(0), format="rgb24").reformat(format="yuv444p", dst_colorspace="ITU709")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    frames, _ = load_video(buffer.getvalue(), resize=False)
    assert frames.float().mean((0, 2, 3)).tolist() == pytest.approx([20, 60, 200], abs=4)


def test_transparency_is_shown_over_white():
    def half(index):
        array = np.zeros((32, 32, 4), np.uint8)
        array[:, :16] = (200, 0, 0, 255)
        array[:, 16:, 3] = 0
        return array

    video = encode(2, "mov", picture=half, codec="qtrle", pix_fmt="argb")
    frame = load_video(video, resize=False, fps=100)[0][0]
    assert frame[:, 16, 4].tolist() == [200, 0, 0] and frame[:, 16, 28].tolist() == [255, 255, 255]


def test_interlaced_frames_show_one_field():
    def combed(index):
        array = np.zeros((64, 64, 3), np.uint8)
        array[0::2], array[1::2] = 200, 40
        return array

    options = {"x264-params": "interlaced=1:tff=1:scenecut=0", "crf": "1", "flags": "+ildct+ilme"}
    video = encode(3, picture=combed, size=(64, 64), options=options)
    assert next(av.open(io.BytesIO(video)).decode(video=0)).interlaced_frame
    frames, _ = load_video(video, resize=False, fps=100)
    assert frames.float().mean() > 185 and frames.float().std() < 12


def test_a_resolution_that_changes_is_brought_to_the_first_size():
    video = encode(5, "ts", size=(32, 32)) + encode(5, "ts", size=(64, 96))
    frames, times = load_video(video, resize=False, fps=1000)
    assert frames.shape[2:] == (32, 32) and len(frames) >= 9
    assert shown(frames)[:5] == [0, 1, 2, 3, 4] and shown(frames)[-1] == 4
    assert (times.diff() > 0).all()


# Sources


def test_paths_bytes_files_and_file_urls_agree(clip, tmp_path, monkeypatch):
    path = tmp_path / "a video %41 #1.mp4"
    path.write_bytes(clip)
    file = io.BytesIO(clip)
    for source in (path, str(path), os.fsencode(path) and path, clip, bytearray(clip), memoryview(clip), file):
        assert indices(source, fps=2)[0] == [0, 5, 10, 15]
    assert indices(path.as_uri(), fps=2)[0] == [0, 5, 10, 15]
    assert not file.closed and indices(file, fps=2)[0] == [0, 5, 10, 15]
    with path.open("rb") as opened:
        assert indices(opened, fps=2)[0] == [0, 5, 10, 15]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "concat:x.mp4").write_bytes(clip)
    assert indices("concat:x.mp4", fps=2)[0] == [0, 5, 10, 15]


def test_data_url(clip):
    import base64

    url = "data:video/mp4;base64," + base64.b64encode(clip).decode()
    assert indices(url, fps=2)[0] == [0, 5, 10, 15]
    with pytest.raises(VideoReadError, match="base64"):
        read_video("data:video/mp4;base64,@@@")


def test_folder_and_lists_of_images(tmp_path):
    from PIL import Image

    for index in range(12):
        Image.new("RGB", (40, 30), (level(index),) * 3).save(tmp_path / f"frame{index}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    files = sorted(tmp_path.glob("*.png"), key=lambda path: natural_key(path.name))
    assert indices(tmp_path) == (list(range(12)), [float(index) for index in range(12)])
    assert indices(files, fps=2) == (list(range(12)), [index / 2 for index in range(12)])
    assert indices([str(file) for file in files], fps=1, source_fps=4)[0] == [0, 4, 8]
    assert indices([Image.open(file) for file in files], num_frames=3)[0] == [0, 5, 11]
    assert indices(tmp_path, start=3, end=6) == ([3, 4, 5], [3.0, 4.0, 5.0])
    transparent = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    assert load_video([transparent], resize=False)[0].min() == 255


def test_image_orientation_is_applied(tmp_path):
    from PIL import Image

    image = Image.fromarray(corner(0))
    exif = image.getexif()
    exif[0x0112] = 6  # turn clockwise to view
    image.save(tmp_path / "a.png", exif=exif)
    frames, _ = load_video(tmp_path, resize=False)
    assert frames.shape == (1, 3, 96, 64)
    assert frames[0, 0, 5, 60] == 250 and frames[0, 0, 5, 5] == 0


def test_arrays_and_tensors():
    array = np.stack([np.full((30, 40, 3), level(index), np.uint8) for index in range(6)])
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    for source in (array, array.transpose(0, 3, 1, 2), tensor, tensor.permute(0, 2, 3, 1)):
        assert indices(source) == (list(range(6)), [0, 1, 2, 3, 4, 5])
    for source in (array / 255.0, tensor.float() / 255, tensor.double() / 255):
        assert indices(source)[0] == list(range(6))
    frames, _ = load_video(array, resize=False)
    assert torch.equal(frames, tensor)
    assert indices(array, fps=3, source_fps=30) == ([0], [0.0])


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((2, 8, 8, 4), np.uint8), "shape"),
        (np.zeros((8, 8, 3), np.uint8), "shape"),
        (np.zeros((0, 8, 8, 3), np.uint8), "no frames"),
        (np.zeros((2, 0, 8, 3), np.uint8), "shape"),
        (np.full((2, 8, 8, 3), 255.0), r"\[0, 1\]"),
        (np.full((2, 8, 8, 3), np.nan), r"\[0, 1\]"),
        (np.zeros((2, 8, 8, 3), np.int64), "int64"),
    ],
)
def test_wrong_arrays(array, message):
    with pytest.raises(VideoReadError, match=message):
        read_video(array)


# Mistakes


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fps": 2, "num_frames": 4}, "fps=2 and num_frames=4"),
        ({"fps": 0}, "fps"),
        ({"fps": -1}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"fps": float("inf")}, "fps"),
        ({"fps": "fast"}, "fps .*'fast'"),
        ({"fps": True}, "fps"),
        ({"num_frames": 0}, "num_frames"),
        ({"num_frames": 2.5}, "num_frames"),
        ({"start": -1}, "start"),
        ({"start": float("nan")}, "start"),
        ({"start": 2.5}, r"start=2.5 .*2.000 s"),
        ({"start": float("inf")}, "start"),
        ({"start": 2.5, "num_frames": 2}, r"start=2.5"),
        ({"start": 1, "end": 1}, "end=1"),
        ({"start": 1, "end": 0.5}, "end=0.5"),
        ({"end": float("nan")}, "end"),
        ({"chunk_frames": 0}, "chunk_frames"),
        ({"threads": -1}, "threads"),
        ({"factor": 0}, "factor"),
        ({"max_pixels": 100}, "max_pixels"),
        ({"max_pixels": 1000, "min_pixels": 2000}, "max_pixels"),
        ({"resized_height": 100}, "both or neither"),
        ({"resized_height": 1, "resized_width": 5000}, "aspect ratio"),
        ({"backend": "decord"}, "decord"),
    ],
)
def test_wrong_arguments_are_named(clip, tmp_path, options, message):
    path = tmp_path / "talk.mp4"
    path.write_bytes(clip)
    with pytest.raises(VideoReadError, match=message) as caught:
        load_video(path, **options)
    assert "talk.mp4" in str(caught.value) and "\n" not in str(caught.value)


def test_start_past_the_end_of_a_video_of_unknown_length():
    with pytest.raises(VideoReadError, match="start=50"):
        load_video(encode(12, "h264", rate=25), start=50)


def test_long_thin_pictures(clip):
    array = np.zeros((1, 2, 500, 3), np.uint8)
    with pytest.raises(VideoReadError, match="aspect ratio"):
        read_video(array)
    assert load_video(array, resize=False)[0].shape == (1, 3, 2, 500)


def audio_file(cover=False):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp3" if cover else "matroska") as container:
        stream = container.add_stream("mp3" if cover else "aac", rate=44100)
        art = container.add_stream("mjpeg", rate=1) if cover else None
        if art is not None:
            art.width = art.height = 32
            art.pix_fmt = "yuvj420p"
            container.start_encoding()
            container.mux(art.encode(av.VideoFrame(32, 32, "yuvj420p")))
            container.mux(art.encode(None))
        for index in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, index * 1152
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize("cover", [False, True])
def test_audio_and_cover_art_are_no_video(cover):
    video = audio_file(cover)
    assert bool(av.open(io.BytesIO(video)).streams.video) == cover
    with pytest.raises(VideoReadError, match="no video stream .*audio"):
        read_video(video)


def test_files_that_are_not_video(clip, tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("this is not a video\n" * 50)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    headless = tmp_path / "headless.mp4"
    headless.write_bytes(clip[: len(clip) // 2])  # libavformat writes moov last
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(tmp_path / "pipe")
    cases = {
        tmp_path / "missing.mp4": "No such file",
        text: "cannot be opened",
        empty: "empty",
        headless: "cannot be opened",
        folder: "no images",
        tmp_path / "pipe": "neither a file nor a folder",
    }
    for path, message in cases.items():
        with pytest.raises(VideoReadError, match=message) as caught:
            load_video(path)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)
    for source, message in (
        (b"", "no bytes"),
        ("", "path"),
        ("a\0b", "path"),
        (7, "int"),
        (None, "NoneType"),
        ([], "no frames"),
    ):
        with pytest.raises(VideoReadError, match=message):
            load_video(source)
    with pytest.raises(VideoReadError, match="item 1 is int"):
        load_video([text, 3])
    with pytest.raises(VideoReadError, match="cannot be read as an image"):
        load_video([text])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_permissions(clip, tmp_path):
    path = tmp_path / "locked.mp4"
    path.write_bytes(clip)
    path.chmod(0)
    with pytest.raises(VideoReadError, match="permission"):
        read_video(path)


def test_a_file_that_cannot_seek_is_refused(clip):
    class Pipe(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            return 0

    with pytest.raises(VideoReadError, match="seek"):
        read_video(Pipe())
    closed = io.BytesIO(clip)
    closed.close()
    with pytest.raises(VideoReadError, match="closed"):
        read_video(closed)


def test_huge_pictures_are_refused():
    video = encode(2, "avi", codec="rawvideo", pix_fmt="yuv420p")
    header = struct.pack("<II", 32, 32)
    assert video.count(header) >= 2
    with pytest.raises(VideoReadError, match="20000x100 pixels are too large"):
        load_video(video.replace(header, struct.pack("<II", 20000, 100)))
    with pytest.raises(VideoReadError):
        load_video(video.replace(header, struct.pack("<II", 70000, 70000)))
    with pytest.raises(VideoReadError, match="20000x3 pixels are too large"):
        load_video(np.broadcast_to(np.uint8(0), (1, 3, 20000, 3)))


# Network


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/a.mp4", "HTTPS://x/a.mp4", "rtsp://x/a", "ftp://x/a.mp4", "concat://a"]
)
def test_urls_need_permission(url):
    with pytest.raises(VideoReadError, match="allow_urls=True"):
        read_video(url)


@pytest.fixture
def server(clip):
    """A local HTTP server that counts what it is asked for."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(clip)))
            self.end_headers()
            self.wfile.write(clip)

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        http.asked = []
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield http
        http.shutdown()
        thread.join()


def test_urls_are_read_when_allowed(server):
    url = f"http://127.0.0.1:{server.server_port}/clip.mp4"
    assert indices(url, fps=2, allow_urls=True)[0] == [0, 5, 10, 15]
    assert server.asked


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("local", [False, True])
def test_a_playlist_reaches_neither_the_network_nor_other_files(server, clip, tmp_path, as_bytes, local):
    (tmp_path / "other.ts").write_bytes(encode(20, "ts"))
    target = (tmp_path / "other.ts").as_posix() if local else f"http://127.0.0.1:{server.server_port}/a.ts"
    playlists = [
        f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{target}'\n",
        "ffconcat version 1.0\nfile 'fd:'\n",
        "ffconcat version 1.0\nfile other.ts\n",
    ]
    for index, playlist in enumerate(playlists):
        path = tmp_path / f"list{index}.m3u8"
        path.write_text(playlist)
        with pytest.raises(VideoReadError):
            load_video(playlist.encode() if as_bytes else path)
    assert server.asked == []


# Damage


def packet_places(video):
    with av.open(io.BytesIO(video)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def read_with_warnings(video):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reader = read_video(video, fps=1000, resize=False)
        chunks = list(reader)
    return reader, chunks, [str(item.message) for item in caught]


def test_lost_packets_are_counted_in_one_warning(capfd):
    video = bytearray(encode(30, gop=1))
    for index in (4, 5, 20):
        position, _ = packet_places(video)[index]
        video[position : position + 4] = b"\xff" * 4  # the length of the first NAL unit
    reader, chunks, messages = read_with_warnings(video)
    assert messages == [f"<{len(video)} bytes>: 3 of 30 packets could not be decoded; continuing with the rest"]
    assert reader.lost_packets == sum(chunk.lost_packets for chunk in chunks) == 3
    assert shown(torch.cat([chunk.frames for chunk in chunks])) == [i for i in range(30) if i not in (4, 5, 20)]
    assert capfd.readouterr() == ("", "")  # FFmpeg's own complaints stay silent


def test_damaged_frames_are_counted_in_one_warning(capfd):
    video = bytearray(encode(30, picture=lambda index: gradient(7 * index), size=(96, 160), gop=10))
    position, size = packet_places(video)[14]
    for place in range(position + size // 2, position + size):
        video[place] ^= 0x5A
    reader, chunks, messages = read_with_warnings(video)
    assert len(messages) == 1 and "of the 30 frames taken are damaged" in messages[0]
    assert 0 < reader.damaged_frames < 10 and sum(len(chunk) for chunk in chunks) == 30
    assert sum(chunk.damaged_frames for chunk in chunks) == reader.damaged_frames
    assert capfd.readouterr() == ("", "")


def test_no_warning_for_a_sound_file(clip):
    assert read_with_warnings(clip)[2] == []


def test_a_truncated_file_is_read_as_far_as_it_goes():
    video = encode(60, "mkv", picture=lambda index: np.full((32, 32, 3), level(index), np.uint8))
    found, _ = indices(video[: len(video) * 2 // 3], fps=1000)
    assert found[:10] == list(range(10)) and 10 < len(found) < 60
    assert len(indices(video[: len(video) * 2 // 3], num_frames=5)[0]) == 5


def test_a_file_cut_short_behind_its_index_says_so(tmp_path):
    path = tmp_path / "cut.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for index in range(60):
            picture = np.full((32, 32, 3), level(index), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    video = path.read_bytes()
    position, size = packet_places(video)[40]
    path.write_bytes(video[:position])
    reader, chunks, messages = read_with_warnings(path)
    assert sum(len(chunk) for chunk in chunks) == 40
    assert len(messages) == 1 and "the last 2.0 s that it declares are missing" in messages[0]
    assert indices(path, num_frames=3)[1][-1] == 3.9


def test_streams_that_appear_on_the_way(clip, monkeypatch):
    """PyAV's demux ends with an IndexError then (seen in fuzzing); the frames still in the decoder must come out."""

    class Proxy:
        def __init__(self, container):
            self._container = container

        def __getattr__(self, name):
            return getattr(self._container, name)

        def demux(self, stream):
            yield from (packet for packet in self._container.demux(stream) if packet.size)
            raise IndexError("list index out of range")

    original = video_decoding._open_container
    monkeypatch.setattr(video_decoding, "_open_container", lambda *arguments: Proxy(original(*arguments)))
    assert indices(clip, fps=1000)[0] == list(range(20))


def test_dropping_frames_that_nobody_sees_changes_nothing(monkeypatch):
    options = {"bf": "3", "x264-params": "b-pyramid=normal:scenecut=0:keyint=250"}
    for kind in ("mp4", "mkv"):
        video = encode(100, kind, gop=250, options=options, picture=gradient, size=(96, 160))
        for rate in ({"fps": 0.7}, {"fps": 3.0}, {"num_frames": 7}, {"start": 3.33, "end": 6.1}):
            with_dropping = load_video(video, resize=False, **rate)
            with monkeypatch.context() as patch:
                patch.setattr(video_decoding.PyavStream, "_spare", lambda self, packet: None)
                patch.setattr(video_decoding.PyavStream, "skip_to", lambda self, target: None)
                without = load_video(video, resize=False, **rate)
            assert torch.equal(with_dropping[1], without[1]) and torch.equal(with_dropping[0], without[0]), rate


def test_frames_that_nobody_sees_are_not_decoded(monkeypatch):
    video = encode(200, gop=250, options={"bf": "3"})
    decoded = []
    original = video_decoding.PyavStream._decode
    count = lambda self, packet: decoded.extend(frames := original(self, packet)) or frames  # noqa: E731
    monkeypatch.setattr(video_decoding.PyavStream, "_decode", count)
    assert len(indices(video, num_frames=2)[0]) == 2
    assert len(decoded) < 120  # of 200


def test_an_abandoned_iteration_releases_its_file(clip, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(clip)

    def opened():
        return sum(os.path.realpath(f"/proc/self/fd/{fd}") == str(path) for fd in os.listdir("/proc/self/fd"))

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    reader = read_video(path, fps=10, chunk_frames=2)
    assert opened() == 0
    running = iter(reader)
    next(running)
    assert opened() == 1
    del running
    assert opened() == 0
    with read_video(path, fps=10, chunk_frames=2) as reader:
        running = iter(reader)
        next(running)
        assert opened() == 1
    assert opened() == 0 and list(running) == []


# Parts


def test_sample_times():
    grid = SampleTimes.at_rate(2.0, 1.0, 3.0)
    assert [grid.at_or_after(time) for time in (0, 1, 1.1, 2.5, 2.6, 1e15)] == [1.0, 1.0, 1.5, 2.5, None, None]
    spread = SampleTimes.spread(3, 0.0, 4.0)
    assert [spread.at_or_after(time) for time in (-1, 0, 0.1, 2, 3.9, 4.1)] == [0.0, 0.0, 2.0, 2.0, 4.0, None]
    assert SampleTimes.spread(1, 2.0, 2.0).at_or_after(2.5) is None
    assert SampleTimes.at_rate(1000.0, 0.0, None).at_or_after(1e12) == pytest.approx(1e12)


def test_the_clock_survives_absurd_timestamps():
    clock = PresentationClock(0.1)
    assert [clock.tick(raw) for raw in (0.0, 0.1, 1e12, 0.3)] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert [clock.tick(raw) for raw in (None, -5.0, 0.6)] == pytest.approx([0.4, 0.5, 0.6])
    assert not clock.trusted
    glued = PresentationClock(0.1)
    times = [glued.tick(raw) for raw in (5.0, 5.1, 5.2, 0.0, 0.1, 0.2, 2.2)]
    assert times == pytest.approx([5.0, 5.1, 5.2, 5.3, 5.4, 5.5, 7.5])
    lasting = PresentationClock(0.1, duration=9000.0)
    assert [lasting.tick(raw) for raw in (0.0, 8000.0)] == [0.0, 8000.0] and lasting.trusted


def test_natural_order():
    names = ["f10.png", "f9.png", "F1.png", "10.png", "2.png", "a.png"]
    assert sorted(names, key=natural_key) == ["2.png", "10.png", "a.png", "F1.png", "f9.png", "f10.png"]


# Backends


def test_torchcodec_that_is_not_there(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(VideoReadError, match=r"pip install torchcodec"):
        read_video(clip, backend="torchcodec")


def test_torchcodec_is_driven_by_time(monkeypatch, tmp_path, clip):
    """torchcodec itself needs FFmpeg's libraries; a stand-in with its documented interface shows what we ask of it."""

    class Decoder:
        def __init__(self, source, num_ffmpeg_threads, seek_mode):
            assert not isinstance(source, (str, Path)) and seek_mode == "exact"
            self.metadata = types.SimpleNamespace(
                begin_stream_seconds=3.0, end_stream_seconds=5.0, average_fps=10.0,
                num_frames=20, width=16, height=8, codec="h264",
            )  # fmt: skip

        def get_frame_played_at(self, seconds):
            index = int((seconds - 3.0) * 10 + 1e-6)
            if not 0 <= index < 20:
                raise IndexError(f"no frame at {seconds}")
            data = torch.full((3, 8, 16), level(index), dtype=torch.uint8)
            return types.SimpleNamespace(data=data, pts_seconds=3.0 + index / 10, duration_seconds=0.1)

    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", types.SimpleNamespace(VideoDecoder=Decoder))
    path = tmp_path / "a.mp4"
    path.write_bytes(clip)
    for options in ({"fps": 4}, {"fps": 1000}, {"num_frames": 5}, {"fps": 5, "start": 0.5, "end": 1.1}):
        assert indices(path, backend="torchcodec", **options) == indices(path, **options), options
    monkeypatch.setattr(
        Decoder, "get_frame_played_at", lambda self, seconds: (_ for _ in ()).throw(RuntimeError("bad\nx"))
    )
    with pytest.raises(VideoReadError, match="torchcodec cannot read it .bad."):
        load_video(path, backend="torchcodec")


# Real footage


@pytest.mark.skipif(not MAGIC.exists(), reason="the shared videos are not here")
class TestMagic:
    def test_chosen_times_and_sizes(self):
        reader = read_video(MAGIC)
        chunks = list(reader)
        frame = 1001 / 60000
        assert torch.cat([chunk.timestamps for chunk in chunks]).tolist() == pytest.approx(
            [int(second / frame + 1e-9) * frame for second in range(6)], abs=1e-6
        )
        assert chunks[0].frames.shape == (6, 3, 560, 1008) and reader.num_frames_expected == 6
        info = reader.metadata
        assert (info.width, info.height, info.codec, info.total_frames) == (1920, 1080, "h264", 359)
        assert info.fps == pytest.approx(59.94, abs=0.01) and info.duration == pytest.approx(5.989, abs=0.01)

    def test_jumps_change_nothing(self, monkeypatch):
        options = {"start": 4.5, "num_frames": 3, "max_pixels": 200 * 28 * 28}
        seeks = spy_on_seeks(monkeypatch)
        jumped = load_video(MAGIC, **options)
        assert seeks
        monkeypatch.setattr(video_decoding.PyavStream, "skip_to", lambda self, target: None)
        straight = load_video(MAGIC, **options)
        assert torch.equal(jumped[1], straight[1]) and torch.equal(jumped[0], straight[0])
        assert jumped[1].tolist() == pytest.approx([4.487817, 5.221883, 5.972633], abs=0.02)

    def test_pixels_against_pil(self):
        from PIL import Image

        frames, _ = load_video(MAGIC, end=0.5)
        frame = next(av.open(str(MAGIC)).decode(video=0))
        # in the file's own colours, which PyAV applies by itself only from 17 on
        full = frame.to_ndarray(format="rgb24", src_colorspace="ITU709", dst_colorspace="ITU601")
        reference = np.asarray(Image.fromarray(full).resize((1008, 560), Image.BICUBIC)).astype(int)
        assert np.abs(frames[0].permute(1, 2, 0).numpy() - reference).mean() < 1.5
