"""Fresh tensors, initialised as the original does: Mamba blocks as mamba-ssm's Mamba2, alpha at one half.

The unusual: every tensor has its own generator, seeded by its key, so that a value depends neither on the order of
writing nor on the sharding.
"""

import hashlib
import re

import torch

from vamba.modeling.configuration_vamba import VambaConfig, VambaMamba2Config
from vamba.modeling.mamba2 import init_mamba2_parameter


FRESH = re.compile(r"model\.video_encoder\.layers\.\d+\.(.+)|model\.language_model\.layers\.\d+\.(alpha)")


def mixer_shapes(config: VambaMamba2Config) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of one Mamba block, by its name below `model.video_encoder.layers.{i}.`"""
    inner, heads, conv, hidden = config.intermediate_size, config.num_heads, config.conv_dim, config.hidden_size
    projected = inner + conv + heads  # z, then what the convolution sees (x, B, C), then dt
    shapes = {
        "norm.weight": (hidden,),
        "mixer.dt_bias": (heads,),
        "mixer.A_log": (heads,),
        "mixer.D": (heads,),
        "mixer.in_proj.weight": (projected, hidden),
        "mixer.conv1d.weight": (conv, 1, config.conv_kernel),
        "mixer.norm.weight": (inner,),
        "mixer.out_proj.weight": (hidden, inner),
    }
    if config.use_bias:
        shapes |= {"mixer.in_proj.bias": (projected,), "mixer.out_proj.bias": (hidden,)}
    if config.use_conv_bias:
        shapes["mixer.conv1d.bias"] = (conv,)
    return shapes


def is_fresh(key: str) -> bool:
    """Whether a tensor that Qwen2-VL does not have can be initialised here."""
    return FRESH.fullmatch(key) is not None


def seeded(key: str, seed: int) -> torch.Generator:
    """The generator of one tensor."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def fresh_tensor(key: str, shape: tuple[int, ...], config: VambaConfig, seed: int) -> torch.Tensor:
    """The initial float32 value of our key `key`; the same for the same key and seed, whatever else is written."""
    match = FRESH.fullmatch(key)
    if match is None:
        raise KeyError(f"no rule initialises {key}")
    generator = seeded(key, seed)
    tensor = torch.empty(shape, dtype=torch.float32)
    if match[2] == "alpha":
        tensor.fill_(0.5)
    elif match[1] == "norm.weight":
        tensor.fill_(1.0)
    else:
        name = match[1].removeprefix("mixer.")
        init_mamba2_parameter(name, tensor, config.mamba_config, config.text_config.num_hidden_layers, generator)
    return tensor
