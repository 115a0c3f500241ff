"""The models that are measured, and for floors and plots what their parts weigh and what a paper says they take.

What is unusual: random weights are made on the GPU, where 11 billion of them take seconds and no disk.
"""

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from vamba.checkpoint_folder import kind_of
from vamba.errors import UserError
from vamba.loading import load_model
from vamba.modeling import VambaConfig, VambaForConditionalGeneration, VambaMamba2Config
from vamba.modeling.multi_axis import MemoryCosts


SEVEN_BILLION = {  # for our configuration and Qwen2-VL's
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4},
}


def load_ours(model: str, device: torch.device) -> VambaForConditionalGeneration:
    """A checkpoint, or random bfloat16 weights of the 7B's sizes for "7b"."""
    if model != "7b":
        if (kind := kind_of(model)) != "vamba":
            raise UserError(
                f"{model} is a {kind} checkpoint, and vamba bench measures a Vamba; benchmarks/video_ma2mba.py is for "
                "a Video-Ma2mba."
            )
        return load_model(model, dtype="auto").to(device).eval()
    if device.type != "cuda":
        raise UserError(f"--model 7b takes 21 GiB and a GPU, not {device}; give the folder of a small checkpoint.")
    return random_model(VambaForConditionalGeneration, VambaConfig(**SEVEN_BILLION), device, torch.bfloat16)


def load_peer(ours: VambaConfig, device: torch.device, dtype: torch.dtype) -> Qwen2VLForConditionalGeneration:
    """Qwen2-VL of our text model's and vision tower's sizes with random weights, attention through sdpa."""
    if ours.vision_config.model_type != "qwen2_vl_vision":
        raise UserError(f"--peer qwen2-vl has no vision tower like {ours.vision_config.model_type}; leave it out.")
    names = Qwen2VLConfig().text_config.to_dict().keys() - {"model_type", "architectures", "dtype"}
    text = {name: value for name, value in ours.text_config.to_dict().items() if name in names}
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=ours.vision_config.to_dict(),
        **{name: getattr(ours, name) for name in tokens},
    )
    return random_model(Qwen2VLForConditionalGeneration, config, device, dtype)


def random_model(kind: type[PreTrainedModel], config, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model initialised on the device, as transformers initialises it, in `dtype`."""
    with device:
        model = kind._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    in_float32 = model._keep_in_fp32_modules_strict or []
    for name, parameter in model.named_parameters():
        if any(part in name for part in in_float32):
            parameter.data = parameter.data.float()
    model.generation_config.eos_token_id = None
    return model


def linear_weights(*modules: nn.Module) -> int:
    """Numbers in the matrices of `modules`: each token that passes them costs twice as many operations."""
    return sum(
        part.weight.numel()
        for module in modules
        for part in module.modules()
        if isinstance(part, (nn.Linear, nn.Conv3d))
    )


def decode_bytes(model: PreTrainedModel, memory_bytes: int) -> int:
    """What has to be read for a token: the weights it passes, and the memory of the video."""
    return linear_weights(model.model.language_model, model.lm_head) * model.dtype.itemsize + memory_bytes


def paper_costs(config: VambaMamba2Config, dtype: torch.dtype = torch.bfloat16) -> MemoryCosts:
    """Returns the constants of the paper's table 7 in bytes, which hold for mamba-ssm's fused layer.

    The paper counts C_state per token (equation 16), though backward recomputes one state per chunk of the scan. So
    counted, the model is close to the paper's measurements (table 3), which are 1.0 to 1.9 times as large.
    """
    inner, conv_dim = config.intermediate_size, config.conv_dim
    state = inner * config.state_size
    layer = inner + conv_dim + config.num_heads + inner
    numbers = (config.hidden_size, state + (config.conv_kernel - 1) * conv_dim, layer, state + conv_dim)
    return MemoryCosts(*(dtype.itemsize * number for number in numbers))
