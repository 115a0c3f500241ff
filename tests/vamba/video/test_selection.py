"""Which frames are chosen, at what size, and what is said of arguments that are wrong."""

import numpy as np
import pytest
import torch

from vamba.video import VideoReadError, load_video, read_video
from vamba.video.selection import PresentationClock, SampleTimes

from encoded_videos import encode, indices


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


@pytest.mark.parametrize(
    "size", [(360, 640), (720, 1280), (1280, 720), (240, 320), (1080, 1920), (480, 480), (90, 160)]
)
@pytest.mark.parametrize("longest", [360, 480, 560])
def test_sides_are_bounded_as_by_vambas_scripts(size, longest):
    """`get_resize_output_image_size` of the original's train/data.py, then the image processor's `smart_resize`."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    height, width = size
    ratio = width / height
    if width >= height and width > longest:
        height, width = int(longest / ratio), longest
    elif height > width and height > longest:
        height, width = longest, int(longest * ratio)
    expected = smart_resize(max(height, 256), max(width, 256), 28, 56 * 56, 12845056)
    bounds = {"min_side": 256, "max_side": longest, "min_pixels": 56 * 56, "max_pixels": 12845056}
    assert read_video(np.zeros((2, *size, 3), np.uint8), **bounds).frame_size == expected


@pytest.mark.parametrize("asked", [1, 2, 7, 19, 20, 50])
def test_centered_frames_are_those_of_vambas_scripts(clip, asked):
    """`uniform_indices` of the original's eval/utils_*.py, which rounds the parts and then their middles."""
    total = 20
    splits = torch.linspace(0, total, asked + 1, dtype=int)
    expected = ((splits[:-1] + splits[1:]) // 2).tolist() if asked < total else list(range(total))
    chosen, _ = indices(clip, num_frames=asked, centered=True)
    assert len(chosen) == len(expected) and np.abs(np.subtract(chosen, expected)).max() <= 1
    half, _ = indices(clip, num_frames=2, centered=True, start=1.0, end=2.0)
    assert half == [12, 17]


def test_long_thin_pictures(clip):
    array = np.zeros((1, 2, 500, 3), np.uint8)
    with pytest.raises(VideoReadError, match="aspect ratio"):
        read_video(array)
    assert load_video(array, resize=False)[0].shape == (1, 3, 2, 500)


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
        ({"fps": 1e308}, r"fps .*1e\+308"),
        ({"fps": b"5"}, "fps"),
        ({"source_fps": 1e-300}, "source_fps"),
        ({"num_frames": "5"}, "num_frames .*'5'"),
        ({"num_frames": 10**30}, "num_frames"),
        ({"num_frames": np.True_}, "num_frames"),
        ({"start": 1e300}, "start"),
        ({"chunk_frames": 2**70}, "chunk_frames"),
        ({"threads": 10**6}, "threads"),
        ({"factor": 10**9}, "factor"),
        (
            dict.fromkeys(("factor", "resized_height", "resized_width"), 16384),
            "frames of .* would take .* lower factor",
        ),
        ({"min_pixels": 1e300}, "min_pixels"),
        ({"resized_height": 10**9, "resized_width": 10**9}, "resized_height"),
        ({"max_frames": 10**30}, "max_frames"),
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
        ({"centered": 1}, "centered"),
        ({"max_side": 0}, "max_side"),
        ({"backend": ["pyav"]}, "backend"),
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


def test_an_end_right_after_the_start(clip):
    assert indices(clip, num_frames=2, end=5e-324)[0] == [0]


def test_numbers_of_numpy_are_numbers(clip):
    given = {"num_frames": np.int64(3), "start": np.float32(0.5), "end": np.float64(1.5), "chunk_frames": np.uint8(2)}
    assert indices(clip, **given) == indices(clip, num_frames=3, start=0.5, end=1.5, chunk_frames=2)
