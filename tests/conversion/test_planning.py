"""conversion/planning.py: names, shapes and dtypes, without a checkpoint."""

import pytest
import torch

from vamba.conversion import vamba_family as tables
from vamba.conversion.formats import ORIGINAL
from vamba.conversion.planning import ConversionError, Rules, TensorSpec, plan, rename
from vamba.modeling import VambaConfig


def spec(*shape, dtype=torch.bfloat16):
    return TensorSpec(shape, dtype)


def simple_plan(source, expected, *, dtype=None, fresh=""):
    return plan(source, Rules(expected, tables.FROM_ORIGINAL, tables.TO_ORIGINAL, fresh), dtype)


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_text_keys_of_both_generations_of_qwen2_vl(prefix):
    ours = "model.language_model."
    assert rename(prefix + "norm.weight", tables.FROM_QWEN2_VL) == (ours + "norm.weight",)
    assert rename(prefix + "layers.10.mlp.up_proj.weight", tables.FROM_QWEN2_VL) == (
        ours + "layers.10.mlp.up_proj.weight",
    )
    assert rename(prefix + "layers.3.self_attn.q_proj.bias", tables.FROM_QWEN2_VL) == (
        ours + "layers.3.self_attn.q_proj.bias",
        ours + "layers.3.cross_attn.q_proj.bias",
    )
    assert rename(prefix + "layers.3.self_attn.k_proj.bias", tables.FROM_QWEN2_VL) == (
        ours + "layers.3.self_attn.k_proj.bias",
        "model.video_encoder.levels.3.k_proj.bias",
    )


@pytest.mark.parametrize("prefix", ["visual.", "model.visual."])
def test_vision_keys_of_both_generations(prefix):
    assert rename(prefix + "blocks.0.norm1.bias", tables.FROM_QWEN2_VL) == ("model.visual.blocks.0.norm1.bias",)


def test_original_mixer_goes_to_the_video_encoder_and_the_last_one_is_dropped():
    config = VambaConfig(text_config={"num_hidden_layers": 12})
    table = tables.vamba_rules(ORIGINAL, config).table
    assert rename("model.layers.10.vision_mixer.mixer.A_log", table) == (
        "model.video_encoder.levels.10.block.mixer.A_log",
    )
    assert rename("model.layers.1.vision_mixer.norm.weight", table) == (
        "model.video_encoder.levels.1.block.norm.weight",
    )
    assert rename("model.layers.11.vision_mixer.mixer.A_log", table) == ()
    assert rename("model.layers.11.cross_attn.k_proj.bias", table) != ()


@pytest.mark.parametrize("key", ["model.layers.0.vision_mixer.gate", "visual", "model.layer.0.mlp.x", "head.weight"])
def test_keys_the_tables_do_not_know(key):
    assert rename(key, tables.FROM_ORIGINAL) is None


def test_cross_attention_of_qwen2_vl_is_not_a_key():
    assert rename("model.layers.0.cross_attn.q_proj.bias", tables.FROM_QWEN2_VL) is None


@pytest.mark.parametrize(
    "ours",
    [
        "model.visual.patch_embed.proj.weight",
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.2.alpha",
        "model.language_model.layers.2.cross_attn.o_proj.weight",
        "model.language_model.layers.2.cross_attn.q_proj.bias",
        "model.video_encoder.levels.2.k_proj.weight",
        "model.video_encoder.levels.2.v_proj.bias",
        "model.video_encoder.levels.0.block.norm.weight",
        "model.video_encoder.levels.0.block.mixer.norm.weight",
        "lm_head.weight",
    ],
)
def test_to_original_and_back_is_the_same_key(ours):
    (theirs,) = rename(ours, tables.TO_ORIGINAL)
    assert theirs != ours or ours == "lm_head.weight"
    assert rename(theirs, tables.FROM_ORIGINAL) == (ours,)


EARLIER = {
    "model.language_model.layers.1.cross_attn.k_proj.weight": "model.video_encoder.levels.1.k_proj.weight",
    "model.language_model.layers.1.cross_attn.v_proj.bias": "model.video_encoder.levels.1.v_proj.bias",
    "model.video_encoder.layers.0.norm.weight": "model.video_encoder.levels.0.block.norm.weight",
    "model.video_encoder.layers.0.mixer.in_proj.bias": "model.video_encoder.levels.0.block.mixer.in_proj.bias",
}
KEPT = ("lm_head.weight", "model.language_model.layers.1.cross_attn.q_proj.weight", "model.visual.blocks.0.norm1.bias")


@pytest.mark.parametrize("earlier, now", [*EARLIER.items(), *zip(KEPT, KEPT)])
def test_keys_of_the_earlier_format(earlier, now):
    assert rename(earlier, tables.FROM_EARLIER) == (now,)
    assert rename(now, tables.TO_EARLIER) == (earlier,)
    adapter = f"base_model.model.{earlier.removesuffix('.weight')}.lora_A.weight"
    for key in (earlier, adapter):
        assert tables.is_earlier_format([*KEPT, key]) == (earlier in EARLIER)
    assert not tables.is_earlier_format([now])


def test_all_problems_are_named_at_once_with_both_shapes():
    source = {"lm_head.weight": spec(3, 4), "visual.a": spec(1), "model.layers.0.alpha": spec(2), "odd.key": spec(7)}
    expected = {"lm_head.weight": (3, 4), "model.language_model.layers.0.alpha": (1,), "model.visual.b": (1,)}
    with pytest.raises(ConversionError) as caught:
        simple_plan(source, expected)
    message = str(caught.value)
    assert "2 unknown keys: odd.key [7], visual.a [1];" in message
    assert "1 missing keys: visual.b;" in message
    assert "1 wrongly shaped keys: model.layers.0.alpha is [2], must be [1]." in message


def test_many_problems_are_counted():
    with pytest.raises(ConversionError, match=r"9 unknown keys: k0 \[1\], .*k4 \[1\], and 4 more"):
        simple_plan({f"k{i}": spec(1) for i in range(9)}, {})


def test_two_names_for_one_tensor():
    source = {"visual.a": spec(1), "model.visual.a": spec(1)}
    with pytest.raises(ConversionError, match="for the same tensor: model.visual.a and visual.a"):
        simple_plan(source, {"model.visual.a": (1,)})


def test_quantized_tensors_are_refused():
    with pytest.raises(ConversionError, match=r"visual.a is torch.int8"):
        simple_plan({"visual.a": spec(1, dtype=torch.int8)}, {"model.visual.a": (1,)})


def test_missing_attention_is_named_as_qwen2_vl_names_it_and_once():
    expected = {f"model.language_model.layers.0.{name}_attn.q_proj.bias": (4,) for name in ("self", "cross")}
    with pytest.raises(ConversionError, match="1 missing keys: model.layers.0.self_attn.q_proj.bias"):
        plan({}, Rules(expected, tables.FROM_QWEN2_VL, tables.TO_QWEN2_VL))


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_dtypes(dtype):
    mixer = "model.layers.0.vision_mixer.mixer."
    ours = "model.video_encoder.levels.0.block.mixer."
    source = {mixer + "A_log": spec(2), mixer + "D": spec(2, dtype=torch.float16), "visual.a": spec(9)}
    expected = {ours + "A_log": (2,), ours + "D": (2,), ours + "dt_bias": (2,), "model.visual.a": (9,), "new": (1,)}
    steps = simple_plan(source, expected, dtype=dtype, fresh="new|.+dt_bias")
    assert [step.key for step in steps] == list(expected)
    found = {step.key.removeprefix(ours): step.dtype for step in steps}
    other = dtype or torch.bfloat16
    assert found == dict.fromkeys(("A_log", "D", "dt_bias"), torch.float32) | {"model.visual.a": other, "new": other}
    assert [step.source for step in steps] == [mixer + "A_log", mixer + "D", None, "visual.a", None]
