"""The pixels of frames, images and arrays: turned, resized, converted."""

import io
import random
import struct
import subprocess
import sys
import zlib
from contextlib import closing
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from vamba.video import VideoReadError, load_video, read_video
from vamba.video.pictures import PNG_MARK, natural_key

from encoded_videos import corner, encode, indices, level, shown


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


def test_large_pictures_are_decoded_with_fewer_threads_and_in_smaller_chunks(monkeypatch):
    video = encode(12, size=(512, 512))  # 0.4 MB a picture, 1.6 MB a finished frame
    reader = read_video(video, resize=False, fps=100, threads=8)
    with closing(reader._clip.open()) as stream:
        assert stream.stream.codec_context.thread_count == 8
    expected, _ = load_video(video, resize=False, fps=100)
    monkeypatch.setenv("VAMBA_MEDIA_MEMORY", "32MB")
    reader = read_video(video, resize=False, fps=100, threads=8)
    with closing(reader._clip.open()) as stream:
        assert stream.stream.codec_context.thread_count == 2
    chunks = list(reader)
    assert [len(chunk) for chunk in chunks] == [2] * 6
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks]), expected)


def test_pictures_that_do_not_fit_the_memory_are_refused(monkeypatch):
    still = np.zeros((1, 512, 512, 3), np.uint8)
    moving = encode(1, "mov", codec="qtrle", pix_fmt="argb", size=(512, 512))
    monkeypatch.setenv("VAMBA_MEDIA_MEMORY", "1MB")
    with pytest.raises(VideoReadError, match="frames of 512x512 pixels would take .*VAMBA_MEDIA_MEMORY"):
        read_video(still, resize=False)
    with pytest.raises(VideoReadError, match="damaged, or too large; .*VAMBA_MEDIA_MEMORY"):
        read_video(moving)
    monkeypatch.setenv("VAMBA_MEDIA_MEMORY", "5MB")  # FFmpeg's own bound lets this one through
    with pytest.raises(VideoReadError, match="decoding pictures of 512x512 pixels would take"):
        read_video(encode(2, size=(512, 512), pix_fmt="yuv444p"))
    monkeypatch.setenv("VAMBA_MEDIA_MEMORY", "a lot")
    with pytest.raises(VideoReadError, match="VAMBA_MEDIA_MEMORY='a lot' is no size"):
        read_video(still)


def test_a_header_of_a_huge_picture_takes_no_memory():
    """In a child, as a process's peak never falls; decoded as the header says, the frame alone would take 1 GB."""
    video = encode(1, "mov", codec="qtrle", pix_fmt="argb")
    small = struct.pack(">HH", 32, 32)
    assert small in video
    code = """
import sys
from vamba.video import VideoReadError, read_video
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
try:
    read_video(sys.stdin.buffer.read())
except VideoReadError as error:
    print("too large" in str(error), (peak() - before) // 1024)
"""
    bomb = video.replace(small, struct.pack(">HH", 16000, 16000))
    done = subprocess.run([sys.executable, "-c", code], input=bomb, capture_output=True, timeout=60, check=True)
    told, megabytes = done.stdout.split()
    assert told == b"True" and int(megabytes) < 100


def test_transparency_of_a_picture_higher_than_a_strip():
    layers = np.random.default_rng(0).integers(0, 256, (150, 34, 4), dtype=np.uint8)
    found, _ = load_video(
        encode(1, "mov", codec="png", pix_fmt="rgba", size=(150, 34), picture=lambda i: layers), resize=False
    )
    color, alpha = layers[..., :3].astype(int), layers[..., 3:].astype(int)
    expected = (color * alpha + 255 * (255 - alpha) + 127) // 255
    assert np.array_equal(found[0].permute(1, 2, 0), expected)


def test_natural_order():
    names = ["f10.png", "f9.png", "F1.png", "10.png", "2.png", "a.png"]
    assert sorted(names, key=natural_key) == ["2.png", "10.png", "a.png", "F1.png", "f9.png", "f10.png"]


def test_packed_metadata_of_a_png_are_not_unpacked(tmp_path):
    """By FFmpeg, which would make anything of them; a still PNG is Pillow's."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    profile = b"name\0\0" + zlib.compress(random.Random(0).randbytes(200_000))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + bytes(192) for _ in range(64)))) + chunk(b"IEND", b"")
    bomb, still = PNG_MARK + head + chunk(b"iCCP", profile) + pixels, PNG_MARK + head + pixels
    for path, picture in ((tmp_path / "bomb.mov", bomb), (tmp_path / "sound.mov", still)):
        with av.open(str(path), "w") as container:
            stream = container.add_stream("png", rate=8)
            stream.width = stream.height = 64
            stream.pix_fmt = "rgb24"
            packet = av.Packet(picture)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1, 8)
            container.mux(packet)
    with pytest.raises(VideoReadError, match="not one frame"):
        load_video(tmp_path / "bomb.mov")
    assert len(load_video(tmp_path / "sound.mov")[0]) == len(load_video(still)[0]) == 1
