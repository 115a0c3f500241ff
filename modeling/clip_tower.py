"""Video-Ma2mba's eyes: CLIP's tower up to its penultimate layer, 2 x 2 pooling, and a projector.

What is unusual: frames come as patches in the order of Qwen2-VL's processors, as for Vamba, and are put together again.

Shapes: F frames, G patches along each side of a frame, D hidden.
"""

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel, PreTrainedConfig


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


def vision_tower(config: PreTrainedConfig) -> CLIPVisionModel:
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


__all__ = ["ProjectorLinear", "VideoMa2mbaProjector", "frames_of", "vision_tower"]
