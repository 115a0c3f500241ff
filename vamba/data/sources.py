"""Files of examples, opened with `datasets`, but for those of JSON, and mixtures of them.

Columns of images and videos are not decoded: examples hold what `datasets` stores of them, bytes or a path.

What is unusual: which example comes n-th is a function of n and the seed alone. So the position in the data is a
number, the same in every process, and going on from a position needs no replay of what came before (a streamed source
has to be walked through again, which reads rows but no video). For the same reason every process and worker walks
through all rows of a streamed source and takes its own among them, however many files they lie in.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vamba.errors import UserError

from .conversations import ExampleError
from .json_rows import JsonRows, parse, walk


FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SAVED = ({"dataset_dict.json"}, {"dataset_info.json", "state.json"})  # what is in a folder that `save_to_disk` wrote
WHOLE = 2**30  # bytes of a source up to which its fingerprint is made of all of them
BLOCK, BLOCKS = 2**16, 64  # of a larger one: bytes of one block, and how many of each file
SHUFFLE_BUFFER = 1000  # rows of a streamed source among which the next is drawn


class Source:
    """One dataset, drawn from without end: every example once, in a new order, then all of them again.

    Args:
        path: a .jsonl, .json or .parquet file, a folder of them, a folder that `save_to_disk` wrote, or the id of a
            dataset on the Hub.
        split: of a dataset on the Hub or of a saved `DatasetDict`.
        name, revision, data_files: of a dataset on the Hub, as `datasets.load_dataset` takes them.
        streaming: read rows as they are needed instead of all at first.
        media_root: what relative paths of videos and images are relative to; the file's folder if None.
        shuffle, seed: whether and how the order is random.

    Raises:
        ValueError, OSError: there is no such source, it cannot be read, or it holds no example.
    """

    def __init__(
        self,
        path: str,
        *,
        split: str = "train",
        name: str | None = None,
        revision: str | None = None,
        data_files: str | list[str] | None = None,
        streaming: bool = False,
        media_root: str | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ):
        self.path, self.streaming, self.shuffle, self.seed = str(path), streaming, shuffle, seed
        hub = {"name": name, "revision": revision, "data_files": data_files}
        hub = {key: value for key, value in hub.items() if value is not None}
        self.rows, folder, self._files = _open(self.path, split, streaming, hub)
        if not streaming and not len(self.rows):
            raise ValueError(f"{self.path} holds no example.")
        self._of_json = any(FORMATS.get(file.suffix) == "json" for file in self._files)
        self.media_root = folder if media_root is None else str(media_root)
        self._order: tuple[int, np.ndarray] | None = None
        self._walk: tuple[int, Iterator] | None = None

    def __len__(self) -> int:
        if self.streaming:
            raise TypeError(f"{self.path} is streamed: its length is not known")
        return len(self.rows)

    def __getitem__(self, draw: int) -> tuple[str, dict[str, Any]]:
        """The `draw`-th example and its name; draws of a streamed source are cheap in increasing order only.

        Raises:
            ExampleError: it is none, in a file of JSON; names file and line. UserError: the source cannot be read.
        """
        index = self.index(draw)
        row = self._next_streamed(draw) if self.streaming else self.rows[index]
        known = row.get("id")
        name = " ".join(str(known).split())[:80] if isinstance(known, (str, int, float)) else index
        return f"{Path(self.path).name}#{name}", row

    def index(self, draw: int) -> int:
        """Which example the `draw`-th is: its number in the data, or the draw itself where they are streamed."""
        if self.streaming:
            return draw
        epoch, place = divmod(draw, len(self.rows))
        if self._order is None or self._order[0] != epoch:
            order = np.arange(len(self.rows))
            if self.shuffle:
                np.random.default_rng([self.seed, epoch]).shuffle(order)
            self._order = epoch, order
        return int(self._order[1][place])

    def examples(self) -> Iterator[dict[str, Any] | ExampleError]:
        """All once, in the order of the files; in the place of a broken one its error."""
        streamed = self._read(self.rows) if self.streaming else None
        for row in range(len(self.rows)) if streamed is None else streamed:
            try:
                yield self.rows[row] if streamed is None else self._example(row)
            except ExampleError as error:
                yield error

    @cached_property
    def fingerprint(self) -> str:
        """The source's name, its rows where they are counted, and a digest, to notice when the examples are others.

        The digest is that of all bytes of files of up to 1 GB together. Of larger ones it is that of each file's size,
        time of modification and 64 blocks spread evenly over it: a change is seen by its time, unless that was put
        back, and a copy has to keep the times. Of a dataset on the Hub, the first row and the last are seen.
        """
        digest = hashlib.sha256()
        sizes = [path.stat().st_size for path in self._files]
        for path, size in zip(self._files, sizes):
            digest.update(f"{size}".encode())
            with open(path, "rb") as file:
                if sum(sizes) <= WHOLE:
                    while block := file.read(2**20):
                        digest.update(block)
                    continue
                digest.update(f" {path.stat().st_mtime_ns}".encode())
                for index in range(BLOCKS):
                    file.seek(max(0, size - BLOCK) * index // (BLOCKS - 1))
                    digest.update(file.read(BLOCK))
        if not self._files and not self.streaming and len(self.rows):
            digest.update(repr((self.rows[0], self.rows[-1])).encode())
        rows = "" if self.streaming else f"{len(self.rows)} rows, "
        return f"{Path(self.path).name} with {rows}fingerprint {digest.hexdigest()[:12]}"

    def _next_streamed(self, draw: int) -> dict:
        if self._walk is None or self._walk[0] > draw:
            self._walk = 0, self._endless()
        done, rows = self._walk
        row = next(islice(rows, draw - done, None))
        self._walk = draw + 1, rows
        return self._example(row)

    def _endless(self) -> Iterator[dict]:
        epoch = 0
        while True:
            rows = self.rows
            if self.shuffle:
                rows = rows.shuffle(seed=self.seed + epoch, buffer_size=SHUFFLE_BUFFER)
            seen = False
            for row in self._read(rows):
                seen = True
                yield row
            if not seen:
                raise ValueError(f"{self.path} holds no example.")
            epoch += 1

    def _read(self, rows) -> Iterator[dict]:
        """Streamed rows, of a file of JSON as they stand there."""
        with _reading(self.path):
            for batch in rows.iter(batch_size=1):  # unlike iter(), the same in every worker of a DataLoader
                yield {name: values[0] for name, values in batch.items()}

    def _example(self, row: Any) -> dict:
        return parse(**row) if self._of_json else row

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


def _open(path: str, split: str, streaming: bool, hub: dict) -> tuple[Any, str | None, list[Path]]:
    """The rows, the folder that relative paths in them start from, and the files; no folder and no files of a dataset
    on the Hub, of which `hub` is what `load_dataset` is told besides."""
    from datasets import IterableDataset, load_dataset, load_from_disk

    folder = Path(path).expanduser()
    saved = any(all((folder / name).is_file() for name in names) for names in SAVED)
    files = sorted(folder.rglob("*.arrow")) if saved else _files(folder)
    if files is None:
        return _undecoded(load_dataset(path, split=split, streaming=streaming, **hub)), None, []
    if hub:
        raise ValueError(f"{path} is no dataset on the Hub, which alone has {', '.join(hub)}; leave that out.")
    parent = str(folder if folder.is_dir() else folder.parent)
    if saved:
        with _reading(path):
            rows = load_from_disk(folder)
        if isinstance(rows, dict):
            if split not in rows:
                raise ValueError(f"{path} has no split {split!r}; it has {', '.join(rows)}.")
            rows = rows[split]
        with _reading(path):
            rows.data.table.validate(full=True)  # offsets that lead anywhere would end the process when they are used
        return _undecoded(rows.to_iterable_dataset() if streaming else rows), parent, files
    kinds, names = {FORMATS[file.suffix] for file in files}, [str(file) for file in files]
    if len(kinds) > 1:
        raise ValueError(f"{path} holds .json and .parquet files; give them as two sources.")
    if kinds == {"json"}:
        lines = {"generator": walk, "gen_kwargs": {"files": names}}
        return IterableDataset.from_generator(**lines) if streaming else JsonRows(files), parent, files
    with _reading(path):
        rows = load_dataset("parquet", data_files=names, split="train", streaming=streaming)
    return _undecoded(rows), parent, files


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """What `datasets` and Arrow come up with where a file is damaged is of any type."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{error.__cause__ or error}".split())
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {reason:.300}") from error


def _undecoded(rows):
    """The same rows with images and videos as they are stored, `{"bytes": ..., "path": ...}`."""
    from datasets import IterableDataset

    if rows.features is None:  # streamed from files of text, which have no such columns
        return rows
    features = _without_decoding(rows.features)
    if isinstance(rows, IterableDataset):
        return rows if features == rows.features else rows.cast(features)
    rows.info.features = features  # `cast` would copy all of it
    return rows


def _without_decoding(feature):
    from datasets import Image, Video

    if isinstance(feature, dict):
        return type(feature)({name: _without_decoding(inner) for name, inner in feature.items()})
    if hasattr(feature, "feature"):  # a list of them
        return dataclasses.replace(feature, feature=_without_decoding(feature.feature))
    return dataclasses.replace(feature, decode=False) if isinstance(feature, (Image, Video)) else feature


def _files(path: Path) -> list[Path] | None:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in FORMATS)
        if not files:
            raise ValueError(f"{path} holds no {', '.join(FORMATS)} file and was not written by `save_to_disk`.")
        return files
    if path.suffix in FORMATS:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file.")
        return [path]
    if path.exists() or len(path.parts) != 2 or path.is_absolute():
        raise ValueError(f"{path}: give a {', '.join(FORMATS)} file, a folder of them, or a dataset's id on the Hub.")
    return None
