"""What every request passes first: how many there may be, how long its body may be, and whether its client is there.

What is unusual: a body is counted while it comes, so no more of it is ever in memory than is allowed. When the client
goes away, whatever is done for it is cancelled, whether it streams or not, and `Call.left` tells the model's thread.
"""

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.responses import JSONResponse

from .metrics import Metrics


BODY_SECONDS = 60.0  # for a whole body to come
DRAIN_SECONDS, DRAIN_BYTES = 2.0, 2**29  # of a refused body are read and dropped
UPLOAD = "/gradio_api/upload"  # of the web page, which bounds it itself
# What is served; all but the last are routes of transformers' server.
KNOWN = ("/v1/chat/completions", "/v1/responses", "/v1/models", "/health", "/metrics")


@dataclass
class Call:
    """One request under way: whether its client has left, and what it was made into."""

    left: threading.Event = field(default_factory=threading.Event)
    prepared: Any = None


CALL: ContextVar[Call] = ContextVar("call")


def error_response(status: int, message: str, code: str | None = None, **headers: str) -> JSONResponse:
    """An error as OpenAI's clients read it; one line, whatever was in the request that it quotes."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    text = " ".join(message.encode("utf-8", "backslashreplace").decode().split())
    error = {"message": text, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers={name.replace("_", "-"): v for name, v in headers.items()})


class Gate:
    """ASGI middleware in front of the routes that ask the model something.

    Args:
        max_bytes: of a body. max_calls: under way at once.
        hosts: names under which the server is asked; none for any. Another is that of a web page somewhere, which has
            its visitor's browser ask in its place, as is an origin that is not the host.
    """

    def __init__(
        self, app: Any, metrics: Metrics, max_bytes: int, max_calls: int, calls: set, hosts: Sequence[str] = ()
    ):
        self.app, self.metrics = app, metrics
        self.max_bytes, self.max_calls, self.calls, self.hosts = max_bytes, max_calls, calls, hosts

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = [499]  # as nginx calls it that a client left

        async def noting(message):
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        try:
            if self._is_foreign(dict(scope["headers"])):
                hosts = ", ".join(self.hosts) or "any name"
                told = f"This request comes from another site; the server answers to {hosts}, see --allowed-hosts."
                await error_response(421, told, "foreign_host")(scope, receive, noting)
            elif scope["method"] == "POST" and scope["path"].startswith("/v1/"):
                await self._admit(scope, receive, noting)
            elif scope["method"] == "POST" and scope["path"] != UPLOAD:
                await self._bound(scope, receive, noting)
            else:
                await self.app(scope, receive, noting)
        except Exception:
            status[0] = 500
            raise
        finally:
            path = scope["path"] if scope["path"] in KNOWN else "other"
            self.metrics.requests.labels(path, status[0]).inc()

    def _is_foreign(self, headers: dict[bytes, bytes]) -> bool:
        host, origin = (urlsplit(b"//" + headers.get(b"host", b"")), urlsplit(headers.get(b"origin", b"")))
        name = (host.hostname or b"").decode("latin-1")
        return bool((self.hosts and name not in self.hosts) or (origin.netloc and origin.netloc != host.netloc))

    async def _bound(self, scope, receive, send) -> None:
        """Runs the app, which is the web page, on a body that is counted while it comes."""
        read = 0

        async def counted():
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_bytes:
                raise HTTPException(413)
            return message

        if self._tells_too_much(scope):
            return await _refuse(self._too_large(), scope, receive, send)
        await self.app(scope, counted, send)

    async def _admit(self, scope, receive, send) -> None:
        if len(self.calls) >= self.max_calls:
            refused = error_response(
                429, f"{self.max_calls} requests are under way; try again.", "queue_full", Retry_After="1"
            )
            return await refused(scope, receive, send)
        call = Call()
        self.calls.add(call.left)
        try:
            try:
                body = await asyncio.wait_for(self._body(scope, receive), BODY_SECONDS)
            except asyncio.TimeoutError:
                refused = error_response(408, f"The body did not come within {BODY_SECONDS:g} seconds.")
                return await refused(scope, receive, send)
            if body is None:
                return await _refuse(self._too_large(), scope, receive, send)
            CALL.set(call)
            await self._answer(call, body, scope, receive, send)
        except _ClientLeft:
            pass
        finally:
            call.left.set()
            self.calls.discard(call.left)

    def _tells_too_much(self, scope) -> bool:
        told = dict(scope["headers"]).get(b"content-length", b"0")
        return not told.isdigit() or len(told) > 18 or int(told) > self.max_bytes

    def _too_large(self) -> JSONResponse:
        message = f"The body has more than {self.max_bytes} bytes; send less, or name a file or a URL."
        return error_response(413, message, "body_too_large", Connection="close")

    async def _body(self, scope, receive) -> bytes | None:
        """The whole body, None where it is too long."""
        if self._tells_too_much(scope):
            return None
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _ClientLeft
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                return None
            more = message.get("more_body", False)
        return bytes(body)

    async def _answer(self, call: Call, body: bytes, scope, receive, send) -> None:
        """Runs the app until it has answered, or the client has left."""
        parts = [{"type": "http.request", "body": body, "more_body": False}]
        gone = asyncio.Event()

        async def whole():
            if parts:
                return parts.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def until_gone():
            while (await receive())["type"] != "http.disconnect":
                pass

        app, watch = asyncio.ensure_future(self.app(scope, whole, send)), asyncio.ensure_future(until_gone())
        try:
            await asyncio.wait({app, watch}, return_when=asyncio.FIRST_COMPLETED)
            call.left.set()
            gone.set()
            if not app.done():
                app.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await app
        finally:
            app.cancel()
            watch.cancel()


class _ClientLeft(Exception):
    """The client has gone away before all of its body had come."""


async def _refuse(response: JSONResponse, scope, receive, send) -> None:
    """Answers, and lets the client finish what it sends before the answer ends: it might never see it otherwise."""

    async def without_end(message):
        await send(message | {"more_body": True} if message["type"] == "http.response.body" else message)

    async def rest():
        read = 0
        while read < DRAIN_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return
            read += len(message.get("body", b""))

    await response(scope, receive, without_end)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(rest(), DRAIN_SECONDS)
    await send({"type": "http.response.body", "body": b"", "more_body": False})
