"""Images from anywhere, decoded by Pillow: the one decoder of processor, chat, video reader and training.

    open_image("cat.jpg"), open_image("https://...", allow_urls=True), image_size(data)

What is unusual: the size in a header is held against the memory for media before anything is decoded, at what decoding
and processing were measured to take; a header cannot make Pillow read the same bytes again and again; and a URL is
fetched only if the caller allows it, within bounds of time and size.
"""

import base64
import contextlib
import http.client
import io
import math
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np

from .media_limits import (
    MAX_AREA,
    MEMORY_VARIABLE,
    check_memory,
    check_regular_file,
    describe,
    is_url,
    media_memory,
    path_or_bytes,
)  # fmt: skip


# Never EPS, for which Pillow starts a program.
FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif",
    ".tiff", ".webp",
)  # fmt: skip
URL_TIMEOUT, URL_DEADLINE = 10.0, 30.0  # seconds: of each answer of a server, and of all of a download
# Bytes per pixel while an image is decoded (Pillow keeps 4 for RGB) and brought to its patches.
_BYTES_PER_PIXEL = {"JPEG2000": 32, "AVIF": 28, "WEBP": 24}
_OTHER_BYTES_PER_PIXEL = 19
_EXIF_BYTES = 2**16  # of metadata in which the orientation is looked for; that of a JPEG cannot be longer
_ORIENTATION, _TURNS = 274, {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # in EXIF: Pillow's transpositions


def is_image(source: Any) -> bool:
    """Whether this is a PIL image, or the name of a file, or a `data:` URL, that holds one picture and no animation."""
    if not isinstance(source, (str, os.PathLike)):
        return hasattr(source, "convert")
    name = os.fsdecode(source).lower()
    if not name.endswith(IMAGE_SUFFIXES) and not name.startswith("data:image/"):
        return False
    if is_url(name):
        return not name.endswith(".gif")
    try:
        with _undecoded(source, False) as image:
            return not getattr(image, "is_animated", False)
    except ValueError:  # damaged, which whoever reads it tells, or no file
        return False


def open_image(source: Any, *, allow_urls: bool = False, over_white: bool = False):
    """Decodes an image: RGB, upright, transparency dropped as transformers does. Of an animation the first picture.

    Args:
        source: path, `file://` or `data:` URL, base64 text, bytes, binary file, PIL image (which is not turned), or
            with `allow_urls` an http or https URL.
        over_white: show transparency over white, and turn PIL images too, as it is done with the frames of a video.

    Returns:
        A `PIL.Image.Image` of mode RGB.

    Raises:
        ValueError: it is damaged, of an unknown format, no regular file, too large for the memory, or not allowed.
    """
    with _undecoded(source, allow_urls, verify=True) as image:
        image.load()
        turn = None if hasattr(source, "convert") and not over_white else _TURNS.get(_orientation(image))
        image = image if turn is None else image.transpose(turn)
        return _rgb(image, over_white)


def image_size(source: Any, *, allow_urls: bool = False) -> tuple[int, int]:
    """(width, height) of an image as stored, from its header; see `open_image`."""
    with _undecoded(source, allow_urls) as image:
        return image.size


def image_of_base64(text: str) -> bytes | None:
    """The bytes of an image that is given as its base64 text; None where the text is none, such as a path."""
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
        image_size(data)
    except ValueError:
        return None
    return data


@contextlib.contextmanager
def _undecoded(source, allow_urls: bool, verify: bool = False):
    """The opened image; whatever Pillow meets a broken one with, here or in the block, becomes a ValueError.

    `verify` checks the checksums of a PNG, which Pillow does not do while it decodes.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with contextlib.ExitStack() as files:
            if isinstance(source, Image.Image):
                image, stored = source, 0
            else:
                file, stored = _opened(source, allow_urls)
                files.enter_context(file)
                check_memory("reading the file", 4 * stored, "store it smaller")
                Image.init()
                known = [name for name in FORMATS if name in Image.OPEN]
                image = Image.open(_Metered(file, 4 * stored + 2**20), formats=known)
            width, height = image.size
            area = max(width * height, _tile_area(image))
            needed = area * _BYTES_PER_PIXEL.get(image.format, _OTHER_BYTES_PER_PIXEL) + stored
            check_memory(f"a picture of {width}x{height} pixels", needed, "scale it down")
            if verify and image.format == "PNG" and image is not source:
                image.verify()
                image = Image.open(_Metered(file, 4 * stored + 2**20), formats=known)
            yield image
    except Exception as error:  # OSError, SyntaxError, zlib.error, MemoryError, struct.error and others
        if isinstance(error, UnidentifiedImageError):
            error = ValueError(f"it is damaged, or none of {', '.join(FORMATS)}")
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{describe(source)}: cannot be read as an image ({reason:.300})") from error


def _opened(source, allow_urls: bool):
    """A binary file with an image, and its length."""
    if isinstance(source, (str, os.PathLike)):
        source = path_or_bytes(os.fsdecode(os.fspath(source)), allow_urls)
        if isinstance(source, str):
            source = download(source) if is_url(source) else _base64(source) or source
    if isinstance(source, str):
        about = os.stat(source)
        check_regular_file(about)
        return open(source, "rb"), about.st_size
    if hasattr(source, "read"):
        source = _content(source)
    if not isinstance(source, (bytes, bytearray, memoryview)):
        raise ValueError("give a path, a URL, base64 text, bytes, an open file or a PIL image")
    return io.BytesIO(source), len(source)


def _base64(text: str) -> bytes | None:
    """The bytes of a base64 text; None where there is a file of this name, or the text is something else."""
    with contextlib.suppress(OSError, ValueError):  # too long for a name
        if os.path.lexists(text) or len(text) < 40:
            return None
    with contextlib.suppress(ValueError):
        return base64.b64decode("".join(text.split()), validate=True)
    return None


def _content(file) -> bytes:
    """All of a binary file that the caller has opened, within bounds."""
    try:
        about = os.fstat(file.fileno())
    except (AttributeError, OSError, ValueError):  # a file that is not on the system, such as io.BytesIO
        about = None
    if about is not None:
        check_regular_file(about)
    if hasattr(file, "seek"):
        file.seek(0)
    data = file.read(limit := media_memory() // 4 + 1)
    if not isinstance(data, bytes) or len(data) == limit:
        raise ValueError("the file is not open in binary mode, or longer than any image")
    return data


class _Metered:
    """A file of which no more is read than `left` bytes: a TIFF may name its one long text 65,535 times."""

    def __init__(self, file, left):
        self._file, self._left = file, left

    def read(self, size=-1):
        data = self._file.read(size if size >= 0 else max(self._left, 0) + 1)
        self._left -= len(data)
        if self._left < 0:
            raise ValueError("its header refers to more data than the file has")
        return data

    def __getattr__(self, name):
        return getattr(self._file, name)


def _tile_area(image) -> int:
    """Pixels of one tile of a TIFF, for which there is room while it is decoded, however small the image."""
    tags = getattr(image, "tag_v2", {})
    sides = [tags.get(tag, 0) for tag in (322, 323)]  # TileWidth, TileLength
    return math.prod(side if isinstance(side, int) else MAX_AREA for side in sides)


def _orientation(image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or nobody can read it."""
    for key in ("exif", "Raw profile type exif"):
        if len(image.info.get(key, "")) > _EXIF_BYTES:
            image.info[key] = image.info[key][:_EXIF_BYTES]
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # of any type, and an image is none the worse for it
        return 1


def _rgb(image, over_white: bool):
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 8
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if over_white and (image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info):
        image, white = image.convert("RGBA"), Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def download(url: str, limit: int | None = None, connect: Callable | None = None) -> bytes:
    """What an http or https URL gives, also after redirects to such; within time and a quarter of the memory for media.

    Args:
        limit: bytes that it may give at most. connect: makes each connection in the place of
            `socket.create_connection`, and then without the proxies of the environment.

    Raises:
        OSError, ValueError, http.client.HTTPException: it gives nothing, too much, or too slowly.
    """
    limit = min(media_memory() // 4, limit or media_memory())
    sockets, until, data = [], time.monotonic() + URL_DEADLINE, bytearray()
    opener = urllib.request.OpenerDirector()  # without the handlers of file:, ftp: and data:
    of_library = [] if connect else ["Proxy"]
    of_library += ["Unknown", "HTTPDefaultError", "HTTPRedirect"]
    handlers = [getattr(urllib.request, f"{name}Handler")() for name in of_library]
    for handler in (*handlers, urllib.request.HTTPErrorProcessor(), _HttpHandler(sockets, connect)):
        opener.add_handler(handler)
    timer = threading.Timer(URL_DEADLINE, _hang_up, [sockets])
    timer.daemon = True
    timer.start()
    try:
        with opener.open(url, timeout=URL_TIMEOUT) as response:
            while len(data) <= limit and (piece := response.read(2**16)):
                data += piece
    finally:
        timer.cancel()
        if time.monotonic() >= until:
            raise ValueError(f"the download took more than {URL_DEADLINE:g} seconds")
    if len(data) > limit:
        raise ValueError(f"the download has more than {limit} bytes; raise {MEMORY_VARIABLE}")
    return bytes(data)


class _HttpHandler(urllib.request.AbstractHTTPHandler):
    """Opens http and https URLs, and keeps a list of the sockets."""

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def __init__(self, sockets, connect: Callable | None = None):
        super().__init__()
        self._sockets, self._connect = sockets, connect

    def http_open(self, request):
        return self.do_open(self._listed(http.client.HTTPConnection), request)

    def https_open(self, request):
        return self.do_open(self._listed(http.client.HTTPSConnection), request)

    def _listed(self, kind):
        sockets, make_connection = self._sockets, self._connect

        class Connection(kind):
            def connect(self):
                self._create_connection = make_connection or self._create_connection
                super().connect()
                sockets.append(self.sock)

        return Connection


def _hang_up(sockets) -> None:
    """Ends every read, also of a server that sends its answer byte by byte."""
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
