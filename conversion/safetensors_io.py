"""Reading and writing checkpoints one tensor at a time.

The unusual: safetensors' own writer wants all tensors of a file at once, which is as much host memory as a shard. The
format is an 8-byte header length, a JSON header and the raw bytes; names, shapes and dtypes are known before the
values, so the header is written first and the tensors follow as they come. Memory is the largest tensor twice (as
read, as cast), whatever the size of the model.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from .planning import ConversionError, Step, TensorSpec


SINGLE, INDEX, BIN = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
TORCH_DTYPES = {name: dtype for dtype, name in NAMES.items()}  # any other dtype is refused, and named as in the file


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
            for key, spec in _header(folder / name).items():
                if listed is not None and listed.get(key) != name:
                    where = f"puts it in {listed[key]}" if key in listed else "does not list it"
                    raise ConversionError(f"{name} holds {key}, but {INDEX} {where}.")
                self.files[key], self.specs[key] = folder / name, spec
        if absent := sorted(set(listed or ()) - set(self.specs)):
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
    if (folder / BIN).is_file() and not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return TorchReader(folder / BIN)
    return CheckpointReader(folder)


def split_into_files(steps: Iterable[Step], max_shard_size: int | str) -> StateDictSplit:
    """The output files, named as transformers names them. Raises ConversionError on a bad size."""
    options = {"filename_pattern": "model{suffix}.safetensors", "max_shard_size": max_shard_size}
    size_of = {"get_storage_size": lambda step: step.nbytes}
    try:
        return split_state_dict_into_shards_factory({step.key: step for step in steps}, **size_of, **options)
    except ValueError as error:
        raise ConversionError(f"max_shard_size is {max_shard_size!r}: {error}") from error


def write_files(
    folder: Path,
    steps: Iterable[Step],
    produce: Callable[[Step], torch.Tensor],
    max_shard_size: int | str = "5GB",
    on_bytes: Callable[[int], object] = lambda size: None,
) -> None:
    """Writes a checkpoint's safetensors, and their index where there is more than one.

    Args:
        produce: the tensor of a step, of its shape and dtype; asked for one after the other.
        on_bytes: told the bytes of each tensor once written.
    """
    steps = {step.key: step for step in steps}
    split = split_into_files(steps.values(), max_shard_size)
    for name, keys in split.filename_to_tensors.items():
        _write_file(folder / name, [steps[key] for key in keys], produce, on_bytes)
    if split.is_sharded:
        parameters = sum(torch.Size(step.shape).numel() for step in steps.values())
        index = {"metadata": {"total_parameters": parameters, **split.metadata}, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_file(path: Path, steps: list[Step], produce: Callable, on_bytes: Callable) -> None:
    # Wide dtypes first, as safetensors does: a float32 behind an odd number of bfloat16 would lie misaligned.
    steps = sorted(steps, key=lambda step: -step.dtype.itemsize)
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for step in steps:
        offsets = [offset, offset := offset + step.nbytes]
        header[step.key] = {"dtype": NAMES[step.dtype], "shape": list(step.shape), "data_offsets": offsets}
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
            on_bytes(step.nbytes)


def _header(path: Path) -> dict[str, TensorSpec]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            stored = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
    except SafetensorError as error:
        raise ConversionError(f"{path} is damaged or incomplete: {error}") from error
    return {key: TensorSpec(shape, TORCH_DTYPES.get(dtype, dtype)) for key, (shape, dtype) in stored.items()}


def _no_weights(folder: Path) -> str:
    if any(folder.glob("pytorch_model*.bin")):
        return (
            f"{folder} holds {BIN}, which can run code when read; only safetensors are converted. For each "
            "file: state = torch.load(path, weights_only=True), then safetensors.torch.save_file(state, "
            '"model.safetensors", metadata={"format": "pt"}).'
        )
    if any(folder.glob("adapter_model*")):
        return f"{folder} holds an adapter only; merge it into its base model (peft's merge_and_unload) and save that."
    return f"{folder} holds neither {SINGLE} nor {INDEX}."
