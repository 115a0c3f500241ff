"""Writing checkpoints one tensor at a time; `vamba.weight_files` reads them.

The unusual: safetensors' own writer wants all tensors of a file at once, which is as much host memory as a shard. The
format is an 8-byte header length, a JSON header and the raw bytes; names, shapes and dtypes are known before the
values, so the header is written first and the tensors follow as they come. Memory is the largest tensor twice (as
read, as cast), whatever the size of the model.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory

from vamba.weight_files import INDEX, NAMES

from .planning import ConversionError, Step


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
