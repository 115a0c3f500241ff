"""transformers' own common test suites run against our models, as transformers runs them against its own.

They live in transformers' source distribution, not in its wheel:

    pip download --no-binary :all: --no-deps transformers && tar xf transformers-*.tar.gz
    TRANSFORMERS_SOURCE=$PWD/transformers-5.23.0 pytest tests/modeling/test_transformers_common.py

What it leaves out, tests/generation and tests/exporters, runs where the tree at TRANSFORMERS_SOURCE has it (the
exporters' with `RUN_SLOW=1`). Without TRANSFORMERS_SOURCE this file is skipped. What the tests would fetch from the Hub
is made here, and the tests that decode video run without torchcodec, as Vamba's processor does.
"""

import atexit
import functools
import importlib
import os
import shutil
import sys
import tempfile
import types
import unittest
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedConfig, Qwen2VLImageProcessor, Qwen2VLVideoProcessor, testing_utils

from vamba.demo.tiny_checkpoints import CHAT_TEMPLATE, tiny_tokenizer
from vamba.modeling import (
    VambaConfig,
    VambaForConditionalGeneration,
    VambaModel,
    VambaProcessor,
    VideoMa2mbaConfig,
    VideoMa2mbaForConditionalGeneration,
    VideoMa2mbaModel,
    VideoMa2mbaProcessor,
)
from vamba.modeling.processing_video_ma2mba import CHAT_TEMPLATE as MA2MBA_CHAT_TEMPLATE


SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
if not SOURCE:
    pytest.skip("TRANSFORMERS_SOURCE does not name a transformers source tree", allow_module_level=True)


def _transformers_tests(name: str):
    """`tests.<name>` of the source tree, kept apart from our own `tests` folder."""
    if "tests" not in sys.modules or not hasattr(sys.modules["tests"], "_of_transformers"):
        package = types.ModuleType("tests")
        package.__path__ = [os.path.join(SOURCE, "tests")]
        package._of_transformers = True
        sys.modules["tests"] = package
    return importlib.import_module(f"tests.{name}")


def _stand_in(name: str, **contents) -> None:
    """An empty stand-in for what the common tests import but the source distribution leaves out."""
    if not os.path.exists(os.path.join(SOURCE, "tests", *name.split(".")) + ".py"):
        for path in (name.split(".")[0], name):
            sys.modules.setdefault(f"tests.{path}", types.ModuleType(f"tests.{path}"))
        vars(sys.modules[f"tests.{name}"]).update(contents)


_stand_in("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
_stand_in("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
common = _transformers_tests("test_modeling_common")
exporters = _transformers_tests("exporters.test_export")
generation = _transformers_tests("generation.test_utils")
GenerationTesterMixin = generation.GenerationTesterMixin
if hasattr(exporters, "ExportGenerateTesterMixin"):  # whether or not that of generation has it among its bases
    GenerationTesterMixin = type("_", (GenerationTesterMixin, exporters.ExportGenerateTesterMixin), {})


def _config_zero_init(config, original=common._config_zero_init, fields=PreTrainedConfig.__iter__):
    """transformers' own, which takes `image_std` for the width of an initialisation, without that field."""
    shown = lambda self: (name for name in fields(self) if name != "image_std")  # noqa: E731
    with mock.patch.object(PreTrainedConfig, "__iter__", shown):
        return original(config)


common._config_zero_init = _config_zero_init


@functools.cache
def _local_file(url: str) -> str:
    """A small file of the kind that `url` names, made instead of fetched."""
    path = os.path.join(_folder(), os.path.basename(url))
    if path.endswith(".mp4"):
        _write_video(path, frames=11 if "tiny" in path else 40)
    elif path.endswith((".jpg", ".png")):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)).save(path)
    return path


@functools.cache
def _folder() -> str:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    return folder


def _write_video(path: str, frames: int) -> None:
    import av

    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for index in range(frames):
            picture = np.full((240, 320, 3), 5 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


sys.modules["fetch_hub_objects_for_ci"] = types.ModuleType("fetch_hub_objects_for_ci")
sys.modules["fetch_hub_objects_for_ci"].url_to_local_path = _local_file
with mock.patch.object(testing_utils, "require_torchcodec", lambda test: test):
    processing_common = _transformers_tests("test_processing_common")


class VambaModelTester:
    """A tiny Vamba and inputs with one image per row, in the form the common tests expect."""

    base_model_class = VambaModel
    conditional_generation_class = VambaForConditionalGeneration

    def __init__(self, parent, batch_size=3, seq_length=7):
        self.parent, self.batch_size, self.seq_length = parent, batch_size, seq_length
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 32, 2, 4
        self.vocab_size, self.is_training = 99, True

    def get_config(self):
        return VambaConfig(
            text_config={
                "hidden_size": self.hidden_size,
                "intermediate_size": 37,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "num_key_value_heads": 2,
                "vocab_size": self.vocab_size,
                "max_position_embeddings": 512,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
                "bos_token_id": 0,
                "eos_token_id": 1,
                "pad_token_id": 2,
            },
            vision_config={
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": self.hidden_size,
                "num_heads": 4,
                "patch_size": 4,
                "mlp_ratio": 2,
                "spatial_merge_size": 1,
            },
            mamba_config={"hidden_size": self.hidden_size, "head_dim": 16, "state_size": 8, "chunk_size": 8},
            vision_start_token_id=3,
            vision_end_token_id=4,
            image_token_id=5,
            video_token_id=6,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 7) + 7
        input_ids[:, 1], input_ids[:, 2] = config.vision_start_token_id, config.vision_end_token_id
        patch = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
        mm_token_type_ids = torch.zeros_like(input_ids)
        mm_token_type_ids[:, 1] = 1
        return config, {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": common.floats_tensor([self.batch_size, patch]),  # as many as rows, as rows are cut
            "image_grid_thw": torch.tensor([[1, 1, 1]] * self.batch_size, device=input_ids.device),
            "mm_token_type_ids": mm_token_type_ids,
        }


class VambaModelTest(common.ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (VambaModel, VambaForConditionalGeneration)
    all_generative_model_classes = (VambaForConditionalGeneration,)
    _is_composite = True

    def setUp(self):
        self.model_tester = VambaModelTester(self)


class VambaProcessorTest(processing_common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = VambaProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_tokenizer(["lower newer", "upper older longer string"])

    @classmethod
    def _setup_image_processor(cls):
        return Qwen2VLImageProcessor(patch_size=4, min_pixels=28 * 28, max_pixels=56 * 56)

    @classmethod
    def _setup_video_processor(cls):
        return Qwen2VLVideoProcessor(patch_size=4, min_pixels=28 * 28, max_pixels=56 * 56)

    @staticmethod
    def prepare_processor_dict():
        return {"chat_template": CHAT_TEMPLATE}

    @property
    def video_sampling_expectations(self):
        # rows of pixels: (frames / 2, rounded up) times 12 x 16 patches of the 320 x 240 frame; 11 frames at 30 fps
        frame_pair = 12 * 16
        return [
            {"num_frames": 3, "fps": None, "expected_dim": 0, "output_length": 2 * frame_pair},
            {"num_frames": None, "fps": 10, "expected_dim": 0, "output_length": 2 * frame_pair},
            {"do_sample_frames": False, "fps": 10, "expected_dim": 0, "output_length": 6 * frame_pair},
            {"do_sample_frames": False, "expected_dim": 0, "output_length": 6 * frame_pair},
            {"expected_dim": 0, "output_length": frame_pair},  # files are sampled at 1 fps unless told otherwise
        ]


class VideoMa2mbaModelTester(VambaModelTester):
    """A tiny Video-Ma2mba; the inputs are the same, and an image is one frame of 16 patches."""

    base_model_class = VideoMa2mbaModel
    conditional_generation_class = VideoMa2mbaForConditionalGeneration

    def get_config(self):
        return VideoMa2mbaConfig(
            text_config={
                "hidden_size": self.hidden_size,
                "num_hidden_layers": self.num_hidden_layers,
                "vocab_size": self.vocab_size,
                "head_dim": 16,
                "state_size": 8,
                "chunk_size": 8,
                "bos_token_id": 0,
                "eos_token_id": 1,
                "pad_token_id": 2,
            },
            vision_config={
                "hidden_size": self.hidden_size,
                "intermediate_size": 37,
                "num_hidden_layers": 3,
                "num_attention_heads": self.num_attention_heads,
                "image_size": 16,
                "patch_size": 4,
            },
            vision_start_token_id=3,
            vision_end_token_id=4,
            image_token_id=5,
            video_token_id=6,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 7) + 7
        input_ids[:, 1], input_ids[:, 2] = config.vision_start_token_id, config.vision_end_token_id
        return config, {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": common.floats_tensor([self.batch_size * 16, 3 * 4 * 4]),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * self.batch_size, device=input_ids.device),
        }


class VideoMa2mbaModelTest(common.ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (VideoMa2mbaModel, VideoMa2mbaForConditionalGeneration)
    all_generative_model_classes = (VideoMa2mbaForConditionalGeneration,)
    _is_composite = True
    has_attentions = False  # of the tower only

    def setUp(self):
        self.model_tester = VideoMa2mbaModelTester(self)

    def prepare_config_and_inputs_for_generate(self, batch_size=2):
        """transformers' cuts all inputs to so many rows, patches too, of which an image here has 16."""
        config, inputs = super().prepare_config_and_inputs_for_generate(batch_size)
        pixel_values = self.model_tester.prepare_config_and_inputs_for_common()[1]["pixel_values"]
        return config, inputs | {"pixel_values": pixel_values[: 16 * batch_size]}

    @unittest.skip("there is no generating without the states")
    def test_greedy_generate_dict_outputs(self):
        pass

    test_sample_generate_dict_output = test_greedy_generate_dict_outputs
    test_beam_search_generate_dict_output = test_greedy_generate_dict_outputs
    test_beam_sample_generate_dict_output = test_greedy_generate_dict_outputs

    def _check_caches_are_equal(self, cache1, cache2):
        torch.testing.assert_close(cache1.states, cache2.states)

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        assert len(past_key_values) == config.get_text_config().num_hidden_layers
        assert past_key_values.batch_size == batch_size and past_key_values.get_seq_length() == seq_length

    @unittest.skip("hidden states are those of the text, taken out of the stream of text and media")
    def test_retain_grad_hidden_states_attentions(self):
        pass


class VideoMa2mbaProcessorTest(VambaProcessorTest):
    processor_class = VideoMa2mbaProcessor
    sizes = {"patch_size": 4, "temporal_patch_size": 1, "min_pixels": 56 * 56, "max_pixels": 56 * 56}

    @classmethod
    def _setup_image_processor(cls):
        return Qwen2VLImageProcessor(**cls.sizes)

    @classmethod
    def _setup_video_processor(cls):
        return Qwen2VLVideoProcessor(**cls.sizes)

    @staticmethod
    def prepare_processor_dict():
        return {"chat_template": MA2MBA_CHAT_TEMPLATE}

    @property
    def video_sampling_expectations(self):
        frame = 14 * 14  # rows of pixels: every frame by itself, squeezed to 56 x 56 pixels
        return [
            {"num_frames": 3, "fps": None, "expected_dim": 0, "output_length": 3 * frame},
            {"num_frames": None, "fps": 10, "expected_dim": 0, "output_length": 4 * frame},
            {"do_sample_frames": False, "fps": 10, "expected_dim": 0, "output_length": 11 * frame},
            {"do_sample_frames": False, "expected_dim": 0, "output_length": 11 * frame},
            {"expected_dim": 0, "output_length": frame},
        ]

    def test_subprocessor_defaults(self):
        self.skipTest("the processor makes squares, which its image and video processor take as they are")

    test_subprocessor_defaults_1_images = test_subprocessor_defaults_2_videos = test_subprocessor_defaults
