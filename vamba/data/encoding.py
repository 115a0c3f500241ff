"""One example to model inputs: messages, frames that fit a budget, tokens, labels.

What is unusual: planning and decoding are two steps. `plan` looks at the headers of the media only and says how many
tokens an example will have, which is what packing needs to know; `encode` decodes what was planned. A video that would
not fit its share of the budget is seen in fewer frames, spread evenly over it, never in part.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from transformers import ProcessorMixin
from transformers.image_utils import get_image_size

from vamba.modeling.images import image_size
from vamba.modeling.processing_vamba import plain_item
from vamba.video import frames_asked_for
from vamba.video.selection import target_size

from .conversations import ExampleError, media_blocks, to_messages
from .labels import refusals, template_options


IGNORED = -100
GRIDS = ("image_grid_thw", "video_grid_thw")
_TENSORS = ("pixel_values", "pixel_values_videos", *GRIDS)
_COUNTING = ("fps", "num_frames", "min_frames", "max_frames")
_PLACES = ("start", "end", "source_fps", "backend")
_READING = (*_COUNTING, *_PLACES, "min_pixels", "max_pixels", "resized_height", "resized_width")


@dataclass
class Plan:
    """An example before anything was decoded: its messages, and the tokens it will have at most."""

    messages: list[dict]
    template_options: dict[str, Any]  # with which the messages become text, whatever their media are
    text_tokens: int
    video_tokens: int  # those of images included
    frames: list[int]  # of each video


@dataclass
class _Clip:
    """A video as planned: frames of `frame_tokens` tokens per temporal patch."""

    block: dict
    frames: int
    temporal: int  # frames in one temporal patch
    frame_tokens: int

    @property
    def tokens(self) -> int:
        return -(-self.frames // self.temporal) * self.frame_tokens

    def limit(self, frames: int) -> None:
        """Asks for an even number of frames, `frames` at most and two at least."""
        self.frames = max(2, frames - frames % 2)
        _resample(self.block, self.frames)


@dataclass(eq=False)
class ConversationEncoder:
    """Examples to model inputs.

    Args:
        processor: of the model; a `VambaProcessor` or one with the same interface.
        fps: how videos are sampled where the example does not say (`fps`, `num_frames`, and the bounds `min_frames`
            and `max_frames`); the processor's own default otherwise.
        max_frames: of any video, whatever the example says.
        min_pixels, max_pixels: area of a frame, where the example does not say.
        max_video_tokens: of all media of an example together. Videos that need more get fewer frames: an even number,
            at least two, all videos of the example by the same share.
        max_length: text tokens of an example; one with more is an `ExampleError`.
        media_root: what relative paths in examples are relative to.
        allow_urls: whether images and videos may be URLs, whatever the example says; one with a URL is an error if not.
        pixel_dtype: of the patches; the vision tower's dtype halves what goes through memory, with the same result.
    """

    processor: ProcessorMixin
    _: KW_ONLY
    fps: float | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_video_tokens: int | None = None
    max_length: int | None = None
    media_root: str | None = None
    allow_urls: bool = False
    pixel_dtype: torch.dtype | None = None

    def __call__(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """`encode(plan(example))`; see there."""
        return self.encode(self.plan(example))

    def check_text(self, example: Mapping[str, Any]) -> None:
        """Raises ExampleError if there is nothing to learn from an example, whatever its media are."""
        template_options(self.processor, to_messages(example))

    def plan(self, example: Mapping[str, Any], media_root: str | None = None) -> Plan:
        """What an example will take; opens its media, decodes nothing. Messages then say how to sample each video.

        Raises:
            ExampleError: the example is unsound, too long, or does not fit the budget in two frames a video.
            VideoReadError: a video cannot be opened.
        """
        messages = to_messages(example, media_root or self.media_root)
        with refusals():
            messages = [turn | {"content": [plain_item(block) for block in turn["content"]]} for turn in messages]
        bare = _without_sources(messages)
        options = template_options(self.processor, bare)
        text = self._tokenize(bare, options)["input_ids"].shape[1]
        if self.max_length is not None and text > self.max_length:
            raise ExampleError(f"{text} text tokens are more than the limit of {self.max_length} (max_length)")
        images, clips = 0, []
        for block in media_blocks(messages):
            for name in ("min_pixels", "max_pixels"):
                if getattr(self, name) is not None:
                    block.setdefault(name, getattr(self, name))
            if block["type"] == "image":
                images += self._image_tokens(block)
            else:
                clips.append(self._clip(block))
        self._fit(clips, images)
        tokens = images + sum(clip.tokens for clip in clips)
        return Plan(messages, options, text, tokens, [clip.frames for clip in clips])

    def encode(self, plan: Plan) -> dict[str, Any]:
        """Decodes the media of a plan.

        Returns:
            input_ids, labels (-100 where the assistant does not speak) and mm_token_type_ids, int64 (N,); pixel_values,
            image_grid_thw, pixel_values_videos, video_grid_thw as the processor makes them, where there are any.

        Raises:
            ExampleError: no token is labelled, or an image cannot be read. VideoReadError: a video cannot.
        """
        messages = [turn | {"content": [self._decoded(block) for block in turn["content"]]} for turn in plan.messages]
        inputs = self._tokenize(messages, plan.template_options)
        if self._media_tokens(inputs) > plan.video_tokens:  # a header announced fewer frames than there are
            videos = [block for block in media_blocks(messages) if block["type"] == "video"]
            for block, frames in zip(videos, plan.frames):
                _resample(block, frames)
            inputs = self._tokenize(messages, plan.template_options)
        spoken = torch.as_tensor(inputs["assistant_masks"][0]).bool()
        if not spoken[1:].any():
            raise ExampleError("the chat template leaves nothing of what the assistant says")
        ids = inputs["input_ids"][0]
        sample = {"input_ids": ids, "labels": torch.where(spoken, ids, IGNORED)}
        sample["mm_token_type_ids"] = inputs.get("mm_token_type_ids", torch.zeros_like(ids)[None])[0]
        for name in _TENSORS:
            if name in inputs:
                value = inputs[name]
                sample[name] = value.to(self.pixel_dtype) if value.is_floating_point() and self.pixel_dtype else value
        return sample

    def _tokenize(self, messages: list[dict], template_options: dict[str, Any]) -> dict[str, Any]:
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True}
        options |= template_options
        if self.allow_urls:
            options["processor_kwargs"] = {"allow_urls": True}
        with refusals():
            return self.processor.apply_chat_template(messages, **options)

    def _media_tokens(self, inputs: Mapping[str, Any]) -> int:
        merged = self.processor.video_processor.merge_size**2
        grids = [inputs[name] for name in GRIDS if name in inputs]
        return sum(int(grid.prod(1).sum()) for grid in grids) // merged

    def _image_tokens(self, block: dict) -> int:
        processor = self.processor.image_processor
        factor = processor.patch_size * processor.merge_size
        low, high = processor.size["shortest_edge"], processor.size["longest_edge"]
        area = {"min_pixels": block.get("min_pixels", low), "max_pixels": block.get("max_pixels", high)}
        source = block["image"]
        if self.allow_urls and isinstance(source, str) and source.lower().startswith(("http://", "https://")):
            # as large as any, before it is fetched
            return area["max_pixels"] // factor**2
        with refusals():
            width, height = get_image_size(source)[::-1] if hasattr(source, "shape") else image_size(source)
        # a picture that is turned has its sides the other way round, which is all the same here
        asked = {key: int(block[key]) for key in ("resized_height", "resized_width") if key in block}
        if len(asked) == 1:
            raise ExampleError("resized_height and resized_width belong together: give both or neither")
        height, width = target_size(height, width, factor=factor, **area, **asked)
        return (height // factor) * (width // factor)

    def _decoded(self, block: dict) -> dict:
        """A copy of an item, an image with what the processor is to see, as errors of any kind come of broken ones."""
        if block["type"] != "image":
            return dict(block)
        with refusals():
            return block | {"image": self.processor.fetch_image(block["image"], allow_urls=self.allow_urls)}

    def _clip(self, block: dict) -> _Clip:
        """How many frames of what size a video has, as it would be sampled without a budget."""
        if self.fps is not None and not {"fps", "num_frames"} & block.keys():
            block["fps"] = self.fps
        options = {key: block[key] for key in _READING if key in block} | {"allow_urls": self.allow_urls}
        options, frames, (height, width) = frames_asked_for(block["video"], options, self.processor.video_reader)
        for key in _COUNTING:  # what is decoded is what was counted
            block.pop(key, None)
            block |= {key: options[key]} if key in options else {}
        temporal = self.processor.video_processor.temporal_patch_size
        factor = self.processor.video_processor.patch_size * self.processor.video_processor.merge_size
        clip = _Clip(block, frames, temporal, (height // factor) * (width // factor))
        if self.max_frames is not None and clip.frames > self.max_frames:
            clip.limit(self.max_frames)
        return clip

    def _fit(self, clips: list[_Clip], images: int) -> None:
        """Takes frames from the videos until they fit what the images leave of the budget."""
        budget, wanted = self.max_video_tokens, sum(clip.tokens for clip in clips)
        if budget is None or images + wanted <= budget:
            return
        share = max(budget - images, 0) / max(wanted, 1)
        for clip in clips:
            clip.limit(int(clip.frames * share))
        while images + sum(clip.tokens for clip in clips) > budget:
            longest = max((clip for clip in clips if clip.frames > 2), key=lambda clip: clip.tokens, default=None)
            if longest is None:
                least = images + sum(clip.tokens for clip in clips)
                raise ExampleError(
                    f"{least} video tokens, with two frames of each video, are more than the budget of {budget} "
                    "(max_video_tokens); lower max_pixels"
                )
            longest.limit(longest.frames - 2)


def _resample(block: dict, frames: int) -> None:
    """Has a video read in `frames` frames spread evenly over it; there may be fewer, never more."""
    block.pop("fps", None)
    block["num_frames"] = frames


def tokens_of_pixels(video_processor, area: int | None) -> int:
    """Video tokens of one temporal patch of frames with `area` pixels, by default the least of the processor."""
    area = video_processor.size["shortest_edge"] if area is None else area
    return max(1, area // (video_processor.patch_size * video_processor.merge_size) ** 2)


def _without_sources(messages: list[dict]) -> list[dict]:
    """The same text, with media that stand for nothing."""
    return [
        turn | {"content": [b if b["type"] == "text" else {"type": b["type"]} for b in turn["content"]]}
        for turn in messages
    ]
