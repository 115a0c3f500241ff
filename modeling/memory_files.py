"""Saves memories to files, and takes the fingerprint of the weights that made them.

What is unusual: a file (safetensors with a JSON header) appears complete or not at all, so an interrupted write leaves
an older file intact, and its checksum covers every byte. The partial file has always the same name and is locked, so a
second writer is refused, and the next one takes over what a killed one left. The fingerprint is a short text that
differs between fine-tunes but not between dtypes: one number of each weight instead of a hash, so weights that were
rounded to another dtype are recognised. Weights that cannot be read (quantised, shared out, or offloaded) are not
compared. Adapters count by their own weights; once merged into the base model, they make other weights. As reading
waits for the GPU, it happens only when the addresses or version counters of weights have changed. Fused optimizers do
not raise these counters, so the models also read the weights again after anything that records gradients.
"""

import base64
import hashlib
import json
import math
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .media import check_spans, unknown_times


try:
    import fcntl
except ImportError:  # Windows, where two writers are not told apart
    fcntl = None  # type: ignore[assignment]


_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_NAMES |= {torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
_NAMES[torch.float8_e4m3fn] = "F8_E4M3"
_NO_CHECKSUM = "0" * 64  # what stands in the place of the checksum while it is taken
_PART = 2**24  # bytes that are hashed at once
# How the file of a memory begins, one of an earlier version or half-written included.
_BEGINNING = rb'.{8}\{"__metadata__":\{("format":"pt",|"sha256":"[^"]*",)*"vamba":"\{\\"format\\"'
_BEGINNING_LENGTH = 256
LONGEST_NAME = 240  # bytes, as the name of a file that is being written has 8 more


def write_memory(path: str | os.PathLike, kind: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Writes tensors and a header of the format `kind` to one file; an older memory there is replaced at once.

    Raises:
        OSError: that is not possible, another process writes there, or something that is no memory is in the way.
    """
    path = check_memory_path(path)
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))  # so that all are aligned
    text = json.dumps({"format": kind, **header})
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "sha256": _NO_CHECKSUM, "vamba": text}}
    end = 0
    for name, t in tensors.items():
        start, end = end, end + t.nbytes
        entries[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with _partial_file(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for t in tensors.values():  # one after the other, as neither GPU nor CPU may have room for a copy of all
            file.write(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        file.flush()
        checksum = _checksum(file, _NO_CHECKSUM)
        file.seek(8 + head.index(_NO_CHECKSUM.encode()))
        file.write(checksum.encode())
        file.flush()
        os.fsync(file.fileno())
        check_memory_path(path)


def read_memory(
    path: str | os.PathLike, kind: str, device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns tensors and header of a file.

    Raises:
        FileNotFoundError: there is none. ValueError: it is damaged in any byte, or none of the format `kind`.
    """
    path, device = _text_of(path), checked_device(device)
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no memory at {path!r:.300}.")
    if not os.path.isfile(path):  # a FIFO would be waited for
        raise ValueError(f"{path!r} is no file, so it holds no memory.")
    again = "Encode the video again, and write a memory with memory.save()."
    try:
        with _opened_twice(path) as (file, raw):
            about = file.metadata() or {}
            if "vamba" not in about:
                raise ValueError(f"{path!r} holds no memory, not {kind}. {again}")
            if (checksum := about.get("sha256")) is None:
                raise ValueError(f"{path!r} has no checksum, as an earlier version of vamba wrote it. {again}")
            if _checksum(raw, checksum) != checksum:
                raise ValueError(f"{path!r} is damaged: its checksum is not that of what it holds. {again}")
            try:
                header = {**json.loads(about["vamba"])}  # which takes nothing but an object
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"{path!r} is damaged: its header is no JSON object ({error}). {again}") from error
            if (found := header.pop("format", None)) != kind:
                raise ValueError(f"{path!r} holds a memory of another kind of model ({found}), not {kind}. {again}")
            # a copy, as the tensors of safetensors are the file itself, which someone may write into
            return {name: file.get_tensor(name).to(device, copy=True) for name in file.keys()}, header
    except SafetensorError as error:
        raise ValueError(f"{path!r} is damaged or no safetensors file: {str(error)[:200]}. {again}") from error


@contextmanager
def _opened_twice(path: str) -> Iterator[tuple[Any, IO[bytes]]]:
    """A file for safetensors and for itself; the same one, even where others are saving to `path`."""
    while True:
        with open(path, "rb") as raw, safe_open(path, framework="pt") as file:
            if os.path.samestat(os.fstat(raw.fileno()), os.stat(path)):
                yield file, raw
                return


def check_memory_path(path: str | os.PathLike) -> str:
    """Returns the file that `path` names, links followed. Raises OSError where a memory cannot or must not be written,
    ValueError for what is no path of one.

    A file that is there and is no memory is never replaced.
    """
    try:
        path = _text_of(path)
        path.encode()
        path = os.path.realpath(path)
    except UnicodeEncodeError as error:  # which safetensors could not open again
        raise ValueError(f"{path!r:.80} is not UTF-8; give another name for the memory.") from error
    if len(os.path.basename(path).encode()) > LONGEST_NAME:
        raise ValueError(f"{path!r:.80} … is too long; give a name of at most {LONGEST_NAME} bytes for the memory.")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder; give the name of a file for the memory.")
    if not os.path.isdir(os.path.dirname(path)):
        raise FileNotFoundError(f"{path} cannot be written: there is no such folder; make it first.")
    if os.path.lexists(path) and not (os.path.isfile(path) and _begins_as_memory(path)):
        raise FileExistsError(f"{path} exists and is no memory; give the name of a new file for the memory.")
    return path


def _text_of(path: str | os.PathLike) -> str:
    try:
        return os.fsdecode(path)
    except TypeError as error:
        raise ValueError(f"{path!r:.80} is no path of a file; give the name of one.") from error


def _begins_as_memory(path: str) -> bool:
    with open(path, "rb") as file:
        return re.match(_BEGINNING, file.read(_BEGINNING_LENGTH), re.DOTALL) is not None


def _checksum(file: IO[bytes], checksum: str) -> str:
    """SHA-256 of a whole safetensors file with zeros for `checksum` in its head, and of the rest part by part."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = 8 + int.from_bytes(data[:8], "little")

        def digest(start: int) -> bytes:
            with memoryview(data) as view, view[start : start + _PART] as part:
                return hashlib.sha256(part).digest()

        head = data[:end].replace(checksum.encode(), _NO_CHECKSUM.encode())
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing leaves Python to other threads
            parts = b"".join(pool.map(digest, range(end, len(data), _PART)))
    return hashlib.sha256(head + parts).hexdigest()


@contextmanager
def _partial_file(path: str) -> Iterator[IO[bytes]]:
    """A locked file beside `path`, empty, which takes its name when the block ends and goes if anything is raised."""
    partial = f"{path}.partial"
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    flags |= getattr(os, "O_BINARY", 0)
    with (
        held(partial, lambda: os.open(partial, flags, 0o666)) as descriptor,
        os.fdopen(descriptor, "r+b", closefd=False) as file,
    ):
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or (status.st_size and not _begins_as_memory(partial)):
            raise FileExistsError(f"{partial} is in the way and is no memory; move it away.")
        try:
            file.truncate(0)
            yield file
            os.replace(partial, path)
        except BaseException as error:
            with suppress(OSError):
                os.remove(partial)
                file.close()  # may still hold what did not fit on the disk
            if isinstance(error, OSError) and error.filename is None and error.strerror:
                raise OSError(error.errno, f"the memory cannot be written: {error.strerror}", path) from error
            raise


_locks: set[int] = set()  # descriptors


def _let_go() -> None:
    """A forked child, such as one that loads data, must not hold a lock longer than the process that took it."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def held(path: str | os.PathLike, opened: Callable[[], int]) -> Iterator[int]:
    """The descriptor that `opened` returns of `path`, locked against other processes until the block ends.

    Raises:
        FileExistsError: another process holds it.
    """
    descriptor = _lock(path, opened)
    _locks.add(descriptor)
    try:
        yield descriptor
    finally:
        _locks.discard(descriptor)
        os.close(descriptor)


def _lock(path: str | os.PathLike, opened: Callable[[], int]) -> int:
    while True:
        descriptor = opened()
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise FileExistsError(f"{os.fspath(path)} is being written by another process; let it finish.") from error
        except OSError:  # a filesystem without locks: as if alone
            pass
        with suppress(FileNotFoundError):  # whoever held it has removed or renamed it meanwhile
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)


def checked_device(device: str | torch.device) -> torch.device:
    """`device` as PyTorch's. Raises ValueError where there is no such device, or it holds no numbers."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).cpu()
        if found.type == "cpu" and found.index:
            raise ValueError("there is one CPU")
        return found
    except Exception as error:  # of many kinds, by the device
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(
            f"device={device!r:.80} cannot be used here ({reason}); give 'cpu' or e.g. 'cuda:0'."
        ) from error


def load_memory(kind: Any, path: str | os.PathLike, form: str, device: str | torch.device) -> Any:
    """A memory of the class `kind` from a file. Raises what `read_memory` does, and ValueError for a file that has a
    right checksum and yet makes no memory."""
    tensors, header = read_memory(path, form, device)
    try:
        memory = kind._from_tensors(tensors, header)
        found, about = memory._contents()  # what is missing or left over shows here
        require("the list of tensors", sorted(found.keys() ^ tensors.keys()), found.keys() == tensors.keys())
        require("the header", header, about == header)
        return memory
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{os.fsdecode(path)!r} does not hold a whole memory ({reason}); encode it again.") from error


def check_header(header: dict[str, Any], rows: int | None) -> None:
    """Raises ValueError for values of a header that no memory has; `rows` is how many its tensors have."""
    media, seconds, made_by = header["media"], header["seconds"], header["made_by"]
    require("layers", header["layers"], is_count(header["layers"]) and 1 <= header["layers"] <= 10_000)
    fits = isinstance(media, list) and len(media) in ((0,) if rows is None else (0, rows))
    require("media", media, fits and all(isinstance(row, list) and all(map(_is_item, row)) for row in media))
    is_time = type(seconds) in (int, float) and math.isfinite(seconds) and seconds >= 0
    require("seconds", seconds, seconds is None or is_time)
    require("made_by", made_by, made_by is None or _is_fingerprint(made_by))


def check_states(states: Sequence[tuple[Tensor, Tensor] | None], rows: int | None) -> None:
    """Raises ValueError where states from a file, (B, T, C) and (B, H, P, K), are not alike or not of `rows` rows."""
    first, *others = [state for state in states if state is not None] or [None]
    if first is not None:
        conv, ssm = first
        fits = conv.dim() == 3 and ssm.dim() == 4 and len(conv) == len(ssm) == (len(conv) if rows is None else rows)
        are_alike = all(one.shape == t.shape for state in others for one, t in zip(state, first))
        dtypes = {t.dtype for state in [first, *others] for t in state}
        require("the shape of a state", first, fits and are_alike)
        require("the dtype of a state", dtypes, all(dtype.is_floating_point for dtype in dtypes))


def require(name: str, value: Any, condition: bool) -> None:
    if not condition:
        raise ValueError(f"{name} is {str(value)[:100]}")


def read_times(times: Tensor | None, media: list[list[list]]) -> list[list[Tensor | None]]:
    """The spans of each row's items from those of all, (sum of t, 2), in a file; None where it has none."""
    lengths = [item[1] for row in media for item in row]
    if times is None:
        return [[None for _ in row] for row in media]
    require("video.times", times, times.shape == (sum(lengths), 2) and times.dtype == torch.float64)
    spans = iter(check_spans("video.times", of_item) for of_item in times.cpu().split(lengths))
    return [[next(spans) for _ in row] for row in media]


def written_times(times: list[list[Tensor]]) -> dict[str, Tensor]:
    """What a file holds of the spans of each row's items: nothing where none is known."""
    spans = torch.cat([unknown_times(0), *(of_item for row in times for of_item in row)])
    return {} if spans.isnan().all() else {"video.times": spans}


def is_count(value: Any) -> bool:
    """Whether it is a whole number that something in a memory may have."""
    return type(value) is int and 0 <= value < 2**40


def _is_item(item: Any) -> bool:
    """Whether it is `[kind, t, h, w]`."""
    fits = isinstance(item, list) and len(item) == 4 and item[0] in ("image", "video")
    return fits and all(is_count(size) and size > 0 for size in item[1:])


def _is_fingerprint(text: Any) -> bool:
    match = re.fullmatch(r"[0-9a-f]{16}:([dfhb-]*):([A-Za-z0-9+/]*=*)", text)
    return match is not None and len(base64.b64decode(match[2], validate=True)) == 4 * len(match[1])


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
