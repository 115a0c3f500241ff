"""config.json of the Vamba family: its translation to `VambaConfig` and back.

The unusual: the original calls itself `qwen2_vl` and keeps the language model's fields flat at the top; options of its
Mamba blocks that our model does not have are refused by name rather than ignored.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

from transformers import PreTrainedConfig, Qwen2VLConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

from vamba.errors import UserError, reason_of
from vamba.modeling.configuration_vamba import VambaConfig, VambaMamba2Config

from .planning import ConversionError


# Ours → the original's, in vision_mamba_mixer_config.
MAMBA_FIELDS = {
    "hidden_size": "hidden_dim",
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "expand": "expand",
    "head_dim": "headdim",
    "n_groups": "ngroups",
    "chunk_size": "chunk_size",
    "use_bias": "bias",
    "use_conv_bias": "conv_bias",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
    "time_step_limit": "dt_limit",
    "A_init_bounds": "A_init_range",
}
# The only values of the original's other options that compute what our model computes.
MAMBA_FIXED = {"norm_before_gate": False, "rmsnorm": True, "norm_type": "rmsnorm", "D_has_hdim": False, "d_ssm": None}
SWITCHES = ("use_alpha_balancing", "cross_attn_use_layer_norm", "cross_attn_use_position_embeddings")
TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def config_from_qwen2_vl(source: dict, mamba_config: dict | None = None) -> VambaConfig:
    """`VambaConfig` for a Qwen2-VL config.json, flat (on the Hub) or nested (saved by transformers 5).

    Args:
        source: the config.json.
        mamba_config: sizes of the Mamba blocks that differ from `VambaMamba2Config`'s; the hidden size is the text's.

    Raises:
        ConversionError: on an unknown name in `mamba_config`, or sizes that do not divide.
    """
    sizes = own_fields(VambaMamba2Config)
    if unknown := sorted(set(mamba_config or ()).difference(sizes)):
        raise ConversionError(f"mamba_config has no {', '.join(unknown)}; it has {', '.join(sorted(sizes))}.")
    return _vamba_config(source, mamba_config or {}, {})


def config_from_original(source: dict) -> VambaConfig:
    """`VambaConfig` for an original Vamba's config.json; what its mixer config leaves out is `VambaMamba2Config`'s.

    Raises:
        ConversionError: on an option of the original that our model does not have, or a missing switch.
    """
    mixer = source["vision_mamba_mixer_config"]
    refused = [f"{key} = {mixer[key]!r}" for key, value in MAMBA_FIXED.items() if mixer.get(key, value) != value]
    if refused:
        raise ConversionError(
            f"vision_mamba_mixer_config: {', '.join(refused)} is not supported; this model has "
            + ", ".join(f"{key} = {value!r}" for key, value in MAMBA_FIXED.items())
            + "."
        )
    absent = [key for key in SWITCHES if key not in source]
    if absent:
        raise ConversionError(
            f"The original's config.json lacks {', '.join(absent)}: say whether each is true or false."
        )
    mamba = {ours: mixer[theirs] for ours, theirs in MAMBA_FIELDS.items() if mixer.get(theirs) is not None}
    return _vamba_config(source, mamba, {key: source[key] for key in SWITCHES})


def config_to_original(config: VambaConfig) -> dict:
    """config.json of the original: flat, and `qwen2_vl` by name.

    Raises:
        ConversionError: on a value that the original fixes otherwise.
    """
    text, vision, mamba = config.text_config, config.vision_config, config.mamba_config
    fixed = {
        "vision_config.model_type": (vision.model_type, "qwen2_vl_vision"),
        "vision_config.rope_parameters['rope_theta']": ((vision.rope_parameters or {}).get("rope_theta"), 10000.0),
        "mamba_config.layer_norm_epsilon": (mamba.layer_norm_epsilon, 1e-5),
    }
    refused = [f"{name} = {have!r}, must be {must!r}" for name, (have, must) in fixed.items() if have != must]
    if refused:
        raise ConversionError("The original's format cannot hold this model: " + "; ".join(refused) + ".")
    flat, tower = own_values(text), own_values(vision)
    for part, name in ((flat, "layer_types"), (flat, "rope_parameters"), (tower, "rope_parameters")):
        del part[name]
    tower.pop("initializer_range", None)
    rope = dict(text.rope_parameters)
    mixer = {theirs: getattr(mamba, ours) for ours, theirs in MAMBA_FIELDS.items()}
    mixer |= {key: list(mixer[key]) for key in ("dt_limit", "A_init_range")}
    dtype = config.dtype
    return flat | {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": {**rope, "type": rope["rope_type"]},
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch.") if dtype is not None else None,
        "vision_config": tower | {"model_type": "qwen2_vl"},
        "vision_mamba_mixer_config": {"enable": True, "model_type": "qwen2_vl"} | mixer | MAMBA_FIXED,
        **{key: getattr(config, key) for key in TOKENS},
    }


def _vamba_config(source: dict, mamba: dict, switches: dict) -> VambaConfig:
    """What a config.json says of Qwen2-VL, beside what is given of the Mamba blocks and for the text model."""
    with naming_bad_values():
        qwen = Qwen2VLConfig.from_dict(json.loads(json.dumps(source)))  # its constructor writes into nested dicts
    text = own_values(qwen.text_config)
    common = {key: text[key] for key in ("hidden_size", "initializer_range")}
    text["rope_parameters"] = {key: value for key, value in text["rope_parameters"].items() if key != "type"}
    vision = {key: getattr(qwen.vision_config, key) for key in own_fields(Qwen2VLVisionConfig)}
    with naming_bad_values(""):  # which may be one of `mamba_config`
        return VambaConfig(
            architectures=["VambaForConditionalGeneration"],
            text_config=text | switches,
            vision_config=vision | {"model_type": qwen.vision_config.model_type},
            mamba_config=common | mamba,
            tie_word_embeddings=qwen.tie_word_embeddings,
            initializer_range=qwen.text_config.initializer_range,
            **{key: getattr(qwen, key) for key in TOKENS},
        )


def own_fields(kind: type[PreTrainedConfig]) -> list[str]:
    """The fields that a configuration class and its parents add to `PreTrainedConfig`'s."""
    common = {field.name for field in fields(PreTrainedConfig)}
    return [field.name for field in fields(kind) if field.name not in common]


def own_values(config: PreTrainedConfig) -> dict:
    """The values of `own_fields`."""
    return {name: getattr(config, name) for name in own_fields(type(config))}


@contextmanager
def naming_bad_values(where: str = "The source's config.json: ") -> Iterator[None]:
    """Makes what transformers says of a configuration's value, or fails with at it, a ConversionError in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # what the values of a file raise, and where in transformers, is without number
        raise ConversionError(f"{where}{reason_of(error)}") from error
