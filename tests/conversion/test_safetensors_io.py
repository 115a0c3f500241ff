"""conversion/safetensors_io.py, judged by safetensors' own reader and writer."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vamba.conversion.planning import Step
from vamba.conversion.safetensors_io import split_into_files, write_files
from vamba.weight_files import CheckpointReader


def steps_for(tensors):
    return [Step(key, tuple(tensor.shape), tensor.dtype, key) for key, tensor in tensors.items()]


def mixed_tensors():
    torch.manual_seed(0)
    return {
        "odd.bf16": torch.randn(3, 5).bfloat16(),  # 30 bytes: what follows would lie misaligned
        "wide": torch.randn(7, 2),
        "half": torch.randn(3).half(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(4, 6).T,
        "strided": torch.randn(8)[::2],
        "näme": torch.randn(1, 2, 3),
    }


def write(folder, tensors, max_shard_size="5GB"):
    seen = []
    write_files(folder, steps_for(tensors), lambda step: tensors[step.key], max_shard_size, seen.append)
    return seen


def test_safetensors_reads_back_every_bit(tmp_path):
    tensors = mixed_tensors()
    seen = write(tmp_path, tensors)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert loaded[key].dtype == tensor.dtype and torch.equal(loaded[key], tensor), key
    assert sum(seen) == sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_are_aligned_to_their_dtype(tmp_path):
    write(tmp_path, mixed_tensors())
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    for key, tensor in mixed_tensors().items():
        assert header[key]["data_offsets"][0] % tensor.dtype.itemsize == 0, key


def test_a_tensor_other_than_planned_is_a_bug_and_stops(tmp_path):
    with pytest.raises(RuntimeError, match="wide"):
        write_files(tmp_path, [Step("wide", (3,), torch.float32, None)], lambda step: torch.zeros(4))


def test_shards_hold_what_fits_and_the_index_finds_it(tmp_path):
    tensors = {f"t{i}": torch.full((250,), float(i)) for i in range(7)}  # 1000 bytes each
    write(tmp_path, tensors, 3000)
    files = split_into_files(steps_for(tensors), 3000).filename_to_tensors
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == list(files)
    assert list(files) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [len(steps) for steps in files.values()] == [3, 3, 1]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 1750, "total_size": 7000}
    reader = CheckpointReader(tmp_path)
    assert reader.specs.keys() == tensors.keys()
    assert all(torch.equal(reader.read(key), tensor) for key, tensor in tensors.items())


def test_one_file_needs_no_index(tmp_path):
    write(tmp_path, {"a": torch.zeros(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_bad_shard_size():
    with pytest.raises(ValueError, match="5 bananas"):
        split_into_files(steps_for({"a": torch.zeros(3)}), "5 bananas")
