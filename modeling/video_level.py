"""Keys and values of a video, as one layer's cross-attention reads them: their numbers, and the buffers they lie in.

What is unusual: chunks are written into a buffer with room for what is expected to come, so that reading needs no
joining and a long video fills the memory without holes. Forks share a buffer: only the first that holds all that was
written may write on, any other copies first. Where gradients are recorded the chunks stay apart until they are read.

Shapes: B video rows, H key/value heads, M video tokens, S tokens of one append, P head dim.
"""

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .mamba2 import rebuildable


FP8 = torch.float8_e4m3fn
GROWTH = 1.25  # of a buffer that is full, where nobody knows what is to come
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
        return VideoLevel(
            *(
                (t.to(compute) * torch.exp2(scales.to(compute)).unsqueeze(-1)).to(dtype)
                for t, scales in zip(self[:2], self[2:])
            )
        )


def _to_fp8(t_BHSP: Tensor) -> tuple[Tensor, Tensor]:
    exact = t_BHSP.float()
    # the smallest power of two that brings the largest number of the head within range
    mantissas, scales = torch.frexp(exact.abs().amax(-1) / torch.finfo(FP8).max)
    scales = (scales - (mantissas == 0.5).int()).clamp(-126, 126)
    return torch.ldexp(exact, -scales.unsqueeze(-1)).to(FP8), scales.to(torch.int8)


class _Buffer:
    """Tensors (B, H, capacity, ...), of which the first `claimed` tokens are written, or about to be."""

    def __init__(self, like: VideoLevel, capacity: int):
        def empty(t: Tensor) -> Tensor:
            shape = (*t.shape[:2], capacity, *t.shape[3:])
            return torch.empty(shape, dtype=t.dtype, device=t.device, pin_memory=t.is_pinned())

        self.level, self.capacity, self.claimed = like.map(empty), capacity, 0

    def claim(self, start: int, length: int) -> bool:
        """Whether the caller may write `length` tokens after the first `start`; of several threads one may."""
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


class LevelStore:
    """All keys and values of one layer, in the order they came.

    Attributes:
        keys_are_rotated: whether the keys carry M-RoPE, where `cross_attn_use_position_embeddings` asks for it.
    """

    def __init__(self, parts: list[VideoLevel] = (), buffer: _Buffer | None = None, keys_are_rotated: bool = True):
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
            self._buffer = _Buffer(level, expected if expected > length else int(GROWTH * length))
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
