"""vamba/weight_files.py: damaged headers, indices and folders are named in one sentence."""

import json

import pytest
import torch
from safetensors.torch import save_file

from vamba.weight_files import CheckpointError, CheckpointReader


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "x.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "y.safetensors")

    def index(**weight_map):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return CheckpointReader(tmp_path)

    return index


def test_index_is_followed(sharded):
    assert sharded(a="x.safetensors", b="y.safetensors").specs.keys() == {"a", "b"}


@pytest.mark.parametrize(
    "weight_map, says",
    [
        ({"a": "x.safetensors", "b": "z.safetensors"}, "z.safetensors, which is not there"),
        ({"a": "x.safetensors", "b": "../y.safetensors"}, "not in the folder"),
        ({"a": "x.safetensors", "b": "x.safetensors"}, "lists b and 0 more"),
        ({"b": "x.safetensors"}, "x.safetensors holds a, but .* does not list it"),
        ({"a": "y.safetensors", "b": "x.safetensors"}, "holds b, but .* puts it in x.safetensors"),
    ],
)
def test_index_that_contradicts_the_files(sharded, weight_map, says):
    with pytest.raises(CheckpointError, match=says):
        sharded(**weight_map)


def test_damaged_file(tmp_path):
    save_file({"a": torch.zeros(300)}, tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(raw[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors is damaged or incomplete"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    "name, says",
    [
        ("pytorch_model.bin", r"save_file\(state"),
        ("pytorch_model-00001-of-00002.bin", "weights_only=True"),
        ("adapter_model.safetensors", "merge_and_unload"),
        ("readme.txt", "holds neither model.safetensors nor"),
    ],
)
def test_folders_without_safetensors(tmp_path, name, says):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=says):
        CheckpointReader(tmp_path)
