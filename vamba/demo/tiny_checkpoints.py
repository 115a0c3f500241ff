"""Tiny checkpoints on disk, for the converter to start from: a Qwen2-VL, a Mamba-2 and a CLIP vision tower.

The files are what transformers writes for the published models, only small: a byte-level BPE vocabulary trained on a
few sentences, Qwen2-VL's chat template word for word, and random weights. The demo and the tests make theirs here.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    GPTNeoXTokenizer,
    Mamba2Config,
    Mamba2ForCausalLM,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from vamba.modeling.configuration_vamba import VambaMamba2Config
from vamba.modeling.mamba2 import init_mamba2_parameter
from vamba.modeling.processing_video_ma2mba import SPECIAL_TOKENS as MA2MBA_TOKENS


# Sizes of a Qwen2-VL, or of a Vamba, with heads of 16 numbers; the shares of the rotary frequencies (time, height and
# width) are those of the published models.
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
}
VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2}
MIXER = {"state_size": 16, "head_dim": 16, "chunk_size": 16}
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
    frame_pixels: int = 48 * 48,
    initializer_range: float = 0.02,
    **vision: int,
) -> Path:
    """Writes a randomly initialised Qwen2-VL and all the files that go with it; returns the folder.

    Args:
        sentences: the tokenizer's words; any other text is spelled in bytes.
        frame_pixels: area that every frame and image is resized to.
        vision: sizes of the vision tower that differ from `VISION` and from patches of 8 pixels.
    """
    tokenizer = tiny_tokenizer(sentences)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}
    own = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048, "initializer_range": initializer_range}
    own |= {"bos_token_id": ids["pad"], "eos_token_id": ids["im_end"], "pad_token_id": ids["pad"]}
    config = Qwen2VLConfig(
        text_config=TEXT | own,
        vision_config=VISION | {"patch_size": 8, "initializer_range": initializer_range} | vision,
        tie_word_embeddings=False,
        **{f"{name}_token_id": ids[name] for name in ("image", "video", "vision_start", "vision_end")},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=ids["pad"], pad_token_id=ids["pad"], eos_token_id=[ids["im_end"], ids["pad"]], do_sample=False
    )
    model.save_pretrained(folder)
    size = {"shortest_edge": frame_pixels, "longest_edge": frame_pixels}
    sizes = {"patch_size": config.vision_config.patch_size, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    image, video = Qwen2VLImageProcessor(**sizes), Qwen2VLVideoProcessor(**sizes)
    Qwen2VLProcessor(image, tokenizer, video, chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return Path(folder)


def make_tiny_mamba2(
    folder: str | Path,
    sentences: Iterable[str] = (),
    *,
    seed: int = 0,
    initializer_range: float = 0.02,
    mamba_config: dict | None = None,
) -> Path:
    """Writes a randomly initialised `mamba2` language model and its tokenizer; returns the folder.

    Args:
        sentences: as for `make_tiny_qwen2_vl`.
        mamba_config: sizes and initial values of the mixers that differ from `MIXER`.
    """
    tokenizer = tiny_neox_tokenizer(sentences)
    width, layers = TEXT["hidden_size"], TEXT["num_hidden_layers"]
    mixer = VambaMamba2Config(hidden_size=width, initializer_range=initializer_range, **(MIXER | (mamba_config or {})))
    shared = "state_size conv_kernel expand head_dim num_heads n_groups chunk_size initializer_range".split()
    config = Mamba2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        vocab_size=-(-(len(tokenizer) + len(MA2MBA_TOKENS)) // 16) * 16,  # padded, as Mamba's is
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        **{name: getattr(mixer, name) for name in shared},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Mamba2ForCausalLM(config)
        for layer in model.backbone.layers:
            for name, parameter in layer.mixer.named_parameters():
                init_mamba2_parameter(name, parameter, mixer, layers)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def make_tiny_clip(
    folder: str | Path, *, seed: int = 0, image_size: int = 48, patch_size: int = 12, width: int = 64, depth: int = 2
) -> Path:
    """Writes a randomly initialised vision model of CLIP; returns the folder. Its last layer will not be read."""
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=width,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        CLIPVisionModel(config).save_pretrained(folder)
    return Path(folder)


def tiny_tokenizer(sentences: Iterable[str]) -> Qwen2Tokenizer:
    """Qwen2's tokenizer with a small vocabulary: the 256 bytes, what BPE merges out of `sentences`, special tokens."""
    return Qwen2Tokenizer(
        *_train_bpe(sentences, Qwen2Tokenizer()),
        eos_token=SPECIAL_TOKENS["im_end"],
        pad_token=SPECIAL_TOKENS["pad"],
        extra_special_tokens=list(SPECIAL_TOKENS.values()),
        model_max_length=2048,
    )


def tiny_neox_tokenizer(sentences: Iterable[str]) -> GPTNeoXTokenizer:
    """GPT-NeoX's tokenizer with a small vocabulary, and none of the tokens that Video-Ma2mba adds."""
    vocab, merges = _train_bpe(sentences, GPTNeoXTokenizer())
    own = {"<|endoftext|>": 0, "<|padding|>": 1}
    return GPTNeoXTokenizer(own | {token: index + len(own) for token, index in vocab.items()}, merges)


def _train_bpe(sentences: Iterable[str], kind) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE that splits text into words as the tokenizer `kind` does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = kind._tokenizer.pre_tokenizer
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    bpe.train_from_iterator(["You are a helpful assistant.", "system\nuser\nassistant\n", *sentences], trainer)
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]
