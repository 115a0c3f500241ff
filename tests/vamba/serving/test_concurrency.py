"""Many clients at once, clients that leave, budgets that hold nothing, and a server that is killed."""

import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from openai import APIStatusError, APITimeoutError, OpenAI
from PIL import Image

from vamba.demo.videos import render, stories, write_video
from vamba.modeling import VideoMemory
from vamba.serving.media import Media
from vamba.serving.memory_cache import MemoryCache

import training_data as processes
from conversations import ask, assistant, metric, text_of, user


QUESTIONS = ("What happens?", "Who?", "Where?", "When?")


@pytest.fixture
def served(chats, start, videos):
    return start(chats("checkpoint"), Media(videos))


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    """A video that takes seconds to be encoded at a high rate: enough chunks to come in between."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    write_video(path, render(stories(1, 5, (1600,))[0]))
    return path


def encoded(served):
    return metric(served, "vamba_encodings_total", kind="video")


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_16_clients_at_4_videos_make_4_encodings_and_the_same_answers(served, chats, start, videos):
    alone = start(chats("checkpoint"), Media(videos))
    pairs = [(f"{index}.mp4", question) for question in QUESTIONS for index in range(4)]
    expected = [text_of(ask(alone, user(*pair))) for pair in pairs]
    with ThreadPoolExecutor(16) as clients:
        replies = list(clients.map(lambda pair: text_of(ask(served, user(*pair))), pairs))
    assert replies == expected and encoded(served) == 4 and len(set(expected)) > 4


def test_answers_come_between_the_chunks_of_a_long_video(chats, start, videos, long_video):
    served = start(chats("checkpoint"), Media(long_video.parent), reading={"fps": 8})
    with ThreadPoolExecutor(1) as other:
        watching = other.submit(ask, served, user("long.mp4", "What?"))
        until(lambda: metric(served, "vamba_frames_decoded_total") > 0)
        assert ask(served, user("What?"), max_tokens=1).choices and not watching.done()
        assert watching.result().usage.prompt_tokens > 1000


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_generation(served, stream):
    ask(served, user("0.mp4", "What?"))
    if stream:
        answer = ask(served, user("0.mp4", "What?"), stream=True, max_tokens=4000)
        next(answer)
        answer.close()
    else:
        with pytest.raises(APITimeoutError):
            ask(served, user("0.mp4", "What?"), max_tokens=4000, timeout=0.3)
    left = time.monotonic()
    assert ask(served, user("0.mp4", "Who?"), max_tokens=1).choices
    assert time.monotonic() - left < 2  # and not the 10 seconds that 4000 tokens take
    until(lambda: not metric(served, "vamba_requests_under_way"))


def test_a_video_whose_clients_have_left_is_not_encoded_to_its_end(chats, start, long_video):
    served = start(chats("checkpoint"), Media(long_video.parent), reading={"fps": 8})
    with pytest.raises(APITimeoutError):
        ask(served, user("long.mp4", "What?"), timeout=0.1)
    until(lambda: not metric(served, "vamba_requests_under_way"))
    ask(served, user("Who?"), max_tokens=1)
    assert encoded(served) == 0 and metric(served, "vamba_frames_decoded_total") < 1600
    assert ask(served, user("long.mp4", "What?"), max_tokens=1).usage.prompt_tokens_details.cached_tokens == 0


def test_over_every_budget_nothing_fails(served, chats, start, videos, tmp_path):
    cache = MemoryCache(VideoMemory, "cpu", cpu_bytes=1, disk_bytes=1, folder=tmp_path)
    poor = start(chats("checkpoint"), Media(videos), cache)
    for _ in range(2):
        for name in ("0.mp4", "1.mp4"):
            assert text_of(ask(poor, user(name, "What?"))) == text_of(ask(served, user(name, "What?")))
    assert encoded(poor) == 4 and encoded(served) == 2
    assert metric(poor, "vamba_cache_bytes", place="cpu") == 0 and metric(poor, "vamba_cache_dropped_total") == 4


def test_what_fails_is_told_to_all_who_wait_and_tried_again(served, videos):
    (videos / "broken.mp4").write_bytes((videos / "0.mp4").read_bytes()[:900])
    with ThreadPoolExecutor(4) as clients:
        failures = list(
            clients.map(lambda _: pytest.raises(APIStatusError, ask, served, user("broken.mp4", "?")), range(4))
        )
    assert all(failure.value.status_code == 400 for failure in failures)
    (videos / "broken.mp4").write_bytes((videos / "1.mp4").read_bytes())
    assert text_of(ask(served, user("broken.mp4", "What?"))) == text_of(ask(served, user("1.mp4", "What?")))


@pytest.mark.parametrize("kind", ["video", "image"])
def test_a_file_that_is_replaced_while_it_waits_is_not_kept_for_what_it_was(chats, start, tmp_path, videos, kind):
    names = {"video": ("0.mp4", "1.mp4"), "image": ("0.png", "1.png")}[kind]
    for name, colour in zip(names, ("red", "blue")):
        if kind == "video":
            (tmp_path / name).write_bytes((videos / name).read_bytes())
        else:
            Image.new("RGB", (64, 64), colour).save(tmp_path / name)
    (tmp_path / "new").write_bytes((tmp_path / names[1]).read_bytes())
    served, copy = start(chats("checkpoint"), Media(tmp_path)), tmp_path / f"copy_{names[0]}"
    copy.write_bytes((tmp_path / names[0]).read_bytes())
    begun, busy = threading.Event(), threading.Event()
    served.server.inference.submit_encoding(lambda: begun.set() or busy.wait(20))
    begun.wait(20)
    with ThreadPoolExecutor(1) as client:
        asked = client.submit(ask, served, user(names[0], "What?"))
        until(lambda: served.server.inference._encodings)
        os.replace(tmp_path / "new", tmp_path / names[0])
        busy.set()
        with pytest.raises(APIStatusError, match=f"{names[0]} was changed while it was read; ask again") as refused:
            asked.result()
    assert refused.value.status_code == 400 and str(tmp_path) not in str(refused.value)
    assert ask(served, user(copy.name, "What?")).usage.prompt_tokens_details.cached_tokens == 0
    assert ask(served, user(names[0], "What?")).usage.prompt_tokens_details.cached_tokens == 0


def test_a_conversation_goes_on_while_others_fork_its_memory(served):
    def converse(name):
        turns = [user("0.mp4", f"What does {name} do?")]
        for _ in range(2):
            turns += [assistant(text_of(ask(served, *turns)) or "-"), user("1.mp4", "And here?")]
        return text_of(ask(served, *turns))

    alone = [converse(name) for name in ("A", "B", "C")]
    with ThreadPoolExecutor(3) as clients:
        assert list(clients.map(converse, ("A", "B", "C"))) == alone


def begin(checkpoint, videos, cache, output):
    """`vamba serve` as a process, and its client, when it says that it listens."""
    options = ["--served-name", "tiny", "--port", "0", "--media-root", str(videos), "--cache-dir", str(cache)]
    code = "import sys; from vamba.cli import main; sys.exit(main())"
    process = processes.start(code, ["serve", str(checkpoint), "--device", "cpu", *options], output)
    printed = output.with_suffix(".out")
    until(lambda: not process.is_alive() or (printed.exists() and "\n" in printed.read_text()))
    assert process.is_alive(), output.with_suffix(".err").read_text()
    url = re.search(r"http://\S+", printed.read_text()).group()
    return process, SimpleNamespace(client=OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60))


def test_a_server_that_was_killed_encodes_nothing_again(checkpoint, videos, tmp_path):
    cache = tmp_path / "cache"
    process, served = begin(checkpoint, videos, cache, tmp_path / "first")
    try:
        expected = text_of(ask(served, user("0.mp4", "What?")))
        until(lambda: list(cache.glob("*.safetensors")))
        process.kill()
        process.join(20)
        process, served = begin(checkpoint, videos, cache, tmp_path / "second")
        reply = ask(served, user("0.mp4", "What?"))
        assert text_of(reply) == expected and reply.usage.prompt_tokens_details.cached_tokens > 0
        ask(served, user("1.mp4", "What?"))
        with socket.create_connection(("127.0.0.1", served.client.base_url.port), 20) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 100_000)  # headers are bounded
            assert connection.recv(9999).startswith(b"HTTP/1.1 400")
        os.kill(process.pid, signal.SIGINT)
        process.join(20)
        told = (tmp_path / "second.err").read_text()
        assert process.exitcode in (0, 130) and "Traceback" not in told and "leaked" not in told
        assert len(list(cache.glob("*.safetensors"))) == 2
    finally:
        process.kill()
