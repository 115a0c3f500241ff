"""One causal stream of text and media: which tokens follow which, and cutting the stream into chunks.

What is unusual: the text of a row, without its padding, and the tokens of its media become one sequence. The tokens of
an item come after its `<|vision_start|>`, and that token's place in the text stands for all of them: its output is the
last of theirs, from which the next token of text is predicted.

Shapes: B rows, N tokens of text, S tokens of a chunk of the stream.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .media import MediaItem, assign_media


class Run(NamedTuple):
    """A stretch of one row's stream: tokens of text, or frames of one media item."""

    positions: Tensor  # in the text, int64; of an item that of its <|vision_start|>, or none if that was seen before
    item: MediaItem | None = None


def media_of_rows(
    images: list[MediaItem], videos: list[MediaItem], starts_BN: Tensor, mm_token_type_ids: Tensor | None
) -> list[list[MediaItem]]:
    """`assign_media` where the order matters: raises ValueError if images and videos are mixed and it is not told."""
    rows = assign_media(images, videos, starts_BN, mm_token_type_ids)
    if images and videos:
        kinds = [1 if item.kind == "image" else 2 for row in rows for item in row]
        told = None if mm_token_type_ids is None else mm_token_type_ids[starts_BN.to(mm_token_type_ids.device)].tolist()
        if told != kinds:
            raise ValueError(
                f"In which order do the {len(images)} images and {len(videos)} videos come? mm_token_type_ids, as the "
                f"processor returns them, should be 1 and 2 at their <|vision_start|> tokens, and are {told}."
            )
    return rows


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
    if tokens is None:
        if any(streams):
            yield streams
        return
    pending = [list(reversed(stream)) for stream in streams]
    while any(pending):
        yield [_take(stream, tokens, tokens_per_frame) for stream in pending]


def _take(stream: list[Run], tokens: int, tokens_per_frame: int) -> list[Run]:
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
            rest = item._replace(
                t=item.t - frames, start=item.start + frames * item.h * item.w, first_frame=item.first_frame + frames
            )
            stream.append(Run(positions, rest))
            item = item._replace(t=frames)
        taken.append(Run(positions, item))
        tokens -= item.t * tokens_per_frame
    return taken


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


__all__ = ["Run", "media_of_rows", "runs_of", "split_runs", "text_outputs"]
