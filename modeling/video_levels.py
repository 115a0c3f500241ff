"""Keys and values of a video, layer by layer, in the buffers that they grow in.

What is unusual: forks of a memory share the buffers. Only the first that holds all that was written may write on, any
other copies first. In fp8 each token and head has a scale.

Shapes: B video rows, M video tokens, S tokens of one append, H key/value heads, P head dim.
"""

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .mamba2 import rebuildable
from .memory_files import require


FP8 = torch.float8_e4m3fn
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, FP8)  # that keys and values are kept in
GROWTH = 1.25  # of a full buffer, where nobody has announced what is to come
_CLAIMING = threading.Lock()


@rebuildable
class VideoLevel(NamedTuple):
    """What one layer's cross-attention reads of a video.

    In fp8 a number is its 8 bits times 2**scale, with one scale (int8) per token and head; otherwise there are none.
    """

    keys_BHMP: Tensor
    values_BHMP: Tensor
    key_scales_BHM: Tensor | None = None
    value_scales_BHM: Tensor | None = None

    @property
    def length(self) -> int:
        return self.keys_BHMP.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self if t is not None)

    def map(self, function: Callable[[Tensor], Tensor]) -> "VideoLevel":
        return VideoLevel(*(None if t is None else function(t) for t in self))

    def stored_as(self, dtype: torch.dtype) -> "VideoLevel":
        """The same numbers in another dtype; in `FP8` they get scales, and lose all but four significant bits."""
        if self.keys_BHMP.dtype == dtype:
            return self
        if dtype == FP8:
            (keys, key_scales), (values, value_scales) = _to_fp8(self.keys_BHMP), _to_fp8(self.values_BHMP)
            return VideoLevel(keys, values, key_scales, value_scales)
        if self.key_scales_BHM is None:
            return self.map(lambda t: t.to(dtype))
        compute = torch.promote_types(dtype, torch.bfloat16)  # bfloat16 holds all powers of two and four bits more

        def widened(t: Tensor, scales: Any) -> Tensor:
            return (t.to(compute) * torch.exp2(scales.to(compute)).unsqueeze(-1)).to(dtype)

        return VideoLevel(*map(widened, self[:2], self[2:]))

    def cut(self, reads: "Sequence[tuple[Any, int | None, int | Tensor | None]]") -> "list[VideoLevel]":
        """The part that each read sees; views, unless padding lies between its tokens."""
        if all(read.video_row is None for read in reads):
            return [self] * len(reads)
        # split, not indexed: its backward joins the rows' gradients instead of padding each to all rows
        by_row = zip(*(itertools.repeat(None) if t is None else t.split(1) for t in self))
        rows = [*map(VideoLevel._make, by_row)]
        return [rows[row or 0]._of_tokens(tokens) for _, row, tokens in reads]

    def _of_tokens(self, tokens: int | Tensor | None) -> "VideoLevel":
        if isinstance(tokens, Tensor):
            return self.map(lambda t: t.index_select(2, tokens.to(t.device)))
        return self if tokens is None else self.map(lambda t: t[:, :, :tokens])


def _to_fp8(t_BHSP: Tensor) -> tuple[Tensor, Tensor]:
    exact = t_BHSP.float()
    # the smallest power of two that brings the largest number of the head within range
    mantissas, scales = torch.frexp(exact.abs().amax(-1) / torch.finfo(FP8).max)
    scales = (scales - (mantissas == 0.5).int()).clamp(-126, 126)
    return torch.ldexp(exact, -scales.unsqueeze(-1)).to(FP8), scales.to(torch.int8)


def check_level(level: VideoLevel, like_BHMP: Tensor, M: int) -> None:
    """Raises where a level from a file is not of the shape and dtype of the first, or not of M tokens."""
    for t, scales in ((level.keys_BHMP, level.key_scales_BHM), (level.values_BHMP, level.value_scales_BHM)):
        fits = t.shape == like_BHMP.shape and t.dim() == 4 and t.shape[2] == M and t.dtype == like_BHMP.dtype
        require("the shape of a level", (t.shape, t.dtype), fits and t.dtype in DTYPES)
        are_there = scales is not None and scales.shape == t.shape[:3] and scales.dtype == torch.int8
        require("the scales of a level", scales, are_there if t.dtype == FP8 else scales is None)


class _Buffer:
    """Tensors (B, H, capacity, ...), of which the first `claimed` tokens are written, or about to be."""

    def __init__(self, like: VideoLevel, capacity: int):
        def empty(t: Tensor) -> Tensor:
            shape = (*t.shape[:2], capacity, *t.shape[3:])
            return torch.empty(shape, dtype=t.dtype, device=t.device, pin_memory=t.is_pinned())

        self.level, self.capacity, self.claimed = like.map(empty), capacity, 0

    def claim(self, start: int, length: int) -> bool:
        """Whether the caller may write after the first `start` tokens; of several threads one may."""
        with _CLAIMING:
            is_free = self.claimed == start and start + length <= self.capacity
            self.claimed += length if is_free else 0
        return is_free

    def write(self, start: int, level: VideoLevel) -> None:
        for buffer, t in zip(self.level, level):
            if t is not None:
                buffer[:, :, start : start + level.length] = t

    def read(self, length: int) -> VideoLevel:
        return self.level.map(lambda t: t[:, :, :length])


def _buffer_of(level: VideoLevel, expected: int | None, enough: int) -> _Buffer:
    """A buffer for all tokens that are `expected`, or, where there is no room for so many, for `enough` of them."""
    if expected is not None:
        with suppress(RuntimeError):  # limits that nobody could ask about
            return _Buffer(level, expected)
    return _Buffer(level, enough)


class LevelStore:
    """All keys and values of one layer, in the order they came.

    Attributes:
        keys_are_rotated: whether the keys carry M-RoPE, where `cross_attn_use_position_embeddings` asks for it.
    """

    def __init__(self, parts: Iterable[VideoLevel] = (), buffer: _Buffer | None = None, keys_are_rotated: bool = True):
        self.parts, self._buffer, self.keys_are_rotated = list(parts), buffer, keys_are_rotated

    @property
    def length(self) -> int:
        return sum(part.length for part in self.parts)

    def append(self, level: VideoLevel, expected: int = 0) -> None:
        """Adds S tokens; `expected` tokens in all is what a new buffer is made for."""
        held, length = self.length, self.length + level.length
        recorded = torch.is_grad_enabled() and any(t.requires_grad for part in [*self.parts, level] for t in part[:2])
        if recorded or (not self.parts and length >= expected):  # all at once: nothing to copy
            self.parts.append(level)
            self._buffer = None  # does not hold this part, and forks may write on where it would lie
            return
        if self._buffer is None or not self._buffer.claim(held, level.length):
            self._buffer = _buffer_of(level, expected if expected > length else None, int(GROWTH * length))
            self._buffer.claim(0, length)
            start = 0
            for part in self.parts:
                self._buffer.write(start, part)
                start += part.length
        self._buffer.write(held, level)
        self.parts = [self._buffer.read(length)]

    def replace(self, level: VideoLevel) -> None:
        self.parts, self._buffer = [level], None

    def truncate(self, length: int) -> None:
        """Forgets what came after the first `length` tokens; the buffer is whoever's that wrote them."""
        self.parts = [self.read().map(lambda t: t[:, :, :length])] if length else []

    def read(self) -> VideoLevel:
        """All tokens; parts that gradients kept apart are joined for good."""
        if len(self.parts) > 1:
            self.replace(VideoLevel(*(None if t[0] is None else torch.cat(t, dim=2) for t in zip(*self.parts))))
        return self.parts[0]

    def map(self, function: Callable[[VideoLevel], VideoLevel]) -> None:
        """Puts something else in the place of what is stored."""
        if self.parts:
            self.replace(function(self.read()))

    def fork(self) -> "LevelStore":
        """A store that shares the tensors, and goes on by itself."""
        if self.parts:
            self.read()
        return LevelStore(self.parts, self._buffer, self.keys_are_rotated)
