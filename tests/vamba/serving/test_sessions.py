"""Whose turn it is, what is waited for, and when a session ends."""

import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vamba.errors import UserError
from vamba.serving.sessions import Limits, Session, Sessions, Stopped, Turns, Waiting


@pytest.fixture
def gate():
    """Ends what waits for it at the end of a test."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def turns(gate):
    with ThreadPoolExecutor(1) as executor:
        yield Turns(executor.submit)
        gate.set()


class Chat:
    """Stands for a conversation, which a session only holds."""


def session() -> Session:
    return Session(Chat())


def test_work_is_done_in_turn_and_tells_how_many_are_before_it(turns, gate):
    def wait(emit):
        emit("begun")
        gate.wait()

    first, second = turns.run(session(), wait), turns.run(session(), lambda emit: emit("second"))
    third = turns.run(session(), lambda emit: emit("third"))
    assert next(first) == "begun"
    assert next(second) == Waiting(1) and next(third) == Waiting(2)
    gate.set()
    assert list(first) == [] and list(second)[-1] == "second" and list(third)[-1] == "third"


def test_what_the_work_raises_reaches_its_visitor_and_the_next_has_his_turn(turns):
    def fail(emit):
        raise UserError("no such video")

    with pytest.raises(UserError, match="no such video"):
        list(turns.run(session(), fail))
    assert list(turns.run(session(), lambda emit: emit(1))) == [1]


@pytest.mark.parametrize("leaves", [False, True])
def test_stopped_work_ends_and_what_still_waits_is_never_done(turns, gate, leaves):
    ended, done = threading.Event(), []

    def work(emit):
        try:
            while True:
                emit(1)
                time.sleep(0.01)
        finally:
            ended.set()

    visitor = session()
    running, waiting = turns.run(visitor, work), turns.run(visitor, lambda emit: done.append(1))
    assert next(running) == 1 and next(waiting) == Waiting(1)
    if leaves:
        running.close(), waiting.close()
    else:
        visitor.stop()
        for events in (running, waiting):
            with pytest.raises(Stopped):
                list(events)
    assert ended.wait(5) and list(turns.run(session(), lambda emit: emit(2))) == [2]
    assert not done and not visitor.running


def test_a_session_ends_when_its_visitor_has_left_and_is_freed():
    sessions = Sessions(Chat, Limits(sessions=1, grace_seconds=0.05))
    found = sessions.of("a")
    assert sessions.of("a") is found
    with pytest.raises(UserError, match="try again"):
        sessions.of("b")
    chat, folder = weakref.ref(found.chat), Path(found.folder.name)
    assert folder.is_dir()
    sessions.leave("a")
    del found
    deadline = time.monotonic() + 5
    while chat() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert chat() is None and len(sessions) == 0
    assert not folder.exists() and sessions.of("b")


def test_a_session_does_not_end_while_something_runs_or_when_the_tab_comes_back():
    sessions = Sessions(Chat, Limits(idle_seconds=0.05, grace_seconds=0.05))
    busy = sessions.of("busy")
    busy.running.add(threading.Event())
    sessions.of("idle")
    time.sleep(0.1)
    sessions.end_idle()
    assert len(sessions) == 1 and sessions.of("busy") is busy


def test_a_request_without_a_session_is_refused():
    with pytest.raises(UserError, match="session"):
        Sessions(Chat, Limits()).of(None)
