"""`vamba chat`: lines from a pipe, and a real terminal in which an answer is ended."""

import io
import os
import pty
import re
import subprocess
import sys
import time

import pytest
from PIL import Image

from vamba.chat import load_chat
from vamba.cli import main


@pytest.fixture
def talk(monkeypatch, checkpoint, capsys):
    """Runs `vamba chat` on these lines; its exit code, and what it wrote."""

    def talk(*lines, videos=(), options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        common = ["--model", str(checkpoint), "--max-new-tokens", "6", "--temperature", "0", "--quiet"]
        code = main(["chat", *map(str, videos), *common, *options])
        return code, capsys.readouterr()

    return talk


def test_a_conversation_about_two_videos(talk, clip, checkpoint, tmp_path):
    Image.new("RGB", (56, 84), "red").save(tmp_path / "red.png")
    saved = tmp_path / "kept.safetensors"
    lines = [
        "What happens?",
        "And then?",
        "",
        f"/watch {tmp_path / 'red.png'}",
        "Which colour?",
        "/reset",
        "Which colour?",
    ]
    code, written = talk(*lines, f"/save {tmp_path / 'kept'}", "/quit", "/nothing", videos=[clip])
    chat = load_chat(str(checkpoint))
    options = {"max_new_tokens": 6, "do_sample": False}
    chat.watch(clip, progress=False)
    expected = [chat.ask("What happens?", **options), chat.ask("And then?", **options)]
    chat.watch(tmp_path / "red.png", append=True)
    expected.append(chat.ask("Which colour?", **options))
    chat.reset()
    expected.append(chat.ask("Which colour?", **options))
    assert code == 0 and saved.is_file()
    found = 0
    for answer in expected:  # in this order
        found = written.out.index(answer, found) + len(answer)
    assert "watched 2 in all" in written.out
    code, again = talk("Which colour?", videos=[saved])
    assert code == 0 and expected[-1] in again.out


def test_where_says_in_which_video_and_what_cannot_be_written(talk, clip, tmp_path):
    code, written = talk("What happens?", "/where", videos=[clip, clip])
    assert code == 0 and "%  video 1" in written.out
    code, written = talk("What happens?", f"/where {tmp_path / ('x' * 300)}.html", videos=[clip])
    assert code == 2 and written.err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/wach a.mp4", "/wach is no command; there are /watch"),
        ("/watch", "/watch needs a FILE"),
        ("/watch nothing.mp4", "nothing.mp4"),
        ("/save a", "something that was watched"),
        ("What?", "/watch FILE does"),
    ],
)
def test_what_is_wrong_with_a_line_is_one_sentence(talk, line, said):
    code, written = talk(line)
    assert code == 2 and said in written.err and written.err.count("\n") == 1


def test_an_answer_is_ended_in_a_terminal(checkpoint, clip):
    """Ctrl-C ends an answer, not the conversation; a mistake is told, and Ctrl-D ends it with exit code 0."""
    theirs, ours = pty.openpty()
    command = [sys.executable, "-m", "vamba", "chat", str(clip), "--model", str(checkpoint), "--quiet"]
    command += ["--max-new-tokens", "16000", "--temperature", "0"]
    process = subprocess.Popen(command, stdin=ours, stdout=ours, stderr=ours, start_new_session=True, close_fds=True)
    os.close(ours)
    written = b""

    def wait_for(sign):
        nonlocal written
        until = time.monotonic() + 90
        while not re.search(sign, written) and time.monotonic() < until:
            written += os.read(theirs, 2**16)
        assert re.search(sign, written), written[-500:]
        written = b""

    wait_for(rb"Ctrl-D does.*\n> ")
    os.write(theirs, b"/nothing\n")
    wait_for(rb"! /nothing is no command.*\n> ")
    os.write(theirs, b"What happens?\n")
    wait_for(rb"What happens\?\r\n.+")
    process.send_signal(2)
    wait_for(rb"\(ended\)\r\n> ")
    os.write(theirs, b"\x04")
    assert process.wait(60) == 0
    os.close(theirs)
