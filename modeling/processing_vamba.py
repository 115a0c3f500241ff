"""The processor of Vamba: Qwen2-VL's, without placeholder tokens and with its own way of reading video.

What is unusual: a media item stays `<|vision_start|><|vision_end|>` in the text (placeholders found between them are
removed); `mm_token_type_ids` marks the `<|vision_start|>` of an image with 1 and that of a video with 2. Files are
decoded by `video_reading`, frame by frame at their final size, whatever backends transformers finds.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.video_utils import VideoMetadata, make_batched_videos

from .video_reading import read_video


# What a chat message may say about its image or video: transformers' words, then qwen-vl-utils' where they differ.
_SOURCE_KEYS = {"video": ("video", "url", "path"), "image": ("image", "url", "path", "base64", "image_url")}
_SIZE_OPTIONS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_VIDEO_OPTIONS = (*_SIZE_OPTIONS, "fps", "num_frames", "total_pixels", "start", "end", "backend", "allow_urls")
_ALIASES = {"nframes": "num_frames", "video_start": "start", "video_end": "end"}
IMAGE, VIDEO = 1, 2  # in mm_token_type_ids


class VambaProcessor(Qwen2VLProcessor):
    """Turns chat messages, text, images and videos into model inputs.

    A video may be a path, `file://` URL, bytes, a folder or list of images, an array (T, H, W, 3), a tensor
    (T, 3, H, W), or a dict `{"video": any of these, "fps": 1.0, ...}` with the options of `read_video`; so may the
    `video` items of chat messages. Files are sampled at `fps` (1 by default) or to `num_frames`; arrays are taken
    whole unless `do_sample_frames=True`.

    Source: the interface of transformers' `Qwen2VLProcessor`; message keys of qwen-vl-utils.
    """

    def __init__(self, image_processor=None, tokenizer=None, video_processor=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template, **kwargs)
        self.vision_start_token = "<|vision_start|>"
        self.vision_start_token_id = tokenizer.convert_tokens_to_ids(self.vision_start_token)
        kinds = f"({re.escape(self.image_token)}|{re.escape(self.video_token)})?"
        self._media_pattern = re.compile(re.escape(self.vision_start_token) + kinds)

    def __call__(self, images=None, text=None, videos=None, media_kinds: list[str] | None = None, **kwargs):
        """See `Qwen2VLProcessor.__call__`; `media_kinds` gives the order of "image" and "video" items in the text where
        a batch mixes both and the text does not tell (`apply_chat_template` fills it in).

        Raises:
            ValueError: the text's `<|vision_start|>`s and the media differ in number (a single text may hold none).
            VideoReadError: a video that cannot be read.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        kinds = self._kinds(texts, images, videos, media_kinds) if texts else []
        inputs = super().__call__(images=images, text=text, videos=videos, **kwargs)
        if "mm_token_type_ids" in inputs:
            self._mark_media(inputs, kinds)
        return inputs

    def _kinds(self, texts: list[str], images, videos, media_kinds: list[str] | None) -> list[int]:
        """IMAGE or VIDEO for each `<|vision_start|>` of the batch; checks that their numbers agree."""
        marks = [mark for sample in texts for mark in self._media_pattern.findall(sample)]
        n_images = 0 if images is None else len(make_flat_list_of_images(_without_dicts(images)))
        n_videos = 0 if videos is None else len(_flat_videos(videos))
        if len(texts) == 1 and not marks:
            return []
        if len(marks) != n_images + n_videos:
            raise ValueError(
                f"The text holds {len(marks)} {self.vision_start_token} tokens, but {n_images} images and {n_videos} "
                "videos were passed; write one <|vision_start|><|vision_end|> for each item."
            )
        if all(marks):
            kinds = [IMAGE if mark == self.image_token else VIDEO for mark in marks]
        elif media_kinds is not None:
            kinds = [IMAGE if kind == "image" else VIDEO for kind in media_kinds]
        elif n_images and n_videos:
            raise ValueError(
                f"Which of the {len(marks)} {self.vision_start_token} tokens are images and which videos? Put "
                f"{self.image_token} or {self.video_token} after each, or use apply_chat_template."
            )
        else:
            kinds = [IMAGE] * n_images + [VIDEO] * n_videos
        if kinds.count(IMAGE) != n_images:
            raise ValueError(
                f"The text announces {kinds.count(IMAGE)} images and {kinds.count(VIDEO)} videos, but {n_images} images "
                f"and {n_videos} videos were passed."
            )
        return kinds

    def _mark_media(self, inputs: BatchFeature, kinds: list[int]) -> None:
        """Writes the kinds at the `<|vision_start|>`s, in place, whatever container the rows have."""
        remaining = iter(kinds)
        for ids, types in zip(inputs["input_ids"], inputs["mm_token_type_ids"]):
            for position in np.flatnonzero(np.asarray(ids) == self.vision_start_token_id):
                if (kind := next(remaining, None)) is not None:
                    types[int(position)] = kind

    # Placeholders that older templates write between <|vision_start|> and <|vision_end|> are dropped.
    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return ""

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs) -> str:
        return ""

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if images is None and text is None and videos is None:
            raise ValueError(f"You need to provide at least one input to call {self.__class__.__name__}")
        if text is not None and not all(isinstance(sample, str) for sample in text):
            raise ValueError("`text` must be a string or list of strings.")

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        options = [{}]
        if images is not None:
            images, options = _split_options(images)
        images, text, videos, audio = super().prepare_inputs_layout(images, text, videos, audio, **kwargs)
        if any(options):
            images = [{"image": image, **extra} for image, extra in zip(make_flat_list_of_images(images), options)]
        return images, text, videos, audio

    # --- images and videos, one at a time, as each may carry options of its own -----------------------------------

    def _process_images(self, images, **kwargs):
        if not isinstance(images, list) or not any(isinstance(image, Mapping) for image in images):
            return super()._process_images(images, **kwargs)
        outputs = []
        for item in images:
            item = dict(item)
            outputs.append(self.image_processor([item.pop("image")], **(kwargs | _image_size(item, kwargs, self))))
        return _merge(outputs), [""] * len(images)

    def _process_videos(self, videos, **kwargs):
        outputs, videos = [], _flat_videos(videos)
        metadata = kwargs.pop("video_metadata", None)
        metadata = [None] * len(videos) if metadata is None else make_batched_metadata(metadata, len(videos))
        for video, known in zip(videos, metadata):
            outputs.append(self._process_video(video, known, **kwargs))
        return _merge(outputs), [""] * len(videos)

    def _process_video(self, video, metadata, **kwargs) -> BatchFeature:
        if kwargs.get("cap_pixels_per_frame") is None and self.video_processor.cap_pixels_per_frame is None:
            kwargs["cap_pixels_per_frame"] = False  # Vamba is made for long videos; `total_pixels` caps on request
        options = dict(video) if isinstance(video, Mapping) else {}
        source = options.pop("video", video)
        if not options and not _is_file(source):
            return self.video_processor([source], video_metadata=[metadata] if metadata else None, **kwargs)
        sampling = {key: kwargs.pop(key) for key in ("fps", "num_frames") if kwargs.get(key) is not None}
        kwargs.pop("do_sample_frames", None)
        frames, metadata = self.read_frames(source, **(_limits(self.video_processor, kwargs) | _chosen(sampling, options)))
        kwargs |= {"do_resize": False, "do_sample_frames": False, "video_metadata": [metadata]}
        return self.video_processor([frames], **kwargs)

    def read_frames(self, source, **options) -> tuple[torch.Tensor, VideoMetadata]:
        """All chosen frames (T, 3, H, W) uint8 of one video, at their final size, and what they are."""
        with read_video(source, **options) as reader:
            chunks = list(reader)
            about = reader.metadata
        frames = torch.cat([chunk.frames for chunk in chunks])
        times = torch.cat([torch.as_tensor(chunk.timestamps) for chunk in chunks])
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
        """`read_video` with this processor's frame sizes, for reading a video chunk by chunk."""
        return read_video(source, **(_limits(self.video_processor, {}) | options))

    # --- chat -------------------------------------------------------------------------------------------------------

    def _multimodal_inputs_from_conversations(self, conversations, audio_loading_params, load_audio_from_video=False):
        images, videos, kinds = [], [], []
        for conversation in conversations:
            images.append([])
            videos.append([])
            for block in _media_blocks(conversation):
                kind = "video" if block["type"] == "video" else "image"
                item = _media_item(block, kind)
                (videos if kind == "video" else images)[-1].append(item)
                kinds.append(kind)
        return images, videos, [], {"media_kinds": kinds} if kinds else {}


def _media_blocks(conversation: list[dict]) -> list[dict]:
    return [
        block
        for message in conversation
        if isinstance(message.get("content"), (list, tuple))
        for block in message["content"]
        if isinstance(block, Mapping) and block.get("type") in ("video", "image", "image_url")
    ]


def _media_item(block: Mapping, kind: str) -> Any:
    """The source a chat message names, with its options if it has any."""
    sources = [block[key] for key in _SOURCE_KEYS[kind] if block.get(key) is not None]
    if not sources:
        raise ValueError(f"A message's {kind} item names no source under {_SOURCE_KEYS[kind]}: {dict(block)}.")
    source = sources[0]["url"] if isinstance(sources[0], Mapping) else sources[0]
    known = _VIDEO_OPTIONS if kind == "video" else _SIZE_OPTIONS
    options = {_ALIASES.get(key, key): value for key, value in block.items() if value is not None}
    options = {key: value for key, value in options.items() if key in known}
    return {kind: source, **options} if options else source


def _chosen(default: dict, options: dict) -> dict:
    """Sampling given for the call, overridden by what the item says; its num_frames displaces the call's fps."""
    if {"fps", "num_frames"} & options.keys():
        default = {}
    elif "num_frames" in default:
        default.pop("fps", None)
    return default | {_ALIASES.get(key, key): value for key, value in options.items()}


def _limits(video_processor, kwargs: dict) -> dict:
    """The reader's options that give frames the video processor would not resize."""
    size = kwargs.get("size") or video_processor.size
    get = size.get if isinstance(size, Mapping) else lambda key: getattr(size, key, None)
    patch_size = kwargs.get("patch_size") or video_processor.patch_size
    return {
        "min_pixels": kwargs.get("min_pixels") or get("shortest_edge"),
        "max_pixels": kwargs.get("max_pixels") or get("longest_edge"),
        "factor": patch_size * (kwargs.get("merge_size") or video_processor.merge_size),
    }


def _image_size(options: dict, kwargs: dict, processor) -> dict:
    """An image's own size limits in the image processor's terms."""
    if "resized_height" in options and "resized_width" in options:
        area = options["resized_height"] * options["resized_width"]
        options = {"min_pixels": area, "max_pixels": area}
    size = dict(kwargs.get("size") or processor.image_processor.size)
    if "min_pixels" in options:
        size["shortest_edge"] = options["min_pixels"]
    if "max_pixels" in options:
        size["longest_edge"] = options["max_pixels"]
    return {"size": size}


def _is_file(source) -> bool:
    """Whether the source must be decoded, rather than being frames already."""
    if isinstance(source, (list, tuple)):
        return bool(source) and isinstance(source[0], (str, bytes)) or hasattr(source[0], "__fspath__")
    return isinstance(source, (str, bytes)) or hasattr(source, "__fspath__") or hasattr(source, "read")


def _flat_videos(videos) -> list:
    """One entry per video out of a video, a list, or a list of lists per sample."""
    if isinstance(videos, Mapping) or not isinstance(videos, (list, tuple)) and _is_file(videos):
        return [videos]
    if isinstance(videos, (list, tuple)) and any(_is_video_item(video) for video in videos):
        return list(videos)
    if isinstance(videos, (list, tuple)) and all(isinstance(sample, (list, tuple)) for sample in videos):
        if any(_is_video_item(video) for sample in videos for video in sample) or not any(videos):
            return [video for sample in videos for video in sample]
    return make_batched_videos(videos)


def _is_video_item(video) -> bool:
    return isinstance(video, Mapping) or not isinstance(video, (list, tuple)) and _is_file(video)


def _split_options(images) -> tuple[Any, list[dict]]:
    """Takes options apart from images: images in the caller's layout, and one dict per image in order."""
    if isinstance(images, Mapping):
        images = [images]
    if not isinstance(images, (list, tuple)):
        return images, [{}]
    options, stripped = [], []
    for image in images:
        if isinstance(image, (list, tuple)):
            inner, extra = _split_options(image)
            stripped.append(inner)
            options.extend(extra if inner else [])
        elif isinstance(image, Mapping):
            stripped.append(image["image"])
            options.append({key: value for key, value in image.items() if key != "image"})
        else:
            stripped.append(image)
            options.append({})
    return stripped, options


def _without_dicts(images):
    return _split_options(images)[0]


def make_batched_metadata(metadata, count: int) -> list:
    """One metadata entry per video."""
    flat = metadata if isinstance(metadata, (list, tuple)) else [metadata]
    flat = [entry for group in flat for entry in (group if isinstance(group, (list, tuple)) else [group])]
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


__all__ = ["VambaProcessor"]
