"""What a Video-Ma2mba remembers of the stream so far: one Mamba-2 state per layer, whatever came before.

What is unusual: as a transformers `Cache` its length is that of the *text*, by which `generate` slices prompts, though
most of what it has seen may be video. It is a plain prefix: a memory that holds a video has read the prompt's
`<|vision_start|>` and the video's tokens, and a prompt about it is cut after them. The states are replaced, never
written into, so forks share them; but for those of a memory that a CUDA graph has decoded with.

Shapes: B rows, H heads, P head dim, K state size, T conv taps, C conv channels.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from .mamba2 import Mamba2State
from .media import Run, continued, unknown_times
from .memory_files import (
    check_header,
    check_states,
    checked_device,
    describe,
    is_count,
    load_memory,
    read_times,
    require,
    write_memory,
    written_times,
)


FORMAT = "vamba.state_memory.1"
_IN_HEADER = ("media", "is_open", "text_length", "is_ragged", "made_by", "seconds")


class StateMemory(Cache):
    """The states of one batch of streams of text and video.

    Args:
        config: the model's configuration, or its text configuration.

    Attributes:
        states: one `Mamba2State` per layer, after the last token of each row; None before the first.
        media: for each row the items seen, `[kind, t, h, w]` in patches as in `grid_thw`, in order.
        is_open: for each row whether a video was the last that came, so that more of its frames may follow.
        text_length: tokens of text seen, padding included, as `get_seq_length` says; where rows differ, the fewest.
        text_tokens_B: tokens of text that each row has seen, padding not counted, int64 (B,); None before the first.
        is_ragged: whether some row has seen more text than `text_length` says.
        is_written_into: whether the states are buffers that decoding may write into (`GraphedStateDecoding`).
        made_by: the fingerprint of the weights that read the media, see `WeightsFingerprint`; None if unknown.
        seconds: of video watched; None if unknown. Whoever reads the video sets it.
        sources: where the media came from, as whoever reads them notes it; files do not keep it.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(layers=[None] * config.get_text_config().num_hidden_layers)
        self.media: list[list[list]] = []
        self._times: list[list[Tensor | None]] = []
        self.is_open: list[bool] = []
        self.text_length = 0
        self.text_tokens_B: Tensor | None = None
        self.is_ragged = False
        self.is_written_into = False
        self.made_by: str | None = None
        self.seconds: float | None = None
        self.sources: list[Any] = []

    @classmethod
    def of(cls, cache: Cache | None, config: PreTrainedConfig) -> "StateMemory":
        """`cache` itself, or a new memory for None. Raises ValueError for a cache of keys and values."""
        if cache is None:
            return cls(config)
        # by its attributes, as a checkpoint loaded with remote code has a class of its own of the same name
        if not hasattr(cache, "text_tokens_B"):
            raise ValueError(f"past_key_values is a {type(cache).__name__}; this model remembers in a StateMemory.")
        return cache

    @property
    def states(self) -> list[Mamba2State | None]:
        return self.layers  # by transformers' name

    @states.setter
    def states(self, states: list[Mamba2State | None]) -> None:
        self.layers = states

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first token."""
        return -1 if self.states[0] is None else self.states[0].ssm_BHPK.shape[0]

    @property
    def num_video_rows(self) -> int:
        return len(self.media)

    @property
    def num_video_tokens(self) -> list[int]:
        """Tokens of images and videos that each row has seen."""
        return [sum(t * (h // 2) * (w // 2) for _, t, h, w in row) for row in self.media]

    @property
    def times(self) -> list[list[Tensor]]:
        """For each item of `media` the seconds at which each frame starts and ends, float64 (t, 2) on the CPU,
        counted from the start of its own file; NaN where they are unknown, as of images.
        """
        rows = zip(self.media, self._times)
        return [[unknown_times(item[1]) if t is None else t for item, t in zip(*row)] for row in rows]

    def note_times(self, spans: Tensor) -> None:
        """Records the `times` of the last frames of row 0; see `continued`."""
        self._times[0][-1] = continued(self.times[0][-1], spans)

    def token_times(self, row: int = 0) -> Tensor:
        """The seconds at which each token of a row's media starts and ends, float64 (M, 2) on the CPU; NaN where they
        are unknown, as of images."""
        sizes = [(h // 2) * (w // 2) for _, _, h, w in self.media[row]]
        spans = [times.repeat_interleave(size, 0) for times, size in zip(self.times[row], sizes)]
        return torch.cat([unknown_times(0), *spans])

    @property
    def video_length(self) -> int:
        """Tokens of images and videos in the row that has seen most."""
        return max(self.num_video_tokens, default=0)

    @property
    def video_nbytes(self) -> int:
        """Bytes held by the states; the same after a second and after a day."""
        return sum(t.nbytes for state in self.states if state is not None for t in state)

    def unread(self, attention_mask: Tensor | None, like_BND: Tensor) -> Tensor | None:
        """(B, N) bool, True at the tokens of `like_BND` that are neither padding nor seen already; None if all are.

        Args:
            attention_mask: of these N tokens, or of all text from the first on; zeros are padding, on either side. A
                row that is padded on the left has its tokens later than `text_length` says; those seen are passed over.
        """
        B, N = like_BND.shape[:2]
        if attention_mask is None:
            if not self.is_ragged:
                return None
            attention_mask = torch.ones(B, self.text_length + N, device=like_BND.device)
        if attention_mask.dim() != 2 or attention_mask.shape[1] not in (N, self.text_length + N):
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)}; it must be (batch, {N}) for the tokens given, or "
                f"(batch, {self.text_length + N}) with the {self.text_length} before them."
            )
        attention_mask = attention_mask.to(like_BND.device)
        valid_BN = attention_mask[:, attention_mask.shape[1] - N :].bool()
        if self.text_tokens_B is None or attention_mask.shape[1] != self.text_length + N:
            return valid_BN
        seen_B = self.text_tokens_B.to(like_BND.device) - attention_mask[:, : self.text_length].sum(1)
        return valid_BN & (valid_BN.cumsum(1) > seen_B.unsqueeze(1))

    def note_text(self, tokens_B: Tensor, columns: int, is_ragged: bool = False) -> None:
        """Counts further text in: each row's own tokens, and how many positions of the prompt they took."""
        self.text_tokens_B = tokens_B if self.text_tokens_B is None else self.text_tokens_B + tokens_B
        self.text_length += columns
        self.is_ragged = is_ragged

    def note_step(self) -> None:
        """Counts one token of text for each row in."""
        self.note_text(torch.ones_like(self.text_tokens_B), 1)
        self.is_open = [False] * self.batch_size

    def note_chunk(self, chunk: list[list[Run]]) -> None:
        """Records what a chunk of the stream was; frames that continue an item lengthen it."""
        self.media, self._times = self.media or [[] for _ in chunk], self._times or [[] for _ in chunk]
        self.is_open = self.is_open or [False] * len(chunk)
        for row, stream in enumerate(chunk):
            for _, item in stream:
                if item is not None and item.first_frame:
                    self._times[row][-1] = item.after(self.media[row][-1][1], self._times[row][-1])
                    self.media[row][-1][1] += item.t
                elif item is not None:
                    self.media[row].append([item.kind, item.t, item.h, item.w])
                    self._times[row].append(item.times)
                self.is_open[row] = item is not None

    def note_weights(self, made_by: str | None) -> None:
        """Records which weights read what follows, unless those of what came before are unknown."""
        if not any(self.media):
            self.made_by = made_by
        self.seconds = None

    def last_open(self, row: int) -> list | None:
        """The item of a row that was the last to come, so that more of its frames may follow; None if text was."""
        return self.media[row][-1] if row < len(self.is_open) and self.is_open[row] else None

    def check(self, config: PreTrainedConfig, batch_size: int) -> None:
        """Raises ValueError if this memory was not made by a model of this shape, or for this many rows."""
        made_by = (len(self.states), *(self.states[0].ssm_BHPK.shape[1:] if self.states[0] else ()))
        wanted = (config.num_hidden_layers, config.num_heads, config.head_dim, config.state_size)
        if made_by != wanted[: len(made_by)]:
            raise ValueError(
                f"This memory has (layers, heads, head dim, state size) = {made_by}, the model {wanted}: watch the "
                "video with the model that is asked."
            )
        if self.batch_size not in (-1, batch_size):
            raise ValueError(f"The memory has {self.batch_size} rows and the text {batch_size}; they must be equal.")

    def fork(self) -> "StateMemory":
        """An independent continuation, which may be extended without touching this memory or other forks."""
        fork = object.__new__(type(self))
        fork.__dict__.update(vars(self))
        fork.states, fork.is_open = list(self.states), list(self.is_open)
        fork.media = [[list(item) for item in row] for row in self.media]
        fork._times = [list(row) for row in self._times]
        if self.is_written_into:
            fork._replace(torch.clone)
        return fork

    def to(self, device: torch.device | str | None) -> "StateMemory":
        """Moves the states in place; None leaves them. Raises ValueError where there is no such device."""
        device = None if device is None else checked_device(device)
        self._replace(lambda t: t.to(device))
        return self

    def _replace(self, function: Callable[[Tensor], Tensor]) -> None:
        self.states = [None if state is None else Mamba2State(*map(function, state)) for state in self.states]
        self.is_written_into = False
        if self.text_tokens_B is not None:
            self.text_tokens_B = function(self.text_tokens_B)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        indices = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._replace(lambda t: t.index_select(0, indices.to(t.device)))
        self._select_media(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._replace(lambda t: t.repeat_interleave(repeats, 0))
        self._select_media([row for row in range(len(self.media)) for _ in range(repeats)])

    def _select_media(self, rows: list[int]) -> None:
        if self.media:
            self.media = [[list(item) for item in self.media[row]] for row in rows]
            self._times = [list(self._times[row]) for row in rows]
            self.is_open = [self.is_open[row] for row in rows]

    def expand_rows(self, batch_size: int, copies: int = 1) -> None:
        """Repeats a single row for each of `batch_size` questions, and each row for its beams or samples."""
        if self.batch_size in (1, batch_size) and (repeats := batch_size * copies // self.batch_size) > 1:
            self.batch_repeat_interleave(repeats)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.text_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.text_length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.states[-1 if layer_idx is None else layer_idx] is not None

    @property
    def is_initialized(self) -> bool:
        return self.states[0] is not None

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return False  # as a cache of keys and values; see `get_compiled_call`

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("A state cannot forget its last tokens: fork() the memory before what may be taken back.")

    @contextlib.contextmanager
    def unchanged_on_error(self):
        """Within, more may be read; if anything is raised the memory is as it was before."""
        kept = self.fork()
        try:
            yield
        except BaseException:
            self.__dict__.update(vars(kept))
            raise

    def reset(self) -> None:
        """Forgets everything; `fork()` beforehand to start a new conversation about the same video."""
        self.states = [None] * len(self.states)
        self.media, self._times, self.is_open, self.text_length = [], [], [], 0
        self.text_tokens_B, self.is_ragged, self.is_written_into = None, False, False
        self.made_by = self.seconds = None
        self.sources = []

    def __repr__(self) -> str:
        state = None if self.states[0] is None else self.states[0].ssm_BHPK
        return describe("StateMemory", self, state, frames=sum(t for row in self.media for _, t, _, _ in row))

    def save(self, path: str | os.PathLike) -> None:
        """Writes states and counts to one safetensors file; an interrupted write leaves an older file intact.

        Raises:
            OSError: it cannot be written, or something that is no memory is in the way.
        """
        write_memory(path, FORMAT, *self._contents())

    def _contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and header of a file."""
        tensors = {} if self.text_tokens_B is None else {"text_tokens": self.text_tokens_B}
        for index, state in enumerate(self.states):
            if state is not None:
                tensors[f"state.{index}.conv"], tensors[f"state.{index}.ssm"] = state
        tensors |= written_times(self.times)
        return tensors, {"layers": len(self.states)} | {name: getattr(self, name) for name in _IN_HEADER}

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu") -> "StateMemory":
        """Reads a memory written by `save`.

        Raises:
            FileNotFoundError: no such file. ValueError: the file is not such a memory, or is damaged in any byte.
        """
        return load_memory(cls, path, FORMAT, device)

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> "StateMemory":
        tokens = tensors.get("text_tokens")
        rows = None if tokens is None else len(tokens)
        check_header(header, rows)
        memory = cls(PreTrainedConfig(num_hidden_layers=header["layers"]))
        for name in _IN_HEADER:
            setattr(memory, name, header[name])
        memory._times = read_times(tensors.get("video.times"), memory.media)
        for index in range(header["layers"] if tokens is not None else 0):
            memory.states[index] = Mamba2State(tensors[f"state.{index}.conv"], tensors[f"state.{index}.ssm"])
        check_states(memory.states, rows)
        are_counts = tokens is None or (tokens.dtype == torch.int64 and tokens.dim() == 1 and bool((tokens >= 0).all()))
        require("text_tokens", tokens, are_counts)
        flags = memory.is_open
        is_list = isinstance(flags, list) and len(flags) in (0, rows) and all(isinstance(flag, bool) for flag in flags)
        require("is_open", flags, is_list)
        require("is_ragged", memory.is_ragged, isinstance(memory.is_ragged, bool))
        require("text_length", memory.text_length, is_count(memory.text_length))
        memory.text_tokens_B = tokens
        return memory
