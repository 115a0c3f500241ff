"""Vamba's decoder layer: Qwen2-VL's, with a cross-attention to the video mixed into the self-attention by alpha.

What is unusual: one norm feeds both attentions, and the video comes as the keys and values that the layer itself has
made of its level of the video stream (`video_key_value`). Where no gradient is recorded on a GPU, what lies between the
matrix products runs in the kernels of `kernels_elementwise`; the modules are called all the same, so that adapters and
hooks work.

Shapes: B batch, M video tokens, N text tokens, S video tokens of one chunk, D hidden, H heads, P head dim.
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2MLP,
    Qwen2VLAttention,
    Qwen2VLDecoderLayer,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_vamba import VambaTextConfig
from .cross_attention import VambaCrossAttention
from .kernels import can_use_inference_kernel, has_hooks, overwritable
from .kernels_elementwise import (
    mix_norm_triton,
    rotate_triton,
    silu_mul_triton,
    store_token_triton,
    three_linears_triton,
)
from .kernels_norm import FusedRMSNorm
from .video_level import VideoLevel


class VambaSelfAttention(Qwen2VLAttention):
    """Qwen2-VL's, with the rotary embedding in one kernel where no gradient is recorded on a GPU."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        if not can_use_inference_kernel(hidden_states, *position_embeddings):
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


class VambaDecoderLayer(Qwen2VLDecoderLayer):
    """T' = T + alpha * SelfAttention(h) + (1 - alpha) * CrossAttention(h, V), then the MLP (equations 3 and 4)."""

    def __init__(self, config: VambaTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        for name in ("input_layernorm", "post_attention_layernorm"):  # torch's is one kernel, Qwen2-VL's eight
            setattr(self, name, FusedRMSNorm(config.hidden_size, eps=config.rms_norm_eps))
        self.self_attn.__class__, self.mlp.__class__ = VambaSelfAttention, VambaMLP  # the same parameters
        self.cross_attn = VambaCrossAttention(config, layer_idx)
        self.norm_video = config.cross_attn_use_layer_norm
        self.alpha = nn.Parameter(torch.full((1,), 0.5)) if config.use_alpha_balancing else None

    def device_for(self, t: Tensor) -> torch.device:
        """Where this layer computes: beside its weights; where accelerate keeps those elsewhere it moves `t` itself."""
        device = self.cross_attn.k_proj.weight.device
        return t.device if device.type == "meta" else device

    def video_key_value(
        self, vision_BSD: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The video states as the next Mamba-2 block should get them, and this layer's keys and values of them."""
        vision_BSD = vision_BSD.to(self.device_for(vision_BSD))
        if self.norm_video:
            vision_BSD = self.input_layernorm(vision_BSD)
        return vision_BSD, *self.cross_attn.key_value(vision_BSD, position_embeddings)

    def forward(
        self,
        hidden_states: Tensor,
        *video: Tensor | None,
        video_mask_BM: Tensor | None = None,
        video_rows: list[int] | None = None,
        packed_lengths: list[int] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        query_position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """`video` are the four tensors of a `VideoLevel`, or Nones: of the row's, or of each packed sample's in order.

        They are arguments of their own, as reentrant checkpoints look for gradients only there. Behind them may come
        those of levels that are read for nothing.
        """
        videos = [VideoLevel(*video[i : i + 4]) if video[i] is not None else None for i in range(0, len(video), 4)]
        read = len(packed_lengths or [None])
        videos, videos_besides = videos[:read], videos[read:]
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        # How samples are packed is the self-attention's business; the cross-attention is called for each of them.
        kwargs = {name: value for name, value in kwargs.items() if not name.startswith(("cu_seq_lens", "max_length"))}
        crossed = None
        if packed_lengths is not None:
            samples = [*zip(packed_lengths, videos)]
            crossed = self._cross_packed(hidden_states, samples, query_position_embeddings, **kwargs)
        elif any(videos):
            crossed, _ = self.cross_attn(
                hidden_states, *videos, video_mask_BM, video_rows, query_position_embeddings, **kwargs
            )
        for video in videos_besides:
            nothing = self._read_for_nothing(hidden_states, video, query_position_embeddings, **kwargs)
            crossed = nothing.expand_as(hidden_states) if crossed is None else crossed + nothing
        hidden_states, normed = self._mix(residual, attended, crossed)
        return hidden_states + self.mlp(normed)

    def _cross_packed(
        self,
        hidden_BND: Tensor,
        videos: list[tuple[int, VideoLevel | None]],
        position_embeddings: tuple[Tensor, Tensor] | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """Each sample of a packed row reads its own video, or zeros if it has none."""
        outputs, start = [], 0
        for length, video in videos:
            part = hidden_BND[:, start : start + length]
            positions = position_embeddings and tuple(t[:, start : start + length] for t in position_embeddings)
            crossed = torch.zeros_like(part)
            if video is not None:
                crossed, _ = self.cross_attn(part, video, None, None, positions, **kwargs)
            outputs.append(crossed)
            start += length
        return torch.cat(outputs, 1)

    def _read_for_nothing(
        self,
        hidden_BND: Tensor,
        video: VideoLevel | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """Zero: the first token reads a video, or zeros, only because another rank reads one more (see `ranks`)."""
        first = hidden_BND[:1, :1]
        if video is None:
            zeros = first.new_zeros(1, self.cross_attn.num_key_value_heads, 1, self.cross_attn.head_dim)
            video = VideoLevel(zeros, zeros)
        positions = position_embeddings and tuple(t[:1, :1] for t in position_embeddings)
        return 0 * self.cross_attn(first, video, None, None, positions, **kwargs)[0].sum()

    def _mix(self, residual: Tensor, attended: Tensor, crossed: Tensor | None) -> tuple[Tensor, Tensor]:
        """T' of equation 4, and its norm."""
        norm, alpha = self.post_attention_layernorm, self.alpha
        tensors = residual, attended, crossed, norm.weight
        if crossed is not None and not has_hooks(norm) and can_use_inference_kernel(*tensors):
            return mix_norm_triton(residual, attended, crossed, alpha, norm.weight, norm.eps)
        if alpha is not None:
            alpha = _clamp_to_unit(alpha).to(attended.dtype)
        if crossed is None:
            mixed = attended if alpha is None else alpha * attended
        else:
            mixed = attended + crossed if alpha is None else torch.lerp(crossed, attended, alpha)
        return residual + mixed, norm(residual + mixed)


def _clamp_to_unit(alpha: Tensor) -> Tensor:
    """alpha clamped to [0, 1] with the gradient passed straight through, so that a step outside can be undone.

    The original clamps the parameter in place during forward; its values and gradients are the same.
    """
    return alpha + (alpha.clamp(0, 1) - alpha).detach()
