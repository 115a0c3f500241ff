"""Vision towers: Qwen2-VL's with attention batched over the frames of a video, and Video-Ma2mba's CLIP with projector.

What is unusual: transformers attends frame by frame in a Python loop, and asks the GPU for the frames' lengths in every
layer. Here the sizes are known beforehand, so that consecutive frames of equal size are attended to as one batch.
On a GPU without gradients, Triton kernels replace the operations between the matrix products. CLIP's frames
arrive as patches in the order of Qwen2-VL's processors, and are put together again.

Shapes: F frames of L patches each, T patches of all frames, D width, H heads, P head dim; G patches along each side.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, CLIPVisionModel, PreTrainedConfig, PreTrainedModel
from transformers.activations import QuickGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    VisionAttention,
    VisionMlp,
    apply_rotary_pos_emb_vision,
)
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from .kernels import can_use_forward_kernel, has_hooks, overwritable
from .kernels_attention import cudnn_first, trained_sdpa
from .kernels_elementwise import quick_gelu_triton, rotate_in_place_triton
from .kernels_norm import layer_norm_triton


class PatchProjection(nn.Conv3d):
    """A convolution whose kernel covers a whole patch, as one matrix product: cuDNN is slow at it in bfloat16."""

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


class VambaVisionBlock(GradientCheckpointingLayer):
    """The pre-norm block of Qwen2-VL, which does its first residual sum and its second norm in one step."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.norm1 = FusedLayerNorm(config.embed_dim, eps=1e-6)
        self.norm2 = FusedLayerNorm(config.embed_dim, eps=1e-6)
        self.attn = FrameBatchedAttention(config)
        self.mlp = FusedMLP(config.embed_dim, int(config.embed_dim * config.mlp_ratio), config.hidden_act)

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        attended = self.attn(self.norm1(hidden_states), **kwargs)
        hidden_states, normed = self.norm2(attended, hidden_states)
        return hidden_states + self.mlp(normed)


class FusedLayerNorm(nn.LayerNorm):
    """LayerNorm of x; with a residual, returns (residual + x, LayerNorm of that). It takes half the time of torch's."""

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        entering = (x_TD,) if residual_TD is None else (x_TD, residual_TD)
        if can_use_forward_kernel(*entering, self.weight, self.bias):
            sum_TD, normed_TD = layer_norm_triton(x_TD, residual_TD, self.weight, self.bias, self.eps)
        else:
            sum_TD = x_TD if residual_TD is None else residual_TD + x_TD
            normed_TD = super().forward(sum_TD)
        return normed_TD if residual_TD is None else (sum_TD, normed_TD)


class FusedMLP(VisionMlp):
    """Qwen2-VL's MLP, with quick_gelu in place where nothing else can read its input."""

    def forward(self, x_TD: Tensor) -> Tensor:
        hidden = self.fc1(x_TD)
        if type(self.act) is QuickGELUActivation and not has_hooks(self.act) and can_use_forward_kernel(hidden):
            hidden = overwritable(hidden, self.fc1)
            return self.fc2(quick_gelu_triton(hidden, hidden))
        return self.fc2(self.act(hidden))


class FrameBatchedAttention(VisionAttention):
    """`VisionAttention` with one batch for each (F, L) of `frame_runs`: F consecutive frames of L patches each."""

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        frame_runs: list[tuple[int, int]] | None = None,
        **kwargs,
    ) -> Tensor:
        # "eager" keeps the loop, as it holds all attention weights at once: F times the memory if frames were batched.
        if self.config._attn_implementation != "sdpa" or frame_runs is None:
            # Passed by name: the function that transformers' exporters put in its place takes them in another order.
            kwargs |= {"cu_seqlens": cu_seqlens, "position_embeddings": position_embeddings}
            return super().forward(hidden_states, **kwargs)
        qkv_TD = self.qkv(hidden_states)
        fused = can_use_forward_kernel(qkv_TD)
        if fused:
            qkv_TD = overwritable(qkv_TD, self.qkv)
            rotate_in_place_triton(qkv_TD, *position_embeddings, self.num_heads)
        queries, keys, values = qkv_TD.unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        if not fused:
            queries, keys = apply_rotary_pos_emb_vision(queries, keys, *position_embeddings)
        outputs, start = [], 0
        for count, length in frame_runs:
            run = slice(start, start + count * length)
            q_FHLP, k_FHLP, v_FHLP = (
                t[run].unflatten(0, (count, length)).transpose(1, 2) for t in (queries, keys, values)
            )
            # On an H200 cuDNN is a quarter faster than flash attention, but prepares 30 ms for each new shape. That
            # pays off for many frames whose number is likely to come again: most chunks have a multiple of 16.
            repays_preparation = fused and count % 16 == 0 and count * length >= 16384
            with cudnn_first() if repays_preparation else trained_sdpa(qkv_TD, length):
                attended = F.scaled_dot_product_attention(q_FHLP, k_FHLP, v_FHLP, scale=self.scaling)
            outputs.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
            start += count * length
        return self.proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs))


class VambaVisionTower(Qwen2VisionTransformerPretrainedModel):
    """Qwen2-VL's vision tower, which does not wait for the GPU if `grid_thw` lies on the CPU."""

    _no_split_modules = ["VambaVisionBlock"]
    _can_record_outputs = {"hidden_states": VambaVisionBlock, "attentions": FrameBatchedAttention}

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.patch_embed.proj = PatchProjection(config.in_channels, config.embed_dim, size, stride=size, bias=False)
        self.blocks = nn.ModuleList([VambaVisionBlock(config) for _ in range(config.depth)])
        self.post_init()

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs):
        """Encodes patches (T, patch size) of media with the given (t, h, w); `pooler_output` holds the merged tokens.

        Callers may give `cu_seqlens` and `position_ids`; transformers' exporters do, as they cannot trace their making.
        """
        if "cu_seqlens" in kwargs:
            return super().forward(hidden_states, grid_thw, **kwargs)
        grid_thw = grid_thw.cpu()
        kwargs["frame_runs"] = frame_runs(grid_thw.tolist())
        kwargs["position_ids"] = get_vision_position_ids(grid_thw, self.spatial_merge_size, kwargs=kwargs)
        kwargs["cu_seqlens"] = get_vision_cu_seqlens(grid_thw, kwargs=kwargs)
        for name in ("position_ids", "cu_seqlens"):  # The copy of memory that is not pinned would wait for the GPU.
            pinned = kwargs[name].pin_memory() if hidden_states.is_cuda else kwargs[name]
            kwargs[name] = pinned.to(hidden_states.device, non_blocking=True)
        return super().forward(hidden_states, grid_thw, **kwargs)


def vision_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """Builds a tower whose forward(patches, grid_thw) returns the merged tokens as `pooler_output`."""
    if config.model_type == "qwen2_vl_vision":  # AutoModel does not know this one.
        return VambaVisionTower._from_config(config)
    return AutoModel.from_config(config)


def frame_runs(grid_thw: list[list[int]]) -> list[tuple[int, int]]:
    """Counts consecutive frames of equal size in media of the given (t, h, w): [(F, L), ...]."""
    runs: list[tuple[int, int]] = []
    for t, h, w in grid_thw:
        count = runs.pop()[0] if runs and runs[-1][1] == h * w else 0
        runs.append((count + t, h * w))
    return runs


class ProjectorLinear(nn.Linear):
    """Tells the model by its class which weights are initialised as the projector's."""


class VideoMa2mbaProjector(nn.Sequential):
    """Bilinear pooling of 2 x 2 patches, then Linear-GELU-Linear."""

    def __init__(self, vision_width: int, hidden_size: int):
        first, second = ProjectorLinear(vision_width, hidden_size), ProjectorLinear(hidden_size, hidden_size)
        super().__init__(first, nn.GELU(), second)

    def forward(self, patches_FLD: Tensor) -> Tensor:
        """Turns the patches of frames, (F, G * G, vision width), into tokens, (F, G / 2 * G / 2, D)."""
        grid = round(patches_FLD.shape[1] ** 0.5)
        grid_FDGG = patches_FLD.transpose(1, 2).unflatten(2, (grid, grid))
        pooled_FDGG = F.interpolate(grid_FDGG, size=(grid // 2, grid // 2), mode="bilinear", align_corners=False)
        return super().forward(pooled_FDGG.flatten(2).transpose(1, 2))


def clip_tower(config: PreTrainedConfig) -> CLIPVisionModel:
    """Builds CLIP's tower up to its penultimate layer, whose output the projector reads."""
    tower = CLIPVisionModel._from_config(config)
    del tower.encoder.layers[-1]
    tower.post_layernorm = nn.Identity()  # It normalises the pooled output, which nothing reads.
    return tower


def frames_of(patches: Tensor, grid: int, size: int) -> Tensor:
    """Assembles frames (F, 3, pixels, pixels) from patches in Qwen2-VL's order, in which 2 x 2 neighbours follow."""
    half = grid // 2
    patches = patches.view(-1, half, half, 2, 2, 3, size, size)
    return patches.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(-1, 3, grid * size, grid * size)
