"""Which images and videos belong to which row of text, cut into chunks of frames, and these on their way to the GPU.

What is unusual: a media item is written `<|vision_start|><|vision_end|>`, without a placeholder per video token. A
batch of one owns all media whatever its text says; in a larger batch the n-th item belongs to the row that holds the
n-th `<|vision_start|>`. Patches come in (t, h, w) order, so a range of frames is a slice of them. For Video-Ma2mba the
text of a row and the tokens of its media are one stream: those of an item come after its `<|vision_start|>`, whose
place in the text stands for all of them.

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

# More frames at once bring no speed. 64 frame pairs are a multiple of 64 tokens, which is what the scan's tiles hold.
MAX_CHUNK_FRAMES = 128


# --- media and rows of text -------------------------------------------------------------------------------------------


class MediaItem(NamedTuple):
    """A run of frames of one image or video: `t` temporal patches of `h` x `w` spatial patches each."""

    kind: str  # "image" or "video"
    t: int
    h: int
    w: int
    start: int  # its first patch among all patches of its kind
    first_frame: int = 0  # temporal patches of the same item that came before

    @property
    def num_patches(self) -> int:
        return self.t * self.h * self.w

    def split(self, frames: int) -> "tuple[MediaItem, MediaItem]":
        """The first `frames` temporal patches, and what comes after them."""
        start, first_frame = self.start + frames * self.h * self.w, self.first_frame + frames
        return self._replace(t=frames), self._replace(t=self.t - frames, start=start, first_frame=first_frame)


def list_media(kind: str, pixels: Tensor | None, grid_thw: Tensor | None) -> list[MediaItem]:
    """The items of a `grid_thw` of shape (number of items, 3), whose patches are the rows of `pixels`.

    Raises:
        ValueError: patches without a grid or the other way round, or another number of them than it announces.
    """
    if pixels is None and grid_thw is None:
        return []
    names = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}[kind]
    if pixels is None or grid_thw is None:
        missing, given = names if pixels is None else reversed(names)
        raise ValueError(f"{given} came without {missing}; pass on all that the processor returns.")
    items, start = [], 0
    for t, h, w in grid_thw.tolist():
        if min(t, h, w) < 1:
            raise ValueError(f"{names[1]} holds {[t, h, w]}: each item has at least one frame of one patch.")
        items.append(MediaItem(kind, t, h, w, start))
        start += t * h * w
    if start != pixels.shape[0]:
        raise ValueError(f"{names[1]} announces {start} patches, {names[0]} holds {pixels.shape[0]}.")
    return items


def list_videos(pixels: Tensor, grid_thw: Tensor, rows: list[int] | None) -> list[tuple[MediaItem, int]]:
    """The items of `pixels`, each with its row; None puts all into row 0. ValueError for fewer or more rows."""
    items = list_media("video", pixels, grid_thw)
    rows = [0] * len(items) if rows is None else rows
    if len(rows) != len(items) or min(rows, default=0) < 0:
        raise ValueError(f"{rows=} for {len(items)} videos; give one row for each video, counted from 0.")
    return list(zip(items, rows))


def without_seen_grids(
    pixels: dict[str, Tensor | None], grids: dict[str, Tensor | None], seen: list[list[list]]
) -> dict[str, Tensor | None]:
    """`grids` without those that came without pixels, as their media are among those a memory has `seen`."""
    kinds = [kind for row in seen for kind, *_ in row]
    return {
        kind: None if grid is not None and pixels[kind] is None and len(grid) <= kinds.count(kind) else grid
        for kind, grid in grids.items()
    }


def item_starts(starts_BN: Tensor, mm_token_type_ids: Tensor | None, count: int) -> Tensor:
    """Drops starts typed 0 and starts beyond the types, if exactly `count` remain; else returns all of them."""
    (B, N), types_BN = starts_BN.shape, mm_token_type_ids
    if types_BN is None or len(types_BN) != B or types_BN.shape[1] > N or int(starts_BN.sum()) == count:
        return starts_BN
    typed_BN = starts_BN & (F.pad(types_BN, (0, N - types_BN.shape[1])).to(starts_BN.device) != 0)
    return typed_BN if int(typed_BN.sum()) == count else starts_BN


def assign_media(
    images: list[MediaItem], videos: list[MediaItem], starts_BN: Tensor, mm_token_type_ids: Tensor | None
) -> list[list[MediaItem]]:
    """The items of each row, in the order of the text.

    Args:
        starts_BN: True at each `<|vision_start|>`.
        mm_token_type_ids: (B, N), 1 at the start of an image and 2 at that of a video; needed to mix both.

    Raises:
        ValueError: in a batch, items and `<|vision_start|>`s differ in number, or both kinds come without types.
    """
    total = len(images) + len(videos)
    if not total:
        return [[] for _ in starts_BN]
    starts_BN = item_starts(starts_BN, mm_token_type_ids, total)
    counts = starts_BN.sum(1).tolist()
    items = _in_text_order(images, videos, starts_BN, mm_token_type_ids)
    if len(counts) == 1:
        return [[*images, *videos] if items is None else items]
    if sum(counts) != total:
        raise ValueError(
            f"The {len(counts)} rows of text hold {sum(counts)} <|vision_start|> tokens, but {len(images)} images and "
            f"{len(videos)} videos were given; write one <|vision_start|><|vision_end|> for each item."
        )
    if items is None:
        raise ValueError(
            f"Which of the {sum(counts)} <|vision_start|> tokens are images ({len(images)}) and which videos "
            f"({len(videos)})? Pass mm_token_type_ids, as the processor returns them."
        )
    in_order = iter(items)
    return [list(islice(in_order, count)) for count in counts]


def _in_text_order(
    images: list[MediaItem], videos: list[MediaItem], starts_BN: Tensor, types_BN: Tensor | None
) -> list[MediaItem] | None:
    """All items, one for each `<|vision_start|>`; None if both kinds come and the types do not tell their order."""
    if not (images and videos):
        return [*images, *videos]
    if types_BN is None or types_BN.shape != starts_BN.shape:
        return None
    kinds = types_BN[starts_BN.to(types_BN.device)].tolist()
    if sorted(kinds) != [1] * len(images) + [2] * len(videos):
        return None
    of_kind = {1: iter(images), 2: iter(videos)}
    return [next(of_kind[kind]) for kind in kinds]


def media_of_rows(
    images: list[MediaItem], videos: list[MediaItem], starts_BN: Tensor, mm_token_type_ids: Tensor | None
) -> list[list[MediaItem]]:
    """`assign_media` where the order matters: raises ValueError if images and videos are mixed and it is not told."""
    rows = assign_media(images, videos, starts_BN, mm_token_type_ids)
    if _in_text_order(images, videos, starts_BN, mm_token_type_ids) is None:
        fits = mm_token_type_ids is not None and mm_token_type_ids.shape == starts_BN.shape
        told = mm_token_type_ids[starts_BN.to(mm_token_type_ids.device)].tolist() if fits else None
        raise ValueError(
            f"In which order do the {len(images)} images and {len(videos)} videos come? mm_token_type_ids, as the "
            f"processor returns them, should be 1 and 2 at their <|vision_start|> tokens, and are {told}."
        )
    return rows


def uncached_media(
    rows: list[list[MediaItem]], starts_BN: Tensor, mm_token_type_ids: Tensor | None, cached_length: int
) -> list[list[MediaItem]]:
    """Drops the items whose `<|vision_start|>` lies in the cached part of the text: the memory has seen them.

    A row whose items are not all written in the text (a batch of one may do that) keeps them all.
    """
    starts_BN = item_starts(starts_BN, mm_token_type_ids, sum(map(len, rows)))
    total, cached = starts_BN.sum(1).tolist(), starts_BN[:, :cached_length].sum(1).tolist()
    return [row[seen:] if len(row) == written else row for row, written, seen in zip(rows, total, cached)]


def flattened_lengths(
    position_ids: Tensor | None, attention_mask: Tensor | dict | None, cu_seq_lens: Tensor | None
) -> list[int] | None:
    """Lengths of the samples that a collator without padding has put into one row; None if there is but one sample.

    They are told by `cu_seq_lens` or by positions that start anew within the row, (1, N), or (3 or 4, 1, N) as for
    Qwen2-VL. Positions that come with padding tell nothing, and while a graph is traced nobody can look at them.

    Raises:
        ValueError: positions start anew in one of several rows.
    """
    given = position_ids if cu_seq_lens is None else cu_seq_lens
    if given is None or given.shape[-1] < 2 or is_tracing(given):
        return None
    if cu_seq_lens is not None:
        return cu_seq_lens.diff().tolist()
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or not attention_mask.all()):
        return None
    text_BN = position_ids[0] if position_ids.dim() == 3 else position_ids
    anew_BN = text_BN.diff() < 1
    if not anew_BN.any():
        return None
    B, N = text_BN.shape
    if B > 1:
        raise ValueError(
            f"position_ids start anew within {int(anew_BN.any(1).sum())} of {B} rows: samples put together without "
            "padding have to be a single row, with their packed_lengths or these positions."
        )
    borders = [0, *(anew_BN[0].nonzero().flatten() + 1).tolist(), N]
    return [end - start for start, end in pairwise(borders)]


# --- chunks of media, and of the stream of text and media -------------------------------------------------------------


class Run(NamedTuple):
    """A stretch of one row's stream: tokens of text, or frames of one media item."""

    positions: Tensor | None  # in the text, int64; of an item its <|vision_start|>, none if that was seen before
    item: MediaItem | None = None


def runs_of(unread_BN: Tensor, starts_BN: Tensor, rows: list[list[MediaItem]]) -> list[list[Run]]:
    """The stream of each row.

    Args:
        unread_BN: True at the tokens of text that belong to the stream.
        starts_BN: True at each `<|vision_start|>`.
        rows: the media of each row in order. One whose `first_frame` is not 0 continues what was seen before.

    Raises:
        ValueError: a row's media and its `<|vision_start|>`s differ in number.
    """
    streams = []
    for unread_N, starts_N, items in zip(unread_BN.cpu(), starts_BN.cpu(), rows):
        positions = unread_N.nonzero().flatten()
        marks = starts_N[positions].nonzero().flatten().tolist() if items else []
        continued = [Run(positions[:0], item) for item in items[:1] if item.first_frame]
        items = items[len(continued) :]
        if len(marks) != len(items):
            raise ValueError(
                f"A row of text holds {len(marks)} <|vision_start|> tokens for {len(items)} images and videos; write "
                "one <|vision_start|><|vision_end|> for each where it is to be seen."
            )
        stream, begin = continued, 0
        for mark, item in zip(marks, items):
            stream += [Run(positions[begin : mark + 1]), Run(positions[mark : mark + 1], item)]
            begin = mark + 1
        streams.append(stream + ([Run(positions[begin:])] if begin < len(positions) else []))
    return streams


def split_runs(streams: list[list[Run]], tokens: int | None, tokens_per_frame: int) -> Iterator[list[list[Run]]]:
    """Cuts each row's stream into consecutive chunks of at most `tokens` (a frame at least); None leaves it whole.

    Rows advance together: the n-th chunk holds the n-th part of every row that is that long.
    """
    pending = [list(reversed(stream)) for stream in streams]
    if tokens is None and any(streams):
        yield streams
    while tokens is not None and any(pending):
        yield [_take_tokens(stream, tokens, tokens_per_frame) for stream in pending]


def _take_tokens(stream: list[Run], tokens: int, tokens_per_frame: int) -> list[Run]:
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
    """`split_runs` of streams without text: chunks of at most `frames` temporal patches; None leaves them whole."""
    streams = [[Run(None, item) for item in row] for row in rows]
    for chunk in split_runs(streams, frames, tokens_per_frame=1):
        yield [[run.item for run in stream] for stream in chunk]


def chunk_patches(chunk: list[list[MediaItem]], pixels: dict[str, Tensor]) -> list[Tensor]:
    """The patches of a chunk's items in order, as slices of `pixels` (by kind), one for each run without a gap."""
    runs: list[tuple[str, int, int]] = []
    for item in (item for row in chunk for item in row):
        kind, start, stop = item.kind, item.start, item.start + item.num_patches
        if runs and runs[-1][::2] == (kind, start):
            start = runs.pop()[1]
        runs.append((kind, start, stop))
    return [pixels[kind][start:stop] for kind, start, stop in runs]


def media_positions(rows: list[list[MediaItem]], merge_size: int) -> Tensor:
    """(3, B, S) positions (t, h, w) of the merged tokens, each item counted from zero, rows padded on the right."""
    by_row = []
    for row in rows:
        places = [torch.zeros(0, 3, dtype=torch.long)]
        for item in row:
            frames = torch.arange(item.first_frame, item.first_frame + item.t)
            places.append(
                torch.cartesian_prod(frames, torch.arange(item.h // merge_size), torch.arange(item.w // merge_size))
            )
        by_row.append(torch.cat(places))
    return torch.nn.utils.rnn.pad_sequence(by_row, batch_first=True).permute(2, 0, 1)


def text_outputs(chunk: list[list[Run]], tokens_per_frame: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the outputs of a chunk belong: row, place in the chunk and position in the text, int64, one for each."""
    rows, places, positions = [], [], []
    for row, stream in enumerate(chunk):
        place = 0
        for run, following in zip(stream, [*stream[1:], Run(None)]):
            if run.item is None:
                length = len(run.positions)
                stop = length if following.item is None else length - 1  # its last output is that of the item
                places.append(torch.arange(place, place + stop))
                positions.append(run.positions[:stop])
            else:
                length = run.item.t * tokens_per_frame
                places.append(torch.full_like(run.positions, place + length - 1))
                positions.append(run.positions)
            rows.append(torch.full_like(places[-1], row))
            place += length
    return torch.cat(rows), torch.cat(places), torch.cat(positions)


# --- chunks on their way to the GPU -----------------------------------------------------------------------------------


def load_ahead(
    items: Iterable[Item], load: Callable[[Item], Iterable[Any]], device: torch.device
) -> Iterator[tuple[Item, Any]]:
    """(item, load(item)) for each item; on a GPU loaded while the consumer's work on the item before is computed.

    Args:
        load: makes tensors on `device` of an item. On a GPU it runs on a stream of its own, for which the consumer's
            current stream waits; tensors it only hands through must be ready before.
    """
    if device.type != "cuda":
        for item in items:
            yield item, load(item)
        return
    before_last = last = None  # when the consumer's work on the items before was computed
    for item in items:
        if before_last is not None:
            before_last.synchronize()
        with torch.cuda.stream(side_stream(device, "load")):
            loaded = load(item)
        consumer = torch.cuda.current_stream(device)
        consumer.wait_stream(side_stream(device, "load"))
        for tensor in loaded:
            if tensor.is_cuda:  # its memory goes back to the loading stream, but not before the consumer is done
                tensor.record_stream(consumer)
        yield item, loaded
        before_last, last = last, torch.cuda.Event(blocking=True)
        last.record(torch.cuda.current_stream(device))


@functools.cache
def side_stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """A stream beside the computing one, for each GPU and for good, as the allocator keeps what was freed by stream."""
    return torch.cuda.Stream(device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; from the CPU to a GPU through page-locked memory, without waiting for the copy."""
    if device.type == "meta":  # where accelerate keeps the weights elsewhere it also moves the inputs
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu" and not torch.is_grad_enabled():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def normalized(patches: Tensor, config: PreTrainedConfig) -> Tensor:
    """Patches of dtype uint8 (`do_rescale=False, do_normalize=False`) as the processor would have made them, float32.

    Args:
        patches: (number of patches, channels * temporal patch size * patch size ** 2); floats are returned as they are.
        config: a `VambaConfig`, for `image_mean` and `image_std`.
    """
    if patches.dtype != torch.uint8:
        return patches
    mean, std = (
        (torch.tensor(per_channel).unsqueeze(1) * 255.0).to(patches.device, non_blocking=True)
        for per_channel in (config.image_mean, config.image_std)
    )
    return patches.float().unflatten(1, (len(mean), -1)).sub_(mean).div_(std).flatten(1)


def default_chunk_frames(model: PreTrainedModel, patches: int) -> int:
    """Frames to encode at once: `MAX_CHUNK_FRAMES`, or as many as fit into half of the free memory of the fullest GPU.

    Args:
        patches: of one temporal patch (a pair of frames), of all rows together.
    """
    temporal = model.config.vision_config.temporal_patch_size
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    if not devices:
        return MAX_CHUNK_FRAMES
    needed = patches * activation_bytes(model.config, model.dtype)
    fitting = min(map(free_bytes, devices)) // max(1, 2 * needed)
    return temporal * max(1, min(MAX_CHUNK_FRAMES // temporal, fitting))


def free_bytes(device: torch.device) -> int:
    """What could still be allocated on a GPU: what its driver has, and what PyTorch holds unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def activation_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """About how many bytes a patch takes at most while vision tower and Mamba-2 blocks work on it (no gradients)."""
    vision, mamba, size = config.vision_config, config.mamba_config, dtype.itemsize
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    inner = getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
    numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    # the residual stream and its norm, then either the MLP and its activation or queries and keys rotated in float32
    tower = numbers * (4 + size) + 2 * width * size + max(4 * inner * size, 4 * width * size + 6 * width * 4)
    # residual, norm and result; in_proj, convolution, scan and gated norm; the scan's states in float32
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
