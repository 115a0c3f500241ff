"""The processor of Video-Ma2mba: Vamba's, with frames of one size for CLIP and tokens for Mamba's tokenizer.

What is unusual: every picture is squeezed into the square that the tower takes, not cropped, as a question may be about
the edges of a wide picture. The processor adds the tokens that GPT-NeoX's tokenizer lacks after its own 50,277, in the
rows that pad Mamba's embedding. The chat template puts the media that a message begins with before its first word, so
that a video can be watched before anything is asked.
"""

import math
from typing import Any

from tokenizers import AddedToken
from transformers import BatchFeature, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
from transformers.processing_utils import MultiModalData
from transformers.video_utils import is_valid_video

from .configuration_video_ma2mba import VideoMa2mbaConfig
from .processing_vamba import VambaProcessor, VambaProcessorKwargs, vamba_video


VideoMa2mbaProcessorKwargs = VambaProcessorKwargs  # by the name under which transformers looks for it

# These follow GPT-NeoX's own tokens in this order, from id 50,277 on.
SPECIAL_TOKENS = (
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}{% set header = '<|im_start|>' + message['role'] + '\n' %}"
    "{% if message['content'] is string %}{{ header + message['content'] }}"
    "{% else %}{% set begun = namespace(value=false) %}{% for content in message['content'] %}"
    "{% if content['type'] in ('image', 'video', 'image_url') or 'image' in content or 'image_url' in content "
    "or 'video' in content %}<|vision_start|><|vision_end|>"
    "{% elif 'text' in content %}{% if not begun.value %}{% set begun.value = true %}{{ header }}{% endif %}"
    "{{ content['text'] }}{% endif %}"
    "{% endfor %}{% if not begun.value %}{{ header }}{% endif %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SIZES = {
    "min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width", "min_side", "max_side", "factor",
}  # fmt: skip


class VideoMa2mbaProcessor(VambaProcessor):
    """Turns chat messages, text, images and videos into model inputs; see `VambaProcessor`.

    Frames and images have one size, whatever `min_pixels`, `max_pixels` and similar options a message has.
    """

    def __init__(self, image_processor=None, tokenizer=None, video_processor=None, chat_template=None, **kwargs):
        known = tokenizer.get_vocab()
        missing = [AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS if t not in known]
        tokenizer.add_tokens(missing, special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        template = CHAT_TEMPLATE if chat_template is None else chat_template
        super().__init__(image_processor, tokenizer, video_processor, chat_template=template, **kwargs)

    @classmethod
    def for_model(cls, config: VideoMa2mbaConfig, tokenizer) -> "VideoMa2mbaProcessor":
        """Makes the processor of a model of this configuration, with GPT-NeoX's tokenizer or another."""
        area = config.vision_config.image_size**2
        sizes: dict[str, Any] = {
            "patch_size": config.vision_config.patch_size,
            "merge_size": 2,
            "temporal_patch_size": 1,
            "size": {"shortest_edge": area, "longest_edge": area},
        }
        return cls(Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes))

    @property
    def _side(self) -> int:
        return math.isqrt(self.video_processor.size["longest_edge"])

    def _frame_size(self, kwargs: dict) -> dict:
        size = super()._frame_size(kwargs)
        return {"resized_height": self._side, "resized_width": self._side, "factor": size["factor"]}

    def _process_image(self, item: dict, **kwargs) -> BatchFeature:
        return super()._process_image(item | {"resized_height": self._side, "resized_width": self._side}, **kwargs)

    def _process_video(self, item: dict, **kwargs) -> BatchFeature:
        item = {key: value for key, value in item.items() if key not in _SIZES}
        if is_valid_video(item["video"]):
            item["video"], _ = self.read_frames(item["video"], **self._frame_size(kwargs))
        return super()._process_video(item, **kwargs)

    def video_reader(self, source, **options):
        """Reads a video at this processor's frame size and sampling. Raises VideoReadError for another size."""
        if asked := _SIZES & options.keys():
            error, size = getattr(vamba_video(), "VideoReadError", ValueError), f"{self._side} x {self._side}"
            raise error(f"{', '.join(sorted(asked))}: this model takes frames of {size} pixels only. Leave it out.")
        return super().video_reader(source, **options)

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs) -> MultiModalData:
        images = image_sizes and [(self._side, self._side)] * len(image_sizes)
        videos = video_sizes and [(frames, self._side, self._side) for frames, _, _ in video_sizes]
        return super()._get_num_multimodal_tokens(images, videos, **kwargs)


VideoMa2mbaProcessor.register_for_auto_class("AutoProcessor")
