"""Configuration of Vamba (arXiv 2503.11579).

A Vamba is a Qwen2-VL whose video tokens go through Mamba-2 blocks instead of the language model. `vision_config` is
that of any Qwen2-VL-style tower in transformers, chosen by its `model_type`; `text_config` is Qwen2-VL's with three
switches for the cross-attention; `mamba_config` sizes the Mamba-2 blocks.

What is unusual: every number is checked against a table of bounds before anything is built, as a config.json may be
anyone's, and a list of 10**12 layers would fill the memory before the first error.
"""

import re
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig


# What a checkpoint's config.json tells `trust_remote_code=True` loaders on machines without this package.
AUTO_MAP = {
    "AutoConfig": "configuration_vamba.VambaConfig",
    "AutoModel": "modeling_vamba.VambaModel",
    "AutoModelForImageTextToText": "modeling_vamba.VambaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_vamba.VambaForConditionalGeneration",
    "AutoProcessor": "processing_vamba.VambaProcessor",
}
# Tensors of checkpoints from before November 2026, when the decoder layers held the keys' and values' projections.
EARLIER_KEYS = re.compile(r"language_model\.layers\.\d+\.cross_attn\.[kv]_proj\.|video_encoder\.layers\.\d+\.")
EARLIER_FORMAT = (
    "This checkpoint is in Vamba's earlier format, with the video's keys and values in the decoder layers: "
    "bring it into the present one with `vamba convert OLD NEW`."
)

BACKENDS = {  # of the scan, the convolution and the norms
    "ssd_backend": ("auto", "torch", "triton", "mamba_ssm"),
    "conv_backend": ("auto", "torch", "triton", "causal_conv1d"),
    "norm_backend": ("auto", "torch", "triton"),
}


def _bounds(low: float, high: float, names: str) -> dict[str, tuple[float, float]]:
    return dict.fromkeys(names.split(), (low, high))


# From the least to the greatest value that makes sense, far beyond any model that there is: of all our configurations,
# and of any vision tower in transformers.
BOUNDS = {
    **_bounds(1, 1024, "depth num_hidden_layers patch_size"),
    **_bounds(1, 2**20, "hidden_size intermediate_size embed_dim out_hidden_size projection_dim head_dim window_size"),
    **_bounds(1, 2**20, "num_attention_heads num_key_value_heads num_heads n_groups chunk_size"),
    **_bounds(1, 2**24, "vocab_size"),
    **_bounds(1, 2**40, "max_position_embeddings sliding_window"),
    **_bounds(0, 2**40, "max_window_layers"),
    **_bounds(1, 2**14, "state_size image_size"),
    **_bounds(1, 64, "expand in_channels num_channels temporal_patch_size spatial_merge_size"),
    **_bounds(2, 64, "conv_kernel"),
    **_bounds(1 / 64, 64, "mlp_ratio"),
    **_bounds(0, 1, "rms_norm_eps layer_norm_eps layer_norm_epsilon attention_dropout time_step_floor"),
    **_bounds(1e-30, 1e4, "time_step_min time_step_max A_init_bounds image_std"),
    **_bounds(0, 1e4, "initializer_range"),
    **_bounds(0, float("inf"), "time_step_limit"),
    **_bounds(-1e4, 1e4, "image_mean"),
}


def check_bounds(config: PreTrainedConfig, where: str = "") -> None:
    """Raises ValueError for the first of the values (or of the numbers in it) that is not within `BOUNDS`, and for a
    base of the rotary frequencies from which none can be computed.

    A value that is None, or that the configuration does not have, is not looked at; `where` stands before its name.
    """
    for name, (low, high) in BOUNDS.items():
        value = getattr(config, name, None)
        for number in value if isinstance(value, (list, tuple)) else [] if value is None else [value]:
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not low <= number <= high:
                raise ValueError(f"{where}{name} is {value!r:.80}; it must be a number from {low:g} to {high:g}.")
    rope = getattr(config, "rope_parameters", None)
    theta = rope.get("rope_theta", 1.0) if isinstance(rope, dict) else 1.0
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 1 <= theta <= 1e15:
        raise ValueError(f"{where}rope_parameters['rope_theta'] is {theta!r:.80}; it must be from 1 to 1e15.")


def check_pair(config: PreTrainedConfig, name: str) -> None:
    """Raises ValueError unless the value is two numbers, the second of which is not the smaller."""
    value = getattr(config, name)
    if len(value) != 2 or value[0] > value[1] or any(1e38 < number < float("inf") for number in value):
        raise ValueError(f"{name} is {value!r:.80}; it must be two numbers of float32, the least and the greatest.")


def check_pixels(config: PreTrainedConfig) -> None:
    """Raises ValueError unless the vision tower can be built, and mean and deviation are those of its channels."""
    check_bounds(config)
    check_bounds(config.vision_config, "vision_config.")
    for name in ("image_mean", "image_std"):
        if len(value := getattr(config, name)) != 3:
            raise ValueError(f"{name} is {value!r:.80}; it must be three numbers, one for each colour.")


@strict
class VambaMamba2Config(PreTrainedConfig):
    """Sizes of one Mamba-2 block (arXiv 2405.21060), under the names of transformers' `Mamba2Config`."""

    model_type = "vamba_mamba2"
    base_config_key = "mamba_config"

    hidden_size: int = 3584  # width of the residual stream the block reads and writes
    state_size: int = 128  # K, numbers of state per channel
    conv_kernel: int = 4  # taps of the depthwise causal convolution; the state keeps one fewer past inputs
    expand: int = 2  # the inner width is `expand * hidden_size`
    head_dim: int = 64  # P, channels per head; the inner width must be a multiple of it
    n_groups: int = 1  # G, how many (B, C) pairs the heads share
    chunk_size: int = 256  # tokens per chunk of the state space duality scan; changes the speed, not the result
    use_bias: bool = False  # whether the two projections have a bias
    use_conv_bias: bool = True  # whether the convolution has a bias
    layer_norm_epsilon: float = 1e-5  # of both RMSNorms of the block
    time_step_min: float = 0.001  # least initial step dt; dt_bias is drawn so that steps are log-uniform
    time_step_max: float = 0.1  # largest initial step
    time_step_floor: float = 1e-4  # a smaller initial step is raised to this
    time_step_limit: list[float] | tuple[float, ...] = (0.0, float("inf"))  # dt is clamped to it after the softplus
    A_init_bounds: list[float | int] | tuple[float | int, ...] = (1, 16)  # -A is initialised uniformly between these
    initializer_range: float = 0.02  # standard deviation of the initial weights of linear layers
    # The implementations of the scan, the convolution, and the block's norms and residual stream: "auto" (the fastest
    # available), "torch" (the reference), "triton" (on a GPU), or the optional packages "mamba_ssm" for the scan and
    # "causal_conv1d" for the convolution. They change the speed, not the result.
    ssd_backend: str = "auto"
    conv_backend: str = "auto"
    norm_backend: str = "auto"

    def validate_bounds(self):
        check_bounds(self)
        check_pair(self, "time_step_limit")
        check_pair(self, "A_init_bounds")
        for name, known in BACKENDS.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}.")

    def validate_sizes(self):
        if self.intermediate_size % self.head_dim:
            raise ValueError(f"expand * hidden_size = {self.intermediate_size} is not a multiple of {self.head_dim=}.")
        if self.num_heads % self.n_groups:
            raise ValueError(f"The {self.num_heads} heads cannot be shared out among {self.n_groups=}.")

    @property
    def intermediate_size(self) -> int:
        return self.expand * self.hidden_size

    @property
    def num_heads(self) -> int:
        return self.intermediate_size // self.head_dim

    @property
    def conv_dim(self) -> int:
        """Number of channels that go through the convolution: x, B and C."""
        return self.intermediate_size + 2 * self.n_groups * self.state_size


@strict
class VambaTextConfig(Qwen2VLTextConfig):
    """Qwen2-VL's language model plus a cross-attention in every layer."""

    model_type = "vamba_text"

    hidden_size: int = 3584  # D, width of the residual stream
    intermediate_size: int = 18944  # inner width of the MLP
    num_hidden_layers: int = 28  # L, the number of decoder layers and of levels of the video
    num_attention_heads: int = 28  # heads of self-attention, and of cross-attention
    num_key_value_heads: int | None = 4  # each is shared by equally many heads of queries
    rms_norm_eps: float = 1e-6  # of all RMSNorms
    # Whether a layer adds alpha * self + (1 - alpha) * cross with one learnable alpha per layer, or else self + cross.
    use_alpha_balancing: bool = True
    # Whether the layer's `input_layernorm` also normalises the video, for cross-attention, Mamba-2 block and residual.
    cross_attn_use_layer_norm: bool = False
    # Whether cross-attention applies M-RoPE, to queries at text positions and keys at the (t, h, w) of each media item.
    cross_attn_use_position_embeddings: bool = False

    def __post_init__(self, **kwargs):
        check_bounds(self)  # at once, as a list of the layers' types is made next
        super().__post_init__(**kwargs)

    def validate_bounds(self):
        check_bounds(self)


@strict
class VambaConfig(PreTrainedConfig):
    """Configuration of a Vamba model; the defaults are the published 7B's sizes."""

    model_type = "vamba"
    sub_configs_defaults: ClassVar[dict] = {
        "vision_config": SubConfigSpec(AutoConfig, model_type="qwen2_vl_vision"),
        "text_config": VambaTextConfig,
        "mamba_config": VambaMamba2Config,
    }
    keys_to_ignore_at_inference = ["past_key_values"]

    text_config: Any = None  # `VambaTextConfig`
    vision_config: Any = None  # that of any Qwen2-VL-style tower, chosen by its `model_type`
    mamba_config: Any = None  # `VambaMamba2Config`; None makes it as wide as the text
    image_token_id: int = 151655  # of Qwen2-VL's tokenizer; a prompt names an image by <|vision_start|><|vision_end|>
    video_token_id: int = 151656  # of Qwen2-VL's tokenizer; there is no placeholder per video token
    vision_start_token_id: int = 151652  # the n-th of a batch stands for its n-th media item
    vision_end_token_id: int = 151653  # follows each start
    image_mean: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_MEAN)  # of each channel; the model, too, can
    image_std: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_STD)  # normalise patches (see `media.normalized`)
    tie_word_embeddings: bool = False  # whether the head's weights are those of the embedding
    initializer_range: float = 0.02  # standard deviation of the initial weights

    def __post_init__(self, **kwargs):
        for name in self.sub_configs_defaults:
            if not isinstance(part := getattr(self, name), (dict, PreTrainedConfig, type(None))):
                raise ValueError(f"{name} is {part!r:.80}; it must be a configuration, or an object of its values.")
        if self.mamba_config is None and self.text_config is not None:
            text = self.text_config if isinstance(self.text_config, dict) else self.text_config.to_dict()
            self.mamba_config = {"hidden_size": text.get("hidden_size", VambaMamba2Config.hidden_size)}
        super().__post_init__(**kwargs)

    def validate_bounds(self):
        check_pixels(self)

    def validate_widths(self):
        """Raises ValueError unless vision tower, Mamba-2 blocks and language model have the same width."""
        vision_width = getattr(self.vision_config, "out_hidden_size", None) or self.vision_config.hidden_size
        widths = {
            "text_config.hidden_size": self.text_config.hidden_size,
            "mamba_config.hidden_size": self.mamba_config.hidden_size,
            "the vision tower's output width": vision_width,
        }
        if len(set(widths.values())) != 1:
            raise ValueError("These must be equal: " + ", ".join(f"{name} = {w}" for name, w in widths.items()) + ".")

    def save_pretrained(self, save_directory, **kwargs):
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)


# Saving a checkpoint copies the file of a registered class, and the files it imports, along with it.
VambaConfig.register_for_auto_class("AutoConfig")
