"""Qwen2-VL-style vision towers from transformers, with attention batched over the frames of a video.

What is unusual: transformers attends frame by frame in a Python loop and asks the GPU for the frames' lengths in every
layer. A video's frames are equally large and their sizes known beforehand, so each run of equal frames is one batch.

Shapes: F frames of L patches each, H heads, P head dim.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    VisionAttention,
    apply_rotary_pos_emb_vision,
)


class FrameBatchedAttention(VisionAttention):
    """`VisionAttention` that takes the runs of equal frames, [(F, L), ...], where the caller knows them."""

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        frame_runs: list[tuple[int, int]] | None = None,
        **kwargs,
    ) -> Tensor:
        # "eager" keeps the loop: it writes all attention weights out, which would be F times the memory
        if frame_runs is None or self.config._attn_implementation != "sdpa":
            return super().forward(hidden_states, cu_seqlens, position_embeddings, **kwargs)
        queries, keys, values = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        queries, keys = apply_rotary_pos_emb_vision(queries, keys, *position_embeddings)
        outputs, start = [], 0
        for count, length in frame_runs:
            run = slice(start, start + count * length)
            q_FHLP, k_FHLP, v_FHLP = (
                t[run].unflatten(0, (count, length)).transpose(1, 2) for t in (queries, keys, values)
            )
            attended = F.scaled_dot_product_attention(q_FHLP, k_FHLP, v_FHLP, scale=self.scaling)
            outputs.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
            start += count * length
        return self.proj(torch.cat(outputs))


def vision_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """A tower: forward(patches, grid_thw) gives the merged tokens as `pooler_output`.

    `qwen2_vl_vision` is the one such tower that AutoModel does not know.
    """
    if config.model_type != "qwen2_vl_vision":
        return AutoModel.from_config(config)
    tower = Qwen2VisionTransformerPretrainedModel._from_config(config)
    for block in tower.blocks:
        block.attn.__class__ = FrameBatchedAttention  # the same parameters, another order of computing
    tower.takes_frame_runs = True
    return tower


def frame_runs(grid_thw: list[list[int]]) -> list[tuple[int, int]]:
    """[(F, L), ...]: the frames of media with the given (t, h, w), neighbours of equal size taken together."""
    runs: list[tuple[int, int]] = []
    for t, h, w in grid_thw:
        count = runs.pop()[0] if runs and runs[-1][1] == h * w else 0
        runs.append((count + t, h * w))
    return runs
