"""A tiny Qwen2-VL checkpoint on disk: weights, tokenizer, chat template, processor and generation configs.

What is unusual: nothing, on purpose. The files are what transformers writes for the published models, only small: a
byte-level BPE vocabulary trained on a few sentences, Qwen2-VL's chat template word for word, and frame sizes of the
order of the vision tower's patches.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)


SPECIAL_TOKENS = {
    "pad": "<|endoftext|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
}
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_qwen2_vl(
    folder: str | Path,
    sentences: Iterable[str] = (),
    *,
    seed: int = 0,
    patch_size: int = 8,
    frame_pixels: int = 48 * 48,
    **sizes,
) -> Path:
    """Writes a randomly initialised Qwen2-VL and all the files that go with it; returns the folder.

    Args:
        sentences: the tokenizer's words; any other text is spelled in bytes.
        frame_pixels: area that every frame and image is resized to.
        sizes: see `tiny_config`.
    """
    tokenizer = tiny_tokenizer(sentences)
    config = tiny_config(tokenizer, patch_size=patch_size, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
    pad, end = config.text_config.pad_token_id, config.text_config.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=pad, pad_token_id=pad, eos_token_id=[end, pad], do_sample=False
    )
    model.save_pretrained(folder)
    _processor(tokenizer, patch_size, frame_pixels).save_pretrained(folder)
    return Path(folder)


def tiny_config(
    tokenizer: Qwen2Tokenizer,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_key_value_heads: int = 2,
    vision_width: int = 64,
    vision_depth: int = 1,
    vision_heads: int = 4,
    patch_size: int = 8,
    initializer_range: float = 0.02,
    **text_options,
) -> Qwen2VLConfig:
    """A small `Qwen2VLConfig` with the tokenizer's ids; `text_options` are further fields of the text configuration."""
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}
    sections = mrope_section(hidden_size // num_heads)
    text_config = {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_key_value_heads,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections},
        "bos_token_id": ids["pad"],
        "eos_token_id": ids["im_end"],
        "pad_token_id": ids["pad"],
        "initializer_range": initializer_range,
    }
    vision_config = {
        "depth": vision_depth,
        "embed_dim": vision_width,
        "hidden_size": hidden_size,
        "num_heads": vision_heads,
        "mlp_ratio": 2,
        "patch_size": patch_size,
        "initializer_range": initializer_range,
    }
    return Qwen2VLConfig(
        text_config=text_config | text_options,
        vision_config=vision_config,
        tie_word_embeddings=text_options.get("tie_word_embeddings", False),
        **{f"{name}_token_id": ids[name] for name in ("image", "video", "vision_start", "vision_end")},
    )


def tiny_tokenizer(sentences: Iterable[str]) -> Qwen2Tokenizer:
    """Qwen2's tokenizer with a small vocabulary: the 256 bytes, what BPE merges out of `sentences`, special tokens."""
    vocab, merges = train_bpe(sentences, Qwen2Tokenizer()._tokenizer.pre_tokenizer)
    return Qwen2Tokenizer(
        vocab,
        merges,
        eos_token=SPECIAL_TOKENS["im_end"],
        pad_token=SPECIAL_TOKENS["pad"],
        extra_special_tokens=list(SPECIAL_TOKENS.values()),
        model_max_length=2048,
    )


def train_bpe(sentences: Iterable[str], pre_tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE: the 256 bytes and what it merges out of `sentences`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizer
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    bpe.train_from_iterator(["You are a helpful assistant.", "system\nuser\nassistant\n", *sentences], trainer)
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _processor(tokenizer: Qwen2Tokenizer, patch_size: int, frame_pixels: int) -> Qwen2VLProcessor:
    sizes = {
        "patch_size": patch_size,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": frame_pixels, "longest_edge": frame_pixels},
    }
    image, video = Qwen2VLImageProcessor(**sizes), Qwen2VLVideoProcessor(**sizes)
    return Qwen2VLProcessor(image, tokenizer, video, chat_template=CHAT_TEMPLATE)


def mrope_section(head_dim: int) -> list[int]:
    """The published models' shares of the rotary frequencies: a quarter time, three eighths each height and width."""
    half = head_dim // 2
    time = half // 4
    height = (half - time) // 2
    return [time, height, half - time - height]
