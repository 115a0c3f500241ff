"""Checkpoints at home on the Hub: code that loads without this package, and a card."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_imports, get_relative_imports
from transformers.pipelines import SUPPORTED_TASKS

from vamba import hub
from vamba.modeling import VambaConfig


STRANGER = """
import sys
sys.modules["vamba"] = None  # as if it were not installed
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
folder, clip = sys.argv[1:]
trust = {"trust_remote_code": True}
config, base = (auto.from_pretrained(folder, **trust) for auto in (AutoConfig, AutoModel))
print(type(config).__name__, type(base).__name__)
model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
processor = AutoProcessor.from_pretrained(folder, **trust)
content = [{"type": "video", "video": clip, "fps": 4.0}, {"type": "text", "text": "What happens?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                       tokenize=True, return_dict=True, return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, -6:].tolist())
memory = model.encode_video(inputs["pixel_values_videos"], inputs["video_grid_thw"])
print(type(model).__name__, type(processor).__name__, memory.video_length, type(model).__module__.split(".")[0])
"""


def ask(model, processor, clip):
    content = [{"type": "video", "video": str(clip), "fps": 4.0}, {"type": "text", "text": "What happens?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    return model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, -6:].tolist(), inputs


@pytest.mark.parametrize("saved_by", ["converter", "save_pretrained"])
def test_a_machine_without_the_package_loads_it(checkpoint, clip, tmp_path, saved_by):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    expected, inputs = ask(model, processor, clip)
    folder = checkpoint
    if saved_by == "save_pretrained":
        folder = tmp_path / "saved"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, str(folder), str(clip)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stderr.count("Videos are read by transformers' load_video") == 1
    tokens = int(inputs["video_grid_thw"].prod()) // 4
    assert result.stdout.splitlines() == [
        "VambaConfig VambaModel",
        str(expected),
        f"VambaForConditionalGeneration VambaProcessor {tokens} transformers_modules",
    ]


def test_the_code_stands_alone(tmp_path, checkpoint):
    """Every file that travels imports its siblings one by one, and the package only where it may be missing (`try`)."""
    files = hub.write_remote_code(tmp_path)
    names = {file.stem for file in files}
    assert {"configuration_vamba", "modeling_vamba", "processing_vamba", "video_memory"} <= names
    for file in files:
        assert not {"vamba", "modeling"} & set(get_imports(file)), file.name
        assert set(get_relative_imports(file)) <= names, file.name


def test_auto_map_names_every_class(checkpoint):
    auto_map = json.loads((checkpoint / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {
        "AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoProcessor",
    }  # fmt: skip
    for target in auto_map.values():
        module, name = target.split(".")
        assert f"class {name}" in (checkpoint / f"{module}.py").read_text()


def test_the_model_card(checkpoint):
    text = (checkpoint / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["pipeline_tag"] == "image-text-to-text" and front["pipeline_tag"] in SUPPORTED_TASKS
    assert front["library_name"] == "transformers"
    assert "vamba" in front["tags"] and "license" not in front and "base_model" not in front  # nobody said
    assert "{{" not in text and "freshly initialised" in text
    assert re.search(r"\n3 layers of width 64, [\d.]+ million parameters, [\d.]+ KB of video memory", text)
    snippet = text.split("```python")[1].split("```")[0]
    compile(snippet, "README.md", "exec")
    assert 'from_pretrained("vamba"' in snippet


def test_what_a_card_inherits(tmp_path):
    front = "license: other\nlicense_name: qwen\nbase_model: [a/b]\ntags: [x]"
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# X\n")
    expected = {"license": "other", "license_name": "qwen", "base_model": ["a/b"]}
    assert hub.inherited_metadata(tmp_path) == expected
    (tmp_path / "config.json").write_text('{"_name_or_path": "c/d"}')
    assert hub.inherited_metadata(tmp_path) == expected | {"base_model": "c/d"}
    (tmp_path / "config.json").write_text('{"_name_or_path": "/home/c/d"}')
    (tmp_path / "README.md").write_text("# X\nlicense: mit\n")
    assert hub.inherited_metadata(tmp_path) == {}


@pytest.mark.parametrize("edited", [False, True])
def test_push_uploads_model_processor_code_and_card(checkpoint, monkeypatch, edited):
    uploaded = {}

    class StandIn:
        """Of huggingface_hub.HfApi: the calls an upload makes."""

        def __init__(self, token=None):
            uploaded["token"] = token

        def model_info(self, repo_id, timeout):
            return None

        def create_repo(self, repo_id, private=None, exist_ok=False):
            return type("RepoUrl", (), {"repo_id": repo_id})

        def file_exists(self, repo_id, filename):
            return edited and (repo_id, filename) == ("me/tiny", "README.md")

        def upload_folder(self, repo_id, folder_path, commit_message):
            uploaded.update(repo_id=repo_id, files=sorted(path.name for path in Path(folder_path).iterdir()))
            card = Path(folder_path) / "README.md"
            uploaded["card"] = card.read_text() if card.exists() else None
            return "https://hub/commit/1"

    monkeypatch.setattr("huggingface_hub.HfApi", StandIn)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert hub.push_to_hub(model, processor, "me/tiny", token="t", base_model="me/base") == "https://hub/commit/1"
    assert uploaded["repo_id"] == "me/tiny" and uploaded["token"] == "t"
    assert uploaded["card"] is None if edited else "base_model: me/base" in uploaded["card"]
    assert {"config.json", "model.safetensors", "modeling_vamba.py", "processing_vamba.py", "tokenizer.json"} <= set(
        uploaded["files"]
    )


def test_describe_counts_what_is_there(checkpoint):
    about = hub.describe(checkpoint)
    config = VambaConfig.from_pretrained(checkpoint)
    assert about["layers"] == 3 and about["hidden_size"] == config.text_config.hidden_size
    assert about["video_memory_bytes_per_token_bf16"] == 2 * 32 * 3 * 2  # keys and values of 2 heads of 16, 3 layers
    assert about["weights_bytes"] == (checkpoint / "model.safetensors").stat().st_size
