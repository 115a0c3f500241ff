"""What tests of all rooms share: the tiny model, its inputs, and where real footage and golden numbers lie."""

import gc
from pathlib import Path

import pytest
import torch

from vamba.conversion import convert
from vamba.demo.tiny_checkpoints import MIXER, make_tiny_clip, make_tiny_mamba2, make_tiny_qwen2_vl
from vamba.modeling import VambaForConditionalGeneration

from tiny_vamba import tiny_model


SHARED = Path(__file__).resolve().parents[1].parent / "shared"


def pytest_collection_finish():
    """What was imported is never garbage: without it, collecting takes a tenth of the time."""
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


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
    make_tiny_qwen2_vl(folder / "qwen", ["What happens in the video?"])
    return convert(folder / "qwen", folder / "vamba", mamba_config=MIXER, progress=False)


@pytest.fixture(scope="session")
def ma2mba(tmp_path_factory) -> Path:
    """A tiny Video-Ma2mba, converted by the real converter."""
    folder = tmp_path_factory.mktemp("ma2mba")
    make_tiny_mamba2(folder / "mamba2", ["What happens in the video?"], seed=3)
    make_tiny_clip(folder / "clip", image_size=32, patch_size=8)
    return convert(folder / "mamba2", folder / "video-ma2mba", vision=folder / "clip", progress=False)


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


@pytest.fixture(scope="session")
def model() -> VambaForConditionalGeneration:
    return tiny_model()
