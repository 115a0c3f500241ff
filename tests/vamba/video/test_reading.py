"""The reader: sources of every kind, chunks, the network, and what is said of files that are no video."""

import io
import os
import threading

import pytest
import torch
from PIL import Image

from vamba.video import VideoReadError, load_video, read_video

from encoded_videos import encode, indices, shown


def test_chunks_have_bounded_size_and_all_frames(clip):
    reader = read_video(clip, fps=10, chunk_frames=7)
    chunks = list(reader)
    assert [len(chunk) for chunk in chunks] == [7, 7, 6]
    assert shown(torch.cat([chunk.frames for chunk in chunks])) == list(range(20))
    for chunk in chunks:
        assert chunk.frames.dtype == torch.uint8 and chunk.timestamps.dtype == torch.float64
        assert chunk.frames.shape == (len(chunk), 3, *reader.frame_size)
        assert chunk.frames.untyped_storage().nbytes() == chunk.frames.numel()


def test_a_reader_can_be_iterated_again_and_tells_how_much_comes(clip):
    reader = read_video(clip, fps=4)
    assert shown(torch.cat([chunk.frames for chunk in reader])) == shown(torch.cat([chunk.frames for chunk in reader]))
    assert reader.num_frames_expected == reader.len_estimate == 8
    assert reader.read_packets == 20 and reader.lost_packets == 0
    assert read_video(clip, num_frames=6).num_frames_expected == 6
    assert read_video(clip, num_frames=100).num_frames_expected == 20
    assert read_video(clip, fps=1000).num_frames_expected == 20
    assert read_video(clip, fps=4, start=1.0, end=1.5).num_frames_expected in (2, 3)


def test_paths_bytes_files_and_file_urls_agree(clip, tmp_path, monkeypatch):
    path = tmp_path / "a video %41 #1.mp4"
    path.write_bytes(clip)
    file = io.BytesIO(clip)
    for source in (path, str(path), os.fsencode(path) and path, clip, bytearray(clip), memoryview(clip), file):
        assert indices(source, fps=2)[0] == [0, 5, 10, 15]
    assert indices(path.as_uri(), fps=2)[0] == [0, 5, 10, 15]
    assert not file.closed and indices(file, fps=2)[0] == [0, 5, 10, 15]
    with path.open("rb") as opened:
        assert indices(opened, fps=2)[0] == [0, 5, 10, 15]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "concat:x.mp4").write_bytes(clip)
    assert indices("concat:x.mp4", fps=2)[0] == [0, 5, 10, 15]


def test_data_url(clip):
    import base64

    url = "data:video/mp4;base64," + base64.b64encode(clip).decode()
    assert indices(url, fps=2)[0] == [0, 5, 10, 15]
    with pytest.raises(VideoReadError, match="base64"):
        read_video("data:video/mp4;base64,@@@")


def test_files_that_are_not_video(clip, tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("this is not a video\n" * 50)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    headless = tmp_path / "headless.mp4"
    headless.write_bytes(clip[: len(clip) // 2])  # libavformat writes moov last
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(tmp_path / "pipe")
    cases = {
        tmp_path / "missing.mp4": "No such file",
        text: "cannot be opened",
        empty: "empty",
        headless: "cannot be opened",
        folder: "no images",
        tmp_path / "pipe": "not a regular file",
    }
    for path, message in cases.items():
        with pytest.raises(VideoReadError, match=message) as caught:
            load_video(path)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)
    for source, message in (
        (b"", "no bytes"),
        ("", "path"),
        ("a\0b", "path"),
        (7, "int"),
        (None, "NoneType"),
        ([], "no frames"),
    ):
        with pytest.raises(VideoReadError, match=message):
            load_video(source)
    with pytest.raises(VideoReadError, match="item 1 is int"):
        load_video([text, 3])
    with pytest.raises(VideoReadError, match="cannot be read as an image"):
        load_video([text])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_permissions(clip, tmp_path):
    path = tmp_path / "locked.mp4"
    path.write_bytes(clip)
    path.chmod(0)
    with pytest.raises(VideoReadError, match="permission"):
        read_video(path)


@pytest.mark.parametrize("as_bytes", [True, False])
def test_an_animated_webp_is_refused_with_the_remedy(as_bytes, tmp_path):
    pictures = [Image.new("RGB", (32, 32), (60 * index,) * 3) for index in range(3)]
    pictures[0].save(path := tmp_path / "a.webp", save_all=True, append_images=pictures[1:], duration=100)
    with pytest.raises(VideoReadError, match="animated WebP; convert it"):
        load_video(path.read_bytes() if as_bytes else path)


def test_a_file_in_text_mode_and_images_that_are_none(clip, tmp_path):
    (tmp_path / "text.mp4").write_text("text")
    with open(tmp_path / "text.mp4") as file, pytest.raises(VideoReadError, match="text mode"):
        load_video(file)
    os.mkfifo(tmp_path / "pipe.png")
    for item in (tmp_path / "pipe.png", "/dev/zero", tmp_path / "text.mp4", "http://127.0.0.1:9/a.png"):
        with pytest.raises(VideoReadError, match=f"{item}: cannot be read as an image"):
            load_video([item])


def test_a_file_that_cannot_seek_is_refused(clip):
    class Pipe(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            return 0

    with pytest.raises(VideoReadError, match="seek"):
        read_video(Pipe())
    closed = io.BytesIO(clip)
    closed.close()
    with pytest.raises(VideoReadError, match="closed"):
        read_video(closed)


# Network


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/a.mp4", "HTTPS://x/a.mp4", "rtsp://x/a", "ftp://x/a.mp4", "concat://a"]
)
def test_urls_need_permission(url):
    with pytest.raises(VideoReadError, match="allow_urls=True"):
        read_video(url)


@pytest.fixture
def server(clip):
    """A local HTTP server that counts what it is asked for."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(clip)))
            self.end_headers()
            self.wfile.write(clip)

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        http.asked = []
        thread = threading.Thread(target=http.serve_forever, args=[0.01], daemon=True)
        thread.start()
        yield http
        http.shutdown()
        thread.join()


def test_urls_are_read_when_allowed(server):
    url = f"http://127.0.0.1:{server.server_port}/clip.mp4"
    assert indices(url, fps=2, allow_urls=True)[0] == [0, 5, 10, 15]
    assert server.asked


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("local", [False, True])
def test_a_playlist_reaches_neither_the_network_nor_other_files(server, clip, tmp_path, as_bytes, local):
    (tmp_path / "other.ts").write_bytes(encode(20, "ts"))
    target = (tmp_path / "other.ts").as_posix() if local else f"http://127.0.0.1:{server.server_port}/a.ts"
    playlists = [
        f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{target}'\n",
        "ffconcat version 1.0\nfile 'fd:'\n",
        "ffconcat version 1.0\nfile other.ts\n",
    ]
    for index, playlist in enumerate(playlists):
        path = tmp_path / f"list{index}.m3u8"
        path.write_text(playlist)
        with pytest.raises(VideoReadError):
            load_video(playlist.encode() if as_bytes else path)
    assert server.asked == []


def test_an_abandoned_iteration_releases_its_file(clip, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(clip)

    def opened():
        return sum(os.path.realpath(f"/proc/self/fd/{fd}") == str(path) for fd in os.listdir("/proc/self/fd"))

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    reader = read_video(path, fps=10, chunk_frames=2)
    assert opened() == 0
    running = iter(reader)
    next(running)
    assert opened() == 1
    del running
    assert opened() == 0
    with read_video(path, fps=10, chunk_frames=2) as reader:
        running = iter(reader)
        next(running)
        assert opened() == 1
    assert opened() == 0 and list(running) == []
