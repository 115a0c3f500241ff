"""Conversion as a table: which key of one format becomes which keys of the other.

The unusual: a plan is made from names, shapes and dtypes alone, before a byte is read, so that every unknown, missing
or misshaped key is reported at once and the real 72B can be planned without its weights. The tables themselves stand
with their formats, in vamba_family.py and video_ma2mba.py.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from vamba.errors import UserError
from vamba.weight_files import CheckpointError, TensorSpec, raise_problems


class ConversionError(UserError):
    """The source cannot be converted; the message names the key or value and what was expected."""


class Step(NamedTuple):
    """One tensor to write: read from the source's key, or freshly initialised where `source` is None."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str | None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


# Rows are (pattern of the whole key, targets); the first row that matches counts.
Table = tuple[tuple[str, tuple[str, ...]], ...]
DROPPED: tuple[str, ...] = ()  # the targets of a key that is left out on purpose

UNCHANGED: Table = ((r"(.+)", (r"\1",)),)
FLOAT32_KEYS = re.compile(r".*\bmixer\.(A_log|D|dt_bias)")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROBLEMS = {
    "unknown": "unknown keys",
    "missing": "missing keys",
    "misshaped": "wrongly shaped keys",
    "doubled": "keys for the same tensor",
    "foreign": "keys that are not float32, bfloat16 or float16 (quantized checkpoints cannot be converted)",
}


def rename(key: str, table: Table) -> tuple[str, ...] | None:
    """The keys that `key` becomes: none where it is dropped on purpose, None where the table does not know it."""
    for pattern, targets in table:
        if match := re.fullmatch(pattern, key):
            return tuple(match.expand(target) for target in targets)
    return None


class Rules(NamedTuple):
    """How a source's keys become a target's.

    Args:
        expected: shape of every tensor of the target.
        table: source keys to target keys.
        inverse: target keys to the names a user knows them by in the source, for messages.
        fresh: pattern of the target keys that are initialised, rather than missing, where the source has none.
    """

    expected: Mapping[str, tuple[int, ...]]
    table: Table
    inverse: Table
    fresh: str = ""


def plan(source: Mapping[str, TensorSpec], rules: Rules, dtype: torch.dtype | None = None) -> list[Step]:
    """What to write for each expected key, in their order; reads no tensor.

    Args:
        source: shape and dtype of every tensor of the source.
        dtype: of the target; None keeps each tensor's. A_log, D and dt_bias are always float32.

    Raises:
        ConversionError: naming the unknown, missing, misshaped, doubled or non-float keys, all kinds at once.
    """
    expected, origin = rules.expected, {}
    problems: dict[str, set[str]] = {kind: set() for kind in PROBLEMS}
    for key, (shape, stored) in source.items():
        targets = rename(key, rules.table)
        if targets is None or any(target not in expected for target in targets):
            problems["unknown"].add(f"{key} {list(shape)}")
            continue
        if targets and stored not in DTYPES:
            problems["foreign"].add(f"{key} is {stored}")
        for target in targets:
            if target in origin:
                problems["doubled"].add(f"{key} and {origin[target]}")
            if shape != tuple(expected[target]):
                problems["misshaped"].add(f"{key} is {list(shape)}, must be {list(expected[target])}")
            origin[target] = key
    for key in expected:
        if key not in origin and not re.fullmatch(rules.fresh, key):
            problems["missing"].add((rename(key, rules.inverse) or (key,))[0])
    try:
        raise_problems("The checkpoint", {PROBLEMS[kind]: keys for kind, keys in problems.items()})
    except CheckpointError as error:
        raise ConversionError(str(error)) from error

    fresh_dtype = dominant_dtype(source.values())
    steps = []
    for key, shape in expected.items():
        found = origin.get(key)
        kept = torch.float32 if FLOAT32_KEYS.fullmatch(key) else dtype
        steps.append(Step(key, tuple(shape), kept or (source[found].dtype if found else fresh_dtype), found))
    return steps


def dominant_dtype(specs: Iterable[TensorSpec]) -> torch.dtype:
    """The floating dtype holding most elements; float32 for no tensors."""
    counts = dict.fromkeys(DTYPES, 0)
    for shape, dtype in specs:
        if dtype in counts:
            counts[dtype] += torch.Size(shape).numel()
    return max(counts, key=counts.__getitem__)
