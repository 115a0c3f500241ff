"""The processor of Vamba: Qwen2-VL's, without placeholder tokens and with its own way of reading video.

What is unusual: a media item is `<|vision_start|><|vision_end|>` in the text, however long it is. Qwen2-VL's
placeholders are understood and replaced by that; `mm_token_type_ids` marks the `<|vision_start|>` of an image with 1
and that of a video with 2. Files are decoded by `video_reading`, frame by frame at their final size, whatever backends
transformers finds; images and videos are processed one by one, as each may carry options of its own.
"""

import io
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, processing_utils
from transformers.image_transforms import to_pil_image
from transformers.image_utils import ImageInput
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, VideosKwargs
from transformers.tokenization_utils_base import TextInput
from transformers.video_utils import VideoInput, VideoMetadata

from .frame_selection import IMAGE_SUFFIXES, number, target_size
from .video_reading import read_video


IMAGE, VIDEO = 1, 2  # in mm_token_type_ids
# What a chat message may say about its image or video: transformers' words, then qwen-vl-utils' where they differ.
_SOURCE_KEYS = {"video": ("video", "url", "path"), "image": ("image", "url", "path", "base64")}
ALIASES = {"nframes": "num_frames", "video_start": "start", "video_end": "end", "sample_fps": "source_fps"}
_IMAGE_OPTIONS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
# Options that only `read_video` knows; the video processor would refuse them.
_READER_OPTIONS = (
    "start", "end", "total_pixels", "resized_height", "resized_width", "source_fps", "backend", "allow_urls",
)  # fmt: skip
_VIDEO_OPTIONS = (
    "min_pixels", "max_pixels", "fps", "num_frames", "min_frames", "max_frames", "raw_fps", *_READER_OPTIONS,
)  # fmt: skip
_EVERY_FRAME = 1e6  # frames per second
# User text whose control tokens transformers has marked (`sanitize_control_tokens`) names no media.
_UNMARKED = getattr(processing_utils, "_UNMARKED", "")


class VambaImagesKwargs(ImagesKwargs, total=False):
    """
    min_pixels (`int`, *optional*): least area of an image, in place of `size["shortest_edge"]`.
    max_pixels (`int`, *optional*): greatest area of an image, in place of `size["longest_edge"]`.
    """

    min_pixels: int | None
    max_pixels: int | None


class VambaVideosKwargs(VideosKwargs, total=False):
    """
    min_pixels (`int`, *optional*): least area of a frame, in place of `size["shortest_edge"]`.
    max_pixels (`int`, *optional*): greatest area of a frame, in place of `size["longest_edge"]`.
    total_pixels (`int`, *optional*): bounds the area of all frames of a video together, as in qwen-vl-utils.
    start (`float`, *optional*): seconds into the file where the clip begins.
    end (`float`, *optional*): seconds into the file where the clip ends.
    allow_urls (`bool`, *optional*): whether a video may be a URL; it may not by default.
    """

    min_pixels: int | None
    max_pixels: int | None
    total_pixels: int | None
    start: float | int | None
    end: float | int | None
    allow_urls: bool | None


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
        self.vision_start_token, self.vision_end_token = "<|vision_start|>", "<|vision_end|>"
        self.vision_start_token_id = tokenizer.convert_tokens_to_ids(self.vision_start_token)
        start, image, video = map(re.escape, (self.vision_start_token, self.image_token, self.video_token))
        # `<|vision_start|>` with Qwen2-VL's placeholders, or one of these by itself
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
            media_kinds: "image" or "video" for each item of the texts in order, where a batch mixes both and the text
                does not tell. More of them than `images` and `videos` stand for items that a video memory holds
                already. `apply_chat_template` fills it in.

        Raises:
            ValueError: the texts and the media differ in number (a single text may announce none).
            VideoReadError: a video that cannot be read.
        """
        images = None if images is None else _flat_images(images) or None
        videos = None if videos is None else _flat_videos(videos) or None
        texts = [text] if isinstance(text, str) else text
        if texts is not None and not all(isinstance(sample, str) for sample in texts):
            raise ValueError("`text` must be a string or list of strings.")
        kinds = self._kinds(texts, len(images or []), len(videos or []), media_kinds) if texts else []
        if isinstance(kwargs.get("fps"), (list, tuple)):
            kwargs.pop("fps")  # qwen-vl-utils reports the rates of frames that it has sampled
        inputs = super().__call__(images=images, text=text, videos=videos, **kwargs)
        self._mark_media(inputs, kinds)
        return inputs

    # Saving with code notes the `AutoProcessor` on the image and video processor as well, where it is of no use and
    # makes what was saved differ from what is loaded; here it stands in the processor's own configuration only.
    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        for name in ("image_processor", "video_processor"):
            if output.get(name, {}).get("auto_map", {}).keys() == {"AutoProcessor"}:
                del output[name]["auto_map"]
        return output

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        saved = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        for part in (self, self.image_processor, self.video_processor):
            if (getattr(part, "auto_map", None) or {}).keys() == {"AutoProcessor"}:
                del part.auto_map
        return saved

    # --- text -------------------------------------------------------------------------------------------------------

    def _kinds(self, texts: list[str], n_images: int, n_videos: int, media_kinds: list[str] | None) -> list[int]:
        """IMAGE or VIDEO for each media item that the texts announce; checks that their numbers agree."""
        marks = [match.group() for sample in texts for match in self._mark.finditer(sample)]
        if len(texts) == 1 and not marks:
            return []
        expected = n_images + n_videos if media_kinds is None else len(media_kinds)
        if len(marks) != expected:
            raise ValueError(
                f"The number of {self.vision_start_token} tokens in the prompts should be the same as the number of "
                f"images and videos: found {len(marks)} tokens, {n_images} images and {n_videos} videos. Write one "
                f"{self.vision_start_token}{self.vision_end_token} for each item."
            )
        told = [None if mark == self.vision_start_token else self._kind(mark) for mark in marks]
        if media_kinds is not None:
            kinds = [IMAGE if kind == "image" else VIDEO for kind in media_kinds]
        elif not (n_images and n_videos):
            kinds = [IMAGE] * n_images + [VIDEO] * n_videos
        elif None in told:
            raise ValueError(
                f"Which of the {len(marks)} {self.vision_start_token} tokens are images and which videos? Put "
                f"{self.image_token} or {self.video_token} after each, or use apply_chat_template."
            )
        else:
            kinds = told
        mixed_up = any(kind not in (None, given) for kind, given in zip(told, kinds))
        if mixed_up or kinds.count(IMAGE) < n_images or kinds.count(VIDEO) < n_videos:
            raise ValueError(
                f"The number of {self.image_token} and {self.video_token} tokens in the prompts should be the same as "
                f"the number of images and videos: found {told.count(IMAGE)} and {told.count(VIDEO)} tokens, "
                f"{n_images} images and {n_videos} videos."
            )
        return kinds

    def _kind(self, mark: str) -> int:
        return IMAGE if self.image_token in mark else VIDEO

    def _mark_media(self, inputs: BatchFeature, kinds: list[int]) -> None:
        """Writes the kinds at the `<|vision_start|>`s, in place, whatever container the rows have."""
        if "mm_token_type_ids" in inputs:
            remaining = iter(kinds)
            for ids, types in zip(inputs["input_ids"], inputs["mm_token_type_ids"]):
                for position in np.flatnonzero(np.asarray(ids) == self.vision_start_token_id):
                    if (kind := next(remaining, None)) is not None:
                        types[int(position)] = kind
        offsets = [offset for sample in inputs.get("text_replacement_offsets", []) for offset in sample]
        for offset, kind in zip(offsets, kinds):
            offset["type"] = "image" if kind == IMAGE else "video"

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.vision_start_token + self.vision_end_token

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs) -> str:
        return self.vision_start_token + self.vision_end_token

    def get_text_with_replacements(
        self, text: list[str], images_replacements=(), videos_replacements=(), audio_replacements=()
    ) -> tuple[list[str], list[list[dict[str, Any]]]]:
        """The texts with placeholders dropped after `<|vision_start|>`, and completed where they stand alone."""
        texts, offsets = [], []
        for sample in text:
            parts, found, last, length = [], [], 0, 0
            for match in self._mark.finditer(sample):
                alone = match["start"] is None
                new = self.vision_start_token + (self.vision_end_token if alone else "")
                before = sample[last : match.start()]
                length += len(before)
                kind = "image" if self._kind(match.group()) == IMAGE else "video"
                entry = {"type": kind, "span": match.span()}
                entry |= {"new_span": (length, length + len(new)), "text": match.group(), "replacement": new}
                found.append(entry)
                parts += [before, new]
                length, last = length + len(new), match.end()
            texts.append("".join([*parts, sample[last:]]))
            offsets.append(found)
        return texts, offsets

    def _check_special_mm_tokens(self, text: list[str], text_inputs: BatchFeature, modalities: list[str]) -> None:
        """Raises ValueError if truncation has cut off media items."""
        pattern = re.compile(_UNMARKED + re.escape(self.vision_start_token))
        written = sum(len(pattern.findall(sample)) for sample in text)
        kept = sum(int((np.asarray(ids) == self.vision_start_token_id).sum()) for ids in text_inputs["input_ids"])
        if kept < written:
            raise ValueError(
                f"Mismatch in media items: the texts hold {written} {self.vision_start_token} tokens, `input_ids` "
                f"{kept}, likely due to truncation. Disable it or increase `max_length`."
            )

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs) -> MultiModalData:
        """As `Qwen2VLProcessor` has it, but one marked token of text stands for each item, whatever its size."""
        data = super()._get_num_multimodal_tokens(image_sizes=image_sizes, video_sizes=video_sizes, **kwargs)
        if image_sizes is not None:
            data.num_image_tokens = [1] * len(image_sizes)
        if video_sizes is not None:
            data.num_video_tokens = [1] * len(video_sizes)
        return data

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if images is None and text is None and videos is None:
            raise ValueError(f"You need to provide at least one input to call {self.__class__.__name__}")

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        _, text, videos, audio = super().prepare_inputs_layout(None, text, videos, audio, **kwargs)
        if images is not None:
            images = [item | {"image": self._fetch_image(item["image"])} for item in images]
        return images, text, videos, audio

    def _fetch_image(self, source):
        if isinstance(source, (bytes, bytearray)) or hasattr(source, "read"):
            from PIL import Image, ImageOps

            file = io.BytesIO(source) if isinstance(source, (bytes, bytearray)) else source
            return ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        return self.image_processor.fetch_images(os.fspath(source) if hasattr(source, "__fspath__") else source)

    # --- images and videos ------------------------------------------------------------------------------------------

    def _process_images(self, images: list[dict], **kwargs):
        outputs = _merge([self._process_image(item, **kwargs) for item in images])
        return outputs, [self.replace_image_token(outputs, index) for index in range(len(images))]

    def _process_image(self, item: dict, **kwargs) -> BatchFeature:
        check_keys(item, "image")
        image, options = item["image"], {key: item[key] for key in _IMAGE_OPTIONS if item.get(key) is not None}
        kwargs["size"] = _size(self.image_processor, kwargs, options)
        if options.keys() & {"resized_height", "resized_width"}:
            factor = _factor(self.image_processor, kwargs)
            sides = {key: options.get(key) for key in ("resized_height", "resized_width")}
            height, width = target_size(1, 1, factor=factor, min_pixels=0, max_pixels=np.inf, **sides)
            image, kwargs["do_resize"] = to_pil_image(image).convert("RGB").resize((width, height)), False
        return self.image_processor([image], **kwargs)

    def _process_videos(self, videos: list[dict], **kwargs):
        metadata = _flat_metadata(kwargs.pop("video_metadata", None), len(videos))
        items = [item if known is None else item | {"metadata": known} for item, known in zip(videos, metadata)]
        outputs = _merge([self._process_video(item, **kwargs) for item in items])
        return outputs, [self.replace_video_token(outputs, index) for index in range(len(videos))]

    def _process_video(self, item: dict, **kwargs) -> BatchFeature:
        source, metadata = item["video"], item.get("metadata")
        check_keys(item, "video", "metadata")
        options = {ALIASES.get(key, key): value for key, value in item.items() if value is not None}
        options = {key: value for key, value in options.items() if key in _VIDEO_OPTIONS}
        call = {key: kwargs.pop(key) for key in _READER_OPTIONS if key in kwargs}
        options = {key: value for key, value in call.items() if value is not None} | options
        if kwargs.get("num_frames") is not None:
            kwargs.pop("fps", None)
        if kwargs.get("cap_pixels_per_frame") is None and self.video_processor.cap_pixels_per_frame is None:
            kwargs["cap_pixels_per_frame"] = False  # Vamba is made for long videos; `total_pixels` caps on request
        kwargs["size"] = _size(self.video_processor, kwargs, options)
        options.pop("raw_fps", None)  # only qwen-vl-utils' metadata of frames that are in memory
        asks = options.keys() - {"min_pixels", "max_pixels", "backend", "allow_urls"}
        if _is_frames(source) and (metadata is not None or not asks):
            return self.video_processor([source], video_metadata=[metadata] if metadata else None, **kwargs)
        bounds = {name: options.pop(name) for name in ("min_frames", "max_frames") if name in options}
        options = self._reader_options(source, options, kwargs)
        if bounds:
            options, _, _ = frames_asked_for(source, options | bounds)
        frames, metadata = self.read_frames(source, **options)
        kwargs |= {"do_resize": False, "do_sample_frames": False, "video_metadata": [metadata]}
        return self.video_processor([frames], **kwargs)

    def _reader_options(self, source, options: dict, kwargs: dict) -> dict:
        """How `read_video` is to sample and size a video; takes fps and num_frames out of the call's kwargs."""
        call = {key: kwargs.pop(key) for key in ("fps", "num_frames") if kwargs.get(key) is not None}
        do_sample_frames = kwargs.pop("do_sample_frames", None)
        if options.keys() & {"fps", "num_frames"}:
            call = {}
        elif do_sample_frames is False:
            call = {"source_fps": call.get("fps"), "fps": _EVERY_FRAME}
        elif not call:
            if do_sample_frames and isinstance(source, (list, tuple)):
                raise ValueError(
                    "Sampling frames from a list of images is not supported! Set `do_sample_frames=False`, or say how "
                    "with `num_frames`."
                )
            call = self._default_sampling()
        chosen = call | options
        if "num_frames" in chosen:
            chosen.pop("fps", None)
        elif "source_fps" in options and "fps" not in chosen:
            chosen["fps"] = options["source_fps"]  # frames at their own rate are taken whole
        resize = kwargs.get("do_resize")
        chosen["resize"] = self.video_processor.do_resize if resize is None else resize
        return self._frame_size(kwargs) | chosen

    def _default_sampling(self) -> dict:
        """The video processor's own num_frames or fps, where a checkpoint was trained with one."""
        own = {name: getattr(self.video_processor, name, None) for name in ("num_frames", "fps")}
        return dict([(name, value) for name, value in own.items() if value is not None][:1])

    def _frame_size(self, kwargs: dict) -> dict:
        """The reader's options that give frames the video processor would not resize."""
        processor = self.video_processor
        size, factor = _size(processor, dict(kwargs), {}), _factor(processor, kwargs)
        options = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"], "factor": factor}
        capped = kwargs.get("cap_pixels_per_frame")
        if processor.cap_pixels_per_frame if capped is None else capped:
            tokens = kwargs.get("max_video_tokens") or processor.max_video_tokens
            options["total_pixels"] = int(tokens * factor * factor * 0.9)
        return options

    def read_frames(self, source, **options) -> tuple[torch.Tensor, VideoMetadata]:
        """All frames (T, 3, H, W) uint8 that `read_video(source, **options)` chooses, and what they are."""
        with read_video(source, **options) as reader:
            chunks = list(reader)
            about = reader.metadata
        frames = torch.cat([chunk.frames for chunk in chunks])
        times = torch.cat([chunk.timestamps for chunk in chunks])
        rate = about.fps or 1.0
        metadata = VideoMetadata(
            total_num_frames=about.total_frames or len(frames),
            fps=rate,
            width=about.width,
            height=about.height,
            duration=about.duration,
            video_backend=options.get("backend", "pyav"),
            frames_indices=[round(time * rate) for time in times.tolist()],
        )
        return frames, metadata

    def video_reader(self, source, **options):
        """`read_video` with this processor's frame sizes and sampling, for reading a video chunk by chunk."""
        sampling = {} if options.keys() & {"fps", "num_frames"} else self._default_sampling()
        if not sampling and not options.keys() & {"fps", "num_frames"} and "source_fps" in options:
            sampling = {"fps": options["source_fps"]}  # as `_reader_options` has it
        return read_video(source, **(self._frame_size({}) | sampling | options))

    # --- chat -------------------------------------------------------------------------------------------------------

    def _multimodal_inputs_from_conversations(self, conversations, audio_loading_params, load_audio_from_video=False):
        images, videos, kinds = [], [], []
        for conversation in conversations:
            images.append([])
            videos.append([])
            for message in conversation:
                content = message.get("content")
                for block in content if isinstance(content, list) else ():
                    kind = block.get("type") if isinstance(block, Mapping) else None
                    if kind in _SOURCE_KEYS:
                        kinds.append(kind)
                        if (item := _media_item(block, kind)) is not None:
                            (videos if kind == "video" else images)[-1].append(item)
        return images, videos, [], {"media_kinds": kinds} if kinds else {}

    def _normalize_conversations(self, conversation):
        """Items under the names that every chat template knows. Raises ValueError for what it would drop silently."""
        return super()._normalize_conversations(_plain_messages(conversation))


def _plain_messages(messages):
    """Messages, however nested, whose items say by their `type` alone whether they are text, image or video."""
    if isinstance(messages, (list, tuple)):
        return [_plain_messages(message) for message in messages]
    if not isinstance(messages, Mapping) or not isinstance(messages.get("content"), (list, tuple)):
        return messages
    return {**messages, "content": [_plain_item(item) for item in messages["content"]]}


def _plain_item(block):
    """An item of a message without OpenAI's wrapping (`video_url`, `image_url`) and without keys that are None."""
    if not isinstance(block, Mapping):
        return block
    block = {key: value for key, value in block.items() if value is not None}
    for kind in _SOURCE_KEYS:
        named = block.pop(f"{kind}_url", {} if block.get("type") == f"{kind}_url" else None)
        if named is not None:
            named = named if isinstance(named, Mapping) else {"url": named}
            # `detail` is OpenAI's size of an image
            block |= {key: value for key, value in named.items() if key != "detail"} | {"type": kind}
        if block.get("type") == kind or kind in block:
            check_keys(block, kind, "type")
            return block | {"type": kind}
    if "text" not in block or block.get("type", "text") != "text":
        raise ValueError(f"A message's item is {str(block)[:80]}; give a text, an image or a video.")
    check_keys(block, "text", "type")
    return block


def frames_asked_for(source, options: dict, open_video=read_video) -> tuple[dict, int, tuple[int, int]]:
    """How many frames an item of a message asks for; opens the video, decodes nothing.

    Args:
        options: of `read_video`, and `min_frames` and `max_frames`, which bound the frames that `fps` gives.
        open_video: `read_video` or a processor's `video_reader`.

    Returns:
        The options of `read_video` alone, with `num_frames` where a bound holds; how many frames are due then; their
        height and width.
    """
    options = dict(options)
    low, high = (number(name, options.pop(name, None), 1, integer=True) for name in ("min_frames", "max_frames"))
    if "num_frames" in options:
        options.pop("fps", None)
        low = high = None
    with open_video(source, **options) as reader:
        frames, size, step = reader.num_frames_expected, reader.frame_size, reader.seconds_per_frame
    if frames is None:  # neither length nor number of frames is declared: look at the last packets
        kept = {key: options[key] for key in ("start", "end", "backend", "allow_urls", "source_fps") if key in options}
        with read_video(source, num_frames=2**20, **kept) as reader:
            frames = int((reader.num_frames_expected - 1) / (reader.metadata.fps or 1.0) / step) + 1
    wanted = min(max(frames, low or 1), high or np.inf)
    if wanted != max(frames, 1):
        options = {key: value for key, value in options.items() if key != "fps"} | {"num_frames": wanted}
        return frames_asked_for(source, options, open_video)
    return options, max(frames, 1), size


def check_keys(block: Mapping, kind: str, *more: str) -> None:
    """Raises ValueError for keys of an item that mean nothing."""
    options = {"video": (*_VIDEO_OPTIONS, *ALIASES), "image": _IMAGE_OPTIONS, "text": ("text",)}[kind]
    known = (*_SOURCE_KEYS.get(kind, ()), *options, *more)
    if unknown := [key for key in block if key not in known]:
        named = ", ".join(map(repr, unknown))
        raise ValueError(f"{named} is unknown in an item of type {kind}; known keys are {', '.join(known)}.")


def _media_item(block: Mapping, kind: str) -> dict | None:
    """The source an item of a message names and its options; None for one that the video memory holds already."""
    sources = [block[key] for key in _SOURCE_KEYS[kind] if key in block]
    if not sources:
        if block.keys() <= {"type"}:
            return None
        raise ValueError(f"A message's {kind} item names no source under {', '.join(_SOURCE_KEYS[kind])}: {block}.")
    source = sources[0]["url"] if isinstance(sources[0], Mapping) and "url" in sources[0] else sources[0]
    options = {ALIASES.get(key, key): value for key, value in block.items()}
    known = _VIDEO_OPTIONS if kind == "video" else _IMAGE_OPTIONS
    return {kind: source} | {key: value for key, value in options.items() if key in known}


def _factor(processor, kwargs: dict) -> int:
    """Both sides of a processed image or frame are multiples of this."""
    return (kwargs.get("patch_size") or processor.patch_size) * (kwargs.get("merge_size") or processor.merge_size)


def _size(processor, kwargs: dict, options: dict) -> dict[str, int]:
    """Least and greatest area: the item's own before the call's before the processor's; cleans up `kwargs`."""
    size = kwargs.pop("size", None)
    size = dict(processor.size if size is None else size)
    for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        for area in (kwargs.pop(name, None), options.get(name)):
            size[edge] = size.get(edge) if area is None else area
    if not size["shortest_edge"] or not size["longest_edge"]:
        raise ValueError(f"`size` must contain 'shortest_edge' and 'longest_edge' (least and greatest area): {size}.")
    return size


def _is_frames(source) -> bool:
    """Whether a video is decoded already: an array, or a list of images in memory."""
    if isinstance(source, (list, tuple)):
        return len(source) > 0 and all(_is_picture(frame) for frame in source)
    return hasattr(source, "shape")


def _is_picture(frame) -> bool:
    return getattr(frame, "ndim", None) == 3 or (hasattr(frame, "mode") and hasattr(frame, "convert"))


def _is_path(source) -> bool:
    return isinstance(source, str) or hasattr(source, "__fspath__")


def _flat_images(images) -> list[dict]:
    """One dict per image, `{"image": ..., options}`, out of an image or any nesting of lists."""
    if isinstance(images, (list, tuple)):
        return [item for image in images for item in _flat_images(image)]
    if isinstance(images, Mapping):
        return [dict(images)]
    if getattr(images, "ndim", None) == 4:
        return [{"image": image} for image in images]
    return [] if images is None else [{"image": images}]


def _flat_videos(videos) -> list[dict]:
    """One dict per video, `{"video": ..., options}`, out of a video or any nesting of lists."""
    if isinstance(videos, Mapping):
        item = dict(videos)
        if _is_pair(item["video"]):
            item["video"], item["metadata"] = item["video"]
        return [item]
    if _is_pair(videos):
        return [{"video": videos[0], "metadata": videos[1]}]
    if isinstance(videos, (list, tuple)):
        paths = [video for video in videos if _is_path(video)]
        images = all(os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES - {".gif"} for path in paths)
        if videos and (_is_frames(videos) or (len(paths) == len(videos) and images)):
            return [{"video": list(videos)}]
        return [item for video in videos for item in _flat_videos(video)]
    if getattr(videos, "ndim", None) == 5:
        return [{"video": video} for video in videos]
    if _is_picture(videos):
        return [{"video": videos[None] if hasattr(videos, "ndim") else [videos]}]
    return [] if videos is None else [{"video": videos}]


def _is_pair(video) -> bool:
    """Whether this is (frames, metadata), as qwen-vl-utils returns videos."""
    pair = isinstance(video, (list, tuple)) and len(video) == 2
    return pair and isinstance(video[1], Mapping) and _is_frames(video[0])


def _flat_metadata(metadata, count: int) -> list:
    """One metadata entry or None per video."""
    if metadata is None:
        return [None] * count
    entries = metadata if isinstance(metadata, (list, tuple)) else [metadata]
    flat = [entry for group in entries for entry in (group if isinstance(group, (list, tuple)) else [group])]
    if len(flat) != count:
        raise ValueError(f"video_metadata has {len(flat)} entries for {count} videos.")
    return flat


def _merge(outputs: list[BatchFeature]) -> BatchFeature:
    """Joins what the image or video processor returned for one item at a time."""
    merged = {}
    for key in outputs[0]:
        values = [output[key] for output in outputs]
        if isinstance(values[0], torch.Tensor):
            merged[key] = torch.cat(values)
        elif isinstance(values[0], np.ndarray):
            merged[key] = np.concatenate(values)
        else:
            merged[key] = [entry for value in values for entry in value]
    return BatchFeature(merged)


VambaProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["VambaProcessor"]
