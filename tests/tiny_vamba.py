"""The tiny model of the tests, and inputs for it."""

import torch

from vamba.demo.tiny_checkpoints import MIXER, TEXT, VISION
from vamba.modeling import VambaConfig, VambaForConditionalGeneration


START, END = 4, 5  # <|vision_start|> and <|vision_end|> of the tiny model


def tiny_config(**text) -> VambaConfig:
    return VambaConfig(
        text_config=TEXT | {"vocab_size": 96, "bos_token_id": None, "eos_token_id": None} | text,
        vision_config=VISION | {"patch_size": 4},
        mamba_config=MIXER | {"hidden_size": 64},
        vision_start_token_id=START,
        vision_end_token_id=END,
        image_token_id=6,
        video_token_id=7,
    )


def tiny_model(**text) -> VambaForConditionalGeneration:
    torch.manual_seed(0)
    return spread(VambaForConditionalGeneration(tiny_config(**text)), kept=("norm", "A_log", "dt_bias"))


def spread(model, kept: tuple[str, ...]):
    """Random weights far enough from their initial values that every part leaves its mark on the logits, except vectors
    that have one of `kept` in their name."""
    with torch.no_grad():
        for name, parameter in model.eval().named_parameters():
            if parameter.dim() > 1 and "mixer" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif not any(part in name for part in kept):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def media(*grids: tuple[int, int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches and grid of media with the given (t, h, w), as the image and video processors make them."""
    generator = torch.Generator().manual_seed(seed)
    patches = sum(t * h * w for t, h, w in grids)
    return torch.randn(patches, 96, generator=generator), torch.tensor(grids)


def prompt(length: int, items: int = 0, seed: int = 0) -> torch.Tensor:
    """(1, N) token ids with `items` times `<|vision_start|><|vision_end|>` in front."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, 96, (length,), generator=generator)
    return torch.cat([torch.tensor([START, END] * items, dtype=torch.long), ids])[None]
