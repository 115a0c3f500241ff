"""Memories as files: safetensors with a JSON header.

What is unusual: a file appears complete or not at all, so that an interrupted write leaves an older one intact.
"""

import json
import os
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_memory(path: str | os.PathLike, kind: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Writes tensors and a header of the format `kind` to one file. Raises OSError where that is not possible."""
    # every tensor its own contiguous storage, as slices of one buffer cannot be written; a GPU has no room for copies
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    partial = f"{os.fspath(path)}.partial-{os.getpid()}"
    try:
        save_file(tensors, partial, metadata={"format": "pt", "vamba": json.dumps({"format": kind, **header})})
        os.replace(partial, path)
    except SafetensorError as error:
        raise OSError(f"The memory cannot be written to {os.fspath(path)!r}: {error}.") from error
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def read_memory(path: str | os.PathLike, kind: str, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file that `write_memory` wrote.

    Raises:
        FileNotFoundError: no such file. ValueError: the file is damaged, or not of the format `kind`.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no memory at {os.fspath(path)!r}.")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            header = json.loads((file.metadata() or {}).get("vamba", "{}"))
            if (found := header.get("format")) != kind:
                of = "no memory" if found is None else f"a memory of another kind of model ({found})"
                raise ValueError(f"{os.fspath(path)!r} is {of}, not {kind}; write one with memory.save().")
            return {name: file.get_tensor(name) for name in file.keys()}, header
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)!r} is damaged or no safetensors file: {error}.") from error


__all__ = ["read_memory", "write_memory"]
