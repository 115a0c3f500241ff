"""Checkpoints of before November 2026, in which the decoder layers held the keys' and values' projections."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from vamba.chat import load_chat
from vamba.conversion import ConversionError, convert, is_earlier_format
from vamba.conversion.planning import rename
from vamba.conversion.vamba_family import TO_EARLIER
from vamba.errors import UserError
from vamba.modeling import VambaForConditionalGeneration

from tiny_vamba import media, prompt, tiny_model


def outputs(model):
    patches, grid = media((2, 4, 4))
    with torch.no_grad():
        return model.eval()(prompt(7, items=1), pixel_values_videos=patches, video_grid_thw=grid).logits


@pytest.fixture
def earlier(tmp_path):
    """Folder of a tiny model as it was saved then, and what the model computes."""
    folder, model = tmp_path / "earlier", tiny_model(cross_attn_use_layer_norm=True)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = {rename(key, TO_EARLIER)[0]: tensor for key, tensor in load_file(path).items()}
    assert {f"model.language_model.layers.2.cross_attn.{name}_proj.weight" for name in "qkvo"} <= tensors.keys()
    assert "model.video_encoder.layers.1.mixer.A_log" in tensors and not any(".levels." in key for key in tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder, outputs(model)


def test_it_is_converted_and_computes_the_same(earlier, tmp_path):
    folder, expected = earlier
    ours = convert(folder, tmp_path / "ours", progress=False)
    model, info = VambaForConditionalGeneration.from_pretrained(ours, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(outputs(model), expected)
    assert "in the earlier format" in (ours / "README.md").read_text()
    assert model.config.text_config.cross_attn_use_layer_norm


def test_it_is_not_loaded_with_fresh_weights_in_the_place_of_its_own(earlier):
    with pytest.raises(ValueError, match="vamba convert OLD NEW"):
        VambaForConditionalGeneration.from_pretrained(earlier[0])


def test_dtype_and_sharding(earlier, tmp_path):
    ours = convert(earlier[0], tmp_path / "ours", progress=False)
    half = convert(earlier[0], tmp_path / "half", dtype="bfloat16", max_shard_size="50KB", progress=False)
    stored = {key: t for path in half.glob("model-*.safetensors") for key, t in load_file(path).items()}
    wide = load_file(ours / "model.safetensors")
    assert len(list(half.glob("model-*.safetensors"))) > 3 and stored.keys() == wide.keys()
    for key, tensor in wide.items():
        narrow = torch.float32 if key.endswith((".A_log", ".D", ".dt_bias")) else torch.bfloat16
        assert stored[key].dtype == narrow and torch.equal(stored[key], tensor.to(narrow)), key


def test_what_does_not_fit_is_named_as_it_was_then(earlier, tmp_path):
    folder, _ = earlier
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.language_model.layers.1.cross_attn.k_proj.weight"]
    tensors["model.video_encoder.layers.2.norm.weight"] = torch.ones(64)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConversionError) as caught:
        convert(folder, tmp_path / "ours", progress=False)
    assert "1 missing keys: model.language_model.layers.1.cross_attn.k_proj.weight." in str(caught.value)
    assert "1 unknown keys: model.video_encoder.layers.2.norm.weight [64];" in str(caught.value)
    with pytest.raises(ConversionError, match="in the earlier format and to is 'original': convert it to vamba first"):
        convert(folder, tmp_path / "ours", to="original", progress=False)


def test_adapters_are_refused(checkpoint, tmp_path):
    """Their weights would be passed over in silence."""
    model = VambaForConditionalGeneration.from_pretrained(checkpoint)
    get_peft_model(model, LoraConfig(r=2, target_modules=["k_proj"])).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(checkpoint)}))
    load_chat(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model."
    tensors = {prefix + rename(key.removeprefix(prefix), TO_EARLIER)[0]: t for key, t in tensors.items()}
    assert is_earlier_format(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="is an adapter of a Vamba in the earlier format: merge it"):
        load_chat(str(tmp_path))
    with pytest.raises(ConversionError, match="holds an adapter only; merge it .* with the version of vamba that made"):
        convert(tmp_path, tmp_path.with_name("out"), progress=False)
