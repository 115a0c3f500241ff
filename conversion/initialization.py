"""Fresh tensors, initialised as the models do it: Mamba blocks as mamba-ssm's Mamba2, alpha at one half.

The unusual: every tensor has its own generator, seeded by its key, so that a value depends neither on the order of
writing nor on the sharding.
"""

import hashlib
import re

import torch
from transformers import PreTrainedConfig

from vamba.modeling.mamba2 import init_mamba2_parameter

from .planning import rename
from .vamba_family import FROM_ORIGINAL, TO_EARLIER


def fresh_tensor(key: str, shape: tuple[int, ...], config: PreTrainedConfig, seed: int) -> torch.Tensor:
    """The initial float32 value of a tensor, by our key or the original's; whatever else is written, it is the same."""
    key = (rename(key, FROM_ORIGINAL) or (key,))[0]
    seeded_by = rename(key, TO_EARLIER)[0]  # so that a seed goes on to give the values that it gave
    digest = hashlib.sha256(f"{seed}:{seeded_by}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    tensor = torch.zeros(shape)
    if mixer := re.fullmatch(r"model\.video_encoder\.levels\.\d+\.block\.mixer\.(.+)", key):
        num_layers = config.text_config.num_hidden_layers
        init_mamba2_parameter(mixer[1], tensor, config.mamba_config, num_layers, generator)
    elif re.fullmatch(r"model\.video_encoder\.levels\.\d+\.block\.norm\.weight", key):
        tensor.fill_(1.0)
    elif re.fullmatch(r"model\.language_model\.layers\.\d+\.alpha", key):
        tensor.fill_(0.5)
    elif re.fullmatch(r"model\.projector\..+\.weight", key):  # its biases are zero
        tensor.uniform_(-(shape[1] ** -0.5), shape[1] ** -0.5, generator=generator)
    elif not re.fullmatch(r"model\.projector\..+\.bias", key):
        raise KeyError(f"no rule initialises {key}")
    return tensor
