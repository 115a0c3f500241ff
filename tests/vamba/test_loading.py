"""vamba/loading.py: a damaged or foreign checkpoint is one sentence, before or instead of an answer."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from vamba.chat import load_chat
from vamba.errors import UserError
from vamba.hub import describe
from vamba.loading import load_config, load_model, load_processor
from vamba.training.arguments import ModelArguments
from vamba.training.model import check_model


WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "model")


def edit(file, *path, value):
    content = part = json.loads(file.read_text())
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    file.write_text(json.dumps(content))


def leaves(content, path=()):
    for name, value in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(value, (dict, list)):
            yield from leaves(value, (*path, name))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield (*path, name)


@pytest.mark.parametrize("value", [0, -1, 10**12, 1.5, 1e308, math.nan, "x", []])
def test_every_number_of_a_configuration_is_used_or_refused(copy, value):
    """What `vamba info` says is an answer or a UserError, whatever stands in config.json, and never takes long."""
    original = (copy / "config.json").read_text()
    refused = 0
    for path in leaves(json.loads(original)):
        (copy / "config.json").write_text(original)
        edit(copy / "config.json", *path, value=value)
        try:
            load_config(copy)
        except UserError as error:
            assert "config.json" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    "path, value, says",
    [
        (
            ("vision_config", "depth"),
            10**12,
            "vision_config.depth is 1000000000000; it must be a number from 1 to 1024",
        ),
        (("text_config", "num_hidden_layers"), 10**12, "num_hidden_layers is 1000000000000"),
        (("text_config", "layer_types"), None, None),
        (("text_config", "pad_token_id"), 10**6, "pad_token_id is 1000000; it must be from 0 to"),
        (("text_config", "rope_parameters", "mrope_section"), [2, 3, 4], "must be three numbers that add up to half"),
        (("text_config", "num_key_value_heads"), 3, "must be a multiple of num_key_value_heads, which is 3"),
        (("mamba_config", "time_step_limit"), [0.0], "time_step_limit is .* two numbers"),
        (("mamba_config", "ssd_backend"), "x", "ssd_backend is 'x'; choose one of auto, torch"),
        (("image_std",), [0.2, 0.2], "image_std is .* three numbers"),
        (("text_config",), 5, "text_config is 5; it must be a configuration"),
        (("dtype",), "int8", "dtype is torch.int8"),
        (("model_type",), ["vamba"], r"a \['vamba'\] checkpoint, not a Vamba"),
    ],
)
def test_values_of_a_configuration_are_named(copy, path, value, says):
    edit(copy / "config.json", *path, value=value)
    if says is None:
        return load_config(copy)
    with pytest.raises(UserError, match=says):
        describe(copy)
    recipe = SimpleNamespace(model=ModelArguments(model_name_or_path=str(copy), trainable=["all"]))
    with pytest.raises(UserError, match="^model_name_or_path"):
        check_model(recipe)


def test_layers_left_out_by_the_configuration_are_no_silent_answer(copy):
    edit(copy / "config.json", "vision_config", "depth", value=1)
    with pytest.raises(UserError, match=r"unknown tensors: model.visual.blocks.1.*Fetch the checkpoint again"):
        load_model(copy)


def change(copy, **changes):
    tensors = load_file(copy / WEIGHTS) | changes
    save_file({key: t for key, t in tensors.items() if t is not None}, copy / WEIGHTS, metadata={"format": "pt"})


KEY = "model.language_model.norm.weight"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({KEY: None}, f"1 missing tensors: {KEY}"),
        ({KEY: None, "model.renamed": torch.ones(64)}, f"1 missing tensors: {KEY}; 1 unknown tensors: model.renamed"),
        ({KEY: torch.ones(65)}, r"norm.weight is \[65\], must be \[64\]"),
        ({KEY: torch.ones(64, dtype=torch.int64)}, "tensors that are no floats: .*is I64"),
        ({KEY: torch.full((64,), math.nan)}, f"1 weights are NaN or infinite: {KEY}"),
        ({KEY: torch.full((64,), -math.inf)}, f"1 weights are NaN or infinite: {KEY}"),
    ],
)
def test_weights_that_are_not_the_models(copy, changes, says):
    change(copy, **changes)
    with pytest.raises(UserError, match=says):
        load_chat(str(copy))


@pytest.mark.parametrize("end", [0, 7, 8, 500, -1])
def test_a_file_that_was_cut_off(copy, end):
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:end])
    with pytest.raises(UserError, match="model.safetensors is damaged or incomplete"):
        load_model(copy)


def test_good_weights_load_as_transformers_loads_them(checkpoint):
    ours, theirs = load_model(checkpoint).state_dict(), AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.state_dict().items())


@pytest.mark.parametrize(
    "name, path, value, says",
    [
        ("generation_config.json", ("eos_token_id",), 10**6, "eos_token_id is 1000000; it must be from 0 to"),
        ("generation_config.json", ("max_new_tokens",), "x", "generation_config.json: "),
        (
            "processor_config.json",
            ("image_processor", "patch_size"),
            7,
            "the image_processor cannot be used: its patch",
        ),
        ("processor_config.json", ("video_processor", "image_std"), "x", "the video_processor cannot be used"),
        ("processor_config.json", ("video_processor", "size"), {"shortest_edge": 1e12}, "the video_processor"),
        ("tokenizer.json", ("model",), 5, "no processor and tokenizer that can be read"),
        ("config.json", ("vision_start_token_id",), 7, r"<\|vision_start\|> is .* in the tokenizer, 7 in config.json"),
    ],
)
def test_files_beside_the_weights(copy, name, path, value, says):
    edit(copy / name, *path, value=value)
    with pytest.raises(UserError, match=says):
        load_chat(str(copy))


@pytest.mark.parametrize(
    "name, says",
    [
        ("tokenizer.json", "no tokenizer"),
        ("processor_config.json", "no processor"),
        ("chat_template.jinja", "no chat t"),
    ],
)
def test_missing_files_beside_the_weights(copy, name, says):
    (copy / name).unlink()
    with pytest.raises(UserError, match=says):
        load_chat(str(copy))


def test_a_tokenizer_with_more_words_than_the_embedding(checkpoint):
    config = load_config(checkpoint)
    config.text_config.vocab_size -= 1
    with pytest.raises(UserError, match=f"the tokenizer has a word {config.text_config.vocab_size}"):
        load_processor(checkpoint, config)


@pytest.fixture
def adapter(checkpoint, tmp_path):
    base = AutoModelForImageTextToText.from_pretrained(checkpoint)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter that can be read"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12345678"), "no adapter that can be read"),
        (lambda folder: edit(folder / "adapter_config.json", "peft_type", value="x"), "no adapter that can be read"),
        (lambda folder: edit(folder / "adapter_config.json", "r", value=10**9), "no adapter that can be read"),
        (lambda folder: edit(folder / "adapter_config.json", "lora_alpha", value=math.nan), "NaN"),
        (
            lambda folder: rename_first(folder / "adapter_model.safetensors"),
            "1 missing tensors: .*1 unknown tensors: x",
        ),
    ],
)
def test_a_damaged_adapter(adapter, damage, says):
    damage(adapter)
    with pytest.raises(UserError, match=says):
        load_chat(str(adapter))


def rename_first(file):
    tensors = load_file(file)
    tensors["x"] = tensors.pop(min(tensors))
    save_file(tensors, file)


@pytest.mark.parametrize("device", ["tpu", "auto", "", "meta", "cuda:99", "cpu:7", "xpu", 5.5])
def test_devices_that_are_not_here(device):
    with pytest.raises(UserError, match="device="):
        load_chat("nowhere", device=device)
