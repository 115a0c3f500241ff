"""Which weights made a memory: a short text by which those of another fine-tune are told from the same in another form.

What is unusual: it holds one number of each weight rather than a hash, so that weights rounded to another dtype are
known again; what cannot be read (quantised, sharded, or offloaded weights) is not compared. Adapters count by their own
weights: merged into the base's, they are other weights. As reading waits for the GPU it is done once for each state of
the weights, which their places and version counters tell; fused optimizers write past those, so the models also read
anew after anything that records gradients (see `check_weights`).
"""

import base64
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


_KINDS = {torch.float64: "d", torch.float32: "f", torch.float16: "h", torch.bfloat16: "b"}
_UNREAD = "-"
_QUANTISED = {torch.int8, torch.uint8, torch.int32}  # GPTQ and AWQ keep weights in buffers of these
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


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
            tensors = [weight for _, weight in weights]
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


def _weights(module: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """Weights by names without wrappers, those of adapters where they act."""
    if hasattr(module, "base_layer") or hasattr(module, "original_module"):  # of PEFT
        yield from _adapted_weights(module, name)
        return
    for of, weight in module._parameters.items():
        if weight is not None:
            yield f"{name}.{of}", weight
    for of, buffer in module._buffers.items():
        if buffer is not None and buffer.dtype in _QUANTISED:
            yield f"{name}.{of}", buffer
    for of, child in module._modules.items():
        if child is not None:
            yield from _weights(child, name if of in _WRAPPERS else f"{name}.{of}")


def _adapted_weights(layer: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    acting = [] if layer.disable_adapters or getattr(layer, "merged_adapters", None) else layer.active_adapters
    if hasattr(layer, "modules_to_save"):  # copies that stand in for the module
        copies = [layer.modules_to_save[adapter] for adapter in acting if adapter in layer.modules_to_save]
        yield from _weights(copies[0] if copies else layer.original_module, name)
        return
    yield from _weights(layer.base_layer, name)
    for of, held in layer._modules.items():  # lora_A and others like it, by adapter
        for place, adapter in enumerate(acting):
            if of != "base_layer" and isinstance(held, (nn.ModuleDict, nn.ParameterDict)) and adapter in held:
                inside = f"{name}.{of}.{place}"
                is_weight = isinstance(held[adapter], Tensor)
                yield from [(inside, held[adapter])] if is_weight else _weights(held[adapter], inside)


def _is_readable(weight: Tensor) -> bool:
    plain = type(weight) in (nn.Parameter, Tensor) and weight.dtype in _KINDS
    return plain and not weight.is_meta and weight.numel() > 0  # ZeRO-3 leaves empty ones


def _place(weight: Tensor) -> tuple:
    if not _is_readable(weight):
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
