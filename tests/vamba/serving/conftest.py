"""A server in a thread, and what is sent to it."""

import threading
import time
from types import SimpleNamespace

import pytest
import uvicorn
from openai import OpenAI

from vamba.chat import MEMORIES, load_chat
from vamba.demo.videos import render, stories, write_video
from vamba.serving.app import Server
from vamba.serving.media import Media
from vamba.serving.memory_cache import MemoryCache


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """A folder of media: 0.mp4 to 3.mp4, and what does not belong there."""
    folder = tmp_path_factory.mktemp("media")
    for index, story in enumerate(stories(4, 0)):
        write_video(folder / f"{index}.mp4", render(story))
    return folder


@pytest.fixture(scope="session")
def chats(request):
    """By the name of a fixture with a checkpoint, the chat of it; loaded once."""
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = load_chat(str(request.getfixturevalue(name)), device="cpu")
        return loaded[name]

    return get


@pytest.fixture(scope="session")
def start():
    """Starts a server in a thread: `start(chat, media, **options of Server)`."""
    running = []

    def start(chat, media=None, cache=None, name="tiny", **options):
        cache = cache or MemoryCache(MEMORIES[chat.model.config.model_type], "cpu")
        server = Server(chat, name, cache, media or Media(), **options)
        config = uvicorn.Config(server.app(), port=0, log_level="error", timeout_graceful_shutdown=1)
        uv = uvicorn.Server(config)
        thread = threading.Thread(target=uv.run, daemon=True)
        thread.start()
        while not uv.started:
            time.sleep(0.01)
        port = uv.servers[0].sockets[0].getsockname()[1]
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)

        def stop():
            uv.should_exit = True
            thread.join(20)

        running.append(stop)
        return SimpleNamespace(server=server, client=client, port=port, url=f"http://127.0.0.1:{port}", stop=stop)

    yield start
    for stop in running:
        stop()
