"""Sessions of the web page: what each visitor has watched, and whose turn it is with the model.

What is unusual: there is one model, and it does one thing at a time, as `generate` is not thread-safe. What a visitor
wants of it waits for its turn in `Turns.run`, which tells how many are before it and hands on what the work emits, such
as progress or pieces of an answer. Sessions lie here and not in `gradio.State`, which copies; they end when their
visitor leaves or does nothing for long.
"""

import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vamba.chat import VideoChat
from vamba.errors import UserError


@dataclass(frozen=True)
class Limits:
    """What visitors of the page may take.

    Attributes:
        sessions: visitors who have watched something, at the same time.
        frames: of all that one session watches, together.
        new_tokens: of one answer.
        upload: bytes of one file.
        idle_seconds: after which a session ends; `grace_seconds` after its tab was closed or a phone fell asleep.
    """

    sessions: int = 16
    frames: int = 4096
    new_tokens: int = 1024
    upload: int = 2 * 2**30
    idle_seconds: float = 3600
    grace_seconds: float = 300


class Stopped(Exception):
    """Its visitor wants the work no longer."""


class Waiting(NamedTuple):
    """Work has not begun, as so many others are before it."""

    others: int


@dataclass(eq=False)
class Session:
    """One visitor: a conversation, the files that were watched (None where only a memory was opened), what is shown of
    the conversation, and for each file a strip of its frames in HTML."""

    chat: VideoChat
    sources: list[str | None] = field(default_factory=list)
    shown: list[dict] = field(default_factory=list)
    strips: dict[int, str] = field(default_factory=dict)
    folder: tempfile.TemporaryDirectory = field(default_factory=lambda: tempfile.TemporaryDirectory(prefix="vamba-"))
    running: set[threading.Event] = field(default_factory=set)
    used: float = field(default_factory=time.monotonic)

    def stop(self) -> None:
        """Ends what runs or waits for this session."""
        for stop in list(self.running):
            stop.set()


class Sessions:
    """The sessions that are open, by the name that Gradio gives a visitor's tab. Safe for threads."""

    def __init__(self, new_chat: Callable[[], VideoChat], limits: Limits):
        self._new_chat, self._limits = new_chat, limits
        self._open: dict[str, Session] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def of(self, name: str | None) -> Session:
        """The session of that name, a new one if need be. Raises UserError where there is no room for one."""
        if not name:
            raise UserError("The request names no session; give a session_hash.")
        self.end_idle()
        with self._lock:
            if name not in self._open:
                if len(self._open) >= self._limits.sessions:
                    raise UserError(f"{len(self._open)} others are here, which is the most; try again in some minutes.")
                self._open[name] = Session(self._new_chat())
            session = self._open[name]
            session.used = time.monotonic()
            return session

    def leave(self, name: str | None) -> None:
        """The visitor's tab is gone; the session ends soon, unless the tab comes back."""
        if (session := self._open.get(name or "")) is not None:
            session.stop()
            session.used = time.monotonic() - self._limits.idle_seconds + self._limits.grace_seconds
            timer = threading.Timer(self._limits.grace_seconds + 0.1, self.end_idle)
            timer.daemon = True
            timer.start()

    def end_idle(self) -> None:
        """Ends the sessions in which nothing has been done for long; their memories are freed."""
        oldest = time.monotonic() - self._limits.idle_seconds
        with self._lock:
            for name, session in list(self._open.items()):
                if session.used < oldest and not session.running:
                    del self._open[name]
                    session.folder.cleanup()


class Turns:
    """Runs what needs the model, one after the other.

    Args:
        submit: as of an `Executor` with one thread.
    """

    def __init__(self, submit: Callable[[Callable[[], None]], Future]):
        self._submit = submit
        self._before: list[object] = []  # those whose turn is or has yet to come, in order
        self._lock = threading.Lock()

    def run(self, session: Session, work: Callable[[Callable[[Any], None]], None]) -> Iterator[Any]:
        """What `work(emit)` emits, and `Waiting` until it begins.

        Whatever the work raises is raised here, and `Stopped` once the session has stopped it, in the work by `emit`.
        """
        events: queue.SimpleQueue = queue.SimpleQueue()
        stop, end = threading.Event(), object()

        def emit(event: Any) -> None:
            if stop.is_set():
                raise Stopped
            events.put(event)

        def turn() -> None:
            try:
                if stop.is_set():  # while it waited
                    raise Stopped
                work(emit)
            finally:
                self._before.remove(end)
                events.put(end)

        session.running.add(stop)
        with self._lock:
            self._before.append(end)
            future = self._submit(turn)
        event: Any = None
        others = 0
        try:
            while True:
                with suppress(queue.Empty):
                    event = events.get(timeout=0.1)
                    if event is end:
                        future.result()
                        return
                    yield event
                if stop.is_set():
                    raise Stopped
                before = list(self._before)
                ahead = before.index(end) if end in before else 0
                if ahead and ahead != others:
                    others = ahead
                    yield Waiting(others)
        finally:  # also where the reader of this goes away
            stop.set()
            session.running.discard(stop)
            session.used = time.monotonic()
