"""Configuration of Video-Ma2mba (arXiv 2411.19460).

A Video-Ma2mba is a CLIP vision tower, a projector, and a Mamba-2 language model over one stream of text and video
tokens. The vision configuration is CLIP's as published, but the last layer is not built, as the model reads the
output of the one before. The text configuration is that of Vamba's Mamba-2 block, plus what a language model needs.
GPT-NeoX's tokenizer has no vision tokens; they take the first of the spare ids that pad the vocabulary.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CLIPVisionConfig, PreTrainedConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .configuration_vamba import VambaMamba2Config, check_pixels


# What a checkpoint's config.json tells `trust_remote_code=True` loaders on machines without this package.
AUTO_MAP = {
    "AutoConfig": "configuration_video_ma2mba.VideoMa2mbaConfig",
    "AutoModel": "modeling_video_ma2mba.VideoMa2mbaModel",
    "AutoModelForImageTextToText": "modeling_video_ma2mba.VideoMa2mbaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_video_ma2mba.VideoMa2mbaForConditionalGeneration",
    "AutoProcessor": "processing_video_ma2mba.VideoMa2mbaProcessor",
}
# The sizes of the language models state-spaces/mamba2-*, which differ in nothing else.
SIZES = {
    "370m": {"num_hidden_layers": 48, "hidden_size": 1024},
    "1.3b": {"num_hidden_layers": 48, "hidden_size": 2048},
    "2.7b": {"num_hidden_layers": 64, "hidden_size": 2560},
}


@strict
class VideoMa2mbaVisionConfig(CLIPVisionConfig):
    """CLIP's vision tower; the defaults are CLIP-ViT-L/14-336's."""

    model_type = "video_ma2mba_vision"
    # These two let sizes of chunks be computed as for Qwen2-VL's towers.
    temporal_patch_size: ClassVar[int] = 1  # a frame is a temporal patch by itself
    spatial_merge_size: ClassVar[int] = 2  # 2 x 2 patches become one token

    hidden_size: int = 1024  # width of the residual stream
    intermediate_size: int = 4096  # inner width of the MLP
    num_hidden_layers: int = 24  # number of layers, of which the last is not built
    num_attention_heads: int = 16  # heads of each attention
    image_size: int = 336  # pixels along each side of a frame
    patch_size: int = 14  # pixels along each side of a patch
    projection_dim: int = 768  # width of CLIP's contrastive training; not used

    @property
    def in_channels(self) -> int:
        return self.num_channels


@strict
class VideoMa2mbaTextConfig(VambaMamba2Config):
    """A Mamba-2 language model; the defaults are state-spaces/mamba2-2.7b's."""

    model_type = "video_ma2mba_text"
    base_config_key = "text_config"

    vocab_size: int = 50288  # rows of the embedding: GPT-NeoX's 50,277 tokens padded to a multiple of 16
    hidden_size: int = 2560  # width of the residual stream
    num_hidden_layers: int = 64  # number of Mamba-2 blocks
    residual_in_fp32: bool = True  # whether the residual stream is float32 whatever the dtype of the weights
    use_cache: bool = True  # whether forward returns the memory that it extended
    bos_token_id: int | None = 0  # GPT-NeoX's <|endoftext|>
    eos_token_id: int | list[int] | None = 0  # the same
    pad_token_id: int | None = 0  # the same


@strict
class VideoMa2mbaConfig(PreTrainedConfig):
    """Configuration of a Video-Ma2mba model; the defaults are the 2.7B's sizes with CLIP-ViT-L/14-336."""

    model_type = "video_ma2mba"
    sub_configs_defaults: ClassVar[dict] = {
        "vision_config": VideoMa2mbaVisionConfig,
        "text_config": VideoMa2mbaTextConfig,
    }
    keys_to_ignore_at_inference = ["past_key_values"]

    text_config: Any = None  # `VideoMa2mbaTextConfig`
    vision_config: Any = None  # `VideoMa2mbaVisionConfig`
    vision_start_token_id: int = 50277  # stands for a media item, whose tokens come after it
    vision_end_token_id: int = 50278  # follows each start
    image_token_id: int = 50279  # understood by the processor, never seen by the model
    video_token_id: int = 50280  # the same
    image_mean: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_MEAN)  # of each channel; the model, too, can
    image_std: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_STD)  # normalise patches (see `media.normalized`)
    tie_word_embeddings: bool = True  # whether the head's weights are those of the embedding
    initializer_range: float = 0.02  # standard deviation of the initial weights

    @classmethod
    def of_size(cls, name: str, **kwargs) -> "VideoMa2mbaConfig":
        """Configures a model with a published language model: "370m", "1.3b" or "2.7b"."""
        if name not in SIZES:
            raise ValueError(f"There is no size {name!r}; choose one of {', '.join(SIZES)}.")
        return cls(text_config=dict(SIZES[name]), **kwargs)

    def validate_bounds(self):
        check_pixels(self)

    def validate_vision(self):
        layers = self.vision_config.num_hidden_layers
        if layers < 2 or self.grid_size < 2 or self.grid_size % 2:
            raise ValueError(
                f"vision_config has {layers} layers and {self.grid_size} patches along each side. There must be at "
                "least two layers, as the last is not used, and an even number of patches."
            )

    @property
    def mamba_config(self) -> VideoMa2mbaTextConfig:
        """The configuration of the Mamba-2 blocks, under its name in `VambaConfig`."""
        return self.text_config

    @property
    def grid_size(self) -> int:
        """Number of patches along each side of a frame."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def tokens_per_frame(self) -> int:
        return (self.grid_size // 2) ** 2

    def save_pretrained(self, save_directory, **kwargs):
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)


# Saving a checkpoint copies the file of a registered class, and the files it imports, along with it.
VideoMa2mbaConfig.register_for_auto_class("AutoConfig")
