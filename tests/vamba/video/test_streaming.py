"""Decoding beside other work: the same frames, and nothing left behind."""

import contextlib
import gc
import os
import signal
import threading
import time
import traceback
from types import SimpleNamespace

import pytest
import torch

from vamba.video import VideoReadError, patch_times, read_ahead, read_video


class Reader:
    """Yields `count` pieces of `size` frames, each frame filled with its number; then fails, if told to."""

    def __init__(self, count=10**9, size=2, error=None, pause=0.0):
        self.count, self.size, self.error, self.pause = count, size, error, pause
        self.given, self.closed = 0, False

    def __iter__(self):
        try:
            for index in range(self.count):
                numbers = torch.arange(index * self.size, (index + 1) * self.size) % 256
                time.sleep(self.pause)
                self.given += 1
                yield SimpleNamespace(frames=numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2))
            if self.error:
                raise self.error
        finally:
            self.closed = True


@pytest.fixture
def nothing_left():
    """Threads and open files after the test are those before it."""

    def open_files():
        return os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []

    gc.collect()
    before = set(threading.enumerate()), len(open_files())
    yield
    assert (set(threading.enumerate()), len(open_files())) == before


@pytest.mark.parametrize("count, expected", [(1, [2]), (3, [6]), (6, [6, 6]), (7, [6, 6, 2])])
def test_pieces_are_joined_in_order(nothing_left, count, expected):
    reader = Reader(count)
    chunks = list(read_ahead(reader, 6))
    assert [len(chunk) for chunk in chunks] == expected and reader.closed
    assert torch.cat(chunks)[:, 0, 0, 0].tolist() == list(range(2 * count))


def test_it_reads_while_the_consumer_works_but_not_without_end(nothing_left):
    reader = Reader()
    chunks = read_ahead(reader, 4, max_waiting=2)
    next(chunks)
    deadline = time.monotonic() + 10
    while reader.given < 8 and time.monotonic() < deadline:  # the consumer's, two that wait, one in the thread's hands
        time.sleep(0.01)
    time.sleep(0.1)
    assert reader.given == 8
    chunks.close()


def test_an_error_comes_after_the_frames_before_it_and_says_where_it_arose(nothing_left):
    error = VideoReadError("damaged")
    chunks = read_ahead(Reader(3, error=error), 4)
    assert len(next(chunks)) == 4
    with pytest.raises(VideoReadError) as caught:
        next(chunks)
    assert caught.value is error
    assert "__iter__" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]


@pytest.mark.parametrize("end", ["close", "drop", "fail"])
@pytest.mark.parametrize("waiting", [True, False])
def test_an_early_end_stops_the_thread_and_closes_the_reader(nothing_left, end, waiting):
    """Whether the thread waits for room or is in the middle of a long video."""
    reader = Reader(pause=0 if waiting else 0.01)
    chunks = read_ahead(reader, 4, max_waiting=1 if waiting else 1000)
    next(chunks)
    time.sleep(0.05)
    if end == "close":
        chunks.close()
    elif end == "drop":
        del chunks
    else:
        with pytest.raises(ZeroDivisionError), contextlib.closing(chunks):
            for _ in chunks:
                raise ZeroDivisionError
    assert reader.closed


def test_an_interrupt_while_waiting_for_frames_stops_the_thread(nothing_left):
    reader = Reader(pause=0.01)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start jobs with it ignored
    timer = threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            next(read_ahead(reader, 10**6))
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert reader.closed


def test_a_file_is_closed_with_the_iterator(nothing_left, clip, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip)
    with read_video(path, fps=8, chunk_frames=2) as reader:
        whole = torch.cat(list(read_ahead(reader, 4)))
        chunks = read_ahead(reader, 4)
        assert torch.equal(next(chunks), whole[:4])
        chunks.close()
    assert torch.equal(whole, torch.cat([chunk.frames for chunk in read_video(path, fps=8)]))


def test_spans_of_temporal_patches_follow_the_frames():
    """At a rate that changes; the last patch lacks a frame and ends when another would have been taken."""
    shown = torch.tensor([3.0, 3.1, 4.0, 4.5, 9.0], dtype=torch.float64)
    assert patch_times(shown, 2, 0.5).tolist() == [[3.0, 4.0], [4.0, 9.0], [9.0, 9.5]]
    assert patch_times(shown[:1], 2, 0.5).tolist() == [[3.0, 3.5]] and len(patch_times(shown, 1, 0.5)) == 5
