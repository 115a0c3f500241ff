"""The page, asked by its clients: from upload to answer, sessions apart, and what nobody may do."""

import gc
import json
import runpy
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest


gr = pytest.importorskip("gradio")

import httpx  # noqa: E402
from gradio_client import Client, handle_file  # noqa: E402

import vamba  # noqa: E402
from vamba.chat import MEMORIES, load_chat  # noqa: E402
from vamba.demo.videos import render, stories, write_video  # noqa: E402
from vamba.errors import UserError  # noqa: E402
from vamba.modeling import VideoMemory  # noqa: E402
from vamba.serving.app import Limits as ServerLimits  # noqa: E402
from vamba.serving.app import Server  # noqa: E402
from vamba.serving.command_line import _with_page  # noqa: E402
from vamba.serving.inference import Inference  # noqa: E402
from vamba.serving.media import Media  # noqa: E402
from vamba.serving.memory_cache import MemoryCache  # noqa: E402
from vamba.serving.page import build_page, page_options, videos_below  # noqa: E402
from vamba.serving.sessions import Limits  # noqa: E402


SPACE = Path(__file__).parents[3] / "examples" / "space"
QUESTION = "What happens in the video?"


def launched(chat, **options):
    """A page that is served, and its address."""
    page = build_page(chat, **options)
    return page, page.launch(prevent_thread_lock=True, quiet=True, **page_options(page))[1]


@pytest.fixture(scope="module")
def chats(checkpoint, ma2mba):
    return {"vamba": load_chat(str(checkpoint)), "video_ma2mba": load_chat(str(ma2mba))}


@pytest.fixture(scope="module")
def addresses(chats):
    pages = {kind: launched(chat, reading={"fps": 4}) for kind, chat in chats.items()}
    yield {kind: address for kind, (_, address) in pages.items()}
    for page, _ in pages.values():
        page.close()


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("videos")
    return [write_video(folder / f"{i}.mp4", render(story)) for i, story in enumerate(stories(2, seed=5))]


@pytest.fixture
def visitor(addresses):
    return Client(addresses["vamba"], verbose=False)


def watch(client: Client, video: Path, api_name: str = "/watch") -> str:
    """What the page says once it has watched."""
    return client.predict(handle_file(video), None, None, api_name=api_name)[0]


def ask(client: Client, question: str = QUESTION) -> list[tuple[str, str]]:
    """The conversation that the page then shows."""
    shown = client.predict(question, "", 8, 0, True, api_name="/ask")[0]
    return [(turn["role"], turn["content"][0]["text"]) for turn in shown]


@pytest.mark.parametrize("kind", ["vamba", "video_ma2mba"])
def test_from_upload_to_answer_and_back_from_a_saved_memory(addresses, chats, clip, kind):
    client = Client(addresses[kind], verbose=False)
    said = watch(client, clip)
    assert "Watched clip.mp4" in said and "frames/s" in said and "8 frames of 00:02.0" in said and "tokens" in said
    ask(client)
    shown = ask(client, "And then?")

    alone = vamba.VideoChat(chats[kind].model, chats[kind].processor)
    alone.watch(clip, fps=4, progress=False)
    expected = [alone.ask(text, max_new_tokens=8, do_sample=False) for text in (QUESTION, "And then?")]
    assert shown == [("user", QUESTION), ("assistant", expected[0]), ("user", "And then?"), ("assistant", expected[1])]

    saved, said = client.predict(api_name="/save")
    assert Path(saved["value"] if isinstance(saved, dict) else saved).name == "clip.safetensors" and "Saved" in said
    path = saved["value"] if isinstance(saved, dict) else saved
    assert MEMORIES[kind].load(path).media == alone.memory.media
    other = Client(addresses[kind], verbose=False)
    said = other.predict(handle_file(path), api_name="/open")[0]
    assert "Opened clip.safetensors" in said and "8 frames of 00:02.0" in said
    assert ask(other) == shown[:2]
    assert ask(other, "And then?") == shown


def test_answers_are_streamed_and_a_new_conversation_forgets(visitor, clip):
    watch(visitor, clip)
    first = ask(visitor)
    job = visitor.submit(QUESTION, "", 64, 0, True, api_name="/ask")
    answer = job.result()[0][-1]["content"][0]["text"]
    turns = [shown[-1] for shown, *_ in job.outputs() if isinstance(shown, list)]
    shown = {turn["content"][0]["text"] for turn in turns} - {"…"}
    assert len(shown) > 2 and all(answer.startswith(piece) for piece in shown)
    for length in (1, 1000):  # also in the middle of an answer
        job = visitor.submit(QUESTION, "", length, 0, True, api_name="/ask")
        while not job.outputs():
            time.sleep(0.01)
        visitor.predict(api_name="/new")
        assert ask(visitor) == first


def test_a_second_video_is_watched_as_well(visitor, videos):
    watch(visitor, videos[0])
    said = watch(visitor, videos[1], "/watch_as_well")
    assert "Watched 1.mp4" in said and "24 frames of 00:06.0" in said
    assert "12 frames of 00:03.0" in watch(visitor, videos[1])


def running():
    """The thread of a server, which ends when this is closed."""
    inference = Inference()
    inference.close = inference.stop
    return inference


def test_sessions_at_once_see_their_own_video_and_how_many_are_before_them(chats, videos):
    gate = threading.Event()
    with closing(running()) as inference:
        page, address = launched(chats["vamba"], inference=inference)
        try:
            visitors = [Client(address, verbose=False) for _ in videos]
            inference.submit(gate.wait)
            jobs = [
                one.submit(handle_file(video), None, None, api_name="/watch") for one, video in zip(visitors, videos)
            ]
            while not any("Waiting for 1 other" in said for job in jobs for said, *_ in job.outputs()):
                assert not all(job.done() for job in jobs)
            gate.set()
            assert all("Watched" in job.result(60)[0] for job in jobs)
            questions = [QUESTION, "Which colour flashed first?"]
            with ThreadPoolExecutor(2) as pool:
                found = list(pool.map(lambda one: [ask(one, text) for text in questions][-1], visitors))
        finally:
            gate.set()
            page.close()
    for video, shown in zip(videos, found):
        alone = vamba.VideoChat(chats["vamba"].model, chats["vamba"].processor)
        alone.watch(video, progress=False)
        expected = [alone.ask(text, max_new_tokens=8, do_sample=False) for text in questions]
        assert [text for role, text in shown if role == "assistant"] == expected


def test_watching_can_be_stopped_and_leaves_what_was_watched(chats, clip, videos):
    gate = threading.Event()
    with closing(running()) as inference:
        page, address = launched(chats["vamba"], inference=inference)
        try:
            visitor = Client(address, verbose=False)
            watch(visitor, clip)
            before = ask(visitor)
            inference.submit(gate.wait)
            job = visitor.submit(handle_file(videos[0]), None, None, api_name="/watch")
            while "Opening" not in str(job.outputs()):
                assert not job.done()
            while "Stopped." not in str(job.outputs()):
                visitor.predict(api_name="/stop")
            gate.set()
            assert ask(visitor)[:2] == before
        finally:
            gate.set()
            page.close()


def damaged(path: Path, to: Path) -> Path:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    to.write_bytes(data)
    return to


def test_what_is_broken_is_one_sentence(visitor, chats, clip, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    said = watch(visitor, tmp_path / "broken.mp4")
    assert 'class="status error"' in said and "broken.mp4" in said and "/tmp" not in said and "Traceback" not in said
    assert "upload one first" in visitor.predict(None, None, None, api_name="/watch")[0]
    assert "Nothing was watched yet" in ask(visitor)[-1][1]
    with pytest.raises(Exception, match="Nothing was watched yet"):
        visitor.predict(api_name="/save")

    watch(visitor, clip)
    assert "not spaces only" in ask(visitor, "  ")[-1][1]
    assert "1000000 frames are more" in visitor.predict(handle_file(clip), None, 10**6, api_name="/watch")[0]
    for kind in ("vamba", "video_ma2mba"):
        chat = vamba.VideoChat(chats[kind].model, chats[kind].processor)
        chat.watch(clip, progress=False).save(tmp_path / f"{kind}.safetensors")
    (tmp_path / "video.safetensors").write_bytes(clip.read_bytes())
    for path, reason in (
        (tmp_path / "video_ma2mba.safetensors", "another kind of model"),
        (damaged(tmp_path / "vamba.safetensors", tmp_path / "damaged.safetensors"), "is damaged"),
        (tmp_path / "video.safetensors", "damaged or no safetensors file"),
    ):
        said = visitor.predict(handle_file(path), api_name="/open")[0]
        assert 'class="status error"' in said and reason in said and "/tmp" not in said
    assert ask(visitor)[-1][0] == "assistant" and "No answer" not in str(ask(visitor))  # it goes on


def test_sessions_frames_answers_and_uploads_are_bounded(chats, clip):
    page, address = launched(chats["vamba"], limits=Limits(sessions=1, frames=10, new_tokens=2, upload=10**5))
    try:
        visitor = Client(address, verbose=False)
        assert "8 frames" in visitor.predict(handle_file(clip), 4, None, api_name="/watch")[0]
        with pytest.raises(Exception, match="greater than maximum value 2"):
            ask(visitor)
        assert "10 frames" in visitor.predict(handle_file(clip), 4, None, api_name="/watch_as_well")[0]
        assert "10 frames are watched" in watch(visitor, clip, "/watch_as_well")
        assert "try again" in watch(Client(address, verbose=False), clip)
        large = {"files": ("large.mp4", bytes(10**5 + 1))}
        assert httpx.post(f"{address}gradio_api/upload", files=large).status_code == 413
    finally:
        page.close()


@pytest.mark.parametrize("named", ["http://127.0.0.1:9/v.mp4", "file:///etc/passwd", "/etc/passwd"])
def test_a_request_can_name_no_file_and_no_url(visitor, named):
    call = {"data": [{"path": named, "meta": {"_type": "gradio.FileData"}}, None, None], "session_hash": "x"}
    address = f"{visitor.src}gradio_api/call/watch"
    request = urllib.request.Request(address, json.dumps(call).encode(), {"Content-Type": "application/json"})
    event = json.load(urllib.request.urlopen(request))["event_id"]
    said = urllib.request.urlopen(f"{address}/{event}").read().decode()
    assert "event: error" in said and "root:" not in said


def test_videos_that_can_be_picked_lie_below_the_folder(tmp_path, clip):
    (tmp_path / "root" / "deep").mkdir(parents=True)
    for name in ("b.mp4", "deep/a.MKV", "notes.txt"):
        (tmp_path / "root" / name).write_bytes(clip.read_bytes())
    (tmp_path / "root" / "out.mp4").symlink_to(clip)
    assert [name for name, _ in videos_below(tmp_path / "root")] == ["b.mp4", "deep/a.MKV"]
    with pytest.raises(UserError, match="no folder"):
        videos_below(tmp_path / "nothing")


def test_mounted_on_a_server_it_leaves_the_other_routes_alone(chats, clip):
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    app = FastAPI()
    app.get("/v1/models")(lambda: {"data": []})
    page = build_page(chats["vamba"], media_root=clip.parent)
    gr.mount_gradio_app(app, page, path="/", **page_options(page))
    with TestClient(app) as client:
        assert client.get("/v1/models").json() == {"data": []}
        assert "gradio" in client.get("/").text
        picked = client.get(f"/gradio_api/file={clip}")
        assert picked.status_code == 200 and picked.content == clip.read_bytes()
        assert client.get("/gradio_api/file=/etc/passwd").status_code == 403


def test_what_begins_as_a_route_of_the_server_and_is_none_is_refused_as_clients_read_it(chats):
    from fastapi.testclient import TestClient

    server = Server(chats["vamba"], "tiny", MemoryCache(VideoMemory, "cpu"), Media())
    with TestClient(_with_page(server.app(), server, None)) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny" and "gradio" in client.get("/").text
        for method, path, status in (
            ("POST", "/v1/embeddings", 404),
            ("GET", "/v1/nothing", 404),
            ("GET", "/v1/chat/completions", 405),
            ("POST", "/v1/models/tiny", 405),
            ("POST", "/health", 405),
        ):
            answer = client.request(method, path, json={})
            assert answer.status_code == status and path in answer.json()["error"]["message"], path


def test_beside_the_server_no_other_origin_reads_the_page_and_its_bodies_are_bounded(chats):
    from fastapi.testclient import TestClient

    limits = ServerLimits(max_body=10_000)
    server = Server(chats["vamba"], "tiny", MemoryCache(VideoMemory, "cpu"), Media(), limits=limits)
    with TestClient(_with_page(server.app(), server, None), base_url="http://192.168.1.5:8000") as client:
        for path in ("/config", "/gradio_api/info", "/v1/models", "/v1/nothing"):
            assert "access-control-allow-origin" not in client.get(path, headers={"Origin": "http://evil.com"}).headers
        for body in (b" " * 10_001, iter([b" " * 6000] * 2)):
            assert client.post("/gradio_api/queue/join", content=body).status_code in (400, 413)  # 400 where cut off
        uploaded = client.post("/gradio_api/upload", files={"files": ("a.mp4", b" " * 20_000)})
        assert uploaded.status_code == 200


def test_the_space_runs_and_its_header_is_what_the_hub_takes(checkpoint, monkeypatch):
    from huggingface_hub import SpaceCard

    header = SpaceCard.load(SPACE / "README.md", ignore_metadata_errors=False).data.to_dict()
    assert (SPACE / header["app_file"]).is_file() and header["sdk"] == "gradio"
    assert header["sdk_version"].split(".")[0] == gr.__version__.split(".")[0] and len(header["short_description"]) < 61
    monkeypatch.setenv("VAMBA_MODEL", str(checkpoint))
    earlier = set(gr.Blocks.get_instances())
    threading.Thread(target=runpy.run_path, args=(str(SPACE / header["app_file"]),), daemon=True).start()
    deadline = time.monotonic() + 20
    while not (pages := [page for page in gr.Blocks.get_instances() if page not in earlier and page.is_running]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert '"title":"Vamba"' in urllib.request.urlopen(pages[0].local_url, timeout=5).read().decode()
    pages[0].close()


def test_the_memory_of_a_visitor_who_left_is_freed_and_makes_room(chats, clip, monkeypatch):
    monkeypatch.setenv("GRADIO_HEARTBEAT_INTERVAL", "0.2")  # who has left is noticed so soon, not within 15 s

    def conversations() -> int:
        """Of this model, however they are kept."""
        gc.collect()
        keepers = gc.get_referrers(chats["vamba"].model)
        return sum(
            "memory_options" in (one if isinstance(one, dict) else getattr(one, "__dict__", ())) for one in keepers
        )

    page, address = launched(chats["vamba"], limits=Limits(sessions=1, grace_seconds=0.2))
    try:
        before = conversations()
        first = Client(address, verbose=False)
        watch(first, clip)
        ask(first)
        assert conversations() == before + 1 and "try again" in watch(Client(address, verbose=False), clip)
        with httpx.stream("GET", f"{address}gradio_api/heartbeat/{first.session_hash}") as tab:
            next(tab.iter_lines())  # and it is closed
        deadline = time.monotonic() + 20
        while conversations() > before:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert "Watched" in watch(Client(address, verbose=False), clip)
    finally:
        page.close()


def test_without_gradio_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install 'vamba\[ui\]'"):
        runpy.run_module("vamba.serving.page")
