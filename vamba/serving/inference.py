"""The one thread on which a model works: answers come first, also between the chunks of a video that is encoded.

What is unusual: CUDA graphs and a memory's buffers want one thread, and a long video must not hold up everybody else.
So whoever encodes calls `answer_waiting` between chunks, which answers those who wait at that moment and goes on.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from transformers.cli.serving.utils import GenerateManager


class Inference(GenerateManager):
    """transformers' manager of generation, whose `submit` and `async_submit` are for answers; see `encode`."""

    def __init__(self):
        self._answers: deque[tuple[Future, Callable]] = deque()
        self._encodings: deque[tuple[Future, Callable]] = deque()
        self._wake = threading.Condition()
        self._ended = False
        self._worker = threading.Thread(target=self._run, daemon=True, name="vamba-inference")
        self._worker.start()

    def submit(self, fn: Callable, *args: Any, **kwargs: Any) -> Future:
        return self._put(self._answers, lambda: fn(*args, **kwargs))

    def async_submit(self, fn: Callable, *args: Any, **kwargs: Any) -> asyncio.Future:
        return asyncio.wrap_future(self.submit(fn, *args, **kwargs))

    def submit_encoding(self, fn: Callable) -> Future:
        """The result of `fn`, which is run when nobody waits for an answer."""
        return self._put(self._encodings, fn)

    def encode(self, fn: Callable) -> asyncio.Future:
        """`submit_encoding`, to be awaited."""
        return asyncio.wrap_future(self.submit_encoding(fn))

    def answer_waiting(self) -> None:
        """Answers all who wait now, but none who come meanwhile; for the thread itself."""
        for _ in range(len(self._answers)):
            _do(*self._answers.popleft())

    def stop(self, timeout: float | None = None) -> None:
        """Ends the thread after what it does."""
        with self._wake:
            self._ended = True
            self._wake.notify()
        self._worker.join(timeout)

    def _put(self, jobs: deque, job: Callable) -> Future:
        future: Future = Future()
        with self._wake:
            jobs.append((future, job))
            self._wake.notify()
        return future

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._answers or self._encodings or self._ended)
            if self._ended:
                return
            self.answer_waiting()
            if self._encodings:
                _do(*self._encodings.popleft())


def _do(future: Future, job: Callable) -> None:
    """A job, unless whoever wanted it has gone away before it begins."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(job())
    except BaseException as error:  # the thread goes on, whatever it is
        future.set_exception(error)
