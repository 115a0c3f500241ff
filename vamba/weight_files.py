"""The files of weights in a checkpoint's folder: what they hold, from their headers alone, and one tensor at a time.

What is unusual: nothing is believed. An index and the files it names have to agree, a file has to be as long as its
header says, and what does not fit is named before a weight is read. A pytorch_model.bin is read by an unpickler that
runs no code.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from .errors import UserError


SINGLE, INDEX, BIN = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
TORCH_DTYPES = {name: dtype for dtype, name in NAMES.items()}  # any other dtype is refused, and named as in the file


class CheckpointError(UserError):
    """A file of weights is damaged or missing, or its tensors are not those of the model."""


class TensorSpec(NamedTuple):
    """What a file's header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str


class CheckpointReader:
    """The tensors of a checkpoint folder, sharded or not; `specs` comes from the headers alone.

    Raises CheckpointError where there are no safetensors, a file is damaged, or the index contradicts the files.
    """

    def __init__(self, folder: Path):
        self.folder, self.index = folder, folder / INDEX
        listed = self._listed_files()
        self.files: dict[str, Path] = {}
        self.specs: dict[str, TensorSpec] = {}
        for name in dict.fromkeys(listed.values()) if listed is not None else [SINGLE]:
            for key, spec in _header(folder / name).items():
                if listed is not None and listed.get(key) != name:
                    where = f"puts it in {listed[key]}" if key in listed else "does not list it"
                    raise CheckpointError(f"{folder / name} holds {key}, but the index {where}.")
                self.files[key], self.specs[key] = folder / name, spec
        if absent := sorted(set(listed or ()) - set(self.specs)):
            raise CheckpointError(f"{self.index} lists {absent[0]} and {len(absent) - 1} more keys that no file holds.")

    def read(self, key: str) -> torch.Tensor:
        """One tensor. The file is mapped for this tensor only, so that nothing read before stays in memory."""
        with safe_open(self.files[key], framework="pt") as file:
            return file.get_tensor(key)

    def _listed_files(self) -> dict[str, str] | None:
        """Key → file name of the index; None where there is one file without an index."""
        if (self.folder / SINGLE).is_file():
            return None
        if not self.index.is_file():
            raise CheckpointError(_no_weights(self.folder))
        try:
            listed = dict(json.loads(self.index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{self.index} is not an index of safetensors files: {error!r}") from error
        for name in dict.fromkeys(map(str, listed.values())):
            if Path(name).name != name or name not in listed.values():
                raise CheckpointError(f"{self.index} names the file {name!r}, which is not in the folder itself.")
            if len(name) > 255 or not (self.folder / name).is_file():
                raise CheckpointError(
                    f"{self.index} names {name:.100}, which is not there: the download is incomplete."
                )
        return listed


class TorchReader:
    """The tensors of a pytorch_model.bin, mapped rather than read, with an unpickler that runs no code.

    Raises CheckpointError where the file is damaged or holds anything but tensors.
    """

    def __init__(self, path: Path):
        try:
            self.state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            self.specs = {key: TensorSpec(tuple(t.shape), t.dtype) for key, t in self.state.items()}
        except (RuntimeError, UnpicklingError, EOFError, AttributeError, ValueError, KeyError, TypeError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise CheckpointError(f"{path} is damaged, or no file of tensors by their names: {first}") from error

    def read(self, key: str) -> torch.Tensor:
        return self.state[key]


def open_checkpoint(folder: Path) -> CheckpointReader | TorchReader:
    """A reader of the weights in `folder`: safetensors, or a pytorch_model.bin where there are none."""
    if (folder / BIN).is_file() and not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return TorchReader(folder / BIN)
    return CheckpointReader(folder)


def raise_problems(
    folder: str, problems: Mapping[str, Iterable[str]], remedy: str = "", config: str = "config.json"
) -> None:
    """Raises CheckpointError that names up to five keys of each kind of problem, if there is any."""
    parts = []
    for kind, found in problems.items():
        if keys := sorted(found):
            more = f", and {len(keys) - 5} more" if len(keys) > 5 else ""
            parts.append(f"{len(keys)} {kind}: {', '.join(keys[:5])}{more}")
    if parts:
        raise CheckpointError(f"{folder} does not fit its {config}: {'; '.join(parts)}.{remedy}")


def _header(path: Path) -> dict[str, TensorSpec]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            stored = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete: {error}") from error
    return {key: TensorSpec(shape, TORCH_DTYPES.get(dtype, dtype)) for key, (shape, dtype) in stored.items()}


def _no_weights(folder: Path) -> str:
    if any(folder.glob("pytorch_model*.bin")):
        return (
            f"{folder} holds {BIN}, which can run code when read; only safetensors are read. For each "
            "file: state = torch.load(path, weights_only=True), then safetensors.torch.save_file(state, "
            '"model.safetensors", metadata={"format": "pt"}).'
        )
    if any(folder.glob("adapter_model*")):
        return f"{folder} holds an adapter only; merge it into its base model (peft's merge_and_unload) and save that."
    return f"{folder} holds neither {SINGLE} nor {INDEX}, so no weights; fetch the checkpoint again."
