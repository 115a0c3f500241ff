"""Both models through transformers' exporters, part by part as they take a model apart: equal to what was exported."""

import copy

import pytest
import torch
from transformers import GenerationConfig
from transformers.exporters import DynamoConfig, DynamoExporter
from transformers.exporters.utils import decompose_for_generation, decompose_multimodal, get_leaf_tensors

from vamba.modeling.mamba2 import Mamba2State
from vamba.modeling.video_memory import VideoLevel

import tiny_vamba
import tiny_video_ma2mba


def vamba_and_inputs(layers):
    pixels, grid = tiny_vamba.media((1, 4, 4), (1, 4, 4))
    ids = torch.cat([tiny_vamba.prompt(5, 1, seed=seed) for seed in (0, 1)])
    return tiny_vamba.tiny_model(num_hidden_layers=layers), {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": grid,
    }


def video_ma2mba_and_inputs():
    ids = torch.cat([tiny_video_ma2mba.prompt(5, 1, seed=seed) for seed in (0, 1)])
    return tiny_video_ma2mba.tiny_model(num_hidden_layers=1), {"input_ids": ids, **tiny_video_ma2mba.image(2)}


def assert_exported_equals_eager(model, inputs, dynamic, cache=None):
    config = None if cache is None else GenerationConfig(cache_implementation=cache)
    inputs = inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}
    # `generate` calls the image encoder before the forward pass that is taken apart for it
    parts = decompose_multimodal(model, inputs) if cache is None else {}
    parts = {name: parts[name] for name in parts if name == "image_encoder"}
    parts |= decompose_for_generation(model, inputs, generation_config=config, multi_token_decode=dynamic)
    assert set(parts) - {"image_encoder"} == {"language_model", "lm_head", "decode"}
    if dynamic:
        del parts["language_model"]  # takes as long as the decoding step, which contains it
    for name, (module, given) in parts.items():
        with torch.no_grad():
            expected = get_leaf_tensors(module(**copy.deepcopy(given)))
            exported = DynamoExporter().export(module, given, config=DynamoConfig(dynamic=dynamic))  # completes `given`
            found = get_leaf_tensors(exported.program.module()(**copy.deepcopy(given)))
        assert expected, name
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("dynamic, cache", [(False, None), (True, None), (False, "static")])
def test_vamba(dynamic, cache):
    layers = 1 if dynamic else 2  # what is dynamic takes long
    assert_exported_equals_eager(*vamba_and_inputs(layers), dynamic, cache)


@pytest.mark.parametrize("dynamic", [False, True])
def test_video_ma2mba(dynamic):
    assert_exported_equals_eager(*video_ma2mba_and_inputs(), dynamic)


@pytest.mark.parametrize("kind", [Mamba2State, VideoLevel])
def test_tuples_of_a_cache_can_be_rebuilt(kind):
    fields = [torch.zeros(1), torch.ones(1)]
    assert kind(iter(fields)) == kind(fields) == kind(*fields) == kind(**dict(zip(kind._fields, fields)))
    assert torch.utils._pytree.tree_map(lambda t: t, kind(*fields)) == kind(*fields)
