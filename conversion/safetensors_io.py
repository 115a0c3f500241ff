"""Reading and writing safetensors one tensor at a time.

The unusual: safetensors' own writer wants all tensors of a file at once. The format is an 8-byte header length, a JSON
header and the raw bytes; names, shapes and dtypes are known before the values, so the header is written first and the
tensors follow as they come. Memory is the largest tensor twice (as read, as cast), whatever the size of the model.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from .table import ConversionError, Step, TensorSpec


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class CheckpointReader:
    """The tensors of a checkpoint folder, sharded or not; `specs` comes from the headers alone.

    Raises ConversionError where there are no safetensors, a file is damaged, or the index contradicts the files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        listed = self._listed_files()
        self.files: dict[str, Path] = {}
        self.specs: dict[str, TensorSpec] = {}
        for name in dict.fromkeys(listed.values()) if listed is not None else [SINGLE]:
            for key, spec in self._header(folder / name).items():
                if listed is not None and listed.get(key) != name:
                    where = f"puts it in {listed[key]}" if key in listed else "does not list it"
                    raise ConversionError(f"{name} holds {key}, but {INDEX} {where}.")
                self.files[key], self.specs[key] = folder / name, spec
        absent = sorted(set(listed or ()) - set(self.specs))
        if absent:
            raise ConversionError(f"{INDEX} lists {absent[0]} and {len(absent) - 1} more keys that no file holds.")

    def read(self, key: str) -> torch.Tensor:
        """One tensor. The file is mapped for this tensor only, so that nothing read before stays in memory."""
        with safe_open(self.files[key], framework="pt") as file:
            return file.get_tensor(key)

    def _listed_files(self) -> dict[str, str] | None:
        """Key → file name of the index; None where there is one file without an index."""
        if (self.folder / SINGLE).is_file():
            return None
        if not (self.folder / INDEX).is_file():
            raise ConversionError(_no_weights(self.folder))
        try:
            listed = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConversionError(f"{self.folder / INDEX} is not an index of safetensors files: {error!r}") from error
        for name in set(listed.values()):
            if Path(name).name != name:
                raise ConversionError(f"{INDEX} names the file {name!r}, which is not in the folder itself.")
            if not (self.folder / name).is_file():
                raise ConversionError(f"{INDEX} names {name}, which is not there: the download is incomplete.")
        return listed

    def _header(self, path: Path) -> dict[str, TensorSpec]:
        try:
            with safe_open(path, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}
                return {
                    key: TensorSpec(tuple(part.get_shape()), TORCH_DTYPES.get(part.get_dtype(), part.get_dtype()))
                    for key, part in slices.items()
                }
        except SafetensorError as error:
            raise ConversionError(f"{path} is damaged or incomplete: {error}") from error


class TorchReader:
    """The tensors of a pytorch_model.bin, mapped rather than read, with an unpickler that runs no code.

    Raises ConversionError where the file is damaged or holds anything but tensors.
    """

    def __init__(self, path: Path):
        try:
            self.state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            self.specs = {key: TensorSpec(tuple(t.shape), t.dtype) for key, t in self.state.items()}
        except (RuntimeError, UnpicklingError, EOFError, AttributeError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise ConversionError(f"{path} is damaged, or no file of tensors by their names: {first}") from error

    def read(self, key: str) -> torch.Tensor:
        return self.state[key]


def open_checkpoint(folder: Path) -> CheckpointReader | TorchReader:
    """A reader of the weights in `folder`: safetensors, or a pytorch_model.bin where there are none."""
    if (folder / "pytorch_model.bin").is_file() and not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return TorchReader(folder / "pytorch_model.bin")
    return CheckpointReader(folder)


def split_into_files(steps: Iterable[Step], max_shard_size: int | str) -> dict[str, list[Step]]:
    """The output files, named as transformers names them, and what each holds. Raises ConversionError on a bad size."""
    steps = {step.key: step for step in steps}
    options = {"filename_pattern": "model{suffix}.safetensors", "max_shard_size": max_shard_size}
    try:
        split = split_state_dict_into_shards_factory(steps, get_storage_size=size_of, **options)
    except ValueError as error:
        raise ConversionError(f"max_shard_size is {max_shard_size!r}: {error}") from error
    return {name: [steps[key] for key in keys] for name, keys in split.filename_to_tensors.items()}


def size_of(step: Step) -> int:
    """Bytes of the tensor on disk."""
    return torch.Size(step.shape).numel() * step.dtype.itemsize


def write_file(
    path: Path, steps: Iterable[Step], produce: Callable[[Step], torch.Tensor], on_bytes: Callable[[int], object]
) -> None:
    """Writes one safetensors file, asking `produce` for one tensor at a time.

    Args:
        path: of the file.
        steps: what it holds.
        produce: the tensor of a step, of its shape and dtype.
        on_bytes: told the bytes of each tensor once written.
    """
    # Wide dtypes first, as safetensors does: a float32 behind an odd number of bfloat16 would lie misaligned.
    steps = sorted(steps, key=lambda step: -step.dtype.itemsize)
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for step in steps:
        end = offset + size_of(step)
        header[step.key] = {"dtype": NAMES[step.dtype], "shape": list(step.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for step in steps:
            tensor = produce(step)
            if tuple(tensor.shape) != step.shape or tensor.dtype != step.dtype:
                raise RuntimeError(f"{step.key}: produced {tensor.dtype} {list(tensor.shape)}, planned {step}")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
            del tensor
            on_bytes(size_of(step))
        file.flush()
        os.fsync(file.fileno())


def write_index(folder: Path, files: Mapping[str, list[Step]]) -> None:
    """The index that transformers reads, where there is more than one file."""
    if len(files) < 2:
        return
    steps = [step for held in files.values() for step in held]
    index = {
        "metadata": {
            "total_parameters": sum(torch.Size(step.shape).numel() for step in steps),
            "total_size": sum(map(size_of, steps)),
        },
        "weight_map": {step.key: name for name, held in files.items() for step in held},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _no_weights(folder: Path) -> str:
    if any(folder.glob("pytorch_model*.bin")):
        return (
            f"{folder} holds pytorch_model.bin, which can run code when read; only safetensors are converted. For each "
            "file: state = torch.load(path, weights_only=True), then safetensors.torch.save_file(state, "
            '"model.safetensors", metadata={"format": "pt"}).'
        )
    if any(folder.glob("adapter_model*")):
        return f"{folder} holds an adapter only; merge it into its base model (peft's merge_and_unload) and save that."
    return f"{folder} holds neither {SINGLE} nor {INDEX}."
