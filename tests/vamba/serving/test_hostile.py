"""Requests that nobody should send: each is answered by a 4xx with one sentence, and the next question is answered."""

import http.client
import http.server
import json
import os
import socket
import threading
import time

import httpx
import pytest
from openai import APIStatusError

from vamba.serving.app import Limits
from vamba.serving.media import Media, is_public

from conversations import ask, metric, text_of, user


LIMITS = Limits(max_body=300_000, max_media=3, max_frames=100, max_tokens=50)


@pytest.fixture(scope="module")
def root(tmp_path_factory, videos):
    """A folder of media with all that must not be read, in it or beside it."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "secret.mp4").write_bytes((videos / "0.mp4").read_bytes())
    root = folder / "root"
    (root / "sub").mkdir(parents=True)
    (root / "0.mp4").write_bytes((videos / "0.mp4").read_bytes())
    (root / "cut.mp4").write_bytes((videos / "0.mp4").read_bytes()[:400])
    (root / "empty.mp4").touch()
    (root / "text.png").write_text("no image")
    (root / "link.mp4").symlink_to(folder / "secret.mp4")
    (root / "folder.mp4").symlink_to(folder)
    (root / "device.mp4").symlink_to("/dev/zero")
    os.mkfifo(root / "fifo.mp4")
    files = [folder / "secret.mp4", root / "0.mp4"]
    (root / "list.mp4").write_text("ffconcat version 1.0\n" + "".join(f"file '{file}'\n" for file in files))
    entries = "".join(f"#EXTINF:3,\n{file}\n" for file in files)
    (root / "hls.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n{entries}#EXT-X-ENDLIST\n")
    return root


@pytest.fixture(scope="module")
def served(chats, start, root):
    return start(chats("checkpoint"), Media(root), limits=LIMITS)


def post(served, body, path="/v1/chat/completions", **headers):
    """Status and JSON of an answer to bytes, or to what is made JSON of."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    try:
        connection.request("POST", path, data, {"Content-Type": "application/json"} | headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def check_refused(status, answer, *statuses):
    assert status in (statuses or (400,)), answer
    error = answer["error"]
    assert error["type"] == "invalid_request_error" and "Traceback" not in error["message"]
    assert 0 < len(error["message"]) < 1500 and "\n" not in error["message"]


@pytest.fixture(autouse=True)
def goes_on(served):
    yield
    assert ask(served, user("What?"), max_tokens=1).choices


@pytest.mark.parametrize(
    "url",
    [
        "../secret.mp4", "sub/../../secret.mp4", "/etc/passwd", "link.mp4", "folder.mp4", "folder.mp4/secret.mp4",
        "device.mp4", "fifo.mp4", "sub", "", "missing.mp4", "0.mp4\0.png", "file:///etc/passwd", "file://host/0.mp4",
        "file://../secret.mp4", "file:///%2e%2e/secret.mp4", "cut.mp4", "empty.mp4", "text.png", "list.mp4", "hls.mp4",
        "http://127.0.0.1:9/a.mp4", "ftp://127.0.0.1/a", "rtsp://127.0.0.1/a", "concat:0.mp4|link.mp4",
        "data:video/mp4;base64,", "data:video/mp4;base64,AAAA", "data:video/mp4;base64,!", "data:,", "x" * 5000,
        "~/secret.mp4", "fd:0", "pipe:0",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["video", "image"])
def test_what_must_not_or_cannot_be_read(served, root, url, kind):
    medium = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": [medium, {"type": "text", "text": "What?"}]}]}
    status, answer = post(served, body)
    check_refused(status, answer)
    assert str(root) not in answer["error"]["message"] and metric(served, "vamba_encodings_total", kind=kind) == 0


def test_a_playlist_in_a_data_url_names_nothing(served, root):
    for name in ("list.mp4", "hls.mp4"):
        url = "data:video/mp4," + (root / name).read_text().replace("%", "%25")
        check_refused(*post(served, {"messages": [user(url, "What?")]}))


TURN = [{"role": "user", "content": "What?"}]


@pytest.mark.parametrize(
    "body",
    [
        {}, {"messages": 3}, {"messages": []}, {"messages": [3]}, {"messages": [[]]}, {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": 3}]}, {"messages": [{"role": "user", "content": []}]},
        {"messages": [{"role": "user", "content": [[[]]]}]}, {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": ["user"], "content": "x"}]}, {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": " "}]}, {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
        {"messages": [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": 3}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": "\ud800.mp4"}]}]},
        {"messages": [{"role": "system", "content": [{"type": "video_url", "video_url": "0.mp4"}]}, *TURN]},
        {"messages": [user(*["0.mp4"] * 4, "What?")]}, {"messages": [user("a " * 20_000)]},
        *({"messages": TURN, "temperature": value} for value in ("1", float("nan"), float("inf"), -1, 1e300, True, [])),
        *({"messages": TURN, "max_tokens": value} for value in (0, -1, 51, 10**30, 1.5, "5", True, {})),
        *({"messages": TURN, "top_p": value} for value in (-0.1, 1.1, "x")),
        *({"messages": TURN, "stop": value} for value in (3, [3], ["a"] * 9, "", ["x" * 200], "\ud800", {})),
        *({"messages": TURN, name: 2} for name in ("n", "logprobs", "tools", "stream", "stream_options", "nothing")),
        {"messages": TURN, "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": TURN, "response_format": {"type": "json_object"}}, {"messages": TURN, "seed": 1e400},
        {"messages": TURN, "generation_config": "{}"}, {"messages": TURN, "chat_template_kwargs": {}},
        {"messages": TURN, "logprobs": True}, {"messages": TURN, "stream_options": {"include_usage": 3}},
        {"messages": TURN, "seed": 2**70}, {"messages": TURN, "allow_urls": True}, {"messages": TURN, "\ud800": 1},
        *({"messages": [user("0.mp4", "What?")], "mm_processor_kwargs": value} for value in (
            3, {"num_frames": 50_000}, {"num_frames": -1}, {"num_frames": "2"}, {"fps": 0}, {"fps": float("nan")},
            {"fps": 1, "num_frames": 2}, {"allow_urls": True}, {"backend": "x"}, {"fps": [1]}, {"num_frames": 10**40},
        )),
    ],
)  # fmt: skip
def test_bodies_of_the_wrong_kind(served, body):
    check_refused(*post(served, {"model": "tiny"} | body))


@pytest.mark.parametrize(
    "body",
    [
        {}, {"input": 3}, {"input": [3]}, {"input": [{"type": "function_call"}]}, {"input": "x", "instructions": 3},
        {"input": "x", "previous_response_id": "a"}, {"input": "x", "messages": TURN}, {"input": "x", "stop": "a"},
        {"input": [{"type": "input_image", "file_id": "a"}]}, {"input": "x", "max_output_tokens": 10**9},
        {"input": "x", "background": True}, {"input": [{"type": "item_reference", "id": "x"}]},
    ],
)  # fmt: skip
def test_bodies_of_the_wrong_kind_for_responses(served, body):
    check_refused(*post(served, {"model": "tiny"} | body, "/v1/responses"))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b'{"seed": 1' + b"0" * 9000 + b"}"]
)
def test_bodies_that_are_no_json(served, data):
    status, answer = post(served, data)
    check_refused(status, answer)
    assert answer["error"]["code"] == "invalid_json"


def test_other_models_and_routes(served):
    for name in ("other", "\ud800", 3, {}, ["tiny"]):
        status, answer = post(served, {"model": name, "messages": TURN})
        check_refused(status, answer, 404)
        assert answer["error"]["code"] == "model_not_found"
    for path in ("/v1/completions", "/v1/embeddings", "/load_model", "/reset", "/v1/audio/transcriptions", "/%ff"):
        check_refused(*post(served, {"model": "tiny", "prompt": "x"}, path), 404)
    check_refused(*post(served, {}, "/v1/models"), 405)


def test_a_body_is_refused_before_it_is_read(served):
    """Also one of 10 GB that says so, and one that does not say."""
    with socket.create_connection(("127.0.0.1", served.port), 10) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {10**10}\r\n\r\n".encode())
        assert connection.recv(9999).startswith(b"HTTP/1.1 413")
    with socket.create_connection(("127.0.0.1", served.port), 10) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        sent = 0
        with pytest.raises(OSError):
            while sent < 2**31:
                connection.sendall(b"10000\r\n" + b" " * 2**16 + b"\r\n")
                sent += 2**16
        assert connection.recv(9999).startswith(b"HTTP/1.1 413") and sent < 2**30
    with pytest.raises(APIStatusError) as refused:
        ask(served, user("data:video/mp4;base64," + "A" * 2_000_000, "What?"))
    assert refused.value.status_code == 413 and "more than 300000 bytes" in str(refused.value)


def test_a_client_that_sends_all_of_its_body_sees_why_it_is_refused(served):
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    connection.request("POST", "/v1/chat/completions", b" " * 2**27, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 413 and "more than" in json.loads(answer.read())["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:80"}, 200),
        ({"Host": "evil.com"}, 421),
        ({"Host": "evil.com:8000"}, 421),
        ({"Host": "localhost:80", "Origin": "http://localhost:80"}, 200),
        ({"Host": "localhost:80", "Origin": "http://evil.com"}, 421),
    ],
)
def test_another_site_asks_nothing_by_the_browser_of_its_visitor(chats, start, headers, status):
    served = start(chats("checkpoint"), hosts=("localhost",))
    answer = httpx.get(f"{served.url}/v1/models", headers=headers)
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["code"] == "foreign_host"


def test_requests_beyond_the_queue_are_sent_away(chats, start, videos):
    served = start(chats("checkpoint"), Media(videos), limits=Limits(max_calls=2))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
    waiting = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(2)]
    for connection in waiting:
        connection.sendall(head)
    while metric(served, "vamba_requests_under_way") < 2:
        time.sleep(0.01)
    with pytest.raises(APIStatusError) as refused:
        ask(served, user("What?"))
    assert refused.value.status_code == 429 and refused.value.response.headers["retry-after"] == "1"
    for connection in waiting:
        connection.close()
    while metric(served, "vamba_requests_under_way"):
        time.sleep(0.01)
    assert ask(served, user("What?")).choices


class Site(http.server.BaseHTTPRequestHandler):
    """Gives a video, sends elsewhere, or never ends."""

    def do_GET(self):
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/0.mp4")
            self.end_headers()
        elif self.path in ("/file", "/endless"):
            self.send_response(302 if self.path == "/file" else 200)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
            if self.path == "/endless":
                try:
                    while True:
                        self.wfile.write(b" " * 2**16)
                except OSError:
                    return
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.server.video)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(videos):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.video = (videos / "0.mp4").read_bytes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_urls_are_fetched_only_where_that_is_allowed(chats, start, videos, site, served, monkeypatch):
    allowed = Media(videos, allow_urls=True, max_bytes=2**20, may_connect=lambda address: address == "127.0.0.1")
    able = start(chats("checkpoint"), allowed)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # which must not be asked
    expected = text_of(ask(served, user("0.mp4", "What?")))
    for url in (f"{site}/0.mp4", f"{site.replace('127.0.0.1', 'localhost')}/0.mp4", site.replace("127.0.0.1", "[::1]")):
        for media in (Media(videos), Media(videos, allow_urls=True)):
            with pytest.raises(ValueError, match="opens no URLs|not public|refused|fetched"):
                media.find("video", url)
    first = iter([True])  # the address that is asked first, and none that a redirect leads to
    media = Media(videos, allow_urls=True, may_connect=lambda address: next(first, False))
    with pytest.raises(ValueError, match="localhost has an address that is not public"):
        media.find("video", f"{site}/redirect")
    for path, message in (("file", "cannot be fetched|redirect"), ("endless", "more than 1048576 bytes")):
        with pytest.raises(ValueError, match=message):
            allowed.find("video", f"{site}/{path}")
    assert text_of(ask(able, user(f"{site}/0.mp4", "What?"))) == expected


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "100.64.0.1",
        "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
        "64:ff9b::7f00:1", "2002:7f00:1::", "fec0::1", "240.0.0.1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


def test_addresses_that_are_public():
    assert all(map(is_public, ("8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808")))
