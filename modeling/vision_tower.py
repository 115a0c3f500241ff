"""Vision towers: Qwen2-VL's with attention batched over the frames of a video, and Video-Ma2mba's CLIP with projector.

What is unusual: transformers attends frame by frame in a Python loop and asks the GPU for the frames' lengths in every
layer. A video's frames are equally large and their sizes known beforehand, so each run of equal frames is one batch.
Where no gradient is recorded on a GPU, Triton kernels take the place of the operations between the matrix products.
CLIP gets its frames as patches in the order of Qwen2-VL's processors, and puts them together again.

Shapes: F frames of L patches each, T patches of all frames, D width, H heads, P head dim; G patches along each side.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.backends.cuda import cudnn_sdp_enabled, flash_sdp_enabled, math_sdp_enabled, mem_efficient_sdp_enabled
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
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
from .kernels_elementwise import quick_gelu_triton, rotate_in_place_triton
from .kernels_norm import layer_norm_triton


class PatchProjection(nn.Conv3d):
    """A convolution whose kernel covers a patch: one matrix product, where cuDNN would be slow in bfloat16."""

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


class VambaVisionBlock(GradientCheckpointingLayer):
    """The pre-norm block, with the first residual sum and the second norm as one step."""

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
    """LayerNorm, or with a residual (residual + x, its LayerNorm); torch's own takes twice the time of its bytes."""

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        entering = (x_TD,) if residual_TD is None else (x_TD, residual_TD)
        if can_use_forward_kernel(*entering, self.weight, self.bias):
            sum_TD, normed_TD = layer_norm_triton(x_TD, residual_TD, self.weight, self.bias, self.eps)
        else:
            sum_TD = x_TD if residual_TD is None else residual_TD + x_TD
            normed_TD = super().forward(sum_TD)
        return normed_TD if residual_TD is None else (sum_TD, normed_TD)


class FusedMLP(VisionMlp):
    """quick_gelu in place, where nobody else reads the output of the product before it."""

    def forward(self, x_TD: Tensor) -> Tensor:
        hidden = self.fc1(x_TD)
        if type(self.act) is QuickGELUActivation and not has_hooks(self.act) and can_use_forward_kernel(hidden):
            hidden = overwritable(hidden, self.fc1)
            return self.fc2(quick_gelu_triton(hidden, hidden))
        return self.fc2(self.act(hidden))


class FrameBatchedAttention(VisionAttention):
    """`VisionAttention` over runs of equal frames, [(F, L), ...], each run one batch."""

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        frame_runs: list[tuple[int, int]] | None = None,
        **kwargs,
    ) -> Tensor:
        # "eager" keeps the loop: it writes all attention weights out, which would be F times the memory
        if self.config._attn_implementation != "sdpa" or frame_runs is None:
            # by name, as what transformers' exporters put in its place has other parameters in between
            return super().forward(
                hidden_states, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **kwargs
            )
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
            # On an H200 cuDNN is a quarter faster than flash, after 30 ms of preparation for each new shape: it is for
            # many frames, in a number that is likely to come again, as most chunks of a video are multiples of 16.
            repays_a_plan = fused and count % 16 == 0 and count * length >= 16384
            with cudnn_first() if repays_a_plan else nullcontext():
                attended = F.scaled_dot_product_attention(q_FHLP, k_FHLP, v_FHLP, scale=self.scaling)
            outputs.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
            start += count * length
        return self.proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs))


class VambaVisionTower(Qwen2VisionTransformerPretrainedModel):
    """Qwen2-VL's tower; does not wait for the GPU if `grid_thw` lies on the CPU."""

    _no_split_modules = ["VambaVisionBlock"]
    _can_record_outputs = {"hidden_states": VambaVisionBlock, "attentions": FrameBatchedAttention}

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.patch_embed.proj = PatchProjection(config.in_channels, config.embed_dim, size, stride=size, bias=False)
        self.blocks = nn.ModuleList([VambaVisionBlock(config) for _ in range(config.depth)])
        self.post_init()

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs):
        """Patches (T, patch size) of media with the given (t, h, w); the merged tokens are the `pooler_output`.

        `cu_seqlens` and `position_ids` may be given, as by transformers' exporters, which cannot trace their making.
        """
        if "cu_seqlens" in kwargs:
            return super().forward(hidden_states, grid_thw, **kwargs)
        grid_thw = grid_thw.cpu()
        kwargs["frame_runs"] = frame_runs(grid_thw.tolist())
        for name, value in (
            ("position_ids", get_vision_position_ids(grid_thw, self.spatial_merge_size, kwargs=kwargs)),
            ("cu_seqlens", get_vision_cu_seqlens(grid_thw, kwargs=kwargs)),
        ):
            pinned = value.pin_memory() if hidden_states.is_cuda else value  # else the copy would wait for the GPU
            kwargs[name] = pinned.to(hidden_states.device, non_blocking=True)
        return super().forward(hidden_states, grid_thw, **kwargs)


def cudnn_first():
    """A context in which sdpa prefers cuDNN; backends that are disabled stay so."""
    order = {
        SDPBackend.CUDNN_ATTENTION: cudnn_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: mem_efficient_sdp_enabled(),
        SDPBackend.MATH: math_sdp_enabled(),
    }
    return sdpa_kernel([backend for backend, enabled in order.items() if enabled], set_priority=True)


def vision_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """A tower: forward(patches, grid_thw) gives the merged tokens as `pooler_output`.

    `qwen2_vl_vision` is the one such tower that AutoModel does not know.
    """
    if config.model_type == "qwen2_vl_vision":
        return VambaVisionTower._from_config(config)
    return AutoModel.from_config(config)


def frame_runs(grid_thw: list[list[int]]) -> list[tuple[int, int]]:
    """[(F, L), ...]: the frames of media with the given (t, h, w), neighbours of equal size taken together."""
    runs: list[tuple[int, int]] = []
    for t, h, w in grid_thw:
        count = runs.pop()[0] if runs and runs[-1][1] == h * w else 0
        runs.append((count + t, h * w))
    return runs


class ProjectorLinear(nn.Linear):
    """By its class the model knows which weights to give the projector's initial values."""


class VideoMa2mbaProjector(nn.Sequential):
    """2x2 bilinear pooling, then Linear-GELU-Linear."""

    def __init__(self, vision_width: int, hidden_size: int):
        super().__init__(
            ProjectorLinear(vision_width, hidden_size), nn.GELU(), ProjectorLinear(hidden_size, hidden_size)
        )

    def forward(self, patches_FPD: Tensor) -> Tensor:
        """(F, G * G, vision width) patches of F frames to (F, G / 2 * G / 2, D)."""
        grid = round(patches_FPD.shape[1] ** 0.5)
        grid_FDGG = patches_FPD.transpose(1, 2).unflatten(2, (grid, grid))
        pooled_FDGG = F.interpolate(grid_FDGG, size=(grid // 2, grid // 2), mode="bilinear", align_corners=False)
        return super().forward(pooled_FDGG.flatten(2).transpose(1, 2))


def clip_tower(config: PreTrainedConfig) -> CLIPVisionModel:
    """CLIP's tower up to its penultimate layer, whose output is what is read, and without what comes after."""
    tower = CLIPVisionModel._from_config(config)
    del tower.encoder.layers[-1]
    tower.post_layernorm = nn.Identity()  # of the pooled output, which is not read either
    return tower


def frames_of(patches: Tensor, grid: int, size: int) -> Tensor:
    """(F, 3, pixels, pixels) frames of patches in the order of Qwen2-VL's processors: 2 x 2 neighbours together."""
    half = grid // 2
    patches = patches.view(-1, half, half, 2, 2, 3, size, size)
    return patches.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(-1, 3, grid * size, grid * size)
