"""The harness tells every way in which a case can end."""

import os
import random
import signal
import socket
import threading
import time

import pytest
from children import run_case
from injuries import mutate

from vamba.errors import UserError


def verdict(use, seconds=20.0):
    found = run_case(lambda folder: lambda: use(folder), (ValueError, FileNotFoundError), seconds)
    print(found)  # shown where the test fails
    return found.outcome


def fail(error):
    raise error


def leave_a_process(folder):
    if os.fork() == 0:
        time.sleep(60)


ENDS = {
    "result": lambda folder: (folder / "written").write_text("x"),
    "refused": lambda folder: fail(UserError("give another")),
    "foreign error": lambda folder: fail(UnicodeDecodeError("utf-8", b"x", 0, 1, "a ValueError that is not ours")),
    "no sentence": lambda folder: fail(ValueError("a" * 10_000)),
    "crash": lambda folder: os.kill(os.getpid(), signal.SIGSEGV),
    "memory": lambda folder: len(bytearray(b"x") * 2**30),
}


@pytest.mark.parametrize("outcome", ENDS)
def test_the_verdict_says_how_a_case_ended(outcome):
    assert verdict(ENDS[outcome]) == outcome


@pytest.mark.parametrize(
    "use",
    [
        lambda folder: globals().update(kept=open(os.devnull)),
        lambda folder: threading.Thread(target=time.sleep, args=(60,), daemon=True).start(),
        leave_a_process,
    ],
    ids=["descriptor", "thread", "process"],
)
def test_what_is_left_behind_is_a_leak(use):
    assert verdict(use) == "leak"


@pytest.mark.parametrize(
    "use",
    [
        lambda folder: socket.socket().connect_ex(("127.0.0.1", 9)),
        lambda folder: os.system("true"),
        lambda folder: open(folder.parent / "outside", "w").close(),
    ],
    ids=["network", "program", "file"],
)
def test_what_no_input_may_cause_is_forbidden(use, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert verdict(use) == "forbidden"


def test_a_case_without_an_end_is_a_hang():
    assert verdict(lambda folder: time.sleep(60), seconds=0.5) == "hang"


def test_an_injury_follows_from_its_number():
    data = random.Random(0).randbytes(1000)
    assert mutate(data, random.Random("videos 7")) == mutate(data, random.Random("videos 7")) != data
