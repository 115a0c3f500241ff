"""The server: transformers' own, with ours where media become inputs.

What is unusual: transformers' handlers ask a processor for the inputs of a conversation. Here that is answered with a
prompt and a fork of a video memory, which is encoded only if nobody has asked about these media before: a second
question encodes nothing, and a turn that adds a video that one. Who asks for what is being encoded waits for it.
"""

import asyncio
import copy
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import Request
from starlette.responses import Response
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState, Modality
from transformers.utils import logging

from vamba.chat import FirstScoresAreNumbers, VideoChat
from vamba.conversation import with_media
from vamba.errors import UserError
from vamba.modeling.images import open_image
from vamba.modeling.memory_files import WeightsFingerprint

from .gate import KNOWN, Call, Gate, error_response
from .handlers import KnownChatHandler, KnownResponseHandler
from .inference import Inference
from .media import Media, Medium
from .memory_cache import Memory, MemoryCache, keys_of
from .metrics import Metrics
from .request_bodies import LONGEST_STOP, Asked


logger = logging.get_logger(__name__)
CHARACTERS_PER_TOKEN = 64  # of a text; none has more


@dataclass
class Limits:
    """What one request may ask for, and how many there may be at once."""

    max_body: int = 2**26  # bytes, of what a URL gives too
    max_media: int = 16
    max_frames: int = 16384  # of one video
    max_tokens: int = 4096
    max_calls: int = 64


class Inputs(dict):
    """The arguments of `generate`, which lie where they should."""

    def to(self, device: Any) -> "Inputs":
        return self


@dataclass
class Prepared:
    """What a request was made into before it is handed to transformers' handler."""

    asked: Asked
    inputs: Inputs
    generation: GenerationConfig
    video_tokens: int
    cached_tokens: int


@dataclass
class Encoding:
    """Media that are being encoded, and for each who waits whether it has left."""

    task: asyncio.Task | None = None
    wanted_by: list[threading.Event] = field(default_factory=list)


class NobodyWaits(Exception):
    """All who wanted a video have left while it was encoded."""


class Seed(LogitsProcessor):
    """Seeds what is drawn, on the thread that draws, before the first token."""

    def __init__(self, seed: int):
        self._seed: int | None = seed

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self._seed is not None:
            torch.manual_seed(self._seed)
            self._seed = None
        return scores


class Ends(StoppingCriteria):
    """Whether an answer is to end: its client has left, or it holds one of `stops`."""

    def __init__(self, left: threading.Event, tokenizer: Any, stops: list[str], prompt_length: int):
        self._left, self._tokenizer, self._stops, self._length = left, tokenizer, stops, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **options: Any) -> torch.Tensor:
        ends = self._left.is_set()
        if self._stops:
            last = input_ids[0, self._length :][-4 * LONGEST_STOP :]  # as a token is a byte at least
            text = self._tokenizer.decode(last, skip_special_tokens=True)
            ends = ends or any(stop in text for stop in self._stops)
        return torch.full((len(input_ids),), ends, device=input_ids.device)


@dataclass
class Server:
    """A model, its cache and what requests may name.

    Args:
        chat: the model and its processor. name: of the model, as requests say it. reading: options of `watch`.
        generation: fields of a GenerationConfig, system: a system prompt; they hold where a request says nothing else.
        hosts: names under which the server is asked, see `Gate`.
    """

    chat: VideoChat
    name: str
    cache: MemoryCache
    media: Media
    reading: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    system: str | None = None
    hosts: tuple[str, ...] = ()

    def __post_init__(self):
        self.model, self.processor = self.chat.model, self.chat.processor
        self._check_options()
        self.inference, self.calls = Inference(), set[threading.Event]()
        self.metrics = Metrics(self.cache, lambda: len(self.calls))
        self._threads = ThreadPoolExecutor(self.limits.max_calls, "vamba-request")
        self._tokenizing = threading.Lock()  # as tokenizers are not for two threads at once
        self._encodings: dict[str, Encoding] = {}
        self._made_by = self._what_makes_memories()
        self._device = self.model.device  # which is looked for among all weights
        # what transformers' handlers want of a model
        self.generator = SimpleNamespace(
            config=self.model.config, device=self._device, generation_config=None, generate=self.model.generate
        )

    def _check_options(self) -> None:
        """Raises UserError, before anybody asks, for options that no question could be asked with."""
        self.chat._check_generation(dict(self.generation))
        video = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
        try:
            self.processor.video_reader(video, source_fps=1e-6, **self.reading).close()
        except ValueError as error:
            raise UserError(f"{error}".partition(": ")[2]) from error

    def _what_makes_memories(self) -> str:
        """What tells memories of this server apart from those of others in one folder."""
        weights = WeightsFingerprint().of(self.model.model.modules_that_make_memories())
        processors = [getattr(self.processor, name).to_json_string() for name in ("image_processor", "video_processor")]
        quantization = getattr(self.model.config, "quantization_config", None)
        unread = "-" in weights.split(":")[1]  # quantised weights have no number in the fingerprint
        origin = self.name, os.path.abspath(self.model.config._name_or_path)
        return repr((weights, processors, quantization and str(quantization), unread and origin))

    def check_name(self, name: Any) -> None:
        """Raises HTTPException, 404, for another model than this server's."""
        if name != self.name:
            message = f"There is no model {name!r:.100} here; this server has {self.name!r}."
            raise HTTPException(404, {"message": message, "code": "model_not_found"})

    @staticmethod
    def log_failure(reason: str) -> None:
        logger.error(f"an answer failed: {reason}")

    async def prepare(self, call: Call, asked: Asked) -> Prepared:
        """What `generate` needs to answer. Raises UserError for what cannot be asked."""
        config = copy.deepcopy(self.model.generation_config)
        tokens = min(256, self.limits.max_tokens)
        config.update(**({"max_new_tokens": tokens, "min_new_tokens": 1} | self.generation | asked.generation))
        turns = asked.turns
        if self.system is not None and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": [{"type": "text", "text": self.system}]}, *turns]
        reading = dict(self.reading)
        if asked.reading:
            reading = {name: value for name, value in reading.items() if name not in ("fps", "num_frames")}
            reading |= asked.reading
        prompt, media, keys, memory = await self._in_thread(self._look_up, turns, asked.media, reading)
        cached = 0 if memory is None else memory.video_length
        if media and memory is None:
            memory, cached = await self._encoding_of(call, keys, media, reading)
        inputs = Inputs(input_ids=prompt, logits_processor=[FirstScoresAreNumbers()])
        inputs["attention_mask"] = torch.ones_like(prompt)
        if asked.seed is not None:
            inputs["logits_processor"].append(Seed(asked.seed))
        inputs["stopping_criteria"] = StoppingCriteriaList(
            [Ends(call.left, self.processor.tokenizer, asked.stops, prompt.shape[1])]
        )
        length = 0
        if memory is not None:
            chat = VideoChat(self.model, self.processor, memory)
            inputs["past_key_values"] = chat._fork(inputs, {"max_new_tokens": config.max_new_tokens})
            length = memory.video_length
        return Prepared(asked, inputs, config, length, cached)

    def _look_up(self, turns: list[dict], named: list[tuple[str, str]], reading: dict):
        """The prompt, the media, the keys of the first of them, of the first two …, and their memory if it is held."""
        prompt = self._prompt(turns)
        media = [self.media.find(kind, name) for kind, name in named]
        keys = keys_of(self._made_by, [(medium.kind, medium.digest) for medium in media], reading)
        return prompt, media, keys, self.cache.find(keys[-1]) if keys else None

    def _prompt(self, turns: list[dict]) -> torch.Tensor:
        """The tokens (1, N) of a conversation, media marked where they stand, or where the model has read them."""
        if self.model.config.model_type != "vamba":
            kinds = [item["type"] for turn in turns for item in turn["content"] if item["type"] != "text"]
            texts = [turn | {"content": [item for item in turn["content"] if item["type"] == "text"]} for turn in turns]
            turns = with_media(texts, kinds, after_media=True)
        most = getattr(self.model.config.text_config, "max_position_embeddings", None)
        characters = sum(len(item.get("text", "")) for turn in turns for item in turn["content"])
        if most is not None and characters > CHARACTERS_PER_TOKEN * most:  # which would take seconds to count
            raise UserError(f"The conversation has {characters} characters, and the model takes {most} tokens of text.")
        with self._tokenizing:
            text = self.processor.apply_chat_template(turns, add_generation_prompt=True)
            prompt = self.processor.tokenizer(text, return_tensors="pt")["input_ids"]
        if most is not None and prompt.shape[1] > most:
            raise UserError(f"The conversation has {prompt.shape[1]} tokens of text, and the model takes {most}.")
        return prompt.to(self._device)

    async def _encoding_of(self, call: Call, keys: list[str], media: list[Medium], reading: dict) -> tuple[Memory, int]:
        """A fork of the memory that is being encoded, and how many of its tokens were there already."""
        while True:
            if (encoding := self._encodings.get(keys[-1])) is None:
                encoding = self._encodings[keys[-1]] = Encoding()
                encoding.task = asyncio.ensure_future(self._encoded(encoding, keys, media, reading))
                encoding.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # all may have left
            mine = not encoding.wanted_by
            encoding.wanted_by.append(call.left)
            try:
                memory, cached = await asyncio.shield(encoding.task)
            except NobodyWaits:  # just as this one came
                continue
            return memory.fork(), cached if mine else memory.video_length

    async def _encoded(self, encoding: Encoding, keys: list[str], media: list[Medium], reading: dict):
        try:
            sources = [await self._in_thread(self._checked, medium, reading) for medium in media]
            return await self.inference.encode(lambda: self._encode(encoding, keys, media, sources, reading))
        except UserError as error:
            told = f"{error}"
            for medium in media:
                told = told.replace(f"{medium.content}", medium.name) if medium.name else told
            raise UserError(told) from error
        finally:
            del self._encodings[keys[-1]]

    def _checked(self, medium: Medium, reading: dict) -> Any:
        """What `watch` takes of a medium. Raises UserError where it cannot be read, or has too many frames."""
        if medium.kind == "image":
            try:
                return open_image(medium.content)
            except ValueError as error:
                raise UserError(f"{error}") from error
        with self.processor.video_reader(medium.content, **reading) as reader:
            self._check_frames(reader.num_frames_expected or 0)
        return medium.content

    def _check_frames(self, frames: int) -> None:
        if frames > (most := self.limits.max_frames):
            raise UserError(
                f"{frames} frames of a video would be read, and {most} are allowed; ask for fewer by "
                'mm_processor_kwargs, such as {"num_frames": 64}.'
            )

    def _encode(self, encoding: Encoding, keys: list[str], media: list[Medium], sources: list, reading: dict):
        """On the model's thread: the memory, of which what is kept of the first media is not encoded again."""
        memory, known = self.cache.longest(keys)
        cached = 0 if memory is None else memory.video_length
        chat = VideoChat(self.model, self.processor, memory)
        for medium, source in zip(media[known:], sources[known:]):
            self._watch(chat, encoding, medium, source, reading)
        if known < len(media):
            self.cache.keep(keys[-1], chat.memory)
        return chat.memory, cached

    def _watch(self, chat: VideoChat, encoding: Encoding, medium: Medium, source: Any, reading: dict) -> None:
        done, away, begun = 0, 0.0, time.monotonic()

        def between_chunks(frames: int, expected: int | None) -> None:
            nonlocal done, away
            self.metrics.frames.inc(frames - done)
            done = frames
            self._check_frames(frames)
            if all(left.is_set() for left in encoding.wanted_by):
                raise NobodyWaits
            answering = time.monotonic()
            self.inference.answer_waiting()
            away += time.monotonic() - answering

        between_chunks(0, None)  # all may have left while this waited for its turn
        try:
            chat.watch(source, append=True, progress=between_chunks, **reading)
        except torch.OutOfMemoryError:  # by what is kept of other videos, perhaps
            self.cache.leave_gpu()
            torch.cuda.empty_cache()
            done = 0
            chat.watch(source, append=True, progress=between_chunks, **reading)
        medium.check_unchanged()  # else what was read would be kept as what the digest says
        self.metrics.encodings.labels(medium.kind).inc()
        self.metrics.seconds.inc(time.monotonic() - begun - away)

    def _in_thread(self, function: Callable, *args: Any) -> asyncio.Future:
        return asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def close(self) -> None:
        """Ends what is under way, and waits until the cache has written what it keeps."""
        for left in self.calls:
            left.set()
        self.inference.stop(timeout=10)
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.cache.close()

    def app(self) -> FastAPI:
        """transformers' routes that make sense for one model of ours, and `/metrics`; errors as OpenAI's clients read
        them. When it is shut down, the server is closed."""
        manager, state = OneModel(self), OneThread(self.inference)
        common = {"model_manager": manager, "generation_state": state}
        app = build_server(
            manager,
            chat_handler=KnownChatHandler(self, **common),
            completion_handler=None,
            response_handler=KnownResponseHandler(self, **common),
            transcription_handler=None,
            systemone_handler=None,
            generation_state=state,
        )
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in KNOWN]
        add = app.add_api_route
        add("/v1/models/{name:path}", manager.described, methods=["GET"])
        add("/metrics", lambda: Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST))
        for kind, answer in ERRORS.items():
            app.add_exception_handler(kind, answer)
        limits = self.limits
        bounds = {"max_bytes": limits.max_body, "max_calls": limits.max_calls, "hosts": self.hosts}
        app.add_middleware(Gate, metrics=self.metrics, calls=self.calls, **bounds)
        return app


class OneModel(ModelManager):
    """transformers' manager of models with one that is loaded already and stays."""

    def __init__(self, server: Server):  # not that of transformers, which loads models
        self.loaded_models: dict[str, TimedModel] = {}
        self.force_model = server.name
        self._server = server

    def get_model_modality(self, model: Any, processor: Any = None) -> Modality:
        return Modality.VLM

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:
        return [{"id": self._server.name, "object": "model", "owned_by": "vamba", "created": 0}]

    def described(self, name: str) -> dict:
        """For `/v1/models/NAME`."""
        self._server.check_name(name)
        return self.get_gen_models()[0]

    def shutdown(self) -> None:
        self._server.close()


class OneThread(GenerationState):
    """transformers' state of generation with the one thread of the server."""

    def __init__(self, inference: Inference):
        super().__init__()
        self._inference = inference

    def get_manager(self, model_id: str, use_cb: bool = False) -> Inference:
        return self._inference


def refuse_other_routes(app: FastAPI) -> None:
    """Answers here what begins as our routes and is none, before it comes to a page that is mounted at the root."""

    def refuse(request: Request) -> None:
        known = request.url.path in KNOWN or request.url.path.startswith("/v1/models/")
        raise AnyHTTPException(405 if known else 404)

    for path in ("/v1/{rest:path}", "/health", "/metrics"):
        app.add_route(path, refuse, methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])


def _http_error(request: Any, error: AnyHTTPException) -> Response:
    code = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{error.detail}"
    if isinstance(error.detail, dict):
        message, code = error.detail["message"], error.detail["code"]
    elif error.status_code in (404, 405):
        message = f"{request.method} {request.url.path:.100} is not served; see POST /v1/chat/completions."
    return error_response(error.status_code, message, code)


def _out_of_memory(request: Any, error: Exception) -> Response:
    logger.error(f"{error}")
    return error_response(503, "The GPU has no memory left for this; ask for fewer frames or tokens.", Retry_After="5")


def _fault(request: Any, error: Exception) -> Response:
    return error_response(500, "The server failed at this request; its log says why.")


ERRORS: dict[Any, Callable] = {
    AnyHTTPException: _http_error,
    RequestValidationError: lambda request, error: error_response(400, "The body is no JSON object.", "invalid_json"),
    ValueError: lambda request, error: error_response(400, f"{error}"),
    torch.OutOfMemoryError: _out_of_memory,
    Exception: _fault,
}
