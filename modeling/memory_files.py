"""Memories as files, safetensors with a JSON header, and as a line of text.

What is unusual: a file appears complete or not at all, so that an interrupted write leaves an older one intact.
"""

import json
import os
import warnings
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache


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


def warn_of_unknown_weights(path: str | os.PathLike) -> None:
    """For files of versions that did not write which weights made a memory."""
    warnings.warn(
        f"{os.fspath(path)!r} does not say which weights made it, so it is not checked that the model asked has them; "
        "encode the video again to be sure.",
        stacklevel=3,
    )


def describe(memory: Cache, kept: Tensor | None, frames: int) -> str:
    """What a memory holds, in one line; `kept` is one of its tensors, None if it holds nothing."""
    seconds = "" if memory.seconds is None else f" ({memory.seconds:g} s)"
    where = "" if kept is None else f", {kept.device}, {kept.dtype}"
    text = int(memory.get_seq_length())
    return (
        f"{type(memory).__name__}({frames} frames{seconds}, {sum(memory.num_video_tokens)} video tokens, "
        f"{text} text tokens, {memory.video_nbytes} bytes{where})"
    )


__all__ = ["describe", "read_memory", "warn_of_unknown_weights", "write_memory"]
