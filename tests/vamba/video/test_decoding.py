"""Decoding every container, with jumps and without, of sound and of damaged files, by both backends."""

import io
import sys
import types
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vamba.video import VideoReadError, decoding, load_video, read_video

from encoded_videos import FORMATS, encode, gradient, indices, level, shown, spy_on_seeks


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


# Jumps


@pytest.mark.parametrize("kind", ["mp4", "mkv", "webm"])
@pytest.mark.parametrize(
    "options", [{"num_frames": 4}, {"fps": 0.3}, {"start": 33.3}, {"fps": 1, "start": 7.7, "end": 21}]
)
def test_jumping_gives_the_frames_of_sequential_reading(kind, options, monkeypatch):
    video = encode(400, kind, gop=20, picture=lambda index: np.full((16, 16, 3), 20 + index // 2, np.uint8))
    seeks = spy_on_seeks(monkeypatch)
    jumped = load_video(video, resize=False, **options)
    assert seeks
    monkeypatch.setattr(decoding.PyavStream, "skip_to", lambda self, target: None)
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
            patch.setattr(decoding.PyavStream, "skip_to", lambda self, target: None)
            straight = load_video(video, resize=False, num_frames=4)
        assert jumped[1].tolist() == straight[1].tolist() and len(jumped[1]) == 4
        assert torch.equal(jumped[0], straight[0])


@pytest.mark.parametrize("wrong_by", [3.0, -3.0, 1000.0])
def test_a_seek_that_lands_wrong_changes_nothing(long_clip, monkeypatch, wrong_by):
    straight = load_video(long_clip, resize=False, num_frames=4)
    original = decoding.PyavStream._seek
    monkeypatch.setattr(decoding.PyavStream, "_seek", lambda self, time: original(self, max(time + wrong_by, 0)))
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
                patch.setattr(decoding.PyavStream, "skip_to", lambda self, target: None)
                straight = load_video(video, resize=False, fps=0.15, start=start)
            assert torch.equal(jumped[1], straight[1]) and torch.equal(jumped[0], straight[0]), (kind, start)


def test_dropping_frames_that_nobody_sees_changes_nothing(monkeypatch):
    options = {"bf": "3", "x264-params": "b-pyramid=normal:scenecut=0:keyint=250"}
    for kind in ("mp4", "mkv"):
        video = encode(100, kind, gop=250, options=options, picture=gradient, size=(96, 160))
        for rate in ({"fps": 0.7}, {"fps": 3.0}, {"num_frames": 7}, {"start": 3.33, "end": 6.1}):
            with_dropping = load_video(video, resize=False, **rate)
            with monkeypatch.context() as patch:
                patch.setattr(decoding.PyavStream, "_spare", lambda self, packet: None)
                patch.setattr(decoding.PyavStream, "skip_to", lambda self, target: None)
                without = load_video(video, resize=False, **rate)
            assert torch.equal(with_dropping[1], without[1]) and torch.equal(with_dropping[0], without[0]), rate


def test_frames_that_nobody_sees_are_not_decoded(monkeypatch):
    video = encode(200, gop=250, options={"bf": "3"})
    decoded = []
    original = decoding.PyavStream._decode
    count = lambda self, packet: decoded.extend(frames := original(self, packet)) or frames  # noqa: E731
    monkeypatch.setattr(decoding.PyavStream, "_decode", count)
    assert len(indices(video, num_frames=2)[0]) == 2
    assert len(decoded) < 120  # of 200


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

    original = decoding._open_container
    monkeypatch.setattr(decoding, "_open_container", lambda *arguments: Proxy(original(*arguments)))
    assert indices(clip, fps=1000)[0] == list(range(20))


# torchcodec


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


def test_chosen_times_and_sizes_of_real_footage(footage):
    reader = read_video(footage)
    chunks = list(reader)
    frame = 1001 / 60000
    assert torch.cat([chunk.timestamps for chunk in chunks]).tolist() == pytest.approx(
        [int(second / frame + 1e-9) * frame for second in range(6)], abs=1e-6
    )
    assert chunks[0].frames.shape == (6, 3, 560, 1008) and reader.num_frames_expected == 6
    info = reader.metadata
    assert (info.width, info.height, info.codec, info.total_frames) == (1920, 1080, "h264", 359)
    assert info.fps == pytest.approx(59.94, abs=0.01) and info.duration == pytest.approx(5.989, abs=0.01)


def test_jumps_change_nothing_in_real_footage(footage, monkeypatch):
    options = {"start": 4.5, "num_frames": 3, "max_pixels": 200 * 28 * 28}
    seeks = spy_on_seeks(monkeypatch)
    jumped = load_video(footage, **options)
    assert seeks
    monkeypatch.setattr(decoding.PyavStream, "skip_to", lambda self, target: None)
    straight = load_video(footage, **options)
    assert torch.equal(jumped[1], straight[1]) and torch.equal(jumped[0], straight[0])
    assert jumped[1].tolist() == pytest.approx([4.487817, 5.221883, 5.972633], abs=0.02)


def test_pixels_of_real_footage_against_pil(footage):
    from PIL import Image

    frames, _ = load_video(footage, end=0.5)
    frame = next(av.open(str(footage)).decode(video=0))
    # in the file's own colours, which PyAV applies by itself only from 17 on
    full = frame.to_ndarray(format="rgb24", src_colorspace="ITU709", dst_colorspace="ITU601")
    reference = np.asarray(Image.fromarray(full).resize((1008, 560), Image.BICUBIC)).astype(int)
    assert np.abs(frames[0].permute(1, 2, 0).numpy() - reference).mean() < 1.5
