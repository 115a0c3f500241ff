"""The models under lmms-eval (0.7.3 and newer): `lmms-eval --model vamba --model_args pretrained=...,num_frames=64`.

Requests are grouped by what has to be watched for them, and each video is encoded once, whatever task or rank asks: see
`sharing`. What is unusual: a conversation that does not begin with its videos (images, interleaved text; for a
Video-Ma2mba also a turn of the system) goes the way of every other model of transformers, one by one. What cannot be
answered, as its video cannot be read or it is too long, gets an empty answer, which counts as wrong, is not cached, and
is told of in the log; where likelihoods are compared it is an error, as no answer could be right by chance there.
`SimpleVamba` is for `--force_simple`, which such tasks need.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm.auto import tqdm

from vamba.chat import IS_NAN, MEMORIES, load_chat
from vamba.errors import UserError
from vamba.modeling import VideoMemory
from vamba.modeling.processing_vamba import plain_item

from .asking import check_reading_by
from .protocols import PROTOCOLS
from .sharing import Sharing, meet


READING = (
    "fps", "num_frames", "centered", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels", "min_side",
    "max_side", "allow_urls",
)  # fmt: skip
LOADING = ("dtype", "adapter", "load_in_4bit", "load_in_8bit", "attn_implementation")
OURS = ("pretrained", "protocol", "device", "device_map", "batch_size", "max_batch_size")
MAX_NEW_TOKENS = 128  # where neither the task nor a protocol says
GENERATION = ("max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")


@dataclass
class Asked:
    """A conversation: its messages, and, if it begins with videos in files, these and the turns of text after them."""

    messages: list[dict]
    videos: list[dict] | None
    turns: list[dict]


class Loss(tuple):
    """(loss, whether decoding would give it), for lmms-eval 0.7.3, which makes text of a tuple that is no text of a
    `GenerationResult`, and of what its cache kept of it; so the cache finds it empty and keeps nothing."""

    def strip(self) -> str:
        return ""


class Vamba(lmms):
    """Vamba and Video-Ma2mba for lmms-eval.

    Args:
        pretrained: a checkpoint folder, Hub id or PEFT adapter. dtype, adapter, load_in_4bit, load_in_8bit,
            attn_implementation: of `vamba.chat.load_chat`.
        protocol: a preset of `vamba.evaluation.protocols`, which says how videos are read; the prompts are the task's.
        fps, num_frames, …: options of `VideoChat.watch`, before those of the protocol; min_frames and max_frames bound
            what fps gives.
        device, device_map: where the model is; by default the process's own GPU.
        batch_size: accepted, as lmms-eval gives it; the questions about a video are asked one after the other.
    """

    is_simple = False

    def __init__(self, pretrained: str = "", **options: Any):
        super().__init__()
        if unknown := sorted(options.keys() - {*READING, *LOADING, *OURS}):
            known = ", ".join((*OURS, *LOADING, *READING))
            raise UserError(f"{', '.join(unknown)}: no argument of the model; known are {known}.")
        options = {name: value for name, value in options.items() if value is not None}
        if not pretrained:
            raise UserError("No model is named; give pretrained=PATH in --model_args.")
        if (name := options.get("protocol")) not in (None, *PROTOCOLS):
            raise UserError(f"protocol is {name!r:.80}; give one of {', '.join(PROTOCOLS)}.")
        self.max_new_tokens = PROTOCOLS[name].max_new_tokens if name else MAX_NEW_TOKENS
        asked = {name: options[name] for name in READING if name in options}
        self.reading = PROTOCOLS[name].reading_with(asked) if name else asked
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size != int(os.environ.get("WORLD_SIZE", 1)):
            raise UserError("accelerate sees one process of several; without a GPU, set ACCELERATE_USE_CPU=true.")
        device = options.get("device") or options.get("device_map")
        if self._world_size > 1 and device in (None, "auto", "cuda"):
            device = str(self.accelerator.device)
        device = None if device == "auto" else device
        loading = {name: options[name] for name in LOADING if name in options}
        self.chat = load_chat(pretrained, device=device, **loading)
        self.device = self.chat.model.device
        # a state has read what is before the video, too
        self.watches_before_any_turn = MEMORIES[self.chat.model.config.model_type] is VideoMemory
        check_reading_by(self.chat.processor, self.reading)
        self.sharing = Sharing(self._rank, self._world_size, meet(self._rank, self._world_size))
        self.watched: list[dict] | None = None
        self.encoded = 0
        self.failures: Counter = Counter()
        self._ignored: set[str] = set()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._answer(
            "generate_until", requests, lambda group: [self._reply(self._asked(request), request) for request in group]
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        if self.is_simple:
            raise UserError("Several rounds are asked in chat only; leave out --force_simple.")
        return self._answer(
            "generate_until_multi_round", requests, lambda group: [self._rounds(request) for request in group]
        )

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Losses, the sum over a continuation's tokens, as lmms-eval takes the least of what it gets for the best."""
        found = self._answer("loglikelihood", requests, self._likelihoods)
        return [GenerationResult(Loss((-total, is_greedy))) for total, is_greedy in found]

    def clean(self) -> None:
        del self.chat
        super().clean()

    def _answer(self, kind: str, requests: list[Instance], answer: Callable[[list[Instance]], list]) -> list:
        """What `answer` says to requests about the same videos, for all of them in their order."""
        keys = []
        for request in requests:
            videos = self._asked(request).videos
            keys.append(None if videos is None else repr(videos))
        with tqdm(total=len(requests), desc="watching and asking", disable=self._rank != 0) as bar:

            def answer_and_count(group: list[Instance]) -> list:
                replies = answer(group)
                bar.update(len(group))
                return replies

            results = self.sharing.answer(kind, requests, keys, answer_and_count)
        if self.failures:
            told = "; ".join(f"{error} ({count} requests)" for error, count in self.failures.items())
            logger.error(f"{self.failures.total()} requests have no answer and count as wrong: {told}")
        logger.info(f"rank {self._rank}: {self.encoded} videos encoded for {len(requests)} requests")
        return results

    def _doc(self, request: Instance) -> dict:
        doc_id, task, split = request.args[-3:]
        return self.task_dict[task][split][doc_id]

    def _asked(self, request: Instance) -> Asked:
        return self._as_asked(request.args[1](self._doc(request)))

    def _as_asked(self, given: Sequence[dict]) -> Asked:
        """Messages of lmms-eval as those of our processor, and what of them can be watched first."""
        messages: list[dict] = ChatMessages(messages=given).to_hf_messages()
        for message in messages:
            items = [plain_item(item) for item in message["content"]]
            message["content"] = [item for item in items if item["type"] != "text" or item["text"].strip()]
        first: dict = next((message for message in messages if message["role"] == "user"), {"content": []})
        videos = []
        for item in first["content"]:
            if item["type"] != "video" or not isinstance(item["video"], str):
                break
            videos.append(item)
        turns = [m | {"content": m["content"][len(videos) :] if m is first else m["content"]} for m in messages]
        is_text = all(turn["content"] and all(item["type"] == "text" for item in turn["content"]) for turn in turns)
        can_be_first = bool(videos) and is_text and (first is messages[0] or self.watches_before_any_turn)
        return Asked(messages, videos if can_be_first else None, turns)

    def _rounds(self, request: Instance) -> list[str]:
        """One reply a round, until the task says that it was the last."""
        doc, asked, replies, info = self._doc(request), self._asked(request), [], None
        while True:
            replies.append(self._reply(asked, request))
            payload = request.args[1](
                doc, round_idx=len(replies), previous_output=list(replies), previous_round_info=info
            )
            if not isinstance(payload, tuple) or len(payload) != 4 or payload[1]:
                return replies
            asked, info = self._as_asked(payload[0]), payload[3]

    def _reply(self, asked: Asked, request: Instance) -> str:
        given = next(argument for argument in request.args if isinstance(argument, dict))
        options, until = self._generation(given)
        self.chat._check_generation(options)  # what is wrong here is wrong for all requests
        try:
            if asked.videos is None:
                reply = self._generate_plainly(asked.messages, options)
            else:
                self._watch(asked.videos)
                reply = f"{self.chat.ask(asked.turns, **options)}"
        except UserError as error:
            if f"{error}" == IS_NAN:  # so is the model
                raise
            self.failures[f"{error}"] += 1
            return ""
        return min((reply.split(stop)[0] for stop in until if stop), key=len, default=reply)

    def _generation(self, given: dict) -> tuple[dict, list[str]]:
        """A task's generation arguments as those of `generate`; and the texts that end an answer."""
        options = {name: given[name] for name in GENERATION if given.get(name) is not None}
        options.setdefault("max_new_tokens", self.max_new_tokens)
        temperature = options.get("temperature", 0)
        if not given.get("do_sample", temperature > 0) or temperature == 0:
            for name in ("temperature", "top_p", "top_k"):
                options.pop(name, None)
            options["do_sample"] = False
        else:
            options["do_sample"] = True
        if unknown := given.keys() - {*GENERATION, "do_sample", "until"} - self._ignored:
            self._ignored |= unknown
            logger.warning(f"arguments of generation that have no meaning here: {', '.join(sorted(unknown))}")
        until = given.get("until") or []
        return options, [until] if isinstance(until, str) else list(until)

    def _watch(self, videos: list[dict]) -> None:
        """Lets the videos be in memory, which they are already if these were asked about last."""
        if self.watched == videos:
            return
        self.chat.memory = self.watched = None
        for item in videos:
            source, options = self._reading(item)
            self.chat.watch(source, append=True, progress=False, **options)
        self.watched = videos
        self.encoded += 1

    def _reading(self, item: dict) -> tuple[Any, dict]:
        options = {name: value for name, value in item.items() if name not in ("type", "video")}
        return item["video"], self.reading | options

    def _plain_inputs(self, messages: list[dict]) -> dict:
        """What the processor makes of a conversation as it is, its videos read as those that are watched."""
        read = []
        for message in messages:
            content = []
            for item in message["content"]:
                if item["type"] == "video":
                    source, options = self._reading(item)
                    with self.chat.processor.video_reader(source, **options) as reader:
                        item = {"type": "video", "video": torch.cat([chunk.frames for chunk in reader])}
                content.append(item)
            read.append({**message, "content": content})
        inputs = self.chat.processor.apply_chat_template(
            read,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"videos_kwargs": {"do_resize": False, "do_sample_frames": False}},
        )
        return inputs.to(self.device)

    def _generate_plainly(self, messages: list[dict], options: dict) -> str:
        inputs = self._plain_inputs(messages)
        output = self.chat.model.generate(**inputs, **({"min_new_tokens": 1} | options))
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        return self.chat.processor.batch_decode(new_tokens, skip_special_tokens=True)[0].strip()

    def _likelihoods(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Each context is read once for all of its continuations."""
        by_context: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_context.setdefault(repr(self._asked(request).turns), []).append(index)
        found: dict[int, tuple[float, bool]] = {}
        for indices in by_context.values():
            asked = self._asked(requests[indices[0]])
            if asked.videos is None:
                raise UserError("Likelihoods are compared after videos only; this context begins with none.")
            continuations = [self._continuation(requests[index]) for index in indices]
            self._watch(asked.videos)
            found |= zip(indices, map(tuple, self.chat.log_likelihoods(asked.turns, continuations)))
        return [found[index] for index in range(len(requests))]

    def _continuation(self, request: Instance) -> str:
        given = request.args[1]
        return given(self._doc(request)) if callable(given) else given


class SimpleVamba(Vamba):
    """The same for tasks that give their videos and their text apart, as multiple choice by likelihood does."""

    is_simple = True

    def _asked(self, request: Instance) -> Asked:
        if len(request.args) != 6:
            raise UserError("Likelihoods without a video are not computed; leave out the metric acc_mutual_info.")
        visuals = request.args[2](self._doc(request)) or []
        content = [
            {"type": "video" if isinstance(visual, (str, dict)) else "image", "url": visual} for visual in visuals
        ]
        return self._as_asked([{"role": "user", "content": [*content, {"type": "text", "text": request.args[0]}]}])
