"""Cross-attention from text to the video memory, on whatever attention implementation the model uses.

What is unusual: rows of text that read the same video are folded into its queries, so that beams and batches of
questions never copy keys and values; rows with different numbers of video tokens are masked, or packed for flash
attention; a row without video reads zeros. On a GPU and without gradients few queries go through our own kernel, split
over the keys, for any implementation but "eager".

Shapes: B rows of text, N text tokens, M video tokens, S video tokens of one chunk, D hidden, H heads, P head dim.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLAttention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import is_flash_attention_requested

from .configuration_vamba import VambaTextConfig
from .kernels_attention import can_split_keys, reads_fp8, split_key_attention
from .video_level import VideoLevel


# Beyond as many queries, text rows that share a video counted together, flash attention fills the GPU by itself.
MAX_SPLIT_KEY_QUERIES = 1024
# With more, our kernel would widen the same fp8 keys so often that it pays to do it once beforehand.
MAX_FP8_QUERIES = 32


class VambaCrossAttention(Qwen2VLAttention):
    """Text queries over the video memory: no causal mask, by default no positions."""

    def __init__(self, config: VambaTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = False
        self.sliding_window = None

    def key_value(
        self, vision_BSD: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H_kv, S, P) of S video tokens."""
        keys, values = (
            proj(vision_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in (self.k_proj, self.v_proj)
        )
        if position_embeddings is not None:
            cos_sin = (t.to(keys.device) for t in position_embeddings)  # a model may be spread over devices
            keys, _ = apply_rotary_pos_emb(keys, keys, *cos_sin)
        return keys, values

    def forward(
        self,
        hidden_BND: Tensor,
        video: VideoLevel,
        video_mask_BM: Tensor | None = None,
        video_rows: list[int] | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """Reads keys and values of the video rows; text rows that share one fold into its queries, so it is not copied.

        A text row whose video row holds no token reads zeros.
        """
        B, N, _ = hidden_BND.shape
        if video_rows is not None and not is_repeat(video_rows, video.keys_BHMP.shape[0]):
            index = torch.tensor(video_rows, device=video.keys_BHMP.device)
            video = video.map(lambda t: t[index])
            video_mask_BM = None if video_mask_BM is None else video_mask_BM[index.to(video_mask_BM.device)]
        queries = self.q_proj(hidden_BND).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if position_embeddings is not None:
            queries, _ = apply_rotary_pos_emb(queries, queries, *position_embeddings)
        share = B // video.keys_BHMP.shape[0]  # text rows per video row
        queries = queries.unflatten(0, (-1, share)).transpose(1, 2).flatten(2, 3)  # (B / share, H, share * N, P)
        output, weights = self._attend(queries, video, video_mask_BM, **kwargs)
        output = output.unflatten(1, (share, N)).reshape(B, N, -1)
        if weights is not None:
            weights = weights.unflatten(2, (share, N)).transpose(1, 2).flatten(0, 1)
        return self.o_proj(output), weights

    def _attend(self, queries: Tensor, video: VideoLevel, mask_BM: Tensor | None, **kwargs):
        mask_BM = None if mask_BM is None else mask_BM.to(queries.device)
        if self._splits_keys(queries):
            fp8 = video.key_scales_BHM is not None and queries.shape[2] <= MAX_FP8_QUERIES and reads_fp8(queries.device)
            keys, values, *scales = video if fp8 else video.stored_as(queries.dtype)
            return split_key_attention(queries, keys, values, self.scaling, mask_BM, *scales), None
        keys, values, *_ = video.stored_as(queries.dtype)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        kwargs |= {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        if mask_BM is None:
            return attention(self, queries, keys, values, None, **kwargs)
        if is_flash_attention_requested(self.config):
            output = _varlen_attention(self, attention, queries, keys, values, mask_BM, **kwargs)
            return output, None
        bias = torch.zeros(mask_BM.shape, dtype=queries.dtype, device=queries.device)
        bias = bias.masked_fill(~mask_BM, torch.finfo(queries.dtype).min)[:, None, None]
        bias = bias.expand(-1, -1, queries.shape[2], -1)
        output, weights = attention(self, queries, keys, values, bias, **kwargs)
        return output * mask_BM.any(1)[:, None, None, None], weights

    def _splits_keys(self, queries: Tensor) -> bool:
        dropout = self.training and self.attention_dropout > 0
        if torch.is_grad_enabled() or dropout or self.config._attn_implementation == "eager":
            return False
        return queries.shape[2] <= MAX_SPLIT_KEY_QUERIES and can_split_keys(queries)


def is_repeat(rows: list[int], num_video_rows: int) -> bool:
    """Whether rows is 0, 0, 1, 1, ...: each video row once, in order, repeated equally often."""
    share = len(rows) // num_video_rows
    return rows == [row for row in range(num_video_rows) for _ in range(share)]


def _varlen_attention(module, attention, queries, keys, values, mask_BM, **kwargs) -> Tensor:
    """Flash attention over rows with different numbers of video tokens: all rows packed, no padding computed."""
    B, _, N, _ = queries.shape
    lengths = mask_BM.sum(1, dtype=torch.int32)
    seen = lengths.nonzero().flatten()  # rows without video read zeros
    output = queries.new_zeros(B, N, queries.shape[1], queries.shape[3])
    if len(seen) == 0:
        return output
    packed = [t.transpose(1, 2)[mask_BM].unsqueeze(0).transpose(1, 2) for t in (keys, values)]
    packed_queries = queries[seen].transpose(1, 2).flatten(0, 1).unsqueeze(0).transpose(1, 2)
    starts_k = nn.functional.pad(lengths[seen].cumsum(0, dtype=torch.int32), (1, 0))
    starts_q = torch.arange(len(seen) + 1, device=queries.device, dtype=torch.int32) * N
    packed_output, _ = attention(
        module, packed_queries, *packed, None,
        cu_seq_lens_q=starts_q, cu_seq_lens_k=starts_k, max_length_q=N, max_length_k=int(lengths.max()),
        is_causal=False, **kwargs,
    )  # fmt: skip
    output[seen] = packed_output.view(len(seen), N, *packed_output.shape[2:])
    return output
