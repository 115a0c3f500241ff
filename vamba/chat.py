"""A conversation about videos and images: watch once, ask as often as wanted.

What is unusual: `watch` streams (decode -> vision tower -> Mamba-2 -> video memory) in chunks, so neither frames nor
activations pile up however long the video is, and decodes in a thread while the model computes; each `ask` reads the
conversation so far on a fork of the memory, which copies no video.
"""

import contextlib
import copy
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from .checkpoint_folder import base_of, check_kind, checkpoint_folder
from .conversation import check_question, conversation_of, with_media
from .errors import UserError, VideoReadError, opening, reason_of
from .loading import check_generation, load_config, load_model, load_processor, merge_adapter, quantization
from .modeling import StateMemory, VideoMemory
from .modeling.graphed_decoding import GraphedDecoding
from .modeling.images import is_image, open_image
from .modeling.media import default_chunk_frames, load_ahead
from .modeling.memory_files import checked_device
from .video import patch_times, read_ahead
from .where import Answer, Where, look, source_of


# What each kind of model remembers a video in.
MEMORIES = {"vamba": VideoMemory, "video_ma2mba": StateMemory}
IS_NAN = "The model computes NaN: its weights are damaged, or dtype is too narrow for them."


# What `ask` tells `generate` by itself.
OWN_ARGUMENTS = {
    "inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "mm_token_type_ids",
    "return_dict_in_generate",
}  # fmt: skip


class LogLikelihood(NamedTuple):
    """Of one answer: the natural logarithm of its probability, and whether greedy decoding would give it."""

    total: float
    is_greedy: bool


class FirstScoresAreNumbers(LogitsProcessor):
    """Raises UserError if the first scores of an answer are NaN, as damaged weights or a narrow dtype make them."""

    def __init__(self):
        self.seen = False

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not self.seen and scores.isnan().any():
            raise UserError(IS_NAN)
        self.seen = True  # the others wait for no device
        return scores


class VideoChat:
    """Watches videos and images, and answers questions about them, which continue one conversation.

    Args:
        model: a `VambaForConditionalGeneration` or `VideoMa2mbaForConditionalGeneration`. processor: its processor.
        memory: a `VideoMemory` or `StateMemory` of such a model to start from, e.g. one loaded from a file.
        system: what the conversation begins with, for the model only; a system prompt.
        memory_options: of the `VideoMemory` that a new video is watched into: video_dtype, video_device.

    Attributes:
        history: the conversation so far, `{"role": "user" or "assistant", "content": text}` each; it may be changed.
        answers: the last hundred, of any conversation, for `where`.

    Example:
        >>> chat = VideoChat(model, processor)
        >>> chat.watch("talk.mp4")
        >>> chat.ask("Who speaks third?")
        >>> chat.ask("And what about?")
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        memory: VideoMemory | StateMemory | None = None,
        *,
        system: str | None = None,
        **memory_options: Any,
    ):
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in MEMORIES:
            raise ValueError(f"{type(model).__name__} is no Vamba and no Video-Ma2mba; give a model of one of these.")
        if memory is not None and not isinstance(memory, MEMORIES[kind]):
            raise ValueError(f"memory is a {type(memory).__name__}; a {kind} remembers in a {MEMORIES[kind].__name__}.")
        if memory_options and MEMORIES[model.config.model_type] is not VideoMemory:
            raise ValueError(f"{sorted(memory_options)} are for models with a VideoMemory; leave them out.")
        self.model, self.processor, self.memory = model, processor, memory
        self.memory_options = memory_options
        self.system, self.history = system, list[dict]()
        self._conversation = object()  # another after each reset
        self.answers: deque[Answer] = deque(maxlen=100)

    def reset(self) -> None:
        """Forgets the conversation; what was watched stays."""
        self.history, self._conversation = [], object()

    def watch(
        self,
        video: Any,
        *,
        append: bool = False,
        continue_video: bool = False,
        chunk_frames: int | None = None,
        progress: bool | Callable[[int, int | None], None] = True,
        **options: Any,
    ) -> VideoMemory | StateMemory:
        """Encodes a video into `self.memory`, chunk by chunk, or an image.

        Args:
            video: whatever `read_video` takes: a path, images, an array …; or an image: a PIL image, or a file.
            append: continue the memory with this video, and the conversation with it, instead of starting new ones.
            continue_video: with `append`, these are further frames, of the same size, of the video watched last, such
                as those of a live stream.
            chunk_frames: frames encoded at once, an even number; None means 128, or fewer where the GPU's free memory
                asks for it. A matter of speed and memory, not of result.
            progress: show a progress bar; or a function to be told of frames encoded, and how many are expected (None
                if that is not known), after each chunk. What it raises ends the watching.
            options: of `read_video`: fps, num_frames (by default what the checkpoint was trained with), start, end,
                min_pixels, max_pixels, …; min_frames and max_frames bound what fps gives. Of an image allow_urls,
                min_pixels and max_pixels count.

        Raises:
            VideoReadError: the video or image cannot be read. ValueError: there is no video of its size to continue.

        Whatever is raised, KeyboardInterrupt too, `self.memory` then is as it was before.
        """
        if continue_video and not append:
            raise ValueError("continue_video=True continues what was watched: give append=True as well.")
        if is_image(video):
            memory = self._look(video, append, options)
        else:
            memory = self._watch(video, append, continue_video, chunk_frames, progress, options)
        self.memory = memory
        if not append:
            self.reset()
            self.answers.clear()
        return memory

    def _look(self, image: Any, append: bool, options: dict) -> VideoMemory | StateMemory:
        """Encodes an image after whatever is to be continued."""
        memory = self.memory.fork() if append and self.memory is not None else None
        seconds = 0.0 if memory is None else memory.seconds
        item = {name: options[name] for name in ("min_pixels", "max_pixels") if name in options}
        try:
            picture = open_image(image, allow_urls=options.get("allow_urls", False))
            inputs = self.processor(images=[item | {"image": picture}], return_tensors="pt")
        except ValueError as error:
            raise VideoReadError(f"{error}") from error
        if memory is None and MEMORIES[self.model.config.model_type] is VideoMemory:
            memory = VideoMemory(self.model.config, **self.memory_options)
        memory = self.model.encode_images(inputs["pixel_values"], inputs["image_grid_thw"], memory=memory)
        memory.sources = [*memory.sources, source_of(memory, image, options)]
        memory.seconds = seconds
        return memory

    def _watch(
        self,
        video: Any,
        append: bool,
        continue_video: bool,
        chunk_frames: int | None,
        progress: bool | Callable[[int, int | None], None],
        options: dict,
    ) -> VideoMemory | StateMemory:
        """See `watch`; `self.memory` is left as it is."""
        temporal = self.processor.video_processor.temporal_patch_size
        if chunk_frames is not None and (type(chunk_frames) is not int or chunk_frames < 1 or chunk_frames % temporal):
            raise ValueError(f"{chunk_frames=} must be a positive multiple of the temporal patch size, {temporal}.")
        memory = self.memory.fork() if append and self.memory is not None else None
        seconds = 0.0 if memory is None else memory.seconds
        stamps: list[torch.Tensor] = []  # when the frames are shown, as the thread reads them
        start_anew = not continue_video  # the first chunk opens a new video; the others continue it
        done = 0
        with contextlib.ExitStack() as stack:
            # a few frames at a time, as the thread that decodes can be stopped between them
            reader = stack.enter_context(self.processor.video_reader(video, chunk_frames=temporal, **options))
            total = _plausible_frames(reader.num_frames_expected, video)
            bar = stack.enter_context(
                tqdm(total=total, unit="frame", disable=not progress or callable(progress), desc="watching")
            )
            height, width = reader.frame_size
            patch = self.processor.video_processor.patch_size
            chunk_frames = chunk_frames or default_chunk_frames(self.model, (height // patch) * (width // patch))
            memory = self._with_room(memory, total or 0, height, width)
            device = self.model.device

            def timed() -> Iterator:
                for chunk in reader:
                    stamps.append(chunk.timestamps)
                    yield chunk

            chunks = stack.enter_context(
                contextlib.closing(read_ahead(timed(), chunk_frames, pin_memory=device.type == "cuda"))
            )
            for frames, (patches, grid) in load_ahead(chunks, self._patches, device):
                memory = self.model.encode_video(
                    patches, grid, memory=memory, continue_video=not start_anew, chunk_frames=chunk_frames
                )
                start_anew = False
                seconds = None if seconds is None else seconds + len(frames) * reader.seconds_per_frame
                bar.update(len(frames))
                done += len(frames)
                if callable(progress):
                    progress(done, total)
        spans = patch_times(torch.cat(stamps), temporal, reader.seconds_per_frame)
        memory.note_times(spans)
        memory.sources = [*memory.sources, source_of(memory, video, options, spans, reader.metadata.fps)]
        memory.seconds = seconds
        return memory

    def _with_room(self, memory: VideoMemory | StateMemory | None, frames: int, height: int, width: int):
        """The memory, or a new one, told how many tokens to expect; only a `VideoMemory` grows with the video."""
        if MEMORIES[self.model.config.model_type] is not VideoMemory:
            return memory
        memory = VideoMemory(self.model.config, **self.memory_options) if memory is None else memory
        processor = self.processor.video_processor
        side = processor.patch_size * processor.merge_size
        tokens = -(-frames // processor.temporal_patch_size) * (height // side) * (width // side)
        memory.reserve(memory.video_length + tokens)
        return memory

    def _patches(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches and grid of frames of their final size, made on the GPU where the model is on one."""
        if self.model.device.type == "cuda":
            frames = frames.to(self.model.device, non_blocking=True)
        inputs = self.processor.video_processor(
            [frames], do_resize=False, do_sample_frames=False, cap_pixels_per_frame=False, return_tensors="pt"
        )
        return inputs["pixel_values_videos"], inputs["video_grid_thw"]

    def ask(
        self, question: str | Sequence[dict], *, stream: bool = False, **generate_kwargs: Any
    ) -> str | Iterator[str]:
        """Answers a question about what was watched.

        Args:
            question: plain text, which continues the conversation in `history`; or a conversation of its own,
                `{"role": ..., "content": text}` each, the last turn of which is to be answered: `history` and `system`
                are neither read nor changed then. What was watched comes first in the first turn of the user.
            stream: return an iterator over pieces of the answer as they are generated. Where it is not read to its end
                the answer is what had been generated until then.
            generate_kwargs: passed to `generate`; where neither they nor a `generation_config` among them says so,
                `max_new_tokens` is 256 and `min_new_tokens` 1, as no question is answered by nothing.

        Raises:
            ValueError: nothing was watched yet; the question is no text, empty, not UTF-8 or too long; the conversation
                of a Video-Ma2mba does not begin with the user; an argument that `generate` does not know or cannot use.
        """
        self._check_watched()
        generate_kwargs = {name: value for name, value in generate_kwargs.items() if value is not None}
        self._check_generation(generate_kwargs)
        if stream and "streamer" in generate_kwargs:
            raise UserError("A streamer is given beside stream=True; leave one of them out.")
        generate_kwargs["logits_processor"] = [*generate_kwargs.pop("logits_processor", ()), FirstScoresAreNumbers()]
        inputs = self._prompt(self._continued(question))
        if _setting(generate_kwargs, "max_new_tokens") is None and _setting(generate_kwargs, "max_length") is None:
            generate_kwargs["max_new_tokens"] = 256
        if _setting(generate_kwargs, "min_new_tokens") is None:
            generate_kwargs["min_new_tokens"] = 1
        if generate_kwargs.get("generation_config") is not None:  # `generate` wants all in it, or nothing
            config = copy.deepcopy(generate_kwargs.pop("generation_config"))
            generate_kwargs = {**config.update(**generate_kwargs), "generation_config": config}
        assert self.memory is not None  # as was checked
        text = question if isinstance(question, str) else conversation_of(question)[-1]["content"][0]["text"]
        # what is watched meanwhile changes neither what is answered nor what is remembered of it
        asked = weakref.ref(self.memory), copy.deepcopy(self.memory.media)
        told = Answer(text, "", inputs["input_ids"].cpu(), inputs["input_ids"][:, :0].cpu(), *asked)
        inputs["past_key_values"] = self._fork(inputs, generate_kwargs)
        if stream:
            return self._stream(question, told, inputs | generate_kwargs, self._conversation)
        output = self.model.generate(**inputs, **generate_kwargs)
        new_tokens = output[:, told.prompt.shape[1] :]
        answer = self.processor.batch_decode(new_tokens, skip_special_tokens=True)[0].strip()
        self._remember(question, told, answer, new_tokens, self._conversation)
        return answer

    def _continued(self, question: str | Sequence[dict]) -> str | Sequence[dict]:
        """The conversation that ends with the question."""
        if not isinstance(question, str):
            return question
        check_question(question)
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.history, {"role": "user", "content": question}]

    def _remember(
        self, question: str | Sequence[dict], told: Answer, answer: str, new_tokens: torch.Tensor | None, of: object
    ) -> None:
        """Notes an answer; in the history where that still is the conversation `of` the question."""
        if new_tokens is not None:
            ids = new_tokens[:1].cpu()
            is_text = ~torch.isin(ids[0], torch.tensor(self.processor.tokenizer.all_special_ids))
            ids = ids[:, : len(ids[0]) - int(is_text.flip(0).byte().argmax())]  # without what ends it
            self.answers.append(told._replace(text=answer, ids=ids))
        if isinstance(question, str) and of is self._conversation:
            turns = (("user", question), ("assistant", answer))
            self.history = [*self.history, *({"role": role, "content": text} for role, text in turns)]

    def where(
        self,
        answer: int = -1,
        layers: Sequence[int] | None = None,
        heads: str | Sequence[int] = "mean",
        by: str = "contribution",
    ) -> Where:
        """Where an answer looked: how much each moment and each part of a frame gave to it, by the cross-attention.

        The prompt and the answer pass the model once more for it; see `attention_map` for what is measured.

        Args:
            answer: which of `answers`; -1 is the last.
            layers: those that count, from 0 on; None for all.
            heads: "mean" or "max" over the heads of a layer, or a list of heads.
            by: "contribution", the squared length of what the attention brings into the text: its weight times the
                value after the output projection, times 1 - alpha; or "weights" alone.

        Raises:
            UserError: there is no such answer, layer or head; what is watched now is not what was asked about; a
                Video-Ma2mba, which has no attention.
        """
        return look(self, answer, layers, heads, by)

    @torch.no_grad()
    def log_likelihoods(
        self, question: str | Sequence[dict], answers: Sequence[str], *, ended: bool = False
    ) -> list[LogLikelihood]:
        """How likely the model finds each of these answers to a question, which is read once for all of them.

        Args:
            question: as for `ask`, but a text too is a conversation of its own.
            answers: texts, taken as they are.
            ended: count the end of the answer too. Without it, what begins as another answer does is never likelier.

        Raises:
            ValueError: as `ask`; an answer of no tokens; the model computes NaN.
        """
        self._check_watched()
        prompt = self._prompt(question)["input_ids"]
        assert self.memory is not None  # as was checked
        memory = self.memory.fork()
        read = self.model(input_ids=prompt[:, memory.get_seq_length() :], past_key_values=memory, logits_to_keep=1)
        first = read.logits[0].float().log_softmax(-1)
        if first.isnan().any():
            raise UserError(IS_NAN)
        found = []
        for answer in answers:
            tokens = self.processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
            if not tokens.numel():
                raise UserError(f"An answer is {answer!r:.80}, which makes no token; give a text.")
            if ended:
                tokens = torch.cat([tokens, torch.tensor([[self._end_of_answer()]])], 1)
            tokens, scores = tokens.to(first.device), first
            if tokens.shape[1] > 1:
                rest = self._continue(tokens[:, :-1], memory.fork())
                scores = torch.cat([first, rest[0].float().log_softmax(-1)])
            taken = scores.gather(1, tokens[0][:, None])
            is_greedy = bool((scores.argmax(-1) == tokens[0]).all())
            found.append(LogLikelihood(taken.double().sum().item(), is_greedy))
        return found

    def _end_of_answer(self) -> int:
        """The token that ends a turn: of several that `generate` stops at, the first."""
        end = self.model.generation_config.eos_token_id
        end = self.processor.tokenizer.eos_token_id if end is None else end
        return int(end[0] if isinstance(end, (list, tuple)) else end)

    def _continue(self, tokens: torch.Tensor, memory: VideoMemory | StateMemory) -> torch.Tensor:
        """Logits after each of the tokens (1, N) of an answer, computed as `generate` does."""
        options = {}
        if getattr(self.model.generation_config, "unrotate_video_keys", False):
            options["unrotate_video_keys"] = True
        return self.model(input_ids=tokens, past_key_values=memory, **options).logits

    def _check_watched(self) -> None:
        if self.memory is None or not self.memory.media:
            raise ValueError("Nothing was watched yet: call watch(video) before ask(question).")

    def _check_generation(self, generate_kwargs: dict) -> None:
        """Raises UserError for what `generate` is told and cannot use."""
        given = generate_kwargs.get("generation_config")
        if given is not None and not isinstance(given, GenerationConfig):
            raise UserError(f"generation_config is {given!r:.80}; give a GenerationConfig.")
        config = copy.deepcopy(self.model.generation_config if given is None else given)
        if own := sorted(generate_kwargs.keys() & OWN_ARGUMENTS):
            raise UserError(f"{', '.join(own)}: not for a question, as `ask` says it to `generate` by itself.")
        try:
            for name in ("stopping_criteria", "logits_processor"):
                if not isinstance(generate_kwargs.get(name), (list, type(None))):
                    raise ValueError(f"{name} is {generate_kwargs[name]!r:.80}; it must be a list")
            if not hasattr(generate_kwargs.get("streamer", SimpleNamespace(put=None)), "put"):
                raise ValueError(f"streamer is {generate_kwargs['streamer']!r:.80}; it must have put and end")
            options = {name: value for name, value in generate_kwargs.items() if name != "generation_config"}
            vocab_size = self.model.config.get_text_config().vocab_size
            check_generation(SimpleNamespace(**options), vocab_size)  # first, as transformers compares them
            config.update(**options)
            check_generation(config, vocab_size)
        except (ValueError, TypeError) as error:
            raise UserError(f"Nothing can be generated so: {reason_of(error)}.") from error

    def _fork(self, inputs: dict, generate_kwargs: dict) -> VideoMemory | StateMemory:
        """What a question is asked on: a fork, with room for the text set aside where CUDA graphs can be used."""
        grows = any(
            _setting(generate_kwargs, name) is not None for name in ("assistant_model", "prompt_lookup_num_tokens")
        )
        assert self.memory is not None  # as `ask` has seen
        if grows or not isinstance(self.memory, VideoMemory) or not GraphedDecoding.suits(self.model):
            return self.memory.fork()
        new_tokens, length = _setting(generate_kwargs, "max_new_tokens"), _setting(generate_kwargs, "max_length")
        if new_tokens is not None:
            length = inputs["input_ids"].shape[1] + new_tokens
        return self.memory.fork(max_cache_len=-(-length // 64) * 64)

    def _prompt(self, question: str | Sequence[dict]) -> dict:
        """The conversation with one media item for each that was watched, as the model was trained."""
        assert self.memory is not None  # as `ask` has seen
        messages = conversation_of(question)
        kinds = [kind for kind, *_ in self.memory.media[0]]
        messages = with_media(messages, kinds, after_media=isinstance(self.memory, StateMemory))
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = self.processor.tokenizer(text, return_tensors="pt").to(self.model.device)
        length = inputs["input_ids"].shape[1]
        most = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if length == 0:
            raise UserError(
                "The chat template makes nothing of a question; copy the chat_template.jinja of its origin."
            )
        if most is not None and length > most:
            remedy = "ask a shorter one" if len(messages) == 1 else "begin a new conversation, as reset() does"
            raise UserError(f"The question takes {length} tokens, and the model {most} at most; {remedy}.")
        return inputs

    def _stream(self, question: str | Sequence[dict], told: Answer, options: dict, of: object) -> Iterator[str]:
        """Pieces of what `generate` makes with these options, in a thread of its own."""
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []
        outputs: list[torch.Tensor] = []
        abandoned = threading.Event()

        def is_abandoned(input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), abandoned.is_set(), device=input_ids.device)

        options["stopping_criteria"] = StoppingCriteriaList([*options.get("stopping_criteria", ()), is_abandoned])

        def generate():
            try:
                outputs.append(self.model.generate(**options, streamer=streamer)[:, told.prompt.shape[1] :])
            except BaseException as error:  # handed to the reader of the stream, which would wait for ever otherwise
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        pieces: list[str] = []
        try:
            for piece in streamer:
                pieces.append(piece)
                yield piece
        finally:  # also when the reader goes away in the middle of an answer
            abandoned.set()
            thread.join()
            if pieces and not failure:
                self._remember(question, told, "".join(pieces).strip(), outputs[0], of)
        if failure:
            raise failure[0]


def _plausible_frames(expected: int | None, video: Any) -> int | None:
    """How many frames a reader expects; None, as it is not known, where a file says more than it has bytes."""
    is_file = isinstance(video, (str, os.PathLike)) and os.path.isfile(video)
    return None if is_file and expected is not None and expected > os.path.getsize(video) else expected


def _setting(generate_kwargs: dict, name: str) -> Any:
    """What `generate` is told about `name`, by itself or in a generation config."""
    value = generate_kwargs.get(name)
    return getattr(generate_kwargs.get("generation_config"), name, None) if value is None else value


def open_memory(model: PreTrainedModel, path: str | os.PathLike) -> VideoMemory | StateMemory:
    """A saved memory of one row that this model made, on its device.

    Raises:
        UserError: there is none, it is damaged, of several rows, or of other weights.
    """
    try:
        with opening(path):
            memory = MEMORIES[model.config.model_type].load(path, device=model.device)
        if len(memory.media) != 1:
            raise UserError(f"{os.fspath(path)} holds {len(memory.media)} rows of videos; a question needs one.")
        model.model.check_weights(memory)
    except ValueError as error:
        raise UserError(str(error)) from error
    return memory


def load_chat(
    path: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    adapter: str | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    attn_implementation: str | None = None,
) -> VideoChat:
    """A `VideoChat` from a checkpoint folder or Hub id, on `device` or wherever accelerate puts it.

    Args:
        path: where it is a PEFT adapter, it is added to the weights of the model it was trained on.
        adapter: a PEFT adapter to be added to `path`.
        load_in_4bit, load_in_8bit: quantise the weights with bitsandbytes, as `vamba finetune` does.
        attn_implementation: of transformers; None for its choice.

    Raises:
        UserError: no Vamba checkpoint at `path`, something in it is damaged or missing, or there is no such device.
    """
    if device is not None:
        try:
            checked_device(device)
        except ValueError as error:
            raise UserError(str(error)) from error
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not isinstance(named, torch.dtype):
        raise UserError(f"dtype is {dtype!r:.80}; give 'auto', 'float32', 'bfloat16' or 'float16'.")
    base = base_of(path) if adapter is None else path
    check_kind(base)
    path = path if adapter is None else adapter
    options: dict[str, Any] = {}
    if (quantized := quantization(load_in_4bit, load_in_8bit)) is not None:
        options["quantization_config"] = quantized
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    device_map = device or ("auto" if torch.cuda.is_available() else None)
    own_processor = base == path or (checkpoint_folder(path) / "processor_config.json").is_file()
    processor = load_processor(path if own_processor else base, load_config(base))  # first, as it is small
    if processor.chat_template is None:
        raise UserError(f"{path} holds no chat template; copy the chat_template.jinja of its origin there.")
    model = load_model(base, dtype=dtype, device_map=device_map, **options)
    if base != path:
        model = merge_adapter(model, path)
    return VideoChat(model.eval(), processor)


__all__ = ["VideoChat", "VideoReadError", "load_chat", "open_memory"]
