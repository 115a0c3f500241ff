"""The video stream of Vamba: Mamba-2 blocks, and the keys and values that the text reads of each level between them.

What is unusual: it runs in chunks of a video, after whatever the memory holds; in training, with multi-axis
checkpointing, in cells of layers x tokens that are run when the text asks for their keys and values.

Shapes: B batch, S video tokens of one chunk, D hidden, P head dim.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import auto_docstring

from .configuration_vamba import VambaConfig
from .decoder_layer import VambaDecoderLayer
from .mamba2 import Mamba2Block, Mamba2Mixer, Mamba2State, init_mamba2_mixer
from .multi_axis_checkpointing import CutSequence, LazyLevels, MultiAxisCheckpointingMixin, MultiAxisSettings
from .multi_axis_memory import mamba2_costs
from .video_memory import VideoMemory


@auto_docstring
class VambaPreTrainedModel(MultiAxisCheckpointingMixin, PreTrainedModel):
    config: VambaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["VambaDecoderLayer", "Mamba2Block", "Qwen2_5_VLVisionBlock"]
    _skip_keys_device_placement = ["past_key_values", "video_memory", "packed", "read_besides"]
    _keep_in_fp32_modules_strict = ["mixer.A_log", "mixer.D", "mixer.dt_bias"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Mamba2Mixer):
            init_mamba2_mixer(module, self.config.get_text_config().num_hidden_layers)
        elif isinstance(module, VambaDecoderLayer):
            if module.alpha is not None:
                init.constant_(module.alpha, 0.5)
        else:
            super()._init_weights(module)


class VambaVideoEncoder(VambaPreTrainedModel):
    """The Mamba-2 blocks between the levels V_0 … V_{L-1} of the video stream; V_L is never read, so L - 1 blocks."""

    input_modalities = ("image", "video")
    _can_record_outputs = {"hidden_states": Mamba2Block}
    multi_axis_checkpointing: MultiAxisSettings | None = None

    def __init__(self, config: VambaConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            [Mamba2Block(config.mamba_config) for _ in range(config.text_config.num_hidden_layers - 1)]
        )
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        vision_BSD: Tensor,
        video_memory: VideoMemory,
        key_values: list[Callable],
        lengths_B: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        read_once: bool = False,
    ) -> VideoMemory:
        """Extends `video_memory` by the next S video tokens, after whatever it holds.

        Args:
            vision_BSD: V_0, the vision tower's tokens, (B, S, D); the rows of the memory's video.
            video_memory: by this name, so that accelerate leaves it where it is.
            key_values: what makes the keys and values of each level, see `makers_of_key_values`.
            lengths_B: valid tokens of each row, (B,), the rest being padding on the right; None for all.
            position_embeddings: cos and sin (B, S, P) of the tokens, where the keys are to carry positions.
            read_once: these are the last tokens and each layer is read once, in order: with multi-axis checkpointing
                its keys and values are then made when it is read.
        """
        memory, S = video_memory, vision_BSD.shape[1]
        valid = None
        if lengths_B is not None:
            valid = torch.arange(S, device=lengths_B.device) < lengths_B.unsqueeze(1)
        memory.append_mask(S, valid)
        self._fetch_states(memory, vision_BSD.device)

        def step(index, vision_BSD, state, lengths_B, *positions):
            vision_BSD, *keys_values = key_values[index](vision_BSD, positions or None)
            if index < len(self.layers):
                vision_BSD, state = self.layers[index](vision_BSD, state, lengths_B)
            return vision_BSD, state, tuple(keys_values)

        if self.multi_axis_checkpointing is not None and self.training and torch.is_grad_enabled():
            levels = self._cells(step, memory, vision_BSD, lengths_B, position_embeddings)
            if read_once:
                memory.defer(levels)
                return memory
            for index in range(levels.num_levels):
                memory.append(index, *(torch.cat(parts, 2)[:, :, :S] for parts in zip(*levels.take(index))))
            memory.states[:] = levels.sequences[0].states[:-1]
            return memory
        for index, state in enumerate([*memory.states, None]):
            vision_BSD, state, keys_values = step(index, vision_BSD, state, lengths_B, *(position_embeddings or ()))
            memory.append(index, *keys_values)
            if index < len(self.layers):
                memory.states[index] = state
        return memory

    @staticmethod
    def _fetch_states(memory: VideoMemory, device: torch.device) -> None:
        """Those of a memory that was read from a file may lie elsewhere; a model spread over devices moves its own."""
        for index, state in enumerate(memory.states):
            if state is not None and state.ssm_BHPK.device.type != device.type:
                memory.states[index] = Mamba2State(*(t.to(device) for t in state))

    def _cells(self, step, memory: VideoMemory, vision_BSD, lengths_B, position_embeddings) -> LazyLevels:
        settings, text = self.multi_axis_checkpointing, self.config.text_config
        head_dim = text.hidden_size // text.num_attention_heads
        costs = mamba2_costs(self.config.mamba_config, vision_BSD.dtype, 2 * text.num_key_value_heads * head_dim)
        layers, sizes = settings.intervals(costs, text.num_hidden_layers, vision_BSD, self)
        states = [*memory.states, None]
        sequence = CutSequence.cut(vision_BSD, states, sizes, lengths_B, *(position_embeddings or ()))
        return LazyLevels(step, [sequence], layers, settings.offload)


def makers_of_key_values(text_layers: nn.ModuleList) -> list[Callable]:
    """`video_key_value` of each decoder layer: as functions, for accelerate would move modules that are arguments.

    FSDP2 gathers a layer's weights when it is called; this is another way to call it.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

        for layer in text_layers:
            if isinstance(layer, FSDPModule) and "video_key_value" not in vars(layer):
                register_fsdp_forward_method(layer, "video_key_value")
    return [layer.video_key_value for layer in text_layers]


__all__ = ["VambaPreTrainedModel", "VambaVideoEncoder", "makers_of_key_values"]
