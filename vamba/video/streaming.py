"""Frames decoded in a thread while the caller does something else, such as encoding those before."""

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def read_ahead(reader: Iterable, chunk_frames: int, pin_memory: bool = False, max_waiting: int = 2) -> Iterator[Tensor]:
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
    ready: queue.SimpleQueue = queue.SimpleQueue()
    slots, stopped = threading.Semaphore(max_waiting), threading.Event()

    def decode():
        group = []
        try:
            with contextlib.closing(iter(reader)) as pieces:
                for piece in pieces:
                    group.append(piece.frames)
                    if sum(map(len, group)) >= chunk_frames:
                        frames, group = _join(group, pin_memory), []
                        slots.acquire()
                        ready.put((frames, None))
                    if stopped.is_set():
                        return
            if group:
                ready.put((_join(group, pin_memory), None))
        except BaseException as error:  # handed to the consumer, who would wait for ever otherwise
            ready.put((None, error))
        else:
            ready.put((None, None))

    thread = threading.Thread(target=decode, name="vamba-read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            frames, failure = ready.get()
            if frames is None:
                break
            slots.release()
            yield frames
    finally:  # also when the consumer fails, is interrupted or goes away
        stopped.set()
        slots.release()
        thread.join()
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # its traceback holds this frame, which would hold it


def _join(group: list[Tensor], pin_memory: bool) -> Tensor:
    shape = (sum(map(len, group)), *group[0].shape[1:])
    return torch.cat(group, out=torch.empty(shape, dtype=group[0].dtype, pin_memory=pin_memory))
