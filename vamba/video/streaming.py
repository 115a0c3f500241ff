"""Frames decoded in a thread while the caller does something else, such as encoding those before."""

import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import torch
from torch import Tensor


def read_ahead(
    reader: Iterable, chunk_frames: int, pin_memory: bool = False, max_waiting: int = 2
) -> Generator[Tensor, None, None]:
    """The frames of a `VideoReader`, uint8 (T, 3, H, W), decoded in a thread while the caller does something else.

    Closing the iterator, or dropping it, ends the thread within one chunk of the reader and the reader's pass with it.

    Args:
        reader: yields a few frames at a time, a divisor of `chunk_frames`: the thread can stop between them.
        chunk_frames: frames that are given at once; the last chunk may have fewer.
        pin_memory: put them into page-locked memory, from which they can be copied to a GPU in the background.
        max_waiting: chunks decoded ahead.

    Raises:
        whatever the reader raises, after the frames that came before.
    """
    stopped = threading.Event()

    def chunks():
        group = []
        with closing(iter(reader)) as pieces:
            for piece in pieces:
                group.append(piece.frames)
                if sum(map(len, group)) >= chunk_frames:
                    frames, group = _join(group, pin_memory), []
                    yield frames
                if stopped.is_set():
                    return
        if group:
            yield _join(group, pin_memory)

    pool = ThreadPoolExecutor(1, thread_name_prefix="vamba-read-ahead")
    with closing(chunks()) as decoded:
        try:  # besides those that wait, the thread has one chunk in hand
            ahead = deque(pool.submit(next, decoded, None) for _ in range(max_waiting + 1))
            while (frames := ahead.popleft().result()) is not None:
                ahead.append(pool.submit(next, decoded, None))
                yield frames
        finally:  # also when the consumer fails, is interrupted or goes away
            stopped.set()
            pool.shutdown(cancel_futures=True)


def patch_times(timestamps: Tensor, temporal_patch_size: int, seconds_per_frame: float) -> Tensor:
    """Start and end of each temporal patch of the frames shown from `timestamps` on, seconds, float64 (t, 2).

    A patch ends where the next begins, whatever the frame rate between; the last one, which may have a frame less, when
    a further frame would have been taken.
    """
    starts = timestamps[::temporal_patch_size]
    return torch.stack([starts, torch.cat([starts[1:], timestamps[-1:] + seconds_per_frame])], dim=1)


def _join(group: list[Tensor], pin_memory: bool) -> Tensor:
    shape = (sum(map(len, group)), *group[0].shape[1:])
    return torch.cat(group, out=torch.empty(shape, dtype=group[0].dtype, pin_memory=pin_memory))
