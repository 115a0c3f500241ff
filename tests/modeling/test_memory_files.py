"""Memories as files: whole or not at all, and only of the kind that is asked for."""

import os

import pytest
import torch
from safetensors.torch import save_file

from vamba.modeling.memory_files import read_memory, write_memory


def test_tensors_and_header_come_back(tmp_path):
    whole = torch.arange(6.0, requires_grad=True).reshape(2, 3)
    tensors = {"a": whole[:, 1:], "b": whole.T, "c": torch.tensor([1, 2])}  # slices of one storage, a graph
    write_memory(tmp_path / "m", "kind.1", tensors, {"media": [["video", 3]], "none": None})
    read, header = read_memory(tmp_path / "m", "kind.1")
    assert header == {"format": "kind.1", "media": [["video", 3]], "none": None}
    assert read.keys() == tensors.keys() and all(torch.equal(read[key], tensors[key]) for key in read)


def test_other_files_are_refused_by_name(tmp_path):
    write_memory(tmp_path / "m", "kind.1", {}, {})
    save_file({"a": torch.ones(1)}, tmp_path / "weights")
    (tmp_path / "text").write_text("hello")
    for name, match in (("m", r"another kind of model \(kind.1\)"), ("weights", "no memory"), ("text", "damaged")):
        with pytest.raises(ValueError, match=match):
            read_memory(tmp_path / name, "kind.2")
    with pytest.raises(FileNotFoundError, match="no memory at .*nowhere"):
        read_memory(tmp_path / "nowhere", "kind.1")


def test_an_interrupted_write_leaves_the_older_file(tmp_path, monkeypatch):
    write_memory(tmp_path / "m", "kind.1", {}, {"age": 1})

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_memory(tmp_path / "m", "kind.1", {}, {"age": 2})
    assert read_memory(tmp_path / "m", "kind.1")[1]["age"] == 1 and os.listdir(tmp_path) == ["m"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="cannot be written"):
        write_memory(tmp_path / "no" / "m", "kind.1", {}, {})
