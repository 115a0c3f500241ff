"""Saves memories to files, and takes the fingerprint of the weights that made them.

What is unusual: a file (safetensors with a JSON header) appears complete or not at all, so an interrupted write leaves
an older file intact. The fingerprint is a short text that differs between fine-tunes but not between dtypes: it holds
one number of each weight instead of a hash, so weights that were rounded to another dtype are recognised. Weights that
cannot be read (quantised, shared out, or offloaded) are not compared. Adapters count by their own weights; once merged
into the base model, they make other weights. As reading waits for the GPU, it happens only when the addresses or
version counters of weights have changed. Fused optimizers do not raise these counters, so the models also read the
weights again after anything that records gradients (see `check_weights`).
"""

import base64
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.cache_utils import Cache


def write_memory(path: str | os.PathLike, kind: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Writes tensors and a header of the format `kind` to one file. Raises OSError if that is not possible."""
    # safetensors cannot write slices of a shared buffer. The copies are made on the CPU, as a GPU may have no room.
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
    """Returns tensors and header of a file. Raises FileNotFoundError, or ValueError for a damaged or another file."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no memory at {os.fspath(path)!r}.")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            header = json.loads((file.metadata() or {}).get("vamba", "{}"))
            if (found := header.get("format")) != kind:
                holds = "no memory" if found is None else f"a memory of another kind of model ({found})"
                raise ValueError(f"{os.fspath(path)!r} holds {holds}, not {kind}. Write one with memory.save().")
            return {name: file.get_tensor(name) for name in file.keys()}, header
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)!r} is damaged or no safetensors file: {error}.") from error


def warn_of_unknown_weights(path: str | os.PathLike) -> None:
    """Warns of a file by an earlier version, which did not write the fingerprint of the weights."""
    text = f"{os.fspath(path)!r} does not say which weights made it, so no model can be checked for having them."
    warnings.warn(f"{text} Encode the video again to be sure.", stacklevel=3)


def describe(name: str, memory: Cache, kept: Tensor | None, frames: int) -> str:
    """Says in one line what a memory holds; `kept` is one of its tensors, None if it holds nothing."""
    seconds = "" if memory.seconds is None else f" ({memory.seconds:g} s)"
    where = "" if kept is None else f", {kept.device}, {kept.dtype}"
    return (
        f"{name}({frames} frames{seconds}, {sum(memory.num_video_tokens)} video tokens, "
        f"{int(memory.get_seq_length())} text tokens, {memory.video_nbytes} bytes{where})"
    )


_DTYPES = {"d": torch.float64, "f": torch.float32, "h": torch.float16, "b": torch.bfloat16}
_KINDS = {dtype: kind for kind, dtype in _DTYPES.items()}
_UNREAD = "-"
_QUANTISED = {torch.int8, torch.uint8, torch.int32}  # dtypes of the buffers in which GPTQ and AWQ keep weights
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


class WeightsFingerprint:
    """Keeps the fingerprint of some modules' weights, and reads them again only when they may have changed."""

    def __init__(self):
        self._read_of: list[tuple] | None = None
        self._text = ""

    def of(self, modules: list[nn.Module]) -> str:
        """Returns three parts: a hash of the weights' names, the dtype of each (`_KINDS`), and one number of each."""
        weights = [found for index, module in enumerate(modules) for found in _weights(module, str(index))]
        state = [(name, *_place(weight)) for name, weight in weights]
        if state != self._read_of:
            names, tensors = zip(*weights) if weights else ((), ())
            digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
            kinds = "".join(_KINDS[t.dtype] if _is_readable(t) else _UNREAD for t in tensors)
            numbers = base64.b64encode(_one_of_each(tensors).numpy().tobytes()).decode()
            self._text, self._read_of = f"{digest}:{kinds}:{numbers}", state
        return self._text


def are_same_weights(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same weights, as far as they can be compared."""
    if one == other:
        return True
    (names, kinds, numbers), (other_names, other_kinds, other_numbers) = one.split(":"), other.split(":")
    if names != other_names:  # Quantisation may rename weights, too.
        return _UNREAD in kinds + other_kinds
    values = (torch.frombuffer(bytearray(base64.b64decode(t)), dtype=torch.float32) for t in (numbers, other_numbers))
    return all(
        a == b or _UNREAD in pair or (pair[0] != pair[1] and _is_rounded(a, b, pair))
        for a, b, pair in zip(*values, zip(kinds, other_kinds))
    )


def _is_rounded(a: Tensor, b: Tensor, kinds: tuple[str, str]) -> bool:
    """Whether one number may be the other in a narrower dtype, or float16 and bfloat16 both round the same number."""
    if set(kinds) == {"h", "b"}:
        return torch.allclose(a, b, rtol=torch.finfo(torch.bfloat16).eps, atol=2.0**-24)
    return bool(a.to(_DTYPES[kinds[1]]).float() == b) or bool(b.to(_DTYPES[kinds[0]]).float() == a)


def _weights(module: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yields weights and their names, which leave out wrappers; of PEFT's adapters only those that are active."""
    if hasattr(module, "base_layer") or hasattr(module, "original_module"):
        yield from _adapted_weights(module, name)
        return
    buffers = {of: t for of, t in module._buffers.items() if t is not None and t.dtype in _QUANTISED}
    own = module._parameters | buffers
    yield from ((f"{name}.{of}", weight) for of, weight in own.items() if weight is not None)
    for of, child in module._modules.items():
        if child is not None:
            yield from _weights(child, name if of in _WRAPPERS else f"{name}.{of}")


def _adapted_weights(layer: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    active = [] if layer.disable_adapters or getattr(layer, "merged_adapters", None) else layer.active_adapters
    if hasattr(layer, "modules_to_save"):  # whole copies of the module, one for each adapter
        copies = [layer.modules_to_save[adapter] for adapter in active if adapter in layer.modules_to_save]
        yield from _weights(copies[0] if copies else layer.original_module, name)
        return
    yield from _weights(layer.base_layer, name)
    for of, held in layer._modules.items():  # such as lora_A, which holds a module for each adapter
        for place, adapter in enumerate(active):
            if of != "base_layer" and isinstance(held, (nn.ModuleDict, nn.ParameterDict)) and adapter in held:
                inside, own = f"{name}.{of}.{place}", held[adapter]
                yield from [(inside, own)] if isinstance(own, Tensor) else _weights(own, inside)


def _is_readable(weight: Tensor) -> bool:
    plain = type(weight) in (nn.Parameter, Tensor) and weight.dtype in _KINDS
    return plain and not weight.is_meta and weight.numel() > 0  # Those that ZeRO-3 has shared out are empty.


def _place(weight: Tensor) -> tuple:
    if not _is_readable(weight):
        return (id(weight),)
    return weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version


def _one_of_each(tensors: Sequence[Tensor]) -> Tensor:
    """Reads one number of each tensor, as float32 on the CPU; zero if it is not readable. Waits for a GPU once."""
    numbers, groups = torch.zeros(len(tensors)), {}
    for index, t in enumerate(tensors):
        if _is_readable(t):
            inside = t.detach()[tuple(size * 2 // 3 for size in t.shape)]
            groups.setdefault((t.device, t.dtype), []).append((index, inside))
    for group in groups.values():
        indices, inside = zip(*group)
        numbers[list(indices)] = torch.stack(inside).float().cpu()
    return numbers
