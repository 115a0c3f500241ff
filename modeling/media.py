"""Which images and videos belong to which row of text, and how they are cut into chunks of frames.

What is unusual: a media item is written `<|vision_start|><|vision_end|>`, without a placeholder per video token. A
batch of one owns all media whatever its text says; in a larger batch the n-th item belongs to the row that holds the
n-th `<|vision_start|>`. Where there are more of them than items, those typed 0 in `mm_token_type_ids` are text that
somebody wrote. Patches come in (t, h, w) order, so a range of frames is a slice of them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


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
    if not images and not videos:
        return [[] for _ in starts_BN]
    starts_BN = item_starts(starts_BN, mm_token_type_ids, len(images) + len(videos))
    counts = starts_BN.sum(1).tolist()
    kinds = _kinds(images, videos, starts_BN, mm_token_type_ids)
    if len(counts) == 1:
        return [[*images, *videos] if kinds is None else _in_order(images, videos, kinds)]
    if sum(counts) != len(images) + len(videos):
        raise ValueError(
            f"The {len(counts)} rows of text hold {sum(counts)} <|vision_start|> tokens, but {len(images)} images and "
            f"{len(videos)} videos were given; write one <|vision_start|><|vision_end|> for each item."
        )
    if kinds is None:
        raise ValueError(
            f"Which of the {sum(counts)} <|vision_start|> tokens are images ({len(images)}) and which videos "
            f"({len(videos)})? Pass mm_token_type_ids, as the processor returns them."
        )
    items, rows = iter(_in_order(images, videos, kinds)), []
    for count in counts:
        rows.append([next(items) for _ in range(count)])
    return rows


def _kinds(images, videos, starts_BN: Tensor, mm_token_type_ids: Tensor | None) -> list[str] | None:
    """The kind of each `<|vision_start|>`, or None if they do not tell."""
    total = int(starts_BN.sum())
    if total == len(images) + len(videos) and not (images and videos):
        return ["image"] * len(images) + ["video"] * len(videos)
    if mm_token_type_ids is None or mm_token_type_ids.shape != starts_BN.shape:
        return None
    types = mm_token_type_ids[starts_BN.to(mm_token_type_ids.device)].tolist()
    if types.count(1) != len(images) or types.count(2) != len(videos) or len(types) != len(images) + len(videos):
        return None
    return ["image" if kind == 1 else "video" for kind in types]


def _in_order(images: list[MediaItem], videos: list[MediaItem], kinds: list[str]) -> list[MediaItem]:
    of_kind = {"image": iter(images), "video": iter(videos)}
    return [next(of_kind[kind]) for kind in kinds]


def uncached_media(
    rows: list[list[MediaItem]], starts_BN: Tensor, mm_token_type_ids: Tensor | None, cached_length: int
) -> list[list[MediaItem]]:
    """Drops the items whose `<|vision_start|>` lies in the cached part of the text: the memory has seen them.

    A row whose items are not all written in the text (a batch of one may do that) keeps them all.
    """
    starts_BN = item_starts(starts_BN, mm_token_type_ids, sum(map(len, rows)))
    total, cached = starts_BN.sum(1).tolist(), starts_BN[:, :cached_length].sum(1).tolist()
    return [row[seen:] if len(row) == written else row for row, written, seen in zip(rows, total, cached)]


def split_frames(rows: list[list[MediaItem]], frames: int | None) -> Iterator[list[list[MediaItem]]]:
    """Cuts each row's items into consecutive runs of at most `frames` temporal patches; None leaves them whole.

    Rows advance together: the n-th chunk holds the n-th run of every row that is that long.
    """
    if not any(rows):
        return
    if frames is None:
        yield rows
        return
    pending = [list(reversed(row)) for row in rows]
    while any(pending):
        yield [_take(row, frames) for row in pending]


def _take(row: list[MediaItem], frames: int) -> list[MediaItem]:
    taken = []
    while row and frames > 0:
        item = row.pop()
        if item.t > frames:
            rest = item.t - frames
            row.append(
                item._replace(
                    t=rest, start=item.start + frames * item.h * item.w, first_frame=item.first_frame + frames
                )
            )
            item = item._replace(t=frames)
        taken.append(item)
        frames -= item.t
    return taken


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
        grids = [
            torch.stack(
                torch.meshgrid(
                    torch.arange(item.first_frame, item.first_frame + item.t),
                    torch.arange(item.h // merge_size),
                    torch.arange(item.w // merge_size),
                    indexing="ij",
                )
            ).flatten(1)
            for item in row
        ]
        by_row.append(torch.cat([torch.zeros(3, 0, dtype=torch.long), *grids], 1).T)
    return torch.nn.utils.rnn.pad_sequence(by_row, batch_first=True).permute(2, 0, 1)
