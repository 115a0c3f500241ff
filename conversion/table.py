"""Conversion as a table: which key of one format becomes which keys of the other.

The unusual: a plan is made from names, shapes and dtypes alone, before a byte is read, so that every unknown, missing
or misshaped key is reported at once and the real 72B can be planned without its weights. Two rules drop or add
tensors on purpose: the original's last Mamba block is computed for nothing (its output V_L is never read), so we do
not have it; and the cross-attention of a Vamba made from Qwen2-VL starts as a copy of the self-attention (arXiv
2503.11579, section 4).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch

from vamba.errors import UserError


class ConversionError(UserError):
    """The source cannot be converted; the message names the key or value and what was expected."""


class TensorSpec(NamedTuple):
    """What a safetensors header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Step(NamedTuple):
    """One tensor to write: read from the source's key, or freshly initialised where `source` is None."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str | None


# Rows are (pattern of the whole key, targets); the first row that matches counts, and no targets means: dropped.
Table = tuple[tuple[str, tuple[str, ...]], ...]

TEXT = r"model\.(?:language_model\.)?"
TEXT_LAYER = TEXT + r"layers\.(\d+)\."

_SHARED: Table = (
    (r"(?:model\.)?visual\.(.+)", (r"model.visual.\1",)),
    (TEXT + r"(embed_tokens|norm)\.weight", (r"model.language_model.\1.weight",)),
    (
        TEXT_LAYER + r"(mlp\..+|input_layernorm\.weight|post_attention_layernorm\.weight)",
        (r"model.language_model.layers.\1.\2",),
    ),
    (r"lm_head\.weight", ("lm_head.weight",)),
    (r".+\.rotary_(?:pos_)?emb\.inv_freq", ()),  # a buffer that very old checkpoints store; computed anew
)

FROM_QWEN2_VL: Table = _SHARED + (
    (
        TEXT_LAYER + r"self_attn\.(.+)",
        (r"model.language_model.layers.\1.self_attn.\2", r"model.language_model.layers.\1.cross_attn.\2"),
    ),
)

FROM_ORIGINAL: Table = _SHARED + (
    (TEXT_LAYER + r"((?:self_attn|cross_attn)\..+|alpha)", (r"model.language_model.layers.\1.\2",)),
    (TEXT_LAYER + r"vision_mixer\.norm\.weight", (r"model.video_encoder.layers.\1.norm.weight",)),
    (TEXT_LAYER + r"vision_mixer\.mixer\.(.+)", (r"model.video_encoder.layers.\1.mixer.\2",)),
)

TO_ORIGINAL: Table = (
    (r"model\.visual\.(.+)", (r"visual.\1",)),
    (r"model\.language_model\.(.+)", (r"model.\1",)),
    (r"model\.video_encoder\.layers\.(\d+)\.norm\.weight", (r"model.layers.\1.vision_mixer.norm.weight",)),
    (r"model\.video_encoder\.layers\.(\d+)\.mixer\.(.+)", (r"model.layers.\1.vision_mixer.mixer.\2",)),
    (r"lm_head\.weight", ("lm_head.weight",)),
)

TO_VAMBA: Table = ((r"(.+)", (r"\1",)),)

# How a missing tensor is called in a Qwen2-VL checkpoint.
TO_QWEN2_VL: Table = (
    (r"model\.language_model\.layers\.(\d+)\.cross_attn\.(.+)", (r"model.layers.\1.self_attn.\2",)),
) + TO_ORIGINAL

FLOAT32_KEYS = re.compile(r".*\bmixer\.(A_log|D|dt_bias)")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def drop_tied_head(table: Table) -> Table:
    """With tied embeddings there is no output head of its own; a checkpoint may hold one all the same."""
    return ((r"lm_head\.weight", ()),) + table


def drop_last_mixer(table: Table, num_layers: int) -> Table:
    """The original's last Mamba block, whose output nothing reads."""
    return ((TEXT + rf"layers\.{num_layers - 1}\.vision_mixer\..+", ()),) + table


def rename(key: str, table: Table) -> tuple[str, ...] | None:
    """The keys that `key` becomes: none where it is dropped on purpose, None where the table does not know it."""
    for pattern, targets in table:
        match = re.fullmatch(pattern, key)
        if match:
            return tuple(match.expand(target) for target in targets)
    return None


def plan(
    source: Mapping[str, TensorSpec],
    expected: Mapping[str, tuple[int, ...]],
    table: Table,
    *,
    inverse: Table,
    is_fresh: Callable[[str], bool],
    dtype: torch.dtype | None,
) -> list[Step]:
    """What to write for each key of `expected`, in its order; reads no tensor.

    Args:
        source: shape and dtype of every tensor of the source.
        expected: shape of every tensor of the target.
        table: source keys to target keys.
        inverse: target keys to the names a user knows them by in the source, for messages.
        is_fresh: whether a target key that the source does not have is initialised, rather than missing.
        dtype: of the target; None keeps each tensor's. A_log, D and dt_bias are always float32.

    Raises:
        ConversionError: naming the unknown, missing, misshaped, doubled or non-float keys, all kinds at once.
    """
    origin: dict[str, str] = {}
    unknown, doubled = [], []
    for key in source:
        targets = rename(key, table)
        if targets is None or any(target not in expected for target in targets):
            unknown.append(f"{key} {list(source[key].shape)}")
            continue
        for target in targets:
            if target in origin:
                doubled.append(f"{key} and {origin[target]}")
            origin[target] = key
    used = set(origin.values())
    foreign = [f"{key} is {source[key].dtype}" for key in source if key in used and source[key].dtype not in DTYPES]
    missing = [_known_as(key, inverse) for key in expected if key not in origin and not is_fresh(key)]
    misshaped = [
        f"{key} is {list(source[key].shape)}, must be {list(expected[target])}"
        for target, key in origin.items()
        if source[key].shape != tuple(expected[target])
    ]
    _raise_problems(unknown=unknown, missing=missing, misshaped=misshaped, doubled=doubled, foreign=foreign)

    fresh_dtype = dtype or dominant_dtype(source.values())
    return [
        Step(
            key,
            tuple(shape),
            torch.float32
            if FLOAT32_KEYS.fullmatch(key)
            else dtype or (source[origin[key]].dtype if key in origin else fresh_dtype),
            origin.get(key),
        )
        for key, shape in expected.items()
    ]


def dominant_dtype(specs: Iterable[TensorSpec]) -> torch.dtype:
    """The floating dtype holding most elements; float32 for no tensors."""
    counts = dict.fromkeys(DTYPES, 0)
    for shape, dtype in specs:
        if dtype in counts:
            counts[dtype] += torch.Size(shape).numel()
    return max(counts, key=counts.__getitem__)


def _known_as(key: str, inverse: Table) -> str:
    names = rename(key, inverse)
    return names[0] if names else key


def _raise_problems(**problems: list[str]) -> None:
    says = {
        "unknown": "unknown keys",
        "missing": "missing keys",
        "misshaped": "wrongly shaped keys",
        "doubled": "keys for the same tensor",
        "foreign": "keys that are not float32, bfloat16 or float16 (quantized checkpoints cannot be converted)",
    }
    parts = []
    for kind, keys in problems.items():
        keys = sorted(set(keys))
        if keys:
            more = f", and {len(keys) - 5} more" if len(keys) > 5 else ""
            parts.append(f"{len(keys)} {says[kind]}: {', '.join(keys[:5])}{more}")
    if parts:
        raise ConversionError("The checkpoint does not fit its config.json: " + "; ".join(parts) + ".")
