"""Plans for the released sizes of Qwen2-VL, from shapes alone: no weight is allocated."""

import math

import pytest
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from vamba.conversion.configs import config_from_qwen2_vl, config_to_original
from vamba.conversion.formats import ORIGINAL, QWEN2_VL, VAMBA
from vamba.conversion.planning import TensorSpec, plan
from vamba.conversion.safetensors_io import split_into_files
from vamba.conversion.vamba_family import vamba_rules
from vamba.modeling.modeling_vamba import VambaForConditionalGeneration


# hidden, layers, heads, KV heads, MLP, vocabulary, tied; then Vamba's Mamba heads and parameters
SIZES = {
    "2B": ((1536, 28, 12, 2, 8960, 151936, True), 48, 2.767e9),
    "7B": ((3584, 28, 28, 4, 18944, 152064, False), 112, 11.20e9),
    "72B": ((8192, 80, 64, 8, 29568, 152064, False), 256, None),
}


def hub_config(hidden, layers, heads, kv_heads, mlp, vocabulary, tied):
    return {
        "model_type": "qwen2_vl",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def on_meta(kind, config):
    with torch.device("meta"):
        model = kind(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def plan_checkpoint(kind, config, specs, to=None):
    return plan(specs, vamba_rules(kind, config, to))


def as_specs(shapes, dtype=torch.bfloat16):
    return {key: TensorSpec(shape, dtype) for key, shape in shapes.items()}


@pytest.fixture(scope="module", params=SIZES)
def released(request):
    sizes, heads, parameters = SIZES[request.param]
    source = hub_config(*sizes)
    config = config_from_qwen2_vl(source)
    specs = {}  # as on disk: transformers 5 names them otherwise in memory
    for key, spec in as_specs(on_meta(Qwen2VLForConditionalGeneration, Qwen2VLConfig.from_dict(source))).items():
        key = key.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)
        specs[key] = spec
    return config, specs, plan_checkpoint(QWEN2_VL, config, specs), heads, parameters


def test_plan_has_exactly_the_models_keys_and_shapes(released):
    config, specs, steps, heads, parameters = released
    expected = on_meta(VambaForConditionalGeneration, config)
    assert {step.key: step.shape for step in steps} == expected
    assert config.mamba_config.num_heads == heads
    assert {step.source for step in steps} - {None} == set(specs)


def test_planned_sources_have_the_shape_of_their_targets(released):
    _, specs, steps, _, _ = released
    for step in steps:
        assert step.source is None or specs[step.source].shape == step.shape, step
    fresh = [step for step in steps if step.source is None]
    layers = released[0].text_config.num_hidden_layers
    assert len(fresh) == 9 * (layers - 1) + layers
    assert all("video_encoder" in step.key or step.key.endswith(".alpha") for step in fresh)


def test_files_of_the_real_size(released):
    _, _, steps, _, _ = released
    files = split_into_files(steps, "5GB").filename_to_tensors
    sizes = {step.key: step.nbytes for step in steps}
    assert sum(map(len, files.values())) == len(steps)
    assert all(sum(sizes[key] for key in held) <= 5e9 for held in files.values())


def test_to_original_and_back_of_the_real_size(released):
    config, _, steps, _, _ = released
    ours = {step.key: TensorSpec(step.shape, step.dtype) for step in steps}
    original = plan_checkpoint(VAMBA, config, ours, to="original")
    assert config_to_original(config)["hidden_size"] == config.text_config.hidden_size
    fresh = [step.key for step in original if step.source is None]
    last = config.text_config.num_hidden_layers - 1
    assert len(fresh) == 9 and all(key.startswith(f"model.layers.{last}.vision_mixer.") for key in fresh)
    back = plan_checkpoint(ORIGINAL, config, {step.key: TensorSpec(step.shape, step.dtype) for step in original})
    assert [step[:3] for step in back] == [step[:3] for step in steps]


def test_the_originals_7b_has_the_parameters_measured_for_it():
    config = config_from_qwen2_vl(hub_config(*SIZES["7B"][0]))
    ours = as_specs(on_meta(VambaForConditionalGeneration, config))
    original = plan_checkpoint(VAMBA, config, ours, to="original")
    assert sum(math.prod(step.shape) for step in original) / 1e9 == pytest.approx(11.31, abs=0.005)
