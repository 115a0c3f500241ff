"""Vamba (arXiv 2503.11579): Qwen2-VL whose video tokens pass Mamba-2 blocks and are read by cross-attention.

What is unusual: an encoder-decoder whose decoder looks at every level of the encoder. The video stream never reads the
text (equations 3 and 4 of the paper), so a first phase fills a `VideoMemory` with keys and values per layer, chunk by
chunk in constant activation memory, and a second phase, the text decoder, reads it. There is no placeholder token per
video token; text positions count text only.

Shapes: B batch, M video tokens, N text tokens, S video tokens of one chunk, D hidden, H heads, P head dim.
"""

import contextlib
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    CausalLMOutputWithCrossAttentions,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2MLP,
    Qwen2VLAttention,
    Qwen2VLRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_vamba import EARLIER_FORMAT, EARLIER_KEYS, VambaConfig, VambaTextConfig
from .generation import VambaGenerationMixin
from .kernels import can_use_inference_kernel, has_hooks, is_plain, overwritable
from .kernels_attention import can_split_keys, reads_fp8, split_key_attention, trained_sdpa
from .kernels_elementwise import (
    mix_norm_triton,
    rotate_triton,
    silu_mul_triton,
    store_token_triton,
    three_linears_triton,
)
from .kernels_norm import FusedRMSNorm
from .mamba2 import Mamba2Block, Mamba2Mixer, Mamba2State, init_mamba2_mixer
from .media import flattened_lengths, normalized, without_seen_grids
from .multi_axis import (
    CutSequence,
    LazyLevels,
    MultiAxisCheckpointingMixin,
    MultiAxisSettings,
    mamba2_costs,
    offload_saved,
)
from .ranks import weights_are_sharded
from .video_encoding import VideoEncodingMixin
from .video_memory import TextSlice, VideoLevel, VideoMemory
from .video_model import VideoHeadMixin, VideoModelMixin, positions_in_samples, text_position_ids, varlen_kwargs
from .vision_tower import vision_tower


@auto_docstring
class VambaPreTrainedModel(MultiAxisCheckpointingMixin, PreTrainedModel):
    config: VambaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["VambaDecoderLayer", "VambaVideoLevel", "Qwen2_5_VLVisionBlock"]
    _skip_keys_device_placement = ["past_key_values", "video_memory", "videos"]
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

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        super()._adjust_missing_and_unexpected_keys(loading_info)
        if any(map(EARLIER_KEYS.search, loading_info.unexpected_keys)):
            raise ValueError(EARLIER_FORMAT)


# Beyond as many queries, text rows that share a video counted together, flash attention fills the GPU by itself.
MAX_SPLIT_KEY_QUERIES = 1024
# With more, our kernel would widen the same fp8 keys so often that it pays to do it once beforehand.
MAX_FP8_QUERIES = 32
NOBODY = (0, 0)  # tokens of text that read a video which only other ranks wait for


class VambaVideoLevel(nn.Module):
    """Keys and values of V_l, and the Mamba-2 block that makes V_{l+1} of it; the last level has none."""

    def __init__(self, config: VambaConfig, has_block: bool):
        super().__init__()
        text = config.text_config
        self.head_dim = text.hidden_size // text.num_attention_heads
        self.k_proj, self.v_proj = (
            nn.Linear(text.hidden_size, text.num_key_value_heads * self.head_dim, bias=True) for _ in range(2)
        )
        self.block = Mamba2Block(config.mamba_config) if has_block else None

    def forward(
        self,
        vision_BSD: Tensor,
        state: Mamba2State | None = None,
        lengths_B: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Mamba2State | None, Tensor, Tensor]:
        """Of S tokens and the state before them: the next level's tokens, the state after them, and keys and values,
        (B, H_kv, S, P), which carry M-RoPE where `position_embeddings` are given."""
        keys, values = (
            proj(vision_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in (self.k_proj, self.v_proj)
        )
        if position_embeddings is not None:
            keys, _ = apply_rotary_pos_emb(keys, keys, *position_embeddings)
        if self.block is not None:
            vision_BSD, state = self.block(vision_BSD, state, lengths_B)
        return vision_BSD, state, keys, values


class VambaVideoEncoder(VambaPreTrainedModel):
    """The levels V_0 ... V_{L-1} of the video stream, one for each text layer; V_L is never read, and never made.

    It runs in chunks of a video, after whatever the memory holds; in training with multi-axis checkpointing in cells of
    layers x tokens.
    """

    input_modalities = ("image", "video")
    multi_axis_checkpointing: MultiAxisSettings | None = None

    def __init__(self, config: VambaConfig):
        super().__init__(config)
        L = config.text_config.num_hidden_layers
        self.levels = nn.ModuleList([VambaVideoLevel(config, has_block=level < L - 1) for level in range(L)])
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        vision_BSD: Tensor,
        video_memory: VideoMemory,
        lengths_B: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        norms: list[Callable[[Tensor], Tensor]] | None = None,
        read_once: bool = False,
    ) -> "VideoMemory | VideoInCells":
        """Extends the memory by the next S video tokens, after whatever it holds.

        Args:
            vision_BSD: V_0, the vision tower's tokens, (B, S, D); the rows of the memory's video.
            video_memory: by this name, so that accelerate leaves it where it is.
            lengths_B: valid tokens of each row, (B,), the rest being padding on the right; None for all.
            position_embeddings: cos and sin (B, S, P) of the tokens, where the keys are to carry positions.
            norms: what each level passes first, where `cross_attn_use_layer_norm` ties it to the text layer's norm.
            read_once: these are the only tokens and each level is read once, in order: in cells its keys and values are
                then made when it is read, and what is returned is read in the place of the memory.
        """
        memory, S = video_memory, vision_BSD.shape[1]
        valid_BS = None
        if lengths_B is not None:
            valid_BS = torch.arange(S, device=lengths_B.device) < lengths_B.unsqueeze(1)
        memory.append_mask(S, valid_BS)
        memory.fetch_states(vision_BSD.device)

        def step(index, vision_BSD, state, lengths_B, *positions):
            vision_BSD = vision_BSD if norms is None else norms[index](vision_BSD)
            vision_BSD, state, *keys_values = self.levels[index](vision_BSD, state, lengths_B, positions or None)
            return vision_BSD, state, tuple(keys_values)

        states = [*memory.states, None]
        if self.multi_axis_checkpointing is not None and self.training and torch.is_grad_enabled():
            cells = self._cells(step, states, vision_BSD, lengths_B, position_embeddings)
            if read_once:
                return VideoInCells(cells, memory)
            for index in range(len(self.levels)):
                memory.append(index, *_joined(cells.take(index), S))
            memory.states[:] = cells.sequences[0].states[:-1]
            return memory
        for index, state in enumerate(states):
            vision_BSD, states[index], keys_values = step(
                index, vision_BSD, state, lengths_B, *(position_embeddings or ())
            )
            memory.append(index, *keys_values)
        memory.states[:] = states[:-1]
        return memory

    def _cells(self, step, states, vision_BSD, lengths_B, position_embeddings) -> LazyLevels:
        settings, level = self.multi_axis_checkpointing, self.levels[0]
        key_values = 2 * self.config.text_config.num_key_value_heads * level.head_dim
        costs = mamba2_costs(self.config.mamba_config, vision_BSD.dtype, key_values)
        layers, sizes = settings.intervals(costs, len(self.levels), vision_BSD, self)
        sequence = CutSequence.cut(vision_BSD, states, sizes, lengths_B, *(position_embeddings or ()))
        return LazyLevels(step, [sequence], layers, settings.offload)


class VideoInCells:
    """A video whose levels are made, cell by cell, when the text reads them: each once, in order.

    It is read in the place of a `VideoMemory`, which stays without keys and values and tells only whose video it is.
    """

    def __init__(self, cells: LazyLevels, memory: VideoMemory):
        self.cells, self.reads, self._length = cells, memory.reads, memory.video_length

    def level(self, index: int, device: torch.device) -> VideoLevel:
        return VideoLevel(*_joined(self.cells.take(index), self._length)).map(lambda t: t.to(device))


def _joined(blocks: list[tuple[Tensor, Tensor]], length: int) -> list[Tensor]:
    """Keys and values of all blocks, without what fills the last one up."""
    return [torch.cat(parts, 2)[:, :, :length] for parts in zip(*blocks)]


class VambaCrossAttention(Qwen2VLAttention):
    """Queries of the text over keys and values of the video: no causal mask, by default no positions.

    On a GPU and without gradients few queries go through our own kernel, split over the keys.
    """

    def __init__(self, config: VambaTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        del self.k_proj, self.v_proj  # the video encoder has them
        self.is_causal = False
        self.sliding_window = None

    def forward(
        self,
        hidden_BND: Tensor,
        videos: list[tuple[TextSlice, VideoLevel]],
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """Each slice of the text reads its level; text that is in none reads zeros.

        A slice without tokens reads nothing, but sends gradients of zero, as other ranks wait for them (see `ranks`).
        """
        queries = self.q_proj(hidden_BND).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if position_embeddings is not None:
            queries, _ = apply_rotary_pos_emb(queries, queries, *position_embeddings)
        read = [(text, level) for text, level in videos if text.tokens != NOBODY]
        if len(read) == 1 and read[0][0][:2] == (None, None):
            (text, level), *_ = read
            output_BNHP, weights = self._attend(queries, level, text.mask_BM, **kwargs)
        else:
            outputs, weights = [], None
            for text, level in read:
                rows, tokens = (slice(*(part or (None,))) for part in text[:2])
                output, _ = self._attend(queries[rows, :, tokens], level, text.mask_BM, **kwargs)
                outputs.append((text, output))
            output_BNHP = _in_order(outputs, queries.transpose(1, 2))
        for _, level in videos[len(read) :]:
            output_BNHP = output_BNHP + 0 * (level.keys_BHMP.sum() + level.values_BHMP.sum())
        return self.o_proj(output_BNHP.flatten(2)), weights

    def _attend(
        self, queries: Tensor, level: VideoLevel, mask_BM: Tensor | None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, H, P); rows of text that share a video row are folded into its queries, so that it is not copied."""
        B, N = queries.shape[0], queries.shape[2]
        share = B // level.keys_BHMP.shape[0]  # rows of text for each row of video
        queries = queries.unflatten(0, (-1, share)).transpose(1, 2).flatten(2, 3)  # (B / share, H, share * N, P)
        output, weights = self._attention(queries, level, mask_BM, **kwargs)
        if weights is not None:
            weights = weights.unflatten(2, (share, N)).transpose(1, 2).flatten(0, 1)
        return output.unflatten(1, (share, N)).flatten(0, 1), weights

    def _attention(self, queries: Tensor, level: VideoLevel, mask_BM: Tensor | None, **kwargs):
        mask_BM = None if mask_BM is None else mask_BM.to(queries.device)  # layers may be on several
        if self.splits_keys(queries, queries.shape[2]):
            fp8 = level.key_scales_BHM is not None and queries.shape[2] <= MAX_FP8_QUERIES and reads_fp8(queries.device)
            keys, values, *scales = level if fp8 else level.stored_as(queries.dtype)
            return split_key_attention(queries, keys, values, self.scaling, mask_BM, *scales), None
        keys, values, *_ = level.stored_as(queries.dtype)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        kwargs |= {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        bias = None
        if mask_BM is not None:
            bias = torch.zeros(mask_BM.shape, dtype=queries.dtype, device=queries.device)
            bias = bias.masked_fill(~mask_BM, torch.finfo(queries.dtype).min)[:, None, None]
            bias = bias.expand(-1, -1, queries.shape[2], -1)
        with trained_sdpa(queries, keys.shape[2]):
            output, weights = attention(self, queries, keys, values, bias, **kwargs)
        return output if mask_BM is None else output * mask_BM.any(1)[:, None, None, None], weights

    def splits_keys(self, like: Tensor, queries: int) -> bool:
        """Whether our kernel takes so many queries of a video row, of the dtype, device and head dim of `like`."""
        dropout = self.training and self.attention_dropout > 0
        if torch.is_grad_enabled() or dropout or self.config._attn_implementation == "eager":
            return False
        return queries <= MAX_SPLIT_KEY_QUERIES and can_split_keys(like)

    def takes_masks(self, hidden_BND: Tensor) -> bool:
        """Whether padding of the video is best left to a mask: others than these repeat keys and values for it."""
        by_kernel = self.splits_keys(hidden_BND[..., : self.head_dim], hidden_BND.shape[0] * hidden_BND.shape[1])
        return by_kernel or is_tracing(hidden_BND) or self.config._attn_implementation == "eager"


def _in_order(outputs: list[tuple[TextSlice, Tensor]], like_BNHP: Tensor) -> Tensor:
    """The outputs of slices that come in the order of rows, or of the tokens of all rows; zeros between them."""
    if not outputs:
        return 0 * like_BNHP
    dim = 1 if outputs[0][0].rows is None else 0
    pieces, at, size = [], 0, like_BNHP.shape[dim]
    for text, output in outputs:
        start, stop = text[dim]
        pieces += [torch.zeros_like(like_BNHP.narrow(dim, at, start - at)), output]
        at = stop
    return torch.cat([*pieces, torch.zeros_like(like_BNHP.narrow(dim, at, size - at))], dim)


class VambaSelfAttention(Qwen2VLAttention):
    """Qwen2-VL's, with the rotary embedding in one kernel where no gradient is recorded on a GPU."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        if not can_use_inference_kernel(hidden_states, *position_embeddings):
            with trained_sdpa(hidden_states, hidden_states.shape[1]):
                return super().forward(
                    hidden_states, attention_mask, position_ids, past_key_values, position_embeddings, **kwargs
                )
        projections = (self.q_proj, self.k_proj, self.v_proj)
        projected = three_linears_triton(hidden_states, projections) or (
            overwritable(proj(hidden_states), proj) for proj in projections
        )
        queries, keys, values = (t.unflatten(-1, (-1, self.head_dim)) for t in projected)
        rotate_triton(queries, keys, *position_embeddings)
        queries, keys, values = (t.transpose(1, 2) for t in (queries, keys, values))
        if past_key_values is not None:
            layers = [] if past_key_values.offloading else past_key_values.layers  # those have to be brought back first
            layer = layers[self.layer_idx] if self.layer_idx < len(layers) else None
            if store_token_triton(keys, values, layer):
                keys, values = layer.keys, layer.values
            else:
                keys, values = past_key_values.update(keys, values, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        kwargs |= {"scaling": self.scaling, "sliding_window": self.sliding_window, "position_ids": position_ids}
        output, weights = attention(self, queries, keys, values, attention_mask, **kwargs)
        return self.o_proj(output.flatten(2)), weights


class VambaMLP(Qwen2MLP):
    """Qwen2-VL's, with the gate in one kernel where no gradient is recorded on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        if self.config.hidden_act != "silu" or has_hooks(self.act_fn) or not can_use_inference_kernel(x):
            return super().forward(x)
        return self.down_proj(silu_mul_triton(overwritable(self.gate_proj(x), self.gate_proj), self.up_proj(x)))


class VambaDecoderLayer(GradientCheckpointingLayer):
    """T' = T + alpha * SelfAttention(h) + (1 - alpha) * CrossAttention(h, V), then the MLP (equations 3 and 4).

    One norm feeds both attentions. Without gradients on a GPU what lies between the matrix products runs in fused
    kernels; the modules are called all the same, so that adapters and hooks work.
    """

    def __init__(self, config: VambaTextConfig, layer_idx: int):
        super().__init__()
        self.self_attn = VambaSelfAttention(config, layer_idx)
        self.cross_attn = VambaCrossAttention(config, layer_idx)
        self.mlp = VambaMLP(config)
        self.input_layernorm = FusedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = FusedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.alpha = nn.Parameter(torch.full((1,), 0.5)) if config.use_alpha_balancing else None

    def device_for(self, t: Tensor) -> torch.device:
        """Where this layer computes: beside its weights; where accelerate keeps those elsewhere it moves `t` itself."""
        device = self.cross_attn.q_proj.weight.device
        return t.device if device.type == "meta" else device

    def norm_level(self, vision_BSD: Tensor) -> Tensor:
        """A level of the video, normalised as the text (`cross_attn_use_layer_norm`)."""
        return self.input_layernorm(vision_BSD.to(self.device_for(vision_BSD)))

    def forward(
        self,
        hidden_states: Tensor,
        *video: Tensor | None,
        text_slices: list[TextSlice] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        query_position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """`video` are the four tensors of the `VideoLevel` that each of `text_slices` reads; None: there is no video.

        They are arguments of their own, as reentrant checkpoints look for gradients only there.
        """
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        crossed = None
        if text_slices is not None:
            # How samples are packed is the business of the self-attention: the slices keep them apart here.
            kwargs = {name: value for name, value in kwargs.items() if not name.startswith(("cu_seq_", "max_length"))}
            levels = [VideoLevel(*video[i : i + 4]) for i in range(0, len(video), 4)]
            videos = list(zip(text_slices, levels))
            crossed, _ = self.cross_attn(hidden_states, videos, query_position_embeddings, **kwargs)
        hidden_states, normed = self._mix(residual, attended, crossed)
        return hidden_states + self.mlp(normed)

    def _mix(self, residual: Tensor, attended: Tensor, crossed: Tensor | None) -> tuple[Tensor, Tensor]:
        """T' of equation 4, and its norm."""
        norm, alpha = self.post_attention_layernorm, self.alpha
        tensors = residual, attended, crossed, norm.weight
        if crossed is not None and is_plain(norm, FusedRMSNorm) and can_use_inference_kernel(*tensors):
            return mix_norm_triton(residual, attended, crossed, alpha, norm.weight, norm.eps)
        if alpha is not None:  # clamped; its gradient passes straight through, so that a step outside can be undone
            alpha = (alpha + (alpha.clamp(0, 1) - alpha).detach()).to(attended.dtype)
        if crossed is None:
            mixed = attended if alpha is None else alpha * attended
        else:
            mixed = attended + crossed if alpha is None else torch.lerp(crossed, attended, alpha)
        return residual + mixed, norm(residual + mixed)


class VambaTextModel(VambaPreTrainedModel):
    """Qwen2-VL's language model with a cross-attention to the video in every layer."""

    config: VambaTextConfig
    input_modalities = ("text",)
    _can_record_outputs = {
        "hidden_states": VambaDecoderLayer,
        "attentions": OutputRecorder(Qwen2VLAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(VambaCrossAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: VambaTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([VambaDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = FusedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2VLRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: VideoMemory | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        packed_lengths: list[int] | None = None,
        videos: list[tuple[tuple[int, int] | None, VideoMemory | VideoInCells]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        r"""
        packed_lengths (`list[int]`, *optional*):
            The lengths of the samples that one row of text consists of.
        videos (`list` of `((int, int), VideoMemory)`, *optional*):
            Which tokens of text, from the first to the second, read which video, in order; None stands for all. Behind
            them come videos that nobody reads. If not given all read that of `past_key_values`, if it has one.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        B, N, _ = inputs_embeds.shape
        memory = VideoMemory.of(past_key_values, self.config)
        memory.check(self.config, B, inputs_embeds.dtype)
        if videos is None and memory.video_length:
            videos = [(None, memory)]
        text_cache = memory if use_cache or memory.get_seq_length() else None
        starts_anew = None  # positions that start anew with each sample, for the mask
        if packed_lengths is not None:
            starts_anew = positions_in_samples(packed_lengths, inputs_embeds.device)
            kwargs |= varlen_kwargs(packed_lengths, inputs_embeds.device)
        elif position_ids is not None and is_tracing(inputs_embeds):  # which cannot look whether these do
            starts_anew = position_ids[0] if position_ids.dim() == 3 else position_ids
        position_ids = text_position_ids(position_ids, attention_mask, inputs_embeds, memory.get_seq_length())
        if isinstance(attention_mask, dict):  # made by `generate` for a static cache
            causal_mask = attention_mask["full_attention"]
        else:
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=text_cache,
                position_ids=starts_anew,
            )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        query_positions = position_embeddings if self.config.cross_attn_use_position_embeddings else None
        masked = self.layers[0].cross_attn.takes_masks(inputs_embeds)
        reads = [video.reads(inputs_embeds, tokens, masked) for tokens, video in videos or ()]
        hidden_states = inputs_embeds
        for index, layer in enumerate(self.layers):
            device = layer.device_for(inputs_embeds)
            levels = [video.level(index, device) for _, video in videos or ()]
            with _offloading_saved(videos or (), levels):
                hidden_states = layer(
                    hidden_states,
                    *(t for level, of_level in zip(levels, reads) for part in level.cut(of_level) for t in part),
                    text_slices=None if videos is None else [read.text for of_level in reads for read in of_level],
                    attention_mask=causal_mask,
                    past_key_values=text_cache,
                    position_embeddings=position_embeddings,
                    query_position_embeddings=query_positions,
                    **kwargs,
                )
            del levels  # of those made in cells only autograd keeps them
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(hidden_states), past_key_values=text_cache
        )


def _offloading_saved(
    videos: list[tuple[tuple[int, int] | None, VideoMemory | VideoInCells]], levels: list[VideoLevel]
):
    """Within, autograd keeps keys and values that were made in offloading cells in CPU memory."""
    moved = [
        t
        for (_, video), level in zip(videos, levels)
        if isinstance(video, VideoInCells) and video.cells.offload
        for t in level[:2]
    ]
    return offload_saved(*moved) if moved else contextlib.nullcontext()


@auto_docstring
class VambaModel(VideoEncodingMixin, VideoModelMixin, VambaPreTrainedModel):
    def __init__(self, config: VambaConfig):
        super().__init__(config)
        self.visual = vision_tower(config.vision_config)
        self.video_encoder = VambaVideoEncoder._from_config(config)
        self.language_model = VambaTextModel._from_config(config.text_config)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def get_video_features(
        self,
        pixel_values_videos: torch.FloatTensor,
        video_grid_thw: torch.LongTensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        video_grid_thw (`torch.LongTensor` of shape `(num_videos, 3)`):
            Temporal, height and width dimensions of each video in patches. `pooler_output` holds V_0 of each video,
            `(t * h * w / merge_size**2, hidden_size)`.
        """
        patches = normalized(pixel_values_videos, self.config).to(self.visual.dtype)
        output = self.visual(patches, grid_thw=video_grid_thw, **kwargs)
        output.pooler_output = output.pooler_output.split(
            [t * h * w // self.merged for t, h, w in video_grid_thw.tolist()]
        )
        return output

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        packed_lengths: list[int] | torch.LongTensor | None = None,
        video_times: Tensor | None = None,
        unrotate_video_keys: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPastAndCrossAttentions:
        r"""
        mm_token_type_ids (`torch.IntTensor` of shape `(batch_size, sequence_length)`, *optional*):
            1 at the `<|vision_start|>` of an image, 2 at that of a video; needed where a batch mixes the two.
        packed_lengths (`list[int]` or `torch.LongTensor` of shape `(number of samples,)`, *optional*):
            One row of text consists of samples of these lengths, which see neither each other nor each other's media.
            If not given they are told by `cu_seq_lens_q` or by `position_ids` that start anew within the row.
        video_times (`torch.Tensor` of shape `(sum of t, 2)`, *optional*):
            Start and end of each temporal patch of the videos in seconds, which the memory keeps.
        unrotate_video_keys (`bool`, *optional*, defaults to `False`):
            Read the video without positions although `cross_attn_use_position_embeddings` is set; see
            `VambaForConditionalGeneration.prepare_inputs_for_generation`.
        """
        inputs_embeds = self.embedded(input_ids, inputs_embeds, attention_mask)
        B, N, _ = inputs_embeds.shape
        memory = VideoMemory.of(past_key_values, self.config.text_config)
        pixels = {"image": pixel_values, "video": pixel_values_videos}
        grids = without_seen_grids(pixels, {"image": image_grid_thw, "video": video_grid_thw}, memory.media)
        if packed_lengths is None:
            packed_lengths = flattened_lengths(position_ids, attention_mask, kwargs.get("cu_seq_lens_q"))
        if packed_lengths is not None:
            if past_key_values is not None:
                raise ValueError("Samples packed into one row go without a cache: pass no past_key_values.")
            packed_lengths = torch.as_tensor(packed_lengths).tolist()
            of_samples = packed_lengths, video_times
            rows = self.media_rows(input_ids, inputs_embeds, mm_token_type_ids, pixels, grids, *of_samples)
            videos = [(VideoMemory(self.config), [row]) for row in rows if row]
            stops = accumulate(packed_lengths)
            texts = [(stop - length, stop) for stop, length, row in zip(stops, packed_lengths, rows) if row]
            if position_ids is None:
                position_ids = positions_in_samples(packed_lengths, inputs_embeds.device)
            attention_mask = None  # there is no padding within
        else:
            given = any(given is not None for given in (*pixels.values(), *grids.values()))
            of_text = input_ids, inputs_embeds, mm_token_type_ids
            rows = self.media_rows(*of_text, pixels, grids, video_times=video_times) if given else []
            videos, texts = ([(memory, rows)], [None]) if any(rows) else ([], [])
        if not videos:
            self.warn_of_unseen_media(input_ids, memory)
        if not videos and N > 1 and memory.video_length:  # not for each token that is decoded
            memory.check(self.config.text_config, B, inputs_embeds.dtype)
            self.check_weights(memory)
        sources, calls_are_shared = [], self.shares_calls(N)
        if videos or calls_are_shared:
            read_once = packed_lengths is not None or (past_key_values is None and not use_cache)
            sources = self.encode_media(videos, pixels, read_once=read_once)
        in_cells = [source for source in sources if isinstance(source, VideoInCells)]
        if packed_lengths is not None or (torch.is_grad_enabled() and weights_are_sharded(self)):
            for source in in_cells:  # backward may begin with another video, and ranks may differ in this
                source.cells.keeps_last = False
        memory.expand_rows(B)
        self._rotate_video_keys(memory, not unrotate_video_keys)
        if not videos and memory.video_length:
            texts, sources = [None], [memory, *sources]
        texts = [*texts, *[NOBODY] * (len(sources) - len(texts))]
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=memory,
            use_cache=False if packed_lengths is not None or in_cells else use_cache,
            packed_lengths=packed_lengths,
            videos=list(zip(texts, sources)) if sources or calls_are_shared else None,
            **kwargs,
        )


class VambaForConditionalGeneration(VideoHeadMixin, VambaGenerationMixin, VambaPreTrainedModel):
    """Vamba with a language model head; `forward` is `VideoHeadMixin`'s, `generate` GenerationMixin's."""

    _model_class, _output_class = VambaModel, CausalLMOutputWithCrossAttentions


VambaModel.register_for_auto_class("AutoModel")
VambaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = [
    "VambaForConditionalGeneration",
    "VambaModel",
    "VambaPreTrainedModel",
    "VambaTextModel",
    "VambaVideoEncoder",
]
