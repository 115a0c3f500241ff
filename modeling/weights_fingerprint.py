"""Which weights made a memory: a short text by which those of another fine-tune are told from the same in another form.

What is unusual: it holds one number of each weight rather than a hash, so that weights rounded to another dtype are
known again; what cannot be read (quantised, sharded, or offloaded weights) is not compared. As reading waits for the
GPU it is done once for each state of the weights, which their places and version counters tell. Optimizers that write
past those counters (through `.data` or by raw pointers) are not noticed within one process.
"""

import base64
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


_KINDS = {torch.float64: "d", torch.float32: "f", torch.float16: "h", torch.bfloat16: "b"}
_UNREAD = "-"
_QUANTISED = {torch.int8, torch.uint8, torch.int32}  # GPTQ and AWQ keep weights in buffers of these
_WRAPPERS = {"base_layer", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


class WeightsFingerprint:
    """The fingerprint of some modules' weights, read anew only when they may have changed."""

    def __init__(self):
        self._read_of: tuple | None = None
        self._text = ""

    def of(self, modules: list[nn.Module]) -> str:
        """It is three parts: a hash of the weights' names, the dtype of each (`_KINDS`), and one number of each."""
        weights = [found for index, module in enumerate(modules) for found in _weights(module, str(index))]
        state = tuple((name, *_place(weight)) for name, weight in weights)
        if state != self._read_of:
            names = hashlib.sha256("\n".join(name for name, _ in weights).encode()).hexdigest()[:16]
            tensors = [weight for _, weight in weights if weight is not None]
            kinds = "".join(_KINDS[t.dtype] if _is_readable(t) else _UNREAD for t in tensors)
            numbers = base64.b64encode(_one_of_each(tensors).numpy().tobytes()).decode()
            self._text, self._read_of = f"{names}:{kinds}:{numbers}", state
        return self._text


def are_same_weights(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same weights, as far as they can be compared."""
    if one == other:
        return True
    (names, kinds, numbers), (other_names, other_kinds, other_numbers) = one.split(":"), other.split(":")
    if names != other_names:  # quantisation may also rename weights
        return _UNREAD in kinds + other_kinds
    a, b = (torch.frombuffer(bytearray(base64.b64decode(t)), dtype=torch.float32) for t in (numbers, other_numbers))
    same = a == b
    for index, pair in enumerate(zip(kinds, other_kinds)):
        if _UNREAD in pair:
            same[index] = True
        elif not same[index] and pair[0] != pair[1]:
            same[index] = _is_rounded(a[index], b[index], pair)
    return bool(same.all())


def _is_rounded(a: Tensor, b: Tensor, kinds: tuple[str, str]) -> bool:
    """Whether one may be the other in a dtype with fewer digits, or both are the same number in two such."""
    dtypes = [next(dtype for dtype, kind in _KINDS.items() if kind == mine) for mine in kinds]
    if set(kinds) == {"h", "b"}:
        return torch.allclose(a, b, rtol=torch.finfo(torch.bfloat16).eps, atol=2.0**-24)
    return bool(a.to(dtypes[1]).float() == b) or bool(b.to(dtypes[0]).float() == a)


def _weights(module: nn.Module, name: str) -> Iterator[tuple[str, Tensor | None]]:
    """Weights by names without wrappers; adapters count while they are enabled, which an entry of its own says."""
    if hasattr(module, "merged_adapters"):  # a layer of PEFT
        if module.disable_adapters and not module.merged_adapters:
            yield from _weights(module.base_layer, name)
            return
        yield f"{name} {module.active_adapters} {module.merged_adapters}", None
    for of, weight in module._parameters.items():
        if weight is not None:
            yield f"{name}.{of}", weight
    for of, buffer in module._buffers.items():
        if buffer is not None and buffer.dtype in _QUANTISED:
            yield f"{name}.{of}", buffer
    for of, child in module._modules.items():
        if child is not None:
            yield from _weights(child, name if of in _WRAPPERS else f"{name}.{of}")


def _is_readable(weight: Tensor) -> bool:
    plain = type(weight) in (nn.Parameter, Tensor) and weight.dtype in _KINDS
    return plain and not weight.is_meta and weight.numel() > 0  # ZeRO-3 leaves empty ones


def _place(weight: Tensor | None) -> tuple:
    if weight is None or not _is_readable(weight):
        return (id(weight),)
    return weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version


def _one_of_each(tensors: list[Tensor]) -> Tensor:
    """float32 on the CPU, zero for what is not readable; a GPU is waited for once."""
    numbers, groups = torch.zeros(len(tensors)), {}
    for index, t in enumerate(tensors):
        if _is_readable(t):
            inside = t.detach()[tuple(size * 2 // 3 for size in t.shape)]
            groups.setdefault((t.device, t.dtype), []).append((index, inside))
    for group in groups.values():
        indices, inside = zip(*group)
        numbers[list(indices)] = torch.stack(inside).float().cpu()
    return numbers


__all__ = ["WeightsFingerprint", "are_same_weights"]
