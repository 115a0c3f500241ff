"""vamba/errors.py: what a full disk is known by."""

import shutil
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from vamba.errors import is_disk_full


def test_a_full_disk_is_known_whoever_wrote(tmp_path, monkeypatch):
    """Messages of safetensors and torch as they are on a full disk; that of torch may have other causes."""
    with pytest.raises(OSError) as plain, open("/dev/full", "w") as file:
        file.write("x")
        file.flush()
    tensors = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert is_disk_full(plain.value, tmp_path) and is_disk_full(tensors, tmp_path)
    zipped = RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598")
    assert not is_disk_full(zipped, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert is_disk_full(zipped, tmp_path) and not is_disk_full(RuntimeError("a fault"), tmp_path)
