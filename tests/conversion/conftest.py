"""Tiny checkpoints to convert: Qwen2-VL written by transformers, original Vamba from shared/golden."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from tiny_checkpoints import TEMPLATE, tiny_qwen2_vl


GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "vamba_original_tiny"


@pytest.fixture(scope="session")
def qwen2_vl_state(tmp_path_factory):
    """Folder of a tiny Qwen2-VL, as transformers writes it; for reading only."""
    folder = tmp_path_factory.mktemp("qwen2_vl")
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(tiny_qwen2_vl())
    for parameter in model.parameters():  # off their trivial values, so that a swap of two norms shows
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def qwen2_vl(qwen2_vl_state, tmp_path):
    """A copy of the tiny Qwen2-VL that a test may spoil, with a tokenizer and processor's files."""
    folder = tmp_path / "qwen2_vl"
    shutil.copytree(qwen2_vl_state, folder)
    files = {
        "tokenizer.json": {"version": "1.0", "added_tokens": [{"content": "<|image_pad|>"}]},
        "tokenizer_config.json": {"chat_template": TEMPLATE, "processor_class": "Qwen2VLProcessor", "pad_token": "é"},
        "preprocessor_config.json": {"patch_size": 4, "processor_class": "Qwen2VLProcessor"},
        "chat_template.json": {"chat_template": TEMPLATE},
        "generation_config.json": {"eos_token_id": [2, 3], "temperature": 0.01},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "merges.txt").write_bytes(b"#version: 0.2\r\n\xc4\xa0 t\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "modeling_secret.py").write_text("raise SystemExit")
    return folder


@pytest.fixture(params=["default", "position_and_norm", "no_alpha"])
def golden(request):
    """Folder of an original Vamba checkpoint."""
    folder = GOLDEN / request.param
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


@pytest.fixture
def golden_copy(golden, tmp_path):
    """A copy of an original Vamba checkpoint that a test may spoil."""
    return Path(shutil.copytree(golden, tmp_path / "original"))


@pytest.fixture
def edit_json():
    def edit(path, **changes):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")

    return edit
