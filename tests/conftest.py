"""What tests of all rooms share: the tiny model, its inputs, and where real footage and golden numbers lie."""

from pathlib import Path

import pytest
import torch

from vamba.conversion import convert
from vamba.demo.tiny_checkpoint import make_tiny_qwen2_vl
from vamba.modeling import VambaConfig, VambaForConditionalGeneration


SHARED = Path(__file__).resolve().parents[1].parent / "shared"
START, END = 4, 5  # <|vision_start|> and <|vision_end|> of the tiny model


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    return SHARED


@pytest.fixture(scope="session")
def footage(shared) -> Path:
    """Six seconds of real 1080p60 H.264."""
    return shared / "videos" / "magic_1080p_6s.mp4"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny checkpoint in our format, converted by the real converter."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_tiny_qwen2_vl(folder / "qwen", ["What happens in the video?"], num_layers=3)
    mixer = {"head_dim": 16, "state_size": 16, "chunk_size": 16}
    return convert(folder / "qwen", folder / "vamba", mamba_config=mixer, progress=False)


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """Two seconds of a moving square at 8 frames per second."""
    import av
    import numpy as np

    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for index in range(16):
            picture = np.full((64, 64, 3), 40, np.uint8)
            picture[20:40, 3 * index : 3 * index + 16] = (250, 60, 30)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def tiny_config(**text) -> VambaConfig:
    return VambaConfig(
        text_config={
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": None,
            **text,
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2, "patch_size": 4},
        mamba_config={"hidden_size": 64, "state_size": 16, "head_dim": 16, "chunk_size": 16},
        vision_start_token_id=START,
        vision_end_token_id=END,
        image_token_id=6,
        video_token_id=7,
    )


def tiny_model(**text) -> VambaForConditionalGeneration:
    """Random weights far enough from their initial values that every part leaves its mark on the logits."""
    torch.manual_seed(0)
    model = VambaForConditionalGeneration(tiny_config(**text)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "mixer" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif "norm" not in name and "A_log" not in name and "dt_bias" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="session")
def model() -> VambaForConditionalGeneration:
    return tiny_model()


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
