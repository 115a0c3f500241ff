"""What the tests of the converter share: the smallest Qwen2-VL, and a chat template with its placeholders."""

from transformers import Qwen2VLConfig

from vamba.demo.tiny_checkpoints import TEXT, VISION


TEMPLATE = (
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<|vision_start|><|image_pad|>"
    "<|vision_end|>{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% endif %}"
    "{% endfor %}"
)
STRIPPED = TEMPLATE.replace("<|image_pad|>", "").replace("<|video_pad|>", "")


def tiny_qwen2_vl(**changes) -> Qwen2VLConfig:
    rope = TEXT["rope_parameters"] | {"rope_theta": 5e5}
    text = TEXT | {
        "vocab_size": 100,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    tokens = {"vision_start_token_id": 4, "vision_end_token_id": 5, "image_token_id": 6, "video_token_id": 7}
    return Qwen2VLConfig(text_config=text, vision_config=VISION | {"patch_size": 4}, **tokens, **changes)
