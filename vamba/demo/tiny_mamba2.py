"""A tiny Mamba-2 language model and a tiny CLIP vision tower on disk, for the converter to join.

What is unusual: nothing, on purpose. The files are what transformers writes for the published models, with a byte-level
BPE vocabulary of GPT-NeoX's kind that is trained on a few sentences and padded as Mamba's is.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, GPTNeoXTokenizer, Mamba2Config, Mamba2ForCausalLM

from vamba.modeling.configuration_vamba import VambaMamba2Config
from vamba.modeling.mamba2 import init_mamba2_parameter
from vamba.modeling.processing_video_ma2mba import SPECIAL_TOKENS

from .tiny_checkpoint import train_bpe


OWN_TOKENS = ("<|endoftext|>", "<|padding|>")  # ids 0 and 1 of GPT-NeoX's tokenizer
PADDED_TO = 16


def make_tiny_mamba2(
    folder: str | Path,
    sentences: Iterable[str] = (),
    *,
    seed: int = 0,
    hidden_size: int = 64,
    num_layers: int = 3,
    initializer_range: float = 0.02,
    mamba_config: dict | None = None,
) -> Path:
    """Writes a randomly initialised `mamba2` checkpoint and its tokenizer; returns the folder.

    Args:
        sentences: the tokenizer's words; any other text is spelled in bytes.
        mamba_config: sizes and initial values of the mixers that differ from `VambaMamba2Config`'s.
    """
    tokenizer = tiny_neox_tokenizer(sentences)
    rows = len(tokenizer) + len(SPECIAL_TOKENS)
    mixer = VambaMamba2Config(
        hidden_size=hidden_size, initializer_range=initializer_range, **{"head_dim": 16, **(mamba_config or {})}
    )
    shared = "state_size conv_kernel expand head_dim num_heads n_groups chunk_size initializer_range".split()
    config = Mamba2Config(
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        vocab_size=-(-rows // PADDED_TO) * PADDED_TO,
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
                init_mamba2_parameter(name, parameter, mixer, num_layers)
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


def tiny_neox_tokenizer(sentences: Iterable[str]) -> GPTNeoXTokenizer:
    """GPT-NeoX's tokenizer with a small vocabulary, and none of the tokens that Video-Ma2mba adds."""
    vocab, merges = train_bpe(sentences, GPTNeoXTokenizer()._tokenizer.pre_tokenizer)
    own = {token: index for index, token in enumerate(OWN_TOKENS)}
    return GPTNeoXTokenizer(own | {token: index + len(own) for token, index in vocab.items()}, merges)
