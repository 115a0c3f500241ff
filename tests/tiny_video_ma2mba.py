"""The tiny Video-Ma2mba of the tests, and inputs for it."""

import torch

from vamba.demo.tiny_checkpoints import MIXER
from vamba.modeling import VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration

from tiny_vamba import spread


START, END = 90, 91  # <|vision_start|> and <|vision_end|> of the tiny model
PER_FRAME, PATCHES, PATCH_SIZE = 4, 16, 4


def tiny_config(**text) -> VideoMa2mbaConfig:
    return VideoMa2mbaConfig(
        text_config={
            "vocab_size": 96,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "eos_token_id": None,
            **MIXER,
            **text,
        },
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": PATCH_SIZE,
        },
        vision_start_token_id=START,
        vision_end_token_id=END,
        image_token_id=92,
        video_token_id=93,
    )


def tiny_model(**text) -> VideoMa2mbaForConditionalGeneration:
    torch.manual_seed(0)
    return spread(VideoMa2mbaForConditionalGeneration(tiny_config(**text)), kept=("A_log", "dt_bias"))


def video(*frames: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Patches and grid of videos of so many frames, as the video processor makes them."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(sum(frames) * PATCHES, 3 * PATCH_SIZE**2, generator=generator)
    return {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([[t, 4, 4] for t in frames])}


def image(count: int = 1, seed: int = 1) -> dict[str, torch.Tensor]:
    of = video(*[1] * count, seed=seed)
    return {"pixel_values": of["pixel_values_videos"], "image_grid_thw": of["video_grid_thw"]}


def prompt(length: int, items: int = 0, seed: int = 0) -> torch.Tensor:
    """(1, N) token ids with `items` times `<|vision_start|><|vision_end|>` in front."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 90, (length,), generator=generator)
    return torch.cat([torch.tensor([START, END] * items, dtype=torch.long), ids])[None]
