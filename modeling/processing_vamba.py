"""The processor of Vamba: Qwen2-VL's, without placeholder tokens and with its own way of reading video.

What is unusual: a media item is `<|vision_start|><|vision_end|>` in the text, however long it is. Qwen2-VL's
placeholders are understood and replaced by that; `mm_token_type_ids` marks the `<|vision_start|>` of an image with 1
and that of a video with 2. Images and videos are processed one by one, as each may carry options of its own. Videos are
read by `vamba.video`, frame by frame at their final size; where a checkpoint's code is loaded on a machine without the
package, by transformers' `load_video`.
"""

import io
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
from transformers.image_utils import ImageInput, load_image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, VideosKwargs
from transformers.tokenization_utils_base import TextInput
from transformers.utils import logging
from transformers.video_utils import VideoInput, VideoMetadata, load_video


logger = logging.get_logger(__name__)

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
_IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# User text whose control tokens transformers has marked (`sanitize_control_tokens`) names no media.
_UNMARKED = getattr(processing_utils, "_UNMARKED", "")


class VambaImagesKwargs(ImagesKwargs, total=False):
    min_pixels: int | None  # least area of an image, in place of `size["shortest_edge"]`
    max_pixels: int | None  # greatest area of an image, in place of `size["longest_edge"]`


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
        images, videos = _flat_images(images) or None, _flat_videos(videos) or None
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
        _, *others = super().prepare_inputs_layout(None, text, videos, audio, **kwargs)  # images: `_process_image`
        return images, *others

    # --- images and videos ------------------------------------------------------------------------------------------

    def _process_images(self, images: list[dict], **kwargs):
        outputs = _merge([self._process_image(item, **kwargs | {"return_tensors": "pt"}) for item in images])
        return outputs, [self.replace_image_token(outputs, index) for index in range(len(images))]

    def _process_image(self, item: dict, **kwargs) -> BatchFeature:
        check_keys(item, "image")
        image = self._fetch_image(item["image"])
        options = {key: item[key] for key in _IMAGE_OPTIONS if item.get(key) is not None}
        kwargs["size"] = _size(self.image_processor, kwargs, options)
        sides = [options.get(name) for name in ("resized_height", "resized_width")]
        if any(side is not None for side in sides):
            height, width = _explicit_size(*sides, _factor(self.image_processor, kwargs))
            image, kwargs["do_resize"] = to_pil_image(image).convert("RGB").resize((width, height)), False
        return self.image_processor([image], **kwargs)

    def _fetch_image(self, source):
        """What transformers fetches (strings, images in memory), and `pathlib` paths, bytes and open files."""
        if hasattr(source, "__fspath__"):
            source = os.fspath(source)
        if isinstance(source, (bytes, bytearray)):
            source = io.BytesIO(source)
        if hasattr(source, "read"):
            from PIL import Image

            source = load_image(Image.open(source))
        return self.image_processor.fetch_images(source)

    def _process_videos(self, videos: list[dict], **kwargs):
        if (metadata := kwargs.pop("video_metadata", None)) is not None:
            known = _leaves(metadata)
            if len(known) != len(videos):
                raise ValueError(f"video_metadata has {len(known)} entries for {len(videos)} videos.")
            videos = [item if entry is None else item | {"metadata": entry} for item, entry in zip(videos, known)]
        outputs = _merge([self._process_video(item, **kwargs | {"return_tensors": "pt"}) for item in videos])
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
        options = self._reader_options(source, options, kwargs)
        if vamba_video() is not None and options.keys() & {"min_frames", "max_frames"}:
            options, _, _ = vamba_video().frames_asked_for(source, options)
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
            call = self._default_sampling(options)
        chosen = call | options
        if "num_frames" in chosen:
            chosen.pop("fps", None)
        resize = kwargs.get("do_resize")
        chosen["resize"] = self.video_processor.do_resize if resize is None else resize
        return self._frame_size(kwargs) | chosen

    def _default_sampling(self, options: dict) -> dict:
        """The video processor's own num_frames or fps, where a checkpoint was trained with one; frames that come with
        a rate are taken whole otherwise."""
        own = {name: getattr(self.video_processor, name, None) for name in ("num_frames", "fps")}
        chosen = [(name, value) for name, value in own.items() if value is not None]
        return dict(chosen[:1]) or ({"fps": options["source_fps"]} if "source_fps" in options else {})

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
        """All frames (T, 3, H, W) uint8 that `vamba.read_video(source, **options)` chooses, and what they are."""
        if vamba_video() is None:
            return _read_by_transformers(source, **options)
        frames, _, metadata = vamba_video().load_with_metadata(source, **options)
        return frames, VideoMetadata(**metadata)

    def video_reader(self, source, **options):
        """`vamba.read_video` with this processor's frame sizes and sampling, for reading a video chunk by chunk."""
        if vamba_video() is None:
            raise ImportError("Reading a video chunk by chunk needs the package vamba; pip install vamba.")
        sampling = {} if options.keys() & {"fps", "num_frames"} else self._default_sampling(options)
        return vamba_video().read_video(source, **(self._frame_size({}) | sampling | options))

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
    return {kind: source} | {key: value for key, value in block.items() if key not in ("type", *_SOURCE_KEYS[kind])}


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


def _leaves(nested) -> list:
    """What any nesting of lists holds."""
    return [leaf for part in nested for leaf in _leaves(part)] if isinstance(nested, (list, tuple)) else [nested]


def _flat_images(images) -> list[dict]:
    """One dict per image, `{"image": ..., options}`, out of an image or any nesting of lists."""
    found = []
    for image in _leaves(images):
        if getattr(image, "ndim", None) == 4:
            found += [{"image": one} for one in image]
        elif image is not None:
            found.append(dict(image) if isinstance(image, Mapping) else {"image": image})
    return found


def _flat_videos(videos) -> list[dict]:
    """One dict per video, `{"video": ..., options}`, out of a video or any nesting of lists."""
    if videos is None:
        return []
    if isinstance(videos, Mapping) or _is_pair(videos):
        item = dict(videos) if isinstance(videos, Mapping) else {"video": videos}
        if _is_pair(item["video"]):
            item["video"], item["metadata"] = item["video"]
        return [item]
    if _is_picture(videos):
        return [{"video": videos[None] if hasattr(videos, "ndim") else [videos]}]
    if isinstance(videos, (list, tuple)):
        images = [video for video in videos if _is_path(video) and f"{video}".lower().endswith(_IMAGE_SUFFIXES)]
        if videos and (_is_frames(videos) or len(images) == len(videos)):
            return [{"video": list(videos)}]
    elif getattr(videos, "ndim", None) != 5:
        return [{"video": videos}]
    return [item for video in videos for item in _flat_videos(video)]


def _is_pair(video) -> bool:
    """Whether this is (frames, metadata), as qwen-vl-utils returns videos."""
    pair = isinstance(video, (list, tuple)) and len(video) == 2
    return pair and isinstance(video[1], Mapping) and _is_frames(video[0])


def _merge(outputs: list[BatchFeature]) -> BatchFeature:
    """Joins what the image or video processor returned for one item at a time."""
    merged = {key: [output[key] for output in outputs] for key in outputs[0]}
    return BatchFeature(
        {key: torch.cat(parts) if torch.is_tensor(parts[0]) else sum(parts, []) for key, parts in merged.items()}
    )


def _explicit_size(height, width, factor: int) -> tuple[int, int]:
    """The size nearest to the one asked for that is made of patches, within the bounds of qwen-vl-utils."""
    if not all(isinstance(side, (int, float)) and side >= 1 and side == int(side) for side in (height, width)):
        raise ValueError(
            f"resized_height={height!r} and resized_width={width!r}: give both, as integers of at least 1."
        )
    return smart_resize(int(height), int(width), factor, 4 * factor**2, 16384 * factor**2)


# --- with the package vamba or without it ---------------------------------------------------------------------------


@cache
def vamba_video():
    """`vamba.video`, or None; imported when a video is read, as importing vamba changes what the Auto classes load."""
    try:
        from vamba import video
    except ImportError:
        return None
    return video


def _read_by_transformers(source, **options) -> tuple[torch.Tensor, VideoMetadata]:
    """`VambaProcessor.read_frames` of frames in memory, files and allowed URLs, by transformers' `load_video`."""
    logger.warning_once(
        "Videos are read by transformers' load_video, as the package vamba cannot be imported, whose reader knows more "
        "formats, withstands damage and needs less memory; pip install vamba."
    )
    asked = {name: options.get(name) for name in ("fps", "num_frames", "start", "end", "min_frames", "max_frames")}
    choose = partial(_chosen_frames, **asked)
    if _is_frames(source):
        frames = np.stack([np.asarray(frame) for frame in source])
        frames = (frames * 255).round() if frames.dtype.kind == "f" else frames
        about = VideoMetadata(len(frames), fps=options.get("source_fps") or asked["fps"] or 1.0)
        frames = frames[choose(about)]
    elif not _is_path(source) or ("://" in f"{source}" and not options.get("allow_urls")):
        raise ValueError(
            f"{source!r:.80}: without the package vamba a video is a path, or a URL with allow_urls=True; give one, or "
            "pip install vamba."
        )
    else:
        try:
            frames, about = load_video(f"{source}", backend=options.get("backend") or "pyav", sample_indices_fn=choose)
        except Exception as error:  # of many types, by what is wrong
            message = f"{source}: transformers' load_video cannot read it ({error})"
            raise ValueError(f"{message}; check the file, or pip install vamba.") from error
    frames = torch.as_tensor(frames)
    frames = frames if frames.shape[1] == 3 else frames.permute(0, 3, 1, 2)
    if not options.get("resize", True):
        return frames, about
    if options.keys() & {"resized_height", "resized_width"}:
        size = _explicit_size(options.get("resized_height"), options.get("resized_width"), options["factor"])
    else:
        low, high, total = options["min_pixels"], options["max_pixels"], options.get("total_pixels")
        high = high if total is None else max(min(high, total / len(frames) * 2), int(low * 1.05))
        size = smart_resize(*frames.shape[2:], options["factor"], low, high)
    resized = (interpolate(frame[None].float(), size, mode="bicubic", antialias=True) for frame in frames)
    return torch.cat([frame.round().clamp(0, 255).to(torch.uint8) for frame in resized]), about


def _chosen_frames(metadata: VideoMetadata, fps, num_frames, start, end, min_frames, max_frames) -> np.ndarray:
    """Indices of the frames `vamba.read_video` chooses where frames are evenly spaced; notes them in the metadata."""
    total, rate = metadata.total_num_frames, metadata.fps
    if not (total and rate):
        raise ValueError("it does not say how many frames it has, and how many a second")
    if (first := (start or 0.0) * rate) >= total:
        raise ValueError(f"start={start:g} is past the end of the video")
    stop = total if end is None else min(end * rate, total)
    times = np.arange(first, stop, max(rate / (fps or 1.0), 1.0))
    count = num_frames or min(max(len(times), min_frames or 1), max_frames or np.inf)
    if num_frames or count != len(times):
        times = np.linspace(first, min(stop, total - 1), count)
    metadata.frames_indices = np.unique((times + 1e-6).astype(int))
    return metadata.frames_indices


VambaProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["VambaProcessor"]
