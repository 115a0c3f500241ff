"""Files of examples, opened with `datasets`, and mixtures of them.

What is unusual: which example comes n-th is a function of n and the seed alone. So the position in the data is a
number, the same in every process, and going on from a position needs no replay of what came before (a streamed source
has to be walked through again, which reads rows but no video).
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np


FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SHUFFLE_BUFFER = 1000  # rows of a streamed source among which the next is drawn


class Source:
    """One dataset, drawn from without end: every example once, in a new order, then all of them again.

    Args:
        path: a .jsonl, .json or .parquet file, a folder of them, or the id of a dataset on the Hub.
        split: of a dataset on the Hub. streaming: read rows as they are needed instead of all at first.
        media_root: what relative paths of videos and images are relative to; the file's folder if None.
        shuffle, seed: whether and how the order is random.
    """

    def __init__(
        self,
        path: str,
        *,
        split: str = "train",
        streaming: bool = False,
        media_root: str | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ):
        self.path, self.streaming, self.shuffle, self.seed = str(path), streaming, shuffle, seed
        self.rows, folder = _open(self.path, split, streaming)
        self.media_root = folder if media_root is None else str(media_root)
        self._order: tuple[int, np.ndarray] | None = None
        self._walk: tuple[int, Iterator] | None = None

    def __len__(self) -> int:
        if self.streaming:
            raise TypeError(f"{self.path} is streamed: its length is not known")
        return len(self.rows)

    def __getitem__(self, draw: int) -> tuple[str, dict[str, Any]]:
        """The `draw`-th example and its name; draws of a streamed source are cheap in increasing order only."""
        index, row = self._next_streamed(draw) if self.streaming else self._at(draw)
        return f"{Path(self.path).name}#{row.get('id') if row.get('id') is not None else index}", row

    def _at(self, draw: int) -> tuple[int, dict]:
        epoch, place = divmod(draw, len(self.rows))
        if self._order is None or self._order[0] != epoch:
            order = np.arange(len(self.rows))
            if self.shuffle:
                np.random.default_rng([self.seed, epoch]).shuffle(order)
            self._order = epoch, order
        index = int(self._order[1][place])
        return index, self.rows[index]

    def _next_streamed(self, draw: int) -> tuple[int, dict]:
        if self._walk is None or self._walk[0] > draw:
            self._walk = 0, self._endless()
        done, rows = self._walk
        row = next(islice(rows, draw - done, None))
        self._walk = draw + 1, rows
        return draw, row

    def _endless(self) -> Iterator[dict]:
        epoch = 0
        while True:
            rows = self.rows
            if self.shuffle:
                rows = rows.shuffle(seed=self.seed + epoch, buffer_size=SHUFFLE_BUFFER)
            seen = False
            for row in rows:
                seen = True
                yield row
            if not seen:
                raise ValueError(f"{self.path} holds no example.")
            epoch += 1

    def __getstate__(self):  # a walk begun in one process is not continued in another
        return self.__dict__ | {"_walk": None}


class Mixture:
    """Sources taken in turn, each in proportion to its weight, without end.

    Args:
        weights: relative frequencies of the sources; None for their sizes, so that every example is as frequent.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None):
        self.sources = list(sources)
        if weights is None:
            weights = [1.0] if len(self.sources) == 1 else [len(source) for source in self.sources]
        self.shares = [weight / sum(weights) for weight in weights]

    def __len__(self) -> int:
        """Examples in all sources together."""
        return sum(len(source) for source in self.sources)

    def draws(self) -> Iterator[tuple[int, int]]:
        """(source, how many were drawn from it before), for ever: always the source that is most behind its share."""
        drawn = [0] * len(self.sources)
        total = 0
        while True:
            total += 1
            behind = [share * total - count for share, count in zip(self.shares, drawn)]
            source = behind.index(max(behind))
            yield source, drawn[source]
            drawn[source] += 1


def _open(path: str, split: str, streaming: bool):
    """The rows, and the folder that relative paths in them start from (None for a dataset on the Hub)."""
    from datasets import load_dataset

    files = _files(Path(path).expanduser())
    if files is None:
        return load_dataset(path, split=split, streaming=streaming), None
    folder = Path(path).expanduser()
    kinds = {FORMATS[file.suffix] for file in files}
    if len(kinds) > 1:
        raise ValueError(f"{path} holds .json and .parquet files; give them as two sources.")
    rows = load_dataset(kinds.pop(), data_files=[str(file) for file in files], split="train", streaming=streaming)
    return rows, str(folder if folder.is_dir() else folder.parent)


def _files(path: Path) -> list[Path] | None:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in FORMATS)
        if not files:
            raise ValueError(f"{path} holds no {', '.join(FORMATS)} file.")
        return files
    if path.suffix in FORMATS:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file.")
        return [path]
    if path.exists() or len(path.parts) != 2 or path.is_absolute():
        raise ValueError(f"{path}: give a {', '.join(FORMATS)} file, a folder of them, or a dataset's id on the Hub.")
    return None
