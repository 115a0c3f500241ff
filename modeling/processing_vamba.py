"""The processor of Vamba: Qwen2-VL's, without a placeholder per video token and with its own video reader.

What is unusual: a media item is `<|vision_start|><|vision_end|>` in the text, however long it is. Qwen2-VL's
placeholders are understood and replaced by that; `mm_token_type_ids` marks the `<|vision_start|>` of an image with 1
and that of a video with 2. Images and videos are processed one by one, as each may have its own options. Videos are
read by `vamba.video`, frame by frame at their final size, or by transformers' `load_video` if a checkpoint is loaded
with its own code on a machine without the package vamba.
"""

import os
import re
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate
from transformers import BatchFeature, processing_utils
from transformers.image_transforms import to_pil_image
from transformers.image_utils import ImageInput, is_valid_image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, VideosKwargs
from transformers.tokenization_utils_base import TextInput
from transformers.utils import logging
from transformers.video_utils import VideoInput, VideoMetadata, is_valid_video, is_valid_video_frame, load_video

from .chat_templates import check_rendering
from .images import IMAGE_SUFFIXES, open_image
from .media_limits import check_numbers, check_regular_file, number


logger = logging.get_logger(__name__)

_TYPE_IDS = {"image": 1, "video": 2}  # in mm_token_type_ids
# The keys of a chat message's image or video: those of transformers, and those of qwen-vl-utils that differ.
_SOURCE_KEYS = {"video": ("video", "url", "path"), "image": ("image", "url", "path", "base64")}
_ALIASES = {"nframes": "num_frames", "video_start": "start", "video_end": "end", "sample_fps": "source_fps"}
_IMAGE_OPTIONS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
# The video processor refuses these options, which only `read_video` knows.
_READER_OPTIONS = ("start", "end", "total_pixels", "resized_height", "resized_width", "source_fps", "backend")
_VIDEO_OPTIONS = ("min_pixels", "max_pixels", "fps", "num_frames", "min_frames", "max_frames", *_READER_OPTIONS)
# qwen-vl-utils adds `raw_fps` to frames that are in memory.
_OPTIONS = {"video": (*_VIDEO_OPTIONS, "raw_fps", *_ALIASES), "image": _IMAGE_OPTIONS, "text": ("text",)}
_EVERY_FRAME = 1e6  # a rate in frames per second that no video exceeds
_STILL_SUFFIXES = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix != ".gif")  # Several GIFs are several videos.
# Control tokens that transformers has marked as text of a user (`sanitize_control_tokens`) stand for no media.
_UNMARKED = getattr(processing_utils, "_UNMARKED", "")


class VambaImagesKwargs(ImagesKwargs, total=False):
    min_pixels: int | None  # least area of an image, in place of `size["shortest_edge"]`
    max_pixels: int | None  # greatest area of an image, in place of `size["longest_edge"]`
    allow_urls: bool | None  # whether an image may be a URL; it may not by default


class VambaVideosKwargs(VideosKwargs, total=False):
    min_pixels: int | None  # least area of a frame, in place of `size["shortest_edge"]`
    max_pixels: int | None  # greatest area of a frame, in place of `size["longest_edge"]`
    total_pixels: int | None  # bounds the area of all frames of a video together, as in qwen-vl-utils
    start: float | int | None  # seconds into the file where the clip begins
    end: float | int | None  # seconds into the file where the clip ends
    allow_urls: bool | None  # whether a video may be a URL; it may not by default


class VambaProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: VambaImagesKwargs
    videos_kwargs: VambaVideosKwargs


class VambaProcessor(Qwen2VLProcessor):
    """Turns chat messages, text, images and videos into model inputs.

    A video may be a path, `file://` or `data:` URL, bytes, an open binary file, a folder or list of images, an array
    (T, H, W, 3), a tensor (T, 3, H, W), a list of frames, a pair (frames, metadata) as qwen-vl-utils returns it, or a
    dict `{"video": any of these, "fps": 1.0, ...}` with the options of `read_video`; so may the `video` items of chat
    messages. Files are sampled at `fps` (by default the video processor's, or 1) or to `num_frames`, which wins if both
    are given; `do_sample_frames=False` takes every frame. Arrays are taken whole unless `do_sample_frames=True`.
    A list of paths is one video if all are images (by their suffix), else one video each.

    Source: the interface of transformers' `Qwen2VLProcessor`; message keys of qwen-vl-utils.
    """

    valid_processor_kwargs = VambaProcessorKwargs

    def __init__(self, image_processor=None, tokenizer=None, video_processor=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template, **kwargs)
        if tokenizer is not None and not tokenizer("What?", add_special_tokens=False)["input_ids"]:
            raise ValueError(
                "There is no tokenizer, only one of no files that knows no words; put the tokenizer's beside it"
            )
        self.vision_start_token, self.vision_end_token = "<|vision_start|>", "<|vision_end|>"
        self.vision_start_token_id = tokenizer.convert_tokens_to_ids(self.vision_start_token)
        start, image, video = map(re.escape, (self.vision_start_token, self.image_token, self.video_token))
        # `<|vision_start|>` with or without Qwen2-VL's placeholders, or one such placeholder by itself.
        self._mark = re.compile(f"{_UNMARKED}(?:(?P<start>{start})(?:(?:{image})+|(?:{video})+)?|{image}|{video})")

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        videos: VideoInput | None = None,
        media_kinds: list[str] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """See `Qwen2VLProcessor.__call__`.

        Args:
            media_kinds: "image" or "video" for each item in the order of the texts, for a batch that mixes both without
                saying which is which; `apply_chat_template` fills it in. It may list more items than `images` and
                `videos` give, which are those that a video memory holds already.

        Raises:
            ValueError: the texts name more or fewer media than are given (a single text may name none).
            VideoReadError: a video cannot be read.
        """
        images, videos = _flat_images(images) or None, _flat_videos(videos) or None
        texts = [text] if isinstance(text, str) else [] if text is None else text
        if not isinstance(texts, (list, tuple)) or not all(isinstance(sample, str) for sample in texts):
            raise ValueError("`text` must be a string or list of strings.")
        if text is not None and not texts:
            raise ValueError("`text` is an empty list; give at least one string.")
        for sample in texts:
            _check_unicode(sample)
        kinds = self._kinds(texts, len(images or []), len(videos or []), media_kinds) if texts else []
        if isinstance(kwargs.get("fps"), (list, tuple)):
            kwargs.pop("fps")  # qwen-vl-utils lists the rates of frames that it has sampled already.
        inputs = super().__call__(images=images, text=text, videos=videos, **kwargs)
        self._mark_media(inputs, kinds)
        return inputs

    # When a checkpoint is saved with its code, transformers writes `AutoProcessor` into the `auto_map` of the image and
    # the video processor as well. There it is useless, and makes what is loaded differ from what was saved.
    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        for part in (output.get("image_processor", {}), output.get("video_processor", {})):
            if part.get("auto_map", {}).keys() == {"AutoProcessor"}:
                del part["auto_map"]
        return output

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        saved = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        for part in (self, self.image_processor, self.video_processor):
            if (getattr(part, "auto_map", None) or {}).keys() == {"AutoProcessor"}:
                del part.auto_map
        return saved

    def apply_chat_template(self, conversation, chat_template: str | None = None, *args, **kwargs):
        """See `Qwen2VLProcessor.apply_chat_template`. Raises ValueError for a template that does or makes too much."""
        _check_conversation(conversation)
        template, variables = self._resolve_chat_template(chat_template), {"add_generation_prompt": False, **kwargs}
        variables |= dict(zip(("tools", "documents", "add_generation_prompt"), args))
        conversations, _ = self._normalize_conversations(conversation)
        check_rendering(template, conversations, {**self.tokenizer.special_tokens_map, **variables})
        return super().apply_chat_template(conversation, chat_template, *args, **kwargs)

    def _kind(self, mark: str) -> str | None:
        """Returns the kind of Qwen2-VL's placeholder in a mark, None if it has no placeholder."""
        tokens = {"image": self.image_token, "video": self.video_token}
        return next((kind for kind, token in tokens.items() if token in mark), None)

    def _kinds(self, texts: list[str], n_images: int, n_videos: int, media_kinds: list[str] | None) -> list[str]:
        """Returns the kind of each media item that the texts name. Raises ValueError unless their numbers agree."""
        told = [self._kind(match.group()) for sample in texts for match in self._mark.finditer(sample)]
        if len(texts) == 1 and not told:
            return []
        expected = n_images + n_videos if media_kinds is None else len(media_kinds)
        if len(told) != expected:
            raise ValueError(
                f"The number of {self.vision_start_token} tokens in the prompts should be the same as the number of "
                f"images and videos: found {len(told)} tokens, {n_images} images and {n_videos} videos. Write one "
                f"{self.vision_start_token}{self.vision_end_token} for each item."
            )
        if media_kinds is not None:
            kinds = media_kinds
        elif not (n_images and n_videos):
            kinds = ["image"] * n_images + ["video"] * n_videos
        elif None in told:
            raise ValueError(
                f"Which of the {len(told)} {self.vision_start_token} tokens are images and which videos? Put "
                f"{self.image_token} or {self.video_token} after each, or use apply_chat_template."
            )
        else:
            kinds = told
        mixed_up = any(kind not in (None, given) for kind, given in zip(told, kinds))
        if mixed_up or kinds.count("image") < n_images or kinds.count("video") < n_videos:
            raise ValueError(
                f"The number of {self.image_token} and {self.video_token} tokens in the prompts should be the same as "
                f"the number of images and videos: found {told.count('image')} and {told.count('video')} tokens, "
                f"{n_images} images and {n_videos} videos."
            )
        return kinds

    def _mark_media(self, inputs: BatchFeature, kinds: list[str]) -> None:
        """Writes the kinds at the `<|vision_start|>`s in place, whether rows are lists, arrays or tensors."""
        remaining = iter(kinds)
        for ids, types in zip(inputs.get("input_ids", ()), inputs.get("mm_token_type_ids", ())):
            for position, kind in zip(np.flatnonzero(np.asarray(ids) == self.vision_start_token_id), remaining):
                types[int(position)] = _TYPE_IDS[kind]
        offsets = [offset for sample in inputs.get("text_replacement_offsets", ()) for offset in sample]
        for offset, kind in zip(offsets, kinds):
            offset["type"] = kind

    def replace_image_token(self, *args, **kwargs) -> str:
        return self.vision_start_token + self.vision_end_token

    replace_video_token = replace_image_token

    def get_text_with_replacements(self, text: list[str], *args, **kwargs) -> tuple[list[str], list[list[dict]]]:
        """Drops placeholders after a `<|vision_start|>`, and replaces those that stand by themselves."""
        texts, offsets = [], []
        for sample in text:
            parts, found, last, length = [], [], 0, 0
            for match in self._mark.finditer(sample):
                new = self.vision_start_token + (self.vision_end_token if match["start"] is None else "")
                parts += [sample[last : match.start()], new]
                length, last = length + len(parts[-2]) + len(new), match.end()
                entry = {"type": self._kind(match.group()), "text": match.group(), "replacement": new}
                found.append(entry | {"span": match.span(), "new_span": (length - len(new), length)})
            texts.append("".join([*parts, sample[last:]]))
            offsets.append(found)
        return texts, offsets

    def _check_special_mm_tokens(self, text: list[str], text_inputs: BatchFeature, modalities: list[str]) -> None:
        """Raises ValueError if truncation has cut off the `<|vision_start|>` of a media item."""
        super()._check_special_mm_tokens(text, text_inputs, modalities=["vision_start"])

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs) -> MultiModalData:
        """Counts tokens as `Qwen2VLProcessor` does, but each item has one token in the text, whatever its size."""
        data = super()._get_num_multimodal_tokens(image_sizes, video_sizes, **kwargs)
        if image_sizes is not None:
            data.num_image_tokens = [1] * len(image_sizes)
        if video_sizes is not None:
            data.num_video_tokens = [1] * len(video_sizes)
        return data

    def _merge_kwargs(self, *args, **kwargs) -> dict[str, Any]:
        from huggingface_hub.errors import StrictDataclassError

        try:
            return super()._merge_kwargs(*args, **kwargs)
        except (StrictDataclassError, TypeError) as error:  # a value of another type, an option that it does not know
            raise ValueError(f"{' '.join(str(error).split()):.400}") from error

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if images is None and text is None and videos is None:
            raise ValueError(f"You need to provide at least one input to call {self.__class__.__name__}")

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        _, *others = super().prepare_inputs_layout(None, text, videos, audio, **kwargs)
        return images, *others  # `_process_image` fetches them.

    def _process_images(self, images: list[dict], **kwargs):
        return self._process_one_by_one(self._process_image, images, kwargs)

    def _process_image(self, item: dict, **kwargs) -> BatchFeature:
        image = self.fetch_image(item["image"], allow_urls=kwargs.pop("allow_urls", False))
        kwargs["size"] = _size(self.image_processor, kwargs, item)
        if item.keys() & {"resized_height", "resized_width"}:
            height, width = _explicit_size(item, _factor(self.image_processor, kwargs))
            image, kwargs["do_resize"] = to_pil_image(image).convert("RGB").resize((width, height)), False
        return self.image_processor([image], **kwargs)

    def fetch_image(self, source, allow_urls: bool = False):
        """Decodes an image (see `images.open_image`); one in memory stays as it is. Raises ValueError if it cannot."""
        if not (hasattr(source, "shape") and is_valid_image(source)):
            return open_image(source, allow_urls=allow_urls)
        shape, kind = tuple(source.shape), source.dtype
        numeric = isinstance(kind, torch.dtype) or getattr(kind, "kind", "f") in "buif"
        if len(shape) != 3 or min(shape) == 0 or not {1, 3, 4} & {shape[0], shape[2]} or not numeric:
            raise ValueError(f"An array of shape {shape} and {kind} is no image; give numbers (H, W, 3) or (3, H, W).")
        return source

    def _process_videos(self, videos: list[dict], **kwargs):
        if (metadata := kwargs.pop("video_metadata", None)) is not None:
            known = _leaves(metadata)
            if len(known) != len(videos):
                raise ValueError(f"video_metadata has {len(known)} entries for {len(videos)} videos.")
            videos = [item if entry is None else item | {"metadata": entry} for item, entry in zip(videos, known)]
        return self._process_one_by_one(self._process_video, videos, kwargs)

    def _process_one_by_one(self, process, items: list[dict], kwargs: dict) -> tuple[BatchFeature, list[str]]:
        """Returns the joined outputs of `process` for the items, and the text that stands for each item."""
        kwargs = _given(kwargs) | {"return_tensors": "pt"}
        check_numbers(kwargs)
        outputs, joined = [process(item, **kwargs) for item in items], BatchFeature()
        for key in outputs[0]:
            parts = [output[key] for output in outputs]
            joined[key] = torch.cat(parts) if torch.is_tensor(parts[0]) else sum(parts, [])
        return joined, [self.replace_image_token()] * len(items)

    def _process_video(self, item: dict, **kwargs) -> BatchFeature:
        source, metadata = item["video"], item.get("metadata")
        options = {key: kwargs.pop(key) for key in (*_READER_OPTIONS, "allow_urls") if key in kwargs}
        options |= {key: item[key] for key in _VIDEO_OPTIONS if key in item}
        if "num_frames" in kwargs:
            kwargs.pop("fps", None)
        if self.video_processor.cap_pixels_per_frame is None:
            kwargs.setdefault("cap_pixels_per_frame", False)  # It shrinks long videos; here only `total_pixels` may.
        kwargs["size"] = _size(self.video_processor, kwargs, options)
        asks = options.keys() - {"min_pixels", "max_pixels", "backend", "allow_urls"}
        if is_valid_video(source) and (metadata is not None or not asks):
            return self.video_processor([source], video_metadata=[metadata] if metadata else None, **kwargs)
        frames, metadata = self.read_frames(source, **self._reader_options(source, options, kwargs))
        kwargs |= {"do_resize": False, "do_sample_frames": False, "video_metadata": [metadata]}
        return self.video_processor([frames], **kwargs)

    def _reader_options(self, source, options: dict, kwargs: dict) -> dict:
        """Returns the options of `read_video` for sampling and size; takes those for sampling out of `kwargs`."""
        call = {key: kwargs.pop(key) for key in ("fps", "num_frames") if key in kwargs}
        do_sample_frames = kwargs.pop("do_sample_frames", None)
        if options.keys() & {"fps", "num_frames"}:
            call = {}
        elif do_sample_frames is False:
            call = {"source_fps": call.get("fps"), "fps": _EVERY_FRAME}
        elif not call:
            if do_sample_frames and isinstance(source, (list, tuple)):
                # These are transformers' words, for which its common tests look, and the other remedy.
                text = "Sampling frames from a list of images is not supported! Set `do_sample_frames=False`"
                raise ValueError(f"{text}, or say how with `num_frames`.")
            call = self._default_sampling(options)
        chosen = call | options
        if "num_frames" in chosen:
            chosen.pop("fps", None)
        return self._frame_size(kwargs) | {"resize": kwargs.get("do_resize", self.video_processor.do_resize)} | chosen

    def _default_sampling(self, options: dict) -> dict:
        """Returns the video processor's own num_frames or fps; if it has neither, the rate of the given frames."""
        for name in ("num_frames", "fps"):
            if (own := getattr(self.video_processor, name, None)) is not None:
                return {name: own}
        return {"fps": options["source_fps"]} if "source_fps" in options else {}

    def _frame_size(self, kwargs: dict) -> dict:
        """Returns the options with which the reader makes frames that the video processor would not resize."""
        processor = self.video_processor
        size, factor = kwargs.get("size", processor.size), _factor(processor, kwargs)
        options = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"], "factor": factor}
        if kwargs.get("cap_pixels_per_frame", processor.cap_pixels_per_frame):
            tokens = kwargs.get("max_video_tokens", processor.max_video_tokens)
            options["total_pixels"] = int(tokens * factor * factor * 0.9)
        return options

    def read_frames(self, source, **options) -> tuple[torch.Tensor, VideoMetadata]:
        """Returns all frames that `vamba.read_video(source, **options)` chooses, (T, 3, H, W) uint8, and metadata."""
        if vamba_video() is None:
            return _read_by_transformers(source, **options)
        frames, _, metadata = vamba_video().load_with_metadata(source, **options)
        return frames, VideoMetadata(**metadata)

    def video_reader(self, source, **options):
        """Reads a video chunk by chunk: `vamba.read_video` with the frame sizes and the sampling of this processor.

        `min_frames` and `max_frames` bound the frames that `fps` gives.
        """
        if vamba_video() is None:
            raise ImportError("Reading a video chunk by chunk needs the package vamba; pip install vamba.")
        if options.keys() & {"min_frames", "max_frames"}:
            options, _, _ = vamba_video().frames_asked_for(source, options, self.video_reader)
        sampling = {} if options.keys() & {"fps", "num_frames"} else self._default_sampling(options)
        return vamba_video().read_video(source, **(self._frame_size({}) | sampling | options))

    def _multimodal_inputs_from_conversations(self, conversations, audio_loading_params, load_audio_from_video=False):
        media, kinds = {"image": [], "video": []}, []
        for conversation in conversations:
            contents = [message.get("content") for message in conversation]
            blocks = [block for content in contents if isinstance(content, list) for block in content]
            blocks = [block for block in blocks if isinstance(block, Mapping) and block.get("type") in media]
            kinds += [block["type"] for block in blocks]
            for kind, batch in media.items():  # An item without a source stands for one that a video memory holds.
                batch.append([block for block in blocks if block["type"] == kind and block.keys() > {"type"}])
        return media["image"], media["video"], [], {"media_kinds": kinds} if kinds else {}

    def _normalize_conversations(self, conversation):
        """Renames items for all chat templates. Raises ValueError for items that these would silently leave out."""
        return super()._normalize_conversations(_plain_messages(conversation))


def _check_unicode(text: str) -> None:
    """Raises ValueError for a lone surrogate, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text[:60]!a} … is no Unicode at character {error.start}; give a text that is.") from error


def _check_conversation(messages) -> None:
    """Raises ValueError unless this is a list of messages, or of such lists, each with a role and a content."""
    if hasattr(messages, "messages"):
        return
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"A conversation is {messages!r:.80}; give a list of messages.")
    for message in messages:
        if isinstance(message, (list, tuple)) or hasattr(message, "messages"):
            _check_conversation(message)
            continue
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"A message is {message!r:.80}; give an object with a role, which is a text.")
        content = message.get("content")
        if not isinstance(content, (str, list, tuple, type(None))):
            raise ValueError(f"The content of a message is {content!r:.80}; give a text, or a list of items.")
        if bad := [item for item in content or () if not isinstance(item, (str, Mapping))]:
            raise ValueError(f"A message's item is {bad[0]!r:.80}. Instead, give a text, an image or a video.")


def _plain_messages(messages):
    """Applies `plain_item` to the items of messages in any nesting of lists."""
    if isinstance(messages, (list, tuple)):
        return [_plain_messages(message) for message in messages]
    if not isinstance(messages, Mapping) or not isinstance(messages.get("content"), (list, tuple)):
        return messages
    return {**messages, "content": [plain_item(item) for item in messages["content"]]}


def plain_item(block, *known: str):
    """Rewrites an item of a message so that its `type` is "text", "image" or "video", with its source under that key.

    Options get the names that `read_video` has for them, keys that are None are dropped, and OpenAI's wrapping
    (`video_url`, `image_url`) is removed. Raises ValueError for other items, and for keys that are not among `known`.
    """
    if not isinstance(block, Mapping):
        return block
    block = _given(block)
    for kind, sources in _SOURCE_KEYS.items():
        named = block.pop(f"{kind}_url", {} if block.get("type") == f"{kind}_url" else None)
        if named is not None:
            named = named if isinstance(named, Mapping) else {"url": named}
            # OpenAI's `detail`, which is the size of an image, has no meaning here.
            block |= {key: value for key, value in named.items() if key != "detail"} | {"type": kind}
        if block.get("type") == kind or kind in block:
            if isinstance(inner := block.get(kind), Mapping):
                del block[kind]
                block |= {key: value for key, value in inner.items() if key != "detail" and value is not None}
            _check_keys(block, kind, "type", *known)
            if inner is not None and not block.keys() & set(sources):
                raise ValueError(f"A message's {kind} is {inner!r:.60}, which names no source; give one under 'path'.")
            for source in [block.pop(key) for key in reversed(sources) if key in block]:  # The first of them wins.
                block[kind] = source
            block = {_ALIASES.get(key, key): value for key, value in block.items()} | {"type": kind}
            check_numbers(block)
            return block
    if not isinstance(block.get("text"), str) or block.get("type", "text") != "text":
        raise ValueError(f"A message's item is {str(block)[:80]}. Instead, give a text, an image or a video.")
    _check_keys(block, "text", "type")
    return block


def _check_keys(block: Mapping, kind: str, *more: str) -> None:
    known = (*_SOURCE_KEYS.get(kind, ()), *_OPTIONS[kind], *more)
    if unknown := [key for key in block if key not in known]:
        named = ", ".join(map(repr, unknown))
        raise ValueError(f"{named} is unknown in an item of type {kind}; known keys are {', '.join(known)}.")


def _given(options: Mapping) -> dict:
    return {key: value for key, value in options.items() if value is not None}


def _factor(processor, kwargs: dict) -> int:
    """Returns a number of pixels of which both sides of a processed image or frame are multiples."""
    return kwargs.get("patch_size", processor.patch_size) * kwargs.get("merge_size", processor.merge_size)


def _size(processor, kwargs: dict, options: dict) -> dict[str, int]:
    """Takes the least and greatest area from the item's options, else the call's `kwargs`, else the processor."""
    size = kwargs.pop("size", processor.size)
    if isinstance(size, (int, list, tuple)):
        raise ValueError(f"size={size!r:.60} must be a dict of 'shortest_edge' and 'longest_edge'.")
    size = dict(size)
    for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        size[edge] = options.get(name, kwargs.pop(name, size.get(edge)))
    if not size.get("shortest_edge") or not size.get("longest_edge"):
        raise ValueError(f"`size` must contain 'shortest_edge' and 'longest_edge' (least and greatest area): {size}.")
    size["shortest_edge"] = int(number("min_pixels", size["shortest_edge"]))
    size["longest_edge"] = int(min(number("max_pixels", size["longest_edge"]), 2**62))
    return size


def _explicit_size(options: dict, factor: int) -> tuple[int, int]:
    """Returns the size of whole patches nearest to the one asked for, within the bounds of qwen-vl-utils."""
    height, width = (options.get(name) for name in ("resized_height", "resized_width"))
    if height is None or width is None:
        raise ValueError(f"resized_height={height!r}, resized_width={width!r}: give both as integers of at least 1.")
    return smart_resize(int(height), int(width), factor, 4 * factor**2, 16384 * factor**2)


def _leaves(nested) -> list:
    return [leaf for part in nested for leaf in _leaves(part)] if isinstance(nested, (list, tuple)) else [nested]


def _item(source, kind: str) -> dict:
    """Returns `{kind: source, **options}` for one image or video, which may be such a dict already."""
    known = ("metadata",) if kind == "video" else ()
    item = plain_item({"type": kind, **(source if isinstance(source, Mapping) else {kind: source})}, *known)
    if kind not in item:
        sources = ", ".join(_SOURCE_KEYS[kind])
        raise ValueError(f"A message's {kind} item names no source under {sources}: {source}.")
    if _is_pair(item[kind]):
        item[kind], item["metadata"] = item[kind]
    return item


def _flat_images(images) -> list[dict]:
    """Lists the items of an image, or of images in any nesting of lists."""
    leaves = [leaf for leaf in _leaves(images) if leaf is not None]
    arrays = [list(leaf) if getattr(leaf, "ndim", None) == 4 else [leaf] for leaf in leaves]
    return [_item(image, "image") for array in arrays for image in array]


def _flat_videos(videos) -> list[dict]:
    """Lists the items of a video, or of videos in any nesting of lists."""
    if videos is None:
        return []
    if is_valid_video_frame(videos):
        videos = [videos]
    if isinstance(videos, (list, tuple)):
        one = is_valid_video(videos) or _is_pair(videos) or (videos and all(map(_is_image_file, videos)))
        videos = list(videos)
    else:
        one = getattr(videos, "ndim", None) != 5
    return [_item(videos, "video")] if one else [item for video in videos for item in _flat_videos(video)]


def _is_pair(video) -> bool:
    """Whether this is (frames, metadata), as qwen-vl-utils returns videos."""
    pair = isinstance(video, (list, tuple)) and len(video) == 2
    return pair and isinstance(video[1], Mapping) and is_valid_video(video[0])


def _is_image_file(source) -> bool:
    return isinstance(source, (str, os.PathLike)) and str(source).lower().endswith(_STILL_SUFFIXES)


@cache
def vamba_video():
    """Imports `vamba.video` if it can (else None), only when a video is read: it changes what the Auto classes load."""
    try:
        from vamba import video
    except ImportError:
        return None
    return video


def _read_by_transformers(source, **options) -> tuple[torch.Tensor, VideoMetadata]:
    """Does what `VambaProcessor.read_frames` does for frames in memory, files and allowed URLs, without vamba."""
    logger.warning_once(
        "Videos are read by transformers' load_video, as the package vamba cannot be imported, whose reader knows more "
        "formats, withstands damage and needs less memory. Use pip install vamba."
    )
    choose = partial(_chosen_frames, **options)
    if is_valid_video(source):
        frames = np.stack([np.asarray(frame) for frame in source])
        frames = (frames * 255).round() if frames.dtype.kind == "f" else frames
        about = VideoMetadata(len(frames), fps=options.get("source_fps") or options.get("fps") or 1.0)
        frames = frames[choose(about)]
    elif not isinstance(source, (str, os.PathLike)) or ("://" in f"{source}" and not options.get("allow_urls")):
        raise ValueError(
            f"{source!r:.80}: without the package vamba a video is a path, or a URL with allow_urls=True. Give one, or "
            "pip install vamba."
        )
    else:
        try:
            if "://" not in f"{source}":
                check_regular_file(os.stat(source))
            frames, about = load_video(f"{source}", backend=options.get("backend") or "pyav", sample_indices_fn=choose)
        except Exception as error:  # Each fault of a file raises an error of its own type.
            message = f"{source}: transformers' load_video cannot read it ({error})."
            raise ValueError(f"{message} Check the file, or pip install vamba.") from error
    frames = torch.as_tensor(frames)
    frames = frames if frames.shape[1] == 3 else frames.permute(0, 3, 1, 2)
    if not options.get("resize", True):
        return frames, about
    if options.keys() & {"resized_height", "resized_width"}:
        size = _explicit_size(options, options["factor"])
    else:
        low, high, total = options["min_pixels"], options["max_pixels"], options.get("total_pixels")
        high = high if total is None else max(min(high, total / len(frames) * 2), int(low * 1.05))
        size = smart_resize(*frames.shape[2:], options["factor"], low, high)
    resized = (interpolate(frame[None].float(), size, mode="bicubic", antialias=True) for frame in frames)
    return torch.cat([frame.round().clamp(0, 255).to(torch.uint8) for frame in resized]), about


def _chosen_frames(
    metadata: VideoMetadata, fps=None, num_frames=None, start=0.0, end=None, min_frames=1, max_frames=np.inf, **_
) -> np.ndarray:
    """Chooses frames as `vamba.read_video` does if they are evenly spaced; also puts the indices into the metadata."""
    total, rate = metadata.total_num_frames, metadata.fps
    if not (total and rate):
        raise ValueError("it does not say how many frames it has, and how many a second")
    if (first := start * rate) >= total:
        raise ValueError(f"start={start:g} is past the end of the video")
    stop = total if end is None else min(end * rate, total)
    times = np.arange(first, stop, max(rate / (fps or 1.0), 1.0))
    count = num_frames or min(max(len(times), min_frames), max_frames)
    if num_frames or count != len(times):
        times = np.linspace(first, min(stop, total - 1), count)
    metadata.frames_indices = np.unique((times + 1e-6).astype(int))
    return metadata.frames_indices


VambaProcessor.register_for_auto_class("AutoProcessor")
