"""Assigns images and videos to rows of text, cuts them into chunks of frames, and loads the chunks onto the GPU.

What is unusual: a media item is written `<|vision_start|><|vision_end|>`, without a placeholder per video token. A
batch of one owns all media, whatever its text says; in a larger batch the n-th item belongs to the row that holds the
n-th `<|vision_start|>`. Patches come in (t, h, w) order, so a range of frames is a slice of them. In Video-Ma2mba the
text of a row and the tokens of its media form one stream: the tokens of an item follow its `<|vision_start|>`, whose
position in the text stands for all of them.

Shapes: B rows, N tokens of text, S tokens of a chunk of the stream.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.import_utils import is_tracing


Item = TypeVar("Item")

# Larger chunks are no faster. 64 pairs of frames always make a multiple of 64 tokens, the size of the scan's tiles.
MAX_CHUNK_FRAMES = 128


class MediaItem(NamedTuple):
    """Consecutive frames of one image or video: `t` temporal patches of `h` x `w` spatial patches each."""

    kind: str  # "image" or "video"
    t: int
    h: int
    w: int
    start: int  # index of its first patch among all patches of its kind
    first_frame: int = 0  # number of temporal patches of the same item that came before these
    times: Tensor | None = None  # start and end of each temporal patch in seconds, float64 (t, 2); None: unknown

    @property
    def num_patches(self) -> int:
        return self.t * self.h * self.w

    def after(self, t: int, times: Tensor | None) -> Tensor | None:
        """The `times` of this item behind the `t` temporal patches that it continues. Raises ValueError where they run
        backwards."""
        if self.times is None and times is None:
            return None
        both = ((t, times), (self.t, self.times))
        return check_spans("video_times", torch.cat([unknown_times(n) if of is None else of for n, of in both]))

    def split(self, frames: int) -> "tuple[MediaItem, MediaItem]":
        """Returns the first `frames` temporal patches, and the rest."""
        start, first_frame = self.start + frames * self.h * self.w, self.first_frame + frames
        times, rest = (None, None) if self.times is None else (self.times[:frames], self.times[frames:])
        tail = self._replace(t=self.t - frames, start=start, first_frame=first_frame, times=rest)
        return self._replace(t=frames, times=times), tail


def unknown_times(t: int) -> Tensor:
    """Spans of `t` temporal patches of which nobody knows when they are."""
    return torch.full((t, 2), torch.nan, dtype=torch.float64)


def check_spans(name: str, times: Tensor) -> Tensor:
    """`times` (t, 2). Raises ValueError where a span is neither finite nor unknown (NaN twice), or begins before
    the one before it ends.
    """
    known = times[~times.isnan().all(1)].flatten()
    if not known.isfinite().all() or bool((known.diff() < 0).any()):
        raise ValueError(
            f"{name} are {times.tolist()!s:.100}; give the start and end in seconds of one temporal patch after the "
            "other, or NaN for both where they are unknown."
        )
    return times


def continued(times: Tensor, spans: Tensor) -> Tensor:
    """`times` (t, 2) with other `spans` for the last; where their clock starts anew they go on after those before."""
    before = times[: len(times) - len(spans)]
    ended = before[~before.isnan().all(1), 1][-1:]
    shift = (ended - spans[:1, 0]).clamp(min=0) if len(ended) else 0
    return check_spans("times", torch.cat([before, spans + shift]))


def list_media(
    kind: str, pixels: Tensor | None, grid_thw: Tensor | None, times: Tensor | None = None
) -> list[MediaItem]:
    """Lists the items of `grid_thw`, (number of items, 3), with their `times`, (sum of t, 2).

    Raises ValueError unless `pixels` are their patches and `times` their spans.
    """
    if pixels is None and grid_thw is None:
        return []
    names = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}[kind]
    if pixels is None or grid_thw is None:
        missing, given = names if pixels is None else reversed(names)
        raise ValueError(f"{given} came without {missing}; pass on all that the processor returns.")
    items, start = [], 0
    for name, given in zip(names, (pixels, grid_thw)):
        if not torch.is_tensor(given):
            raise ValueError(f"{name} is {given!r:.80}; give a tensor, as the processor returns it.")
    if grid_thw.dim() != 2 or grid_thw.shape[1] != 3 or grid_thw.is_floating_point():
        shape = list(grid_thw.shape)
        raise ValueError(f"{names[1]} is {shape} of {grid_thw.dtype}; give integers (number of items, 3).")
    for t, h, w in grid_thw.tolist():
        if min(t, h, w) < 1:
            raise ValueError(f"{names[1]} holds {[t, h, w]}: each item has at least one frame of one patch.")
        items.append(MediaItem(kind, t, h, w, start))
        start += t * h * w
    if start != pixels.shape[0]:
        raise ValueError(f"{names[1]} announces {start} patches, {names[0]} holds {pixels.shape[0]}.")
    return items if times is None else _with_times(items, times)


def _with_times(videos: list[MediaItem], times: Tensor) -> list[MediaItem]:
    lengths = [item.t for item in videos]
    if not torch.is_tensor(times) or times.shape != (sum(lengths), 2) or not times.is_floating_point():
        raise ValueError(
            f"video_times is {times!s:.80}; give start and end of each temporal patch, floats {(sum(lengths), 2)}."
        )
    spans = times.detach().to("cpu", torch.float64, copy=True).split(lengths)
    return [item._replace(times=check_spans("video_times", of_item)) for item, of_item in zip(videos, spans)]


def list_with_rows(
    kind: str, pixels: Tensor, grid_thw: Tensor, rows: list[int] | None, times: Tensor | None = None
) -> list[tuple[MediaItem, int]]:
    """Lists items with the row of each, which is 0 if `rows` is None. Raises ValueError if `rows` does not fit."""
    items = list_media(kind, pixels, grid_thw, times)
    rows = [0] * len(items) if rows is None else rows
    if len(rows) != len(items) or not all(isinstance(row, int) and row >= 0 for row in rows):
        raise ValueError(f"{rows=} for {len(items)} {kind}s; give one row for each {kind}, counted from 0.")
    return list(zip(items, rows))


def without_seen_grids(
    pixels: dict[str, Tensor | None], grids: dict[str, Tensor | None], seen: list[list[list]]
) -> dict[str, Tensor | None]:
    """Drops each of the `grids` that came without pixels because a memory has `seen` as many media of its kind."""
    kinds = [kind for row in seen for kind, *_ in row]
    return {
        kind: None if grid is not None and pixels[kind] is None and len(grid) <= kinds.count(kind) else grid
        for kind, grid in grids.items()
    }


def item_starts(starts_BN: Tensor, mm_token_type_ids: Tensor | None, count: int) -> Tensor:
    """Drops starts whose type is 0 or missing if exactly `count` others remain; otherwise returns all starts."""
    (B, N), types_BN = starts_BN.shape, mm_token_type_ids
    if types_BN is None or len(types_BN) != B or types_BN.shape[1] > N or int(starts_BN.sum()) == count:
        return starts_BN
    typed_BN = starts_BN & (F.pad(types_BN, (0, N - types_BN.shape[1])).to(starts_BN.device) != 0)
    return typed_BN if int(typed_BN.sum()) == count else starts_BN


def assign_media(
    images: list[MediaItem], videos: list[MediaItem], starts_BN: Tensor, mm_token_type_ids: Tensor | None
) -> list[list[MediaItem]]:
    """Returns the items of each row, in the order of the text.

    `starts_BN` is True at each `<|vision_start|>`; `mm_token_type_ids` (B, N) is 1 there for an image, 2 for a video.
    With several rows, raises ValueError if there are more or fewer starts than items, or if their order is unknown.
    """
    total = len(images) + len(videos)
    if not total:
        return [[] for _ in starts_BN]
    starts_BN = item_starts(starts_BN, mm_token_type_ids, total)
    if len(starts_BN) == 1:
        return [_in_text_order(images, videos, starts_BN, mm_token_type_ids, required=False)]
    counts = starts_BN.sum(1).tolist()
    if sum(counts) != total:
        raise ValueError(
            f"The {len(counts)} rows of text hold {sum(counts)} <|vision_start|> tokens, but {len(images)} images and "
            f"{len(videos)} videos were given. Write one <|vision_start|><|vision_end|> for each item."
        )
    remaining = iter(_in_text_order(images, videos, starts_BN, mm_token_type_ids, required=True))
    return [list(islice(remaining, count)) for count in counts]


def _in_text_order(
    images: list[MediaItem], videos: list[MediaItem], starts_BN: Tensor, types_BN: Tensor | None, required: bool
) -> list[MediaItem]:
    """Orders items by the types of their starts; if these do not tell, lists images first or, if `required`, raises."""
    if images and videos:
        told = types_BN is not None and types_BN.shape == starts_BN.shape
        kinds = types_BN[starts_BN.to(types_BN.device)].tolist() if told else None
        if told and sorted(kinds) == [1] * len(images) + [2] * len(videos):
            of_kind = {1: iter(images), 2: iter(videos)}
            return [next(of_kind[kind]) for kind in kinds]
        if required:
            raise ValueError(
                f"In which order do the {len(images)} images and {len(videos)} videos come? mm_token_type_ids, as the "
                f"processor returns them, should be 1 and 2 at their <|vision_start|> tokens, and are {kinds}."
            )
    return [*images, *videos]


def media_of_rows(
    images: list[MediaItem], videos: list[MediaItem], starts_BN: Tensor, mm_token_type_ids: Tensor | None
) -> list[list[MediaItem]]:
    """Does what `assign_media` does, but raises ValueError if images and videos are mixed in an unknown order."""
    rows = assign_media(images, videos, starts_BN, mm_token_type_ids)
    _in_text_order(images, videos, starts_BN, mm_token_type_ids, required=True)
    return rows


def uncached_media(
    rows: list[list[MediaItem]], starts_BN: Tensor, mm_token_type_ids: Tensor | None, cached_length: int
) -> list[list[MediaItem]]:
    """Drops the items whose `<|vision_start|>` lies in the cached part of the text, as the memory has seen them.

    A row whose text does not name all of its items, which is allowed in a batch of one, keeps them all.
    """
    starts_BN = item_starts(starts_BN, mm_token_type_ids, sum(map(len, rows)))
    total, cached = starts_BN.sum(1).tolist(), starts_BN[:, :cached_length].sum(1).tolist()
    return [row[seen:] if len(row) == written else row for row, written, seen in zip(rows, total, cached)]


def unread_media(
    images: list[MediaItem], videos: list[MediaItem], starts_BN: Tensor, unread_BN: Tensor, types_BN: Tensor | None
) -> tuple[list[list[MediaItem]], Tensor]:
    """Returns each row's items in the unread part of the text, and their starts; those of the rest may be given too."""
    count = len(images) + len(videos)
    all_BN = item_starts(starts_BN, types_BN, count)
    if count == int(all_BN.sum()):
        rows, new_BN = media_of_rows(images, videos, all_BN, types_BN), all_BN & unread_BN
        return [row[len(row) - new :] for row, new in zip(rows, new_BN.sum(1).tolist())], new_BN
    new_BN = item_starts(starts_BN & unread_BN, types_BN, count)
    return media_of_rows(images, videos, new_BN, types_BN), new_BN


def flattened_lengths(
    position_ids: Tensor | None, attention_mask: Tensor | dict | None, cu_seq_lens: Tensor | None
) -> list[int] | None:
    """Returns the lengths of the samples that a collator has packed into one row, or None for a single sample.

    They follow from `cu_seq_lens`, or from positions that restart within the row: (1, N), or (3 or 4, 1, N) as for
    Qwen2-VL. Positions that come with padding say nothing, and while a graph is traced their values are not known.
    Raises ValueError if positions restart within one of several rows.
    """
    given = position_ids if cu_seq_lens is None else cu_seq_lens
    if given is None or given.shape[-1] < 2 or is_tracing(given):
        return None
    if cu_seq_lens is not None:
        return cu_seq_lens.diff().tolist()
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or not attention_mask.all()):
        return None
    text_BN = position_ids[0] if position_ids.dim() == 3 else position_ids
    restarts_BN = text_BN.diff() < 1
    if not restarts_BN.any():
        return None
    B, N = text_BN.shape
    if B > 1:
        raise ValueError(
            f"position_ids start anew within {int(restarts_BN.any(1).sum())} of {B} rows. Samples that are packed "
            "without padding have to be a single row, with their packed_lengths or these positions."
        )
    ends = [0, *(restarts_BN[0].nonzero().flatten() + 1).tolist(), N]
    return [end - start for start, end in pairwise(ends)]


class Run(NamedTuple):
    """A part of one row's stream: consecutive tokens of text, or consecutive frames of one media item."""

    positions: Tensor | None  # in the text, int64; of an item, its <|vision_start|>, or none if that was read before
    item: MediaItem | None = None


def runs_of(unread_BN: Tensor, starts_BN: Tensor, rows: list[list[MediaItem]]) -> list[list[Run]]:
    """Returns the stream of each row.

    `unread_BN` is True at the tokens of text that belong to the stream, and `starts_BN` at each `<|vision_start|>`.
    `rows` lists each row's media, of which the first may continue one seen before (its `first_frame` is not 0). Raises
    ValueError if a row has more or fewer of the other media than `<|vision_start|>`s.
    """
    streams = []
    for unread_N, starts_N, items in zip(unread_BN.cpu(), starts_BN.cpu(), rows):
        positions = unread_N.nonzero().flatten()
        marks = starts_N[positions].nonzero().flatten().tolist() if items else []
        stream, begin = [Run(positions[:0], item) for item in items[:1] if item.first_frame], 0
        items = items[len(stream) :]
        if len(marks) != len(items):
            raise ValueError(
                f"A row of text holds {len(marks)} <|vision_start|> tokens for {len(items)} images and videos. Write "
                "one <|vision_start|><|vision_end|> where each is to be seen."
            )
        for mark, item in zip(marks, items):
            stream += [Run(positions[begin : mark + 1]), Run(positions[mark : mark + 1], item)]
            begin = mark + 1
        streams.append(stream + ([Run(positions[begin:])] if begin < len(positions) else []))
    return streams


def split_runs(streams: list[list[Run]], tokens: int | None, tokens_per_frame: int) -> Iterator[list[list[Run]]]:
    """Cuts streams into chunks of at most `tokens` per row, but never less than a frame; None leaves them whole.

    Rows advance together: the n-th chunk holds the n-th part of every row that is that long.
    """
    pending = [list(reversed(stream)) for stream in streams]
    if tokens is None and any(streams):
        yield streams
    while tokens is not None and any(pending):
        yield [_take_tokens(stream, tokens, tokens_per_frame) for stream in pending]


def _take_tokens(stream: list[Run], tokens: int, tokens_per_frame: int) -> list[Run]:
    """Takes up to `tokens` off the end of `stream`, which is in reverse order."""
    taken = []
    while stream and tokens > 0 and not (taken and stream[-1].item is not None and tokens < tokens_per_frame):
        positions, item = stream.pop()
        if item is None:
            if len(positions) > tokens:
                stream.append(Run(positions[tokens:]))
            taken.append(Run(positions[:tokens]))
            tokens -= len(positions)
            continue
        frames = max(1, tokens // tokens_per_frame)
        if item.t > frames:
            item, rest = item.split(frames)
            stream.append(Run(positions, rest))
        taken.append(Run(positions, item))
        tokens -= item.t * tokens_per_frame
    return taken


def split_frames(rows: list[list[MediaItem]], frames: int | None) -> Iterator[list[list[MediaItem]]]:
    """Cuts media into chunks of at most `frames` temporal patches per row; None leaves them whole."""
    streams = [[Run(None, item) for item in row] for row in rows]
    for chunk in split_runs(streams, frames, tokens_per_frame=1):
        yield [[run.item for run in stream] for stream in chunk]


def chunk_patches(chunk: list[list[MediaItem]], pixels: dict[str, Tensor]) -> list[Tensor]:
    """Returns the patches of a chunk's items in order, as slices of `pixels`; adjacent items share a slice."""
    slices: list[tuple[str, int, int]] = []
    for item in (item for row in chunk for item in row):
        start, stop = item.start, item.start + item.num_patches
        if slices and slices[-1][::2] == (item.kind, start):
            start = slices.pop()[1]
        slices.append((item.kind, start, stop))
    return [pixels[kind][start:stop] for kind, start, stop in slices]


def media_positions(rows: list[list[MediaItem]], merge_size: int) -> Tensor:
    """Returns the (t, h, w) of each merged token, (3, B, S), counted from zero in each item; rows are right-padded."""

    def positions(item: MediaItem) -> Tensor:
        frames = torch.arange(item.first_frame, item.first_frame + item.t)
        return torch.cartesian_prod(frames, torch.arange(item.h // merge_size), torch.arange(item.w // merge_size))

    empty = torch.zeros(0, 3, dtype=torch.long)
    by_row = [torch.cat([empty, *map(positions, row)]) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(by_row, batch_first=True).permute(2, 0, 1)


def text_outputs(chunk: list[list[Run]], tokens_per_frame: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the row, the index in the chunk and the position in the text (all int64) of each output of a chunk.

    The output of a media item's last token stands at its `<|vision_start|>`, in the place of that token's own output.
    """
    rows, places, positions = [], [], []
    for row, stream in enumerate(chunk):
        place = 0
        for run, following in zip(stream, [*stream[1:], Run(None)]):
            if run.item is None:
                length = len(run.positions)
                stop = length if following.item is None else length - 1
                places.append(torch.arange(place, place + stop))
                positions.append(run.positions[:stop])
            else:
                length = run.item.t * tokens_per_frame
                places.append(torch.full_like(run.positions, place + length - 1))
                positions.append(run.positions)
            rows.append(torch.full_like(places[-1], row))
            place += length
    return torch.cat(rows), torch.cat(places), torch.cat(positions)


def load_ahead(
    items: Iterable[Item], load: Callable[[Item], Iterable[Any]], device: torch.device
) -> Iterator[tuple[Item, Any]]:
    """Yields (item, load(item)); on a GPU an item is loaded while the consumer's work on the previous one runs.

    There `load`, which returns tensors on `device`, runs on its own stream, for which the consumer's current stream
    waits. Tensors that `load` returns unchanged must be ready before it is called.
    """
    if device.type != "cuda":
        yield from ((item, load(item)) for item in items)
        return
    before_last = last = None  # events that mark the end of the consumer's work on the two previous items
    for item in items:
        if before_last is not None:
            before_last.synchronize()
        with torch.cuda.stream(side_stream(device, "load")):
            loaded = load(item)
        consumer = torch.cuda.current_stream(device)
        consumer.wait_stream(side_stream(device, "load"))
        for tensor in loaded:
            if tensor.is_cuda:  # The loading stream may reuse its memory only after the consumer is done with it.
                tensor.record_stream(consumer)
        yield item, loaded
        before_last, last = last, torch.cuda.Event(blocking=True)
        last.record(torch.cuda.current_stream(device))


@functools.cache
def side_stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """One stream per GPU and purpose, never a new one: the allocator reuses freed memory only on the same stream."""
    return torch.cuda.Stream(device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves `tensor` to `device`; from the CPU to a GPU through page-locked memory, without waiting for the copy."""
    if device.type == "meta":  # accelerate keeps the weights elsewhere, and moves the inputs as well
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu" and not torch.is_grad_enabled():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def normalized(patches: Tensor, config: PreTrainedConfig) -> Tensor:
    """Rescales and normalises uint8 patches as the processor would have done, to float32; keeps other dtypes.

    The processor returns uint8 patches with `do_rescale=False, do_normalize=False`. `patches` has the shape
    (number of patches, channels * temporal patch size * patch size ** 2); `config` gives `image_mean` and `image_std`.
    """
    if patches.dtype != torch.uint8:
        return patches
    mean, std = (
        (torch.tensor(per_channel).unsqueeze(1) * 255.0).to(patches.device, non_blocking=True)
        for per_channel in (config.image_mean, config.image_std)
    )
    return patches.float().unflatten(1, (len(mean), -1)).sub_(mean).div_(std).flatten(1)


def default_chunk_frames(model: PreTrainedModel, patches: int) -> int:
    """Chooses a chunk's frames: `MAX_CHUNK_FRAMES`, or as many as fit into half the free memory of the fullest GPU.

    `patches` is the number of patches that one temporal patch has in all rows together.
    """
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    if not devices:
        return MAX_CHUNK_FRAMES
    temporal = model.config.vision_config.temporal_patch_size
    needed = patches * activation_bytes(model.config, model.dtype)
    fitting = min(map(free_bytes, devices)) // max(1, 2 * needed)
    return temporal * max(1, min(MAX_CHUNK_FRAMES // temporal, fitting))


def free_bytes(device: torch.device) -> int:
    """Returns the bytes that can still be allocated: of a GPU those of its driver, and those PyTorch holds unused."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux, where nobody says it in Python: what any machine has
        return 2**31


def activation_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Estimates the most bytes that a patch takes in the vision tower and the Mamba-2 blocks, without gradients."""
    vision, mamba, size = config.vision_config, config.mamba_config, dtype.itemsize
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    inner = getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
    numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    # The residual stream and its norm; then either the MLP and its activation, or queries and keys rotated in float32.
    tower = numbers * (4 + size) + 2 * width * size + max(4 * inner * size, 4 * width * size + 6 * width * 4)
    # Residual, norm and result; in_proj, convolution, scan and gated norm; the states of the scan in float32.
    projected = mamba.intermediate_size + mamba.conv_dim + mamba.num_heads
    token = (3 * mamba.hidden_size + projected + mamba.conv_dim + 2 * mamba.intermediate_size) * size
    token += 4 * mamba.intermediate_size * mamba.state_size // mamba.chunk_size
    return max(tower, token // vision.spatial_merge_size**2)


def copy_to_gpu(t_BHM: Tensor, device: torch.device) -> Tensor:
    """Copies per head: a slice of a larger buffer is not contiguous, and `.to()` would first compact it on the CPU."""
    if t_BHM.nbytes == t_BHM.untyped_storage().nbytes():
        return t_BHM.to(device, non_blocking=True)
    copy = torch.empty(t_BHM.shape, dtype=t_BHM.dtype, device=device)
    for target, source in zip(copy.flatten(0, 1), t_BHM.flatten(0, 1)):
        target.copy_(source, non_blocking=True)
    return copy
