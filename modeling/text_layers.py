"""Qwen2-VL's self-attention and MLP, with what lies between the matrix products in our kernels.

What is unusual: where no gradient is recorded on a GPU the rotary embedding, the gate and the cache's next token are
one kernel each; the modules of the matrix products are called all the same, so that adapters and hooks work.
"""

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2MLP, Qwen2VLAttention, eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .text_triton import fusible, rotate_triton, silu_mul_triton, store_token_triton, three_linears_triton
from .triton_launch import is_unhooked, overwritable


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
        if not fusible(hidden_states, *position_embeddings):
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
        if self.config.hidden_act != "silu" or not is_unhooked(self.act_fn) or not fusible(x):
            return super().forward(x)
        return self.down_proj(silu_mul_triton(overwritable(self.gate_proj(x), self.gate_proj), self.up_proj(x)))


__all__ = ["VambaMLP", "VambaSelfAttention"]
