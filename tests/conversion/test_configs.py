"""conversion/configs.py: which format a config.json is of, and its values in the other."""

import json

import pytest

from vamba.conversion.configs import (
    MAMBA_FIELDS,
    config_from_original,
    config_from_qwen2_vl,
    config_to_original,
)
from vamba.conversion.formats import ORIGINAL, QWEN2_VL, VAMBA, format_of, read_config
from vamba.conversion.planning import ConversionError


# The 2B's config.json as it is on the Hub: flat, "mrope", no vision model_type.
HUB = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 1536,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}


def test_flat_config_of_the_hub():
    config = config_from_qwen2_vl(HUB)
    text = config.text_config
    assert text.rope_parameters == {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert getattr(text, key) == HUB[key], key
    for key in ("vocab_size", "rms_norm_eps", "bos_token_id", "eos_token_id", "max_position_embeddings"):
        assert getattr(text, key) == HUB[key], key
    for key, value in HUB["vision_config"].items():
        if key not in ("in_chans", "spatial_patch_size"):
            assert getattr(config.vision_config, key) == value, key
    assert config.tie_word_embeddings is True and config.video_token_id == 151656
    mamba = config.mamba_config
    assert (mamba.hidden_size, mamba.head_dim, mamba.num_heads, mamba.state_size) == (1536, 64, 48, 128)
    assert (mamba.expand, mamba.chunk_size, mamba.layer_norm_epsilon) == (2, 256, 1e-5)
    assert text.use_alpha_balancing and not text.cross_attn_use_layer_norm
    assert config.architectures == ["VambaForConditionalGeneration"] and config.model_type == "vamba"


def test_nested_config_of_transformers_5_means_the_same():
    from transformers import Qwen2VLConfig

    nested = json.loads(Qwen2VLConfig.from_dict(dict(HUB)).to_json_string())
    assert "hidden_size" not in nested
    assert config_from_qwen2_vl(nested).to_dict() == config_from_qwen2_vl(HUB).to_dict()


def test_conversion_does_not_write_into_the_source():
    before = json.dumps(HUB, sort_keys=True)
    config_from_qwen2_vl(HUB)
    assert json.dumps(HUB, sort_keys=True) == before


def test_mamba_sizes_may_be_chosen():
    mamba = config_from_qwen2_vl(HUB, {"head_dim": 128, "state_size": 16}).mamba_config
    assert (mamba.head_dim, mamba.state_size, mamba.num_heads) == (128, 16, 24)


@pytest.mark.parametrize(
    "mamba_config, says",
    [
        ({"headdim": 64}, "mamba_config has no headdim; it has .*head_dim"),
        ({"head_dim": 100}, "3072 is not a multiple"),
        ({"hidden_size": 64}, "mamba_config.hidden_size = 64"),
        ({"head_dim": "wide"}, "head_dim"),
    ],
)
def test_mamba_sizes_that_do_not_fit(mamba_config, says):
    with pytest.raises(ConversionError, match=says) as caught:
        config_from_qwen2_vl(HUB, mamba_config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"model_type": "qwen2_vl"}, QWEN2_VL),
        ({"model_type": "qwen2_vl", "vision_mamba_mixer_config": None}, QWEN2_VL),
        ({"model_type": "qwen2_vl", "vision_mamba_mixer_config": {"enable": True}}, ORIGINAL),
        ({"model_type": "qwen2_vl", "vision_mamba_mixer_config": {"d_state": 128}}, ORIGINAL),
        ({"model_type": "vamba"}, VAMBA),
    ],
)
def test_formats(config, expected):
    assert format_of(config) == expected


@pytest.mark.parametrize(
    "config, says",
    [
        ({"model_type": "qwen2_5_vl"}, "model_type is 'qwen2_5_vl'. Supported: a Qwen2-VL checkpoint"),
        ({}, "model_type is None"),
        ({"model_type": "qwen2_vl", "vision_mamba_mixer_config": {"enable": False}}, "enable is false.*Supported"),
        ({"model_type": "qwen2_vl", "quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_formats_that_are_not_supported(config, says):
    with pytest.raises(ConversionError, match=says):
        format_of(config)


def test_original_config_there_and_back(golden):
    source = read_config(golden)
    back = json.loads(json.dumps(config_to_original(config_from_original(source))))
    # an unused window, what transformers 4 wrote for a model built in memory, and the dtype it did not record
    changed = {"sliding_window", "architectures", "torch_dtype"}
    assert {key for key in back if back[key] != source[key] and not isinstance(back[key], dict)} <= changed
    for part in ("vision_config", "vision_mamba_mixer_config", "rope_scaling"):
        assert {key: source[part][key] for key in back[part]} == back[part]
        assert back[part]
    assert set(MAMBA_FIELDS.values()) <= set(back["vision_mamba_mixer_config"])


def test_original_values_arrive(golden, golden_copy, edit_json):
    source = read_config(golden)
    mixer = source["vision_mamba_mixer_config"] | {
        "A_init_range": [2, 5],
        "dt_limit": [0.1, 9.0],
        "dt_min": 0.002,
        "dt_max": 0.3,
        "dt_init_floor": 1e-3,
        "d_conv": 3,
    }
    edit_json(golden_copy / "config.json", vision_mamba_mixer_config=mixer, rope_theta=123.0, rms_norm_eps=1e-3)
    config = config_from_original(read_config(golden_copy))
    mamba, text = config.mamba_config, config.text_config
    assert (mamba.hidden_size, mamba.head_dim, mamba.state_size, mamba.chunk_size) == (64, 16, 16, 16)
    assert list(mamba.A_init_bounds) == [2, 5] and list(mamba.time_step_limit) == [0.1, 9.0]
    assert (mamba.time_step_min, mamba.time_step_max, mamba.time_step_floor) == (0.002, 0.3, 1e-3)
    assert mamba.conv_kernel == 3 and mamba.layer_norm_epsilon == 1e-5
    assert text.rope_parameters["rope_theta"] == 123.0 and text.rms_norm_eps == 1e-3
    for key in ("use_alpha_balancing", "cross_attn_use_layer_norm", "cross_attn_use_position_embeddings"):
        assert getattr(text, key) is source[key], key


@pytest.mark.parametrize("key, value", [("norm_before_gate", True), ("D_has_hdim", True), ("rmsnorm", False)])
def test_options_the_model_does_not_have_are_refused(golden, key, value):
    source = read_config(golden)
    source["vision_mamba_mixer_config"][key] = value
    with pytest.raises(ConversionError, match=f"{key} = {value} is not supported"):
        config_from_original(source)


def test_original_without_its_switches(golden):
    source = read_config(golden)
    del source["use_alpha_balancing"]
    with pytest.raises(ConversionError, match="lacks use_alpha_balancing"):
        config_from_original(source)


def test_values_the_originals_format_cannot_hold():
    config = config_from_qwen2_vl(HUB, {"layer_norm_epsilon": 1e-3})
    with pytest.raises(ConversionError, match="layer_norm_epsilon = 0.001, must be 1e-05"):
        config_to_original(config)


@pytest.mark.parametrize("content, says", [("[1]", "not a JSON object"), ("{", "not valid JSON"), (None, "holds no")])
def test_unreadable_config(tmp_path, content, says):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConversionError, match=says):
        read_config(tmp_path)
