"""What media may take and be asked for: one budget of memory for decoding, and the bounds of every number.

Processor, image decoder (`images`) and video reader (`vamba.video`) all ask here, before anything is decoded. What is
unusual: nothing is trusted that a header, a message or an example says; what comes from these is a number within
bounds, a regular file, and of a size that fits the memory, or it is a ValueError.
"""

import base64
import math
import os
import re
import stat
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np


MEMORY_VARIABLE, DEFAULT_MEMORY = "VAMBA_MEDIA_MEMORY", 2 << 30
MAX_SIDE, MAX_AREA = 16384, 2**28  # pixels
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Numbers that may be asked for: the least, the greatest, and whether it is an integer.
_LIMITS = {
    **dict.fromkeys(("fps", "source_fps", "raw_fps"), (1e-9, 1e12, False)),
    **dict.fromkeys(("num_frames", "min_frames", "max_frames", "chunk_frames"), (1, 2**31 - 1, True)),
    **dict.fromkeys(("max_pixels", "total_pixels"), (1, math.inf, False)),
    **dict.fromkeys(("resized_height", "resized_width", "min_side", "max_side", "factor"), (1, MAX_SIDE, True)),
    "start": (0, 1e9, False),
    "end": (0, math.inf, False),
    "min_pixels": (0, 2**24, False),
    "threads": (0, 256, True),
}  # fmt: skip


def media_memory() -> int:
    """Bytes that decoding an image or a video may take: of the environment variable VAMBA_MEDIA_MEMORY, else 2 GiB.

    Raises:
        ValueError: the variable is no size such as 2000000000, 512MB or 2GiB.
    """
    text = os.environ.get(MEMORY_VARIABLE, "").strip()
    if not text:
        return DEFAULT_MEMORY
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,6})?)\s*([KMGT]?)(i?)B?", text, re.IGNORECASE | re.ASCII)
    if match is None or (match[3] and not match[2]) or not float(match[1]):
        raise ValueError(f"{MEMORY_VARIABLE}={text!r:.60} is no size in bytes; give one such as 512MB or 2GiB.")
    unit = _UNITS[match[2].upper()] if match[3] else 1000 ** list(_UNITS).index(match[2].upper())
    return int(float(match[1]) * unit)


def check_memory(what: str, needed: int, remedy: str) -> None:
    """Raises ValueError where `needed` bytes are more than the memory for media; `remedy` says how to need less."""
    if needed > (limit := media_memory()):
        raise ValueError(
            f"{what} would take {needed / 2**20:,.1f} MiB and {limit / 2**20:,.1f} MiB are allowed; {remedy}, "
            f"or raise {MEMORY_VARIABLE}"
        )


def number(name: str, value: Any) -> int | float | None:
    """`value` as a checked number within what `name` may be; None passes.

    Raises:
        ValueError: it is no number, or out of bounds. Texts and truth values are none.
    """
    if value is None:
        return None
    low, high, whole = _LIMITS[name]
    try:
        result = int(value) if whole else float(value)
        sound = not isinstance(value, (bool, np.bool_, str, bytes, bytearray)) and result == float(value)
        sound = sound and low <= result <= high
    except (TypeError, ValueError, OverflowError):
        sound = False
    if not sound:
        bounds = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"{name} must be {'an integer' if whole else 'a number'} {bounds}, got {value!r:.80}")
    return result


def check_numbers(options: dict) -> None:
    """Raises ValueError where one of the options that are numbers is none, or out of bounds."""
    for name, value in options.items():
        if name in _LIMITS:
            number(name, value)


def describe(source: Any) -> str:
    """The name a source goes by in messages: short, whatever was given."""
    if isinstance(source, (str, os.PathLike)):
        text = os.fsdecode(os.fspath(source))
        return (text if len(text) <= 300 else text[:60] + "...") or "an empty path"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>"
    if hasattr(source, "shape"):
        return f"<array {tuple(source.shape)}>"
    if isinstance(source, (list, tuple)):
        return f"<list of {len(source)} images>"
    if hasattr(source, "read"):
        return f"<{type(source).__name__} {getattr(source, 'name', '')}".rstrip() + ">"
    return f"{source!r:.60}"


def path_or_bytes(text: str, allow_urls: bool = False) -> str | bytes:
    """What a text names: a path (also of `file://`), the bytes of a `data:` URL, or another URL if that is allowed.

    Raises:
        ValueError: it is a URL and may not be one, or names nothing.
    """
    if text[:5].lower() == "data:" and "," in text:
        head, _, payload = text.partition(",")
        try:
            return base64.b64decode(payload, validate=True) if head.endswith(";base64") else unquote_to_bytes(payload)
        except ValueError as error:
            raise ValueError(f"the data: URL is not sound base64 ({error})") from error
    if text[:7].lower() == "file://":
        text = unquote(urlsplit(text).path)
    elif is_url(text) and not allow_urls:
        raise ValueError("URLs are not opened by default; download it, or pass allow_urls=True")
    if not text or "\0" in text:
        raise ValueError("not a path; give the path of a file")
    return text


def is_url(text: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def check_regular_file(about: os.stat_result) -> None:
    """Raises ValueError for what might be waited for without end, or is of no size: FIFOs, devices, sockets."""
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("not a regular file; give one or pass its bytes")
