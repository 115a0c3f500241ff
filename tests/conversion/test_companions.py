"""conversion/companions.py: the files beside the weights."""

import json

import pytest

from vamba.conversion.companions import copy_companions, strip_pads
from vamba.conversion.configs import config_from_qwen2_vl
from vamba.conversion.planning import ConversionError

from tiny_checkpoints import STRIPPED, TEMPLATE


REMOTE = {"AutoProcessor": "processing_vamba.VambaProcessor"}


@pytest.fixture
def copied(qwen2_vl, tmp_path):
    """Copies the companions of `qwen2_vl` and reads back a file of the copy."""
    config = config_from_qwen2_vl(json.loads((qwen2_vl / "config.json").read_text()), {"head_dim": 16})

    def copy():
        target = tmp_path / "target"
        target.mkdir()
        copy_companions(qwen2_vl, target, config, "VambaProcessor")
        return lambda name: json.loads((target / name).read_text(encoding="utf-8"))

    return copy


def test_verbatim_files_keep_every_byte(qwen2_vl, copied, tmp_path):
    copied()
    for name in ("tokenizer.json", "merges.txt", "generation_config.json"):
        assert (tmp_path / "target" / name).read_bytes() == (qwen2_vl / name).read_bytes()


def test_weights_code_and_unknown_files_stay(qwen2_vl, copied, tmp_path):
    (qwen2_vl / "README.md").write_text("of the other model")
    copied()
    names = {path.name for path in (tmp_path / "target").iterdir()}
    assert not names & {"modeling_secret.py", "README.md", "model.safetensors", "config.json"}


def test_templates_lose_the_placeholders_wherever_they_are(qwen2_vl, copied, tmp_path):
    (qwen2_vl / "additional_chat_templates").mkdir()
    (qwen2_vl / "additional_chat_templates" / "tools.jinja").write_text(TEMPLATE)
    read = copied()
    assert read("tokenizer_config.json")["chat_template"] == STRIPPED
    assert read("chat_template.json")["chat_template"] == STRIPPED
    assert (tmp_path / "target" / "chat_template.jinja").read_text() == STRIPPED
    assert (tmp_path / "target" / "additional_chat_templates" / "tools.jinja").read_text() == STRIPPED


def test_named_templates(qwen2_vl, copied, edit_json):
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tools", "template": "x"}]
    edit_json(qwen2_vl / "tokenizer_config.json", chat_template=named)
    expected = [{"name": "default", "template": STRIPPED}, {"name": "tools", "template": "x"}]
    assert copied()("tokenizer_config.json")["chat_template"] == expected


def test_vamba_template_renders_media_items_without_placeholders():
    jinja2 = pytest.importorskip("jinja2")
    message = {"content": [{"type": "image"}, {"type": "video"}]}
    rendered = jinja2.Template(strip_pads(TEMPLATE)).render(message=message)
    assert rendered == "<|vision_start|><|vision_end|>" * 2


def test_processor_class_is_ours_and_the_rest_stays(copied):
    read = copied()
    assert read("preprocessor_config.json") == {"patch_size": 4, "processor_class": "VambaProcessor"}
    assert read("tokenizer_config.json")["processor_class"] == "VambaProcessor"
    assert read("tokenizer_config.json")["pad_token"] == "é"
    assert read("processor_config.json") == {"processor_class": "VambaProcessor", "auto_map": REMOTE}


def test_processor_config_of_transformers_5(qwen2_vl, copied):
    parts = {
        "image_processor": {"patch_size": 4, "processor_class": "Qwen2VLProcessor", "auto_map": {"x": "y"}},
        "processor_class": "Qwen2VLProcessor",
        "auto_map": {"AutoProcessor": "modeling_secret.P"},
    }
    (qwen2_vl / "processor_config.json").write_text(json.dumps(parts))
    image_processor = {"patch_size": 4, "processor_class": "VambaProcessor"}
    expected = {"image_processor": image_processor, "processor_class": "VambaProcessor", "auto_map": REMOTE}
    assert copied()("processor_config.json") == expected


def test_generation_config_is_made_where_there_is_none(qwen2_vl, copied):
    (qwen2_vl / "generation_config.json").unlink()
    assert copied()("generation_config.json") == {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}


def test_no_processor_is_made_up_where_there_is_none(qwen2_vl, copied, tmp_path):
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        (qwen2_vl / name).unlink()
    copied()
    assert not (tmp_path / "target" / "processor_config.json").exists()


def test_damaged_companion_is_named(qwen2_vl, copied):
    (qwen2_vl / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConversionError, match="preprocessor_config.json is not valid JSON"):
        copied()
