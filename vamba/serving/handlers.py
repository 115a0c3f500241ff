"""transformers' handlers of requests, for conversations whose videos are known or become so.

What is unusual: a handler gets a body that says no more than whether to stream; prompt, memory and sampling come from
what was made of the real body before. What it returns goes through `_whole` or `_events`, which put right what differs
from OpenAI's: usage with the video's tokens, where it stands in a stream, what stops an answer, and errors.
"""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse, StreamingResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.response import ResponseHandler

from .gate import CALL
from .request_bodies import asked_by


if TYPE_CHECKING:
    from .app import Prepared, Server

FAILED = "The model could not go on with this answer; the server's log says why."


class StopText:
    """Ends a text that comes in pieces before the first of `stops`."""

    def __init__(self, stops: list[str]):
        self._stops, self._held, self._ended = stops, "", False

    def feed(self, piece: str) -> str:
        """What may be shown now: all but what a stop might begin with."""
        text = self._held + piece
        ends = [text.index(stop) for stop in self._stops if stop in text]
        if self._ended or ends:
            self._held, shown = "", "" if self._ended else text[: min(ends)]
            self._ended = True
            return shown
        held = next((n for n in range(len(text), 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What was held back, when nothing more comes."""
        return self._held


class _Known:
    """Mixed into transformers' handlers; see the module's docstring."""

    is_chat = False

    def __init__(self, server: "Server", **options: Any):
        super().__init__(**options)
        self.server = server

    async def handle_request(self, body: dict, request_id: str):
        if (name := body.get("model")) is not None:
            self.server.check_name(name)
        limits = self.server.limits
        bounds = {name: getattr(limits, name) for name in ("max_tokens", "max_media", "max_frames")}
        asked = asked_by(body, is_chat=self.is_chat, **bounds)
        call = CALL.get()
        call.prepared = await self.server.prepare(call, asked)
        conversation = {"messages": []} if self.is_chat else {"input": "-"}
        plain = {"model": None, "stream": body.get("stream") or False, **conversation}
        response = await super().handle_request(plain, request_id)
        if isinstance(response, StreamingResponse):
            options = body.get("stream_options") or {}
            response.body_iterator = self._events(response.body_iterator, call.prepared, options)
            return response
        return JSONResponse(self._whole(json.loads(response.body), call.prepared))

    def _resolve_model(self, body: dict):
        return self.server.name, self.server.generator, _Prompted(self.server.processor)

    def _build_generation_config(self, *args: Any, **options: Any):
        return CALL.get().prepared.generation

    def _counted(self, usage: dict, prepared: "Prepared") -> dict:
        """Usage with the video's tokens, and how many of them nobody had to encode."""
        prompt, answer = ("prompt", "completion") if self.is_chat else ("input", "output")
        usage[f"{prompt}_tokens"] += prepared.video_tokens
        usage["total_tokens"] += prepared.video_tokens
        details = usage.setdefault(f"{prompt}_tokens_details", {})
        details["cached_tokens"] = prepared.cached_tokens
        self.server.metrics.tokens.inc(usage[f"{answer}_tokens"])
        return usage

    async def _events(self, pieces: AsyncIterator[str], prepared: "Prepared", options: dict) -> AsyncIterator[str]:
        """The events of a stream, put right."""
        stop = StopText(prepared.asked.stops)
        async with aclosing(pieces) as all_pieces:  # type: ignore[type-var]
            async for piece in all_pieces:
                for line in filter(None, piece.split("\n\n")):
                    try:
                        event = json.loads(line.removeprefix("data: "))
                    except ValueError:  # what was raised, with quotes
                        event = {"error": line}
                    for better in self._better(event, prepared, options, stop):
                        yield f"data: {json.dumps(better)}\n\n"
        if self.is_chat:
            yield "data: [DONE]\n\n"


class KnownChatHandler(_Known, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    is_chat = True

    def _whole(self, answer: dict, prepared: "Prepared") -> dict:
        self._counted(answer["usage"], prepared)
        stop = StopText(prepared.asked.stops)
        message = answer["choices"][0]["message"]
        message["content"] = stop.feed(message["content"]) + stop.rest()
        return answer

    def _better(self, event: dict, prepared: "Prepared", options: dict, stop: StopText) -> Iterator[dict]:
        if "error" in event:
            self.server.log_failure(event["error"])
            yield {"error": {"message": FAILED, "type": "server_error", "param": None, "code": None}}
            return
        delta, usage = event["choices"][0]["delta"], event.pop("usage", None)
        if delta.get("content"):
            if not (shown := stop.feed(delta["content"])):
                return
            delta["content"] = shown
        if usage is not None and (rest := stop.rest()):
            last = {"index": 0, "delta": {"content": rest}}
            yield event | {"choices": [last]}
        yield event
        if usage is not None:
            usage = self._counted(usage, prepared)
            if options.get("include_usage"):
                yield event | {"choices": [], "usage": usage}


class KnownResponseHandler(_Known, ResponseHandler):
    """`/v1/responses`."""

    def _whole(self, answer: dict, prepared: "Prepared") -> dict:
        self._counted(answer["usage"], prepared)
        return answer

    def _better(self, event: dict, prepared: "Prepared", options: dict, stop: StopText) -> Iterator[dict]:
        if event.get("type") == "error":
            self.server.log_failure(event["message"])
            event["message"] = FAILED
        response = event.get("response", {})
        if response.get("error"):
            response["error"]["message"] = FAILED
        if response.get("usage"):
            self._counted(response["usage"], prepared)
        yield event


class _Prompted:
    """A processor to transformers' handlers, whose inputs of the conversation are those made before."""

    def __init__(self, processor: Any):
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def apply_chat_template(self, conversation: list, **options: Any) -> Any:
        return CALL.get().prepared.inputs
