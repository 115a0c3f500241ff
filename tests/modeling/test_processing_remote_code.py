"""The processors' files by themselves, as `trust_remote_code=True` loads them, with and without the package `vamba`."""

import importlib
import logging
import sys
import types

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor
from transformers.dynamic_module_utils import get_relative_imports

from vamba.demo.tiny_checkpoints import CHAT_TEMPLATE, tiny_neox_tokenizer, tiny_tokenizer
from vamba.modeling import VambaProcessor, VideoMa2mbaProcessor

from tiny_video_ma2mba import tiny_config


MARK = "<|vision_start|><|vision_end|>"


def package_processor(kind):
    if kind == "video_ma2mba":
        return VideoMa2mbaProcessor.for_model(tiny_config(), tiny_neox_tokenizer(["What happens?"]))
    options = {"patch_size": 4, "size": {"shortest_edge": 8 * 8, "longest_edge": 32 * 48}}
    parts = Qwen2VLImageProcessor(**options), tiny_tokenizer(["What happens?"]), Qwen2VLVideoProcessor(**options)
    return VambaProcessor(*parts, chat_template=CHAT_TEMPLATE)


@pytest.fixture(params=["vamba", "video_ma2mba"])
def processor(request):
    return package_processor(request.param)


@pytest.fixture
def alone(processor, tmp_path, monkeypatch):
    """Makes the same processor of the code that is saved with it."""
    processor.save_pretrained(tmp_path)
    package = types.ModuleType("saved_code")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "saved_code", package)

    def load(with_vamba: bool):
        if not with_vamba:
            monkeypatch.setitem(sys.modules, "vamba", None)
        module = importlib.import_module(f"saved_code.{type(processor).__module__.split('.')[-1]}")
        made = getattr(module, type(processor).__name__)
        assert made is not type(processor)
        parts = processor.image_processor, processor.tokenizer, processor.video_processor
        return made(*parts, chat_template=processor.chat_template)

    yield load
    for name in [name for name in sys.modules if name.startswith("saved_code.")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """20 smooth pictures that get brighter, at 5 a second."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    ramp = np.linspace(0, 60, 96)[None, :, None] * np.ones((64, 1, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(20):
            picture = (ramp + 9 * index).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def said(monkeypatch):
    """What the logger of the saved code says once."""
    said = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, line: said.append(line), raising=False)
    return said


def test_exactly_the_code_that_is_needed_is_saved(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    names = {file.stem for file in tmp_path.glob("*.py")}
    own = {"processing_vamba", "images", "media_limits", type(processor).__module__.split(".")[-1]}
    assert {name for name in names if not name.startswith("configuration_")} == own
    assert {name for file in tmp_path.glob("*.py") for name in get_relative_imports(file)} | own == names


@pytest.mark.parametrize("with_vamba", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"fps": 2.0}, {"fps": 100.0}, {"num_frames": 7}, {"num_frames": 99}, {"start": 1.0, "end": 2.2, "fps": 5},
        {"num_frames": 3, "start": 0.5, "end": 3.0}, {"fps": 5, "max_frames": 8}, {"fps": 0.5, "min_frames": 6},
        {"fps": 5.0, "max_pixels": 16 * 24}, {"fps": 5.0, "total_pixels": 10 * 20 * 30},
        {"num_frames": 4, "resized_height": 16, "resized_width": 32},
    ],
)  # fmt: skip
def test_a_file_gives_the_same_frames(processor, alone, film, said, with_vamba, options):
    content = [{"type": "video", "video": str(film), **options}, {"type": "text", "text": "What happens?"}]
    chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = processor.apply_chat_template([{"role": "user", "content": content}], **chat)
    inputs = alone(with_vamba).apply_chat_template([{"role": "user", "content": content}], **chat)
    assert inputs["video_grid_thw"].tolist() == expected["video_grid_thw"].tolist()
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    if with_vamba:
        assert said == [] and torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"])
    else:  # another library resizes
        assert len(said) == 1 and "load_video" in said[0] and "pip install vamba" in said[0]
        torch.testing.assert_close(inputs["pixel_values_videos"], expected["pixel_values_videos"], atol=0.08, rtol=0)


def test_frames_in_memory_and_images_without_the_package(processor, alone, film):
    pictures = [Image.new("RGB", (96, 64), (20 * index,) * 3) for index in range(6)]
    arrays = np.stack([np.asarray(picture) for picture in pictures])
    sources = [pictures, arrays, torch.from_numpy(arrays).permute(0, 3, 1, 2), arrays / 255]
    expected = [processor(text=MARK, videos=[source], return_tensors="pt") for source in sources]
    expected.append(processor(text=MARK, images=[pictures[3]], return_tensors="pt"))
    stranger = alone(False)
    found = [stranger(text=MARK, videos=[source], return_tensors="pt") for source in sources]
    found.append(stranger(text=MARK, images=[pictures[3]], return_tensors="pt"))
    for one, other in zip(found, expected):
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(one[key], other[key], atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere.mp4", "/nowhere.mp4: transformers' load_video cannot read it"),
        ("https://example.com/a.mp4", "without the package vamba a video is a path, or a URL with allow_urls=True"),
        (b"bytes", "without the package vamba a video is a path"),
    ],
)
def test_what_cannot_be_read_without_the_package_is_named(alone, source, message):
    with pytest.raises(ValueError, match=message) as error:
        alone(False)(text=MARK, videos=[source])
    assert "\n" not in str(error.value) and "pip install vamba" in str(error.value)


def test_a_video_is_not_read_in_chunks_without_the_package(alone, film):
    with pytest.raises(ImportError, match="pip install vamba"):
        alone(False).video_reader(film)
    with pytest.raises(ValueError, match="start=9 is past the end"):
        alone(False)(text=MARK, videos=[{"video": film, "start": 9.0}])
