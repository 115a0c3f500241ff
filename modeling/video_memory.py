"""The video memory: what the text needs of a video, as a transformers `Cache`.

What is unusual: a video is encoded once into keys and values per layer (57 KB per video token for the 7B in bf16) plus
one Mamba-2 state per block, so it can be asked many times, extended frame by frame, forked, saved and loaded. As a
`Cache` its length is the *text's*, whose own cache it holds (`text`). Rows of text and rows of video are counted apart:
any number of questions or beams share one video row without copying it (`video_rows`).

Shapes: B video rows, M video tokens, S tokens of one append, H key/value heads, P head dim.
"""

import contextlib
import copy
import itertools
import os
from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache

from .mamba2 import Mamba2State
from .media import MediaItem, continued, copy_to_gpu, free_bytes, side_stream, unknown_times
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
from .video_levels import DTYPES, FP8, LevelStore, VideoLevel, check_level


FORMAT = "vamba.video_memory.1"
MAX_TEXT = 2**24  # tokens that a static text cache may have room for; beyond what any model has been trained on
_IN_HEADER = ("made_by", "seconds", "temporal_patch_size")
_PARTS = ("keys", "values", "key_scales", "value_scales")  # of a VideoLevel, in a file


class TextSlice(NamedTuple):
    """The rows and tokens of text that read a level together, and which of the level's tokens are not padding.

    Both are (start, stop), as `torch.export` knows no slices; None stands for all.
    """

    rows: tuple[int, int] | None = None
    tokens: tuple[int, int] | None = None
    mask_BM: Tensor | None = None


class VideoRead(NamedTuple):
    """A slice of the text, and the row of the video that it reads and its first or its chosen tokens; None for all."""

    text: TextSlice
    video_row: int | None = None
    video_tokens: int | Tensor | None = None


class VideoMemory(Cache):
    """Text cache, video keys and values, and Mamba-2 states of one batch of conversations about videos.

    Args:
        config: the model's configuration (`VambaConfig` or its text configuration).
        max_cache_len: preallocates a static text cache of this many tokens, for compiled decoding; None grows it.
        text_cache: a `Cache` whose layers hold the text instead; they are shared, not copied.
        video_dtype: dtype in which keys and values are kept, e.g. `torch.float8_e4m3fn`; None keeps the model's.
        video_device: where keys and values are kept, e.g. "cpu"; None leaves them where the model makes them. See `to`.

    Raises:
        ValueError: an argument is not one of those.

    Attributes:
        expected_length: video tokens in all for which room is made, see `reserve`.
        states: one `Mamba2State` or None per Mamba-2 block, the state after the last video token of each video row.
        media: for each video row the items seen, `[kind, t, h, w]` in patches as in `grid_thw`, in order.
        video_rows: for each text row the index of its video row; None if they coincide or there is only one.
        made_by: the fingerprint of the weights that encoded the video, see `WeightsFingerprint`; None if unknown.
        seconds: of video encoded; None if unknown. Whoever reads the video sets it.
        sources: where the media came from, as whoever reads them notes it; files do not keep it.
        temporal_patch_size: frames in one of the `t` of a video in `media`.
    """

    def __new__(cls, config=None, max_cache_len=None, text_cache=None, *args, **kwargs):
        if cls is VideoMemory:  # else it is copied or unpickled
            of_own_text = DynamicVideoMemory if max_cache_len is None else StaticVideoMemory
            cls = of_own_text if text_cache is None else _memory_class(text_cache)
        return super().__new__(cls)

    def __init__(
        self,
        config: PreTrainedConfig,
        max_cache_len: int | None = None,
        text_cache: Cache | None = None,
        video_dtype: torch.dtype | None = None,
        video_device: torch.device | str | None = None,
    ):
        L = config.get_text_config(decoder=True).num_hidden_layers
        if not isinstance(text_cache, Cache | None):
            raise ValueError(f"text_cache is a {type(text_cache).__name__}; give a Cache of transformers, or None.")
        self.text = text_cache if text_cache is not None else _empty_text_cache(L, max_cache_len)
        self.video_dtype = None if video_dtype is None else _checked_dtype(video_dtype)
        self.video_device = None if video_device is None else checked_device(video_device)
        self._levels = [LevelStore() for _ in range(L)]
        self.expected_length = 0  # video tokens in all
        self._model_dtype: torch.dtype | None = None
        self._fetched: dict[int, tuple[VideoLevel, torch.cuda.Event]] = {}
        self._valid: list[tuple[Tensor | None, int]] = []
        self._mask: Tensor | None = None
        self.states: list[Mamba2State | None] = [None] * (L - 1)
        self.media: list[list[list]] = []
        self._times: list[list[Tensor | None]] = []
        self.video_rows: list[int] | None = None
        self.made_by: str | None = None
        self.seconds: float | None = None
        self.sources: list[Any] = []
        self.temporal_patch_size = 2

    @classmethod
    def of(cls, cache: Any, config: PreTrainedConfig) -> "VideoMemory":
        """`cache` itself if it is a memory, else a memory without video around it, or around nothing."""
        # by its methods, as a checkpoint loaded with remote code has a class of its own of the same name
        return cache if hasattr(cache, "video_key_values") else cls(config, text_cache=cache)

    def with_text(self, text_cache: Cache) -> "VideoMemory":
        """The same video with another text cache, nothing copied."""
        memory = object.__new__(_memory_class(text_cache))
        memory.__dict__.update(vars(self), text=text_cache, _fetched={})
        return memory

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_fetched": {}}

    @property
    def layers(self) -> list:
        return self.text.layers

    @property
    def offloading(self) -> bool:
        return self.text.offloading

    def update(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return self.text.update(*args, **kwargs)

    @property
    def video_length(self) -> int:
        """M, video tokens of the longest row, padding included."""
        return sum(length for _, length in self._valid)

    @property
    def num_video_rows(self) -> int:
        return self._levels[0].parts[0].keys_BHMP.shape[0] if self._levels[0].parts else len(self.media)

    def keys_are(self, rotated: bool) -> bool:
        """Whether the keys of all layers carry M-RoPE, or none do; neither after an error while they got it."""
        return all(store.keys_are_rotated == rotated for store in self._levels if store.parts)

    @property
    def num_video_tokens(self) -> list[int]:
        """Video tokens of each video row, padding not counted."""
        mask = self.video_mask()
        return [self.video_length] * self.num_video_rows if mask is None else mask.sum(1).tolist()

    @property
    def video_nbytes(self) -> int:
        """Bytes of the video's keys, values and states, room for more not counted."""
        held = sum(part.nbytes for store in self._levels for part in store.parts)
        return held + sum(t.nbytes for state in self.states if state for t in state)

    def reserve(self, tokens: int) -> None:
        """Announces that the video will be `tokens` long in all, so that room is made once.

        An estimate will do: more can be appended, and what does not fit into the free memory is not set aside.
        Raises ValueError for what is no number of tokens.
        """
        if not isinstance(tokens, Integral) or tokens < 0:
            raise ValueError(f"reserve({tokens!r}) needs a number of tokens, 0 or more.")
        self.expected_length = tokens

    def append(self, layer_idx: int, keys_BHSP: Tensor, values_BHSP: Tensor) -> None:
        """Adds the keys and values of the next S video tokens of one layer; `append_mask` once for all layers."""
        if self._levels[layer_idx].parts and not torch.is_autocast_enabled(keys_BHSP.device.type):
            self._check_dtype(keys_BHSP.dtype, "new frames")
        level = self._stored(keys_BHSP, values_BHSP)
        if layer_idx == 0 and self.expected_length and level.length:
            per_token = len(self._levels) * level.nbytes // level.length
            fitting = int(0.85 * free_bytes(level.keys_BHMP.device)) // per_token
            self.expected_length = min(self.expected_length, self.video_length + fitting)
        self._levels[layer_idx].append(level, self.expected_length)

    def rotate_keys(self, rotated: bool, rotate: Callable[[Tensor], Tensor]) -> None:
        """Puts M-RoPE on the keys (B, H, M, P) of each layer, or takes it off, where that has not been done.

        Each layer remembers it, so an error between two of them leaves nothing that would be read wrongly.
        """
        for layer_idx, store in enumerate(self._levels):
            if store.parts and store.keys_are_rotated != rotated:
                keys, values = self.video_key_values(layer_idx)
                store.replace(self._stored(rotate(keys), values))
                store.keys_are_rotated = rotated

    def _stored(self, keys_BHSP: Tensor, values_BHSP: Tensor) -> VideoLevel:
        """New keys and values as this memory keeps them."""
        self._fetched.clear()
        self._model_dtype = keys_BHSP.dtype
        level = VideoLevel(keys_BHSP, values_BHSP).stored_as(self.video_dtype or keys_BHSP.dtype)
        return level if self.video_device is None else level.map(self._place)

    def _place(self, t: Tensor) -> Tensor:
        """`t` on this memory's device; on the CPU in memory that a GPU reads directly, where there is one."""
        t = t.to(self.video_device)
        return t.pin_memory() if t.device.type == "cpu" and torch.cuda.is_available() else t

    def fetch_states(self, device: torch.device) -> None:
        """Those of a memory that was read from a file may lie elsewhere; a model spread over devices moves its own."""
        for index, state in enumerate(self.states):
            if state is not None and state.ssm_BHPK.device.type != device.type:
                self.states[index] = Mamba2State(*(t.to(device) for t in state))

    def append_mask(self, length: int, valid_BS: Tensor | None = None) -> None:
        """Counts S further tokens in; `valid_BS` (bool) marks padding in rows shorter than S, None means no padding."""
        self._valid.append((valid_BS, length))
        self._mask = None

    def note_media(self, rows: list[list[MediaItem]]) -> None:
        """Records what the video rows have seen; frames that continue an item lengthen it."""
        self.media, self._times = self.media or [[] for _ in rows], self._times or [[] for _ in rows]
        for seen, times, items in zip(self.media, self._times, rows):
            for item in items:
                if item.first_frame and seen:
                    times[-1] = item.after(seen[-1][1], times[-1])
                    seen[-1][1] += item.t
                else:
                    seen.append([item.kind, item.t, item.h, item.w])
                    times.append(item.times)

    @property
    def times(self) -> list[list[Tensor]]:
        """For each item of `media` the seconds at which each temporal patch starts and ends, float64 (t, 2) on the
        CPU, counted from the start of its own file; NaN where they are unknown, as of images.
        """
        rows = zip(self.media, self._times)
        return [[unknown_times(item[1]) if t is None else t for item, t in zip(*row)] for row in rows]

    def note_times(self, spans: Tensor) -> None:
        """Records the `times` of the last temporal patches of row 0; see `continued`."""
        self._times[0][-1] = continued(self.times[0][-1], spans)

    def token_patches(self, row: int = 0) -> Tensor:
        """For each token of a video row, padding left out, which temporal patch it is of, counted over all its media,
        int64 on the CPU. Raises ValueError where tokens and `media` do not belong together."""
        tokens, patches = self.num_video_tokens[row], sum(t * h * w for _, t, h, w in self.media[row])
        merged = patches // max(1, tokens)  # patches in a token
        if tokens * merged != patches:
            raise ValueError(f"Row {row} has {tokens} video tokens, which are not those of its media.")
        sizes = [h * w // max(1, merged) for _, t, h, w in self.media[row] for _ in range(t)]
        return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.long))

    def token_times(self, row: int = 0) -> Tensor:
        """The seconds at which each token of a video row starts and ends, float64 (M, 2) on the CPU; NaN at padding,
        images and what is unknown. Raises ValueError where tokens and `media` do not belong together."""
        mask_BM, found_M2 = self.video_mask(), unknown_times(self.video_length)
        valid_M = torch.ones(self.video_length, dtype=torch.bool) if mask_BM is None else mask_BM[row].cpu()
        found_M2[valid_M] = torch.cat([unknown_times(0), *self.times[row]])[self.token_patches(row)]
        return found_M2

    def note_weights(self, made_by: str | None, temporal_patch_size: int) -> None:
        """Records which weights encode what follows, unless those of what came before are unknown."""
        if not self.video_length:
            self.made_by = made_by
        self.seconds, self.temporal_patch_size = None, temporal_patch_size

    def level(self, layer_idx: int, device: torch.device | None = None) -> VideoLevel:
        """One layer as it is stored, on `device`; of a memory on the CPU the next layer is then on its way as well."""
        level = self._levels[layer_idx].read()
        if device is None or level.keys_BHMP.device == device:
            return level
        if device.type != "cuda":
            return level.map(lambda t: t.to(device))
        return self._fetch(layer_idx, device)

    def _fetch(self, layer_idx: int, device: torch.device) -> VideoLevel:
        if layer_idx not in self._fetched or self._fetched[layer_idx][0].keys_BHMP.device != device:
            self._fetched = {layer_idx: self._copy_beside(layer_idx, device)}
        level, ready = self._fetched.pop(layer_idx)
        following = (layer_idx + 1) % len(self._levels)  # after the last layer comes the first, of the next token
        self._fetched = {following: self._copy_beside(following, device)}
        stream = torch.cuda.current_stream(device)
        stream.wait_event(ready)
        return level.map(lambda t: (t.record_stream(stream), t)[1])

    def _copy_beside(self, layer_idx: int, device: torch.device) -> tuple[VideoLevel, torch.cuda.Event]:
        """A layer's copy under way on `device`, beside what is computed there, and the event that it has arrived."""
        stream = side_stream(device, "copy")
        with torch.cuda.stream(stream):
            level = self._levels[layer_idx].read()
            return level.map(lambda t: copy_to_gpu(t, device)), stream.record_event()

    def mark_static(self) -> None:
        """Joins all layers and tells `torch.compile` that they stay where they are, as CUDA graphs would copy them."""
        for layer_idx in range(len(self._levels) if self.video_length else 0):
            for t in self.level(layer_idx):
                if t is not None:
                    torch._dynamo.mark_static_address(t, guard=False)

    def video_key_values(self, layer_idx: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, M, P) of one layer in the model's dtype, on `device` if given."""
        return self.level(layer_idx, device).stored_as(self._model_dtype)[:2]

    def video_mask(self, device: torch.device | None = None) -> Tensor | None:
        """(B, M) bool, False on padding; None if no row has any. It stays on the `device` it was asked for on."""
        if self._mask is None and any(valid is not None for valid, _ in self._valid):
            template = [valid for valid, _ in self._valid if valid is not None][-1]  # older ones may be from a file
            parts = [template.new_ones(template.shape[0], n) if v is None else v.to(template) for v, n in self._valid]
            self._mask = torch.cat(parts, dim=1)
        if self._mask is not None and device is not None:
            self._mask = self._mask.to(device)
        return self._mask

    def reads(self, text_BND: Tensor, tokens: tuple[int, int] | None = None, masked: bool = False) -> list[VideoRead]:
        """Which rows of the text read which row of the video; `tokens` are those of the text that read.

        With `masked` padding is left to a mask where each video row is read by equally many rows of text, in order;
        otherwise every row is read by itself and without its padding. Rows without video are read by nobody.
        """
        rows, R = self.video_rows, self.num_video_rows
        mask_BM, in_order = self.video_mask(text_BND.device), rows is None or repeats_in_order(rows, R)
        if in_order and (mask_BM is None or masked):
            return [VideoRead(TextSlice(tokens=tokens, mask_BM=mask_BM))]
        rows = [row * R // len(text_BND) for row in range(len(text_BND))] if rows is None else rows
        reads, stop = [], 0
        for row, same in itertools.groupby(rows):
            start, stop = stop, stop + len([*same])
            mask_1M = None if mask_BM is None else mask_BM[row : row + 1]
            if mask_1M is None or masked:
                reads.append(VideoRead(TextSlice((start, stop), tokens, mask_1M), row))
            elif (valid := _valid_tokens(mask_1M[0])) is not None:
                reads.append(VideoRead(TextSlice((start, stop), tokens), row, valid))
        return reads

    def fork(self, max_cache_len: int | None = None) -> "VideoMemory":
        """An independent continuation: text and video may be extended without touching this memory or other forks.

        The video's tensors are shared, never copied; the text cache (usually empty or short) is copied. With
        `max_cache_len` the fork of a memory without text gets a static text cache instead, for compiled decoding; a
        ValueError is raised for one that has text, and where `max_cache_len` is no number of tokens.
        """
        if max_cache_len is not None:
            if length := self.get_seq_length():
                raise ValueError(f"fork({max_cache_len=}) needs a memory without text, not {length} tokens.")
            fork = self.with_text(_empty_text_cache(len(self._levels), max_cache_len))
        else:
            fork = self.with_text(copy.copy(self.text))
            fork.text.layers = [_copy_layer(layer) for layer in self.layers]
        fork._levels = [store.fork() for store in self._levels]
        fork._valid, fork.states = list(self._valid), list(self.states)
        fork.media, fork.video_rows = copy.deepcopy(self.media), copy.copy(self.video_rows)
        fork._times = [list(row) for row in self._times]
        return fork

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "VideoMemory":
        """Moves the video (not the text cache) in place, or keeps it in another dtype from now on.

        Args:
            device: on "cpu" the keys and values stay in pinned memory, from where each layer is copied to the GPU while
                the one before it computes; what is encoded afterwards goes there too.
            dtype: `torch.float8_e4m3fn` halves the memory. Other memories that share this video keep theirs.

        Raises:
            ValueError: there is no such device, or memories are not kept in `dtype`.
        """
        dtype = None if dtype is None else _checked_dtype(dtype)
        device = None if device is None else checked_device(device)
        self._fetched.clear()
        if dtype is not None:
            self.video_dtype = dtype
        if device is not None:
            self.video_device = device
        for store in self._levels:
            if dtype is not None:
                store.map(lambda level: level.stored_as(dtype))
            if device is not None:
                store.map(lambda level: level.map(self._place))
        return self

    @property
    def _rows(self) -> list[int]:
        """The video row of each text row, where each has its own."""
        return list(range(self.num_video_rows)) if self.video_rows is None else self.video_rows

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        indices = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._select_rows(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.get_seq_length():
            super().batch_repeat_interleave(repeats)
        self._set_rows([row for row in self._rows for _ in range(repeats)])

    def expand_rows(self, batch_size: int, copies: int = 1) -> None:
        """Repeats a single row of text for each of `batch_size` questions, and each row for its beams or samples.

        What the caller has repeated already is left alone.

        Raises:
            ValueError: another number of rows, or a static text cache that would have to be repeated.
        """
        if copies > 1 and not self.get_seq_length():
            if len(self._rows) == batch_size:
                self.batch_repeat_interleave(copies)
            return
        is_initialized, wanted = self.layers and self.layers[0].is_initialized, batch_size * copies
        rows = self.layers[0].keys.shape[0] if is_initialized else 0
        if rows in (0, wanted):
            return
        if rows not in (1, batch_size):
            raise ValueError(f"The memory holds {rows} rows of text and is asked by {batch_size}; ask on a fork().")
        if not isinstance(self.layers[0], DynamicLayer):
            several = "questions, beams or samples"
            raise ValueError(
                f"A static text cache is not repeated for {several}: ask on a fork() without max_cache_len."
            )
        self.batch_repeat_interleave(wanted // rows)

    def _select_rows(self, indices: list[int]) -> None:
        if self.video_rows is not None or self.num_video_rows > 1:
            self._set_rows([self._rows[index] for index in indices])

    def _set_rows(self, rows: list[int]) -> None:
        same = self.num_video_rows <= 1 or rows == list(range(self.num_video_rows))
        self.video_rows = None if same else rows

    @contextlib.contextmanager
    def unchanged_on_error(self):
        """Within, the video may be extended; if anything is raised it is as it was before."""
        kept = vars(self) | {"_valid": list(self._valid), "states": list(self.states)}
        kept |= {"media": copy.deepcopy(self.media), "_times": [list(row) for row in self._times]}
        kept |= {"_mask": None, "_fetched": {}}
        length = self.video_length
        try:
            yield
        except BaseException:
            for store in self._levels:
                store.truncate(length)
            self.__dict__.update(kept)
            raise

    def reset(self) -> None:
        """Forgets the text and the video; `fork()` beforehand to start a new conversation about the same video."""
        super().reset()
        self._levels, self.expected_length = [LevelStore() for _ in self._levels], 0
        self._fetched.clear()
        self._valid, self._mask, self.media, self._times, self.video_rows = [], None, [], [], None
        self.made_by = self.seconds = None
        self.sources = []
        self.states = [None] * len(self.states)

    def __repr__(self) -> str:
        keys = self._levels[0].parts[0].keys_BHMP if self._levels[0].parts else None
        per_item = {"image": 1, "video": self.temporal_patch_size}
        return describe(
            "VideoMemory", self, keys, frames=sum(t * per_item[kind] for row in self.media for kind, t, _, _ in row)
        )

    def save(self, path: str | os.PathLike) -> None:
        """Writes video, states and text to one safetensors file; an interrupted write leaves an older file intact.

        Raises:
            OSError: it cannot be written, or something that is no memory is in the way. ValueError: the text cache is
                static.
        """
        write_memory(path, FORMAT, *self._contents())

    def _contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and header of a file."""
        tensors: dict[str, Tensor] = {}
        for i in range(len(self._levels) if self.video_length else 0):
            for name, tensor in zip(_PARTS, self.level(i)):
                if tensor is not None:
                    tensors[f"video.{i}.{name}"] = tensor
        for i, state in enumerate(self.states):
            if state is not None:
                tensors[f"state.{i}.conv"], tensors[f"state.{i}.ssm"] = state
        if self.video_mask() is not None:
            tensors["video.mask"] = self.video_mask()
        tensors |= written_times(self.times)
        for i, layer in enumerate(self.layers if self.get_seq_length() else []):
            if not isinstance(layer, DynamicLayer):
                raise ValueError(f"Only a growing text cache can be saved, not {layer}; save before generating.")
            tensors[f"text.{i}.keys"], tensors[f"text.{i}.values"] = layer.keys, layer.values
        return tensors, {
            "layers": len(self._levels),
            "dtype": None if self._model_dtype is None else str(self._model_dtype).removeprefix("torch."),
            "video_length": self.video_length,
            "media": self.media,
            "video_rows": self.video_rows,
            **{name: getattr(self, name) for name in _IN_HEADER},
            "keys_are_rotated": [store.keys_are_rotated for store in self._levels],
        }

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu") -> "VideoMemory":
        """Reads a memory written by `save`.

        Raises:
            FileNotFoundError: no such file. ValueError: the file is not a video memory, or is damaged in any byte.
        """
        return load_memory(cls, path, FORMAT, device)

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> "VideoMemory":
        M = header["video_length"]
        require("video_length", M, is_count(M))
        video = tensors["video.0.keys"] if M else None
        check_header(header, None if video is None else len(video))
        L = header["layers"]
        memory = cls(PreTrainedConfig(num_hidden_layers=L))
        if video is not None:
            for i in range(L):
                level = VideoLevel(*(tensors.get(f"video.{i}.{name}") for name in _PARTS))
                check_level(level, video, M)
                memory._levels[i].replace(level)
            memory.video_dtype = FP8 if video.dtype == FP8 else None
            memory._model_dtype, memory.video_device = video.dtype, video.device
            mask = tensors.get("video.mask")
            require("video.mask", mask, mask is None or (mask.dtype == torch.bool and mask.shape == (len(video), M)))
            memory.append_mask(M, mask)
        if header["dtype"] is not None:
            memory._model_dtype = _checked_dtype(getattr(torch, header["dtype"]))
        for i in range(L - 1):
            if f"state.{i}.ssm" in tensors:
                memory.states[i] = Mamba2State(tensors[f"state.{i}.conv"], tensors[f"state.{i}.ssm"])
        check_states(memory.states, None if video is None else len(video))
        for i in range(L if "text.0.keys" in tensors else 0):
            keys, values = tensors[f"text.{i}.keys"], tensors[f"text.{i}.values"]
            of_all = {(t.shape, t.dtype) for t in (keys, values, tensors["text.0.keys"])}
            require(f"text.{i}", of_all, len(of_all) == 1 and keys.dim() == 4 and keys.is_floating_point())
            memory.update(keys, values, i)
        for store, rotated in zip(memory._levels, header["keys_are_rotated"], strict=True):
            require("keys_are_rotated", rotated, isinstance(rotated, bool))
            store.keys_are_rotated = rotated
        rows, patch = header["video_rows"], header["temporal_patch_size"]
        known = range(memory.num_video_rows)
        are_rows = isinstance(rows, list) and len(rows) > 0 and all(type(row) is int and row in known for row in rows)
        require("video_rows", rows, rows is None or are_rows)
        require("temporal_patch_size", patch, is_count(patch) and patch > 0)
        memory.media, memory.video_rows = header["media"], rows
        memory._times = read_times(tensors.get("video.times"), memory.media)
        for name in _IN_HEADER:
            setattr(memory, name, header[name])
        return memory

    def check(self, config: PreTrainedConfig, batch_size: int, dtype: torch.dtype) -> None:
        """Raises ValueError if this memory was not made by a model of this shape and dtype, or for this many rows."""
        if not self._levels[0].parts:  # nothing, or in cells, which made it in this very forward pass
            return
        keys, heads = self._levels[0].parts[0].keys_BHMP, config.num_attention_heads
        made_by = (len(self._levels), keys.shape[1], keys.shape[3])
        wanted = (config.num_hidden_layers, config.num_key_value_heads, config.hidden_size // heads)
        if made_by != wanted:
            raise ValueError(
                f"This video memory has (layers, key/value heads, head dim) = {made_by}, the model {wanted}: "
                "encode the video with the model that is asked."
            )
        if not torch.is_autocast_enabled(keys.device.type):
            self._check_dtype(dtype, "text")
        rows = len(self._rows)
        if rows not in (1, batch_size):
            raise ValueError(
                f"The video memory has {rows} rows and the text {batch_size}; they must be equal, or 1 video."
            )

    def _check_dtype(self, dtype: torch.dtype, of: str) -> None:
        if self._model_dtype != dtype:
            kept = f"The video memory is in {self._model_dtype}"
            raise ValueError(f"{kept}, the {of} in {dtype}: load the model in that dtype.")


class DynamicVideoMemory(VideoMemory, DynamicCache):
    """A memory whose text cache grows, which transformers asks by `isinstance`."""


class StaticVideoMemory(VideoMemory, StaticCache):
    """A memory whose text cache is static, for compiled decoding."""


def _memory_class(text_cache: Cache) -> type[VideoMemory]:
    kinds = {DynamicCache: DynamicVideoMemory, StaticCache: StaticVideoMemory}
    return next((memory for kind, memory in kinds.items() if isinstance(text_cache, kind)), VideoMemory)


def repeats_in_order(rows: list[int], num_video_rows: int) -> bool:
    """Whether rows is 0, 0, 1, 1, ...: each video row once, in order, repeated equally often."""
    share = len(rows) // num_video_rows
    return rows == [row for row in range(num_video_rows) for _ in range(share)]


def _valid_tokens(mask_M: Tensor) -> int | Tensor | None:
    """The tokens of a row: how many, where padding is only behind them, else which; None if there are none."""
    valid = mask_M.nonzero().flatten()
    if not len(valid):
        return None
    return len(valid) if int(valid[-1]) == len(valid) - 1 else valid


def _checked_dtype(dtype: Any) -> torch.dtype:
    if dtype not in DTYPES:
        names = ", ".join(map(str, DTYPES))
        raise ValueError(f"A video memory is not kept in {dtype!r}; give one of {names}, or None for the model's.")
    return dtype


def _empty_text_cache(num_layers: int, max_cache_len: int | None) -> Cache:
    if max_cache_len is None:
        cache = DynamicCache()
        cache.layers = [DynamicLayer() for _ in range(num_layers)]
        return cache
    if not isinstance(max_cache_len, Integral) or not 1 <= max_cache_len <= MAX_TEXT:
        raise ValueError(f"max_cache_len is {max_cache_len!r}; give the tokens of text to expect, 1 to {MAX_TEXT}.")
    return StaticCache(config=PreTrainedConfig(num_hidden_layers=num_layers), max_cache_len=max_cache_len)


def _copy_layer(layer):
    new = copy.copy(layer)
    if not isinstance(layer, DynamicLayer):  # a growing layer replaces its tensors, others write into them
        vars(new).update({name: t.clone() for name, t in vars(layer).items() if isinstance(t, Tensor)})
    return new
