"""An endless stream of batches that skips what is broken and knows its place in the data; or one pass, to evaluate.

What is unusual: batches are made in the DataLoader's workers, each of which is a shard with every n-th draw of the
mixture. A shard plans a window of draws at a time (headers only), fills batches by length, and decodes them one by one;
its position is (first draw of the window, batch), and it travels with every batch. So a resumed run goes on with the
very next batch, whatever the workers had prepared ahead when the first one ended. A window ends where an epoch does: no
batch holds an example twice, and an epoch is a whole number of batches. That is not so of streamed sources, whose
length nobody knows: a batch may hold the last examples of an epoch and the first of the next.
"""

import errno
import random
import signal
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from itertools import islice
from multiprocessing import connection
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from vamba.errors import DISK_FULL, UserError

from .collator import Collator, fill_packs
from .conversations import ExampleError
from .encoding import GRIDS, IGNORED, Plan
from .sources import Mixture


WINDOW = 64  # draws among which samples of a batch are chosen
ABOUT = "about"  # the key under which a batch says what it is
BROKEN_IN_A_ROW = 512  # draws after which there is no point in going on
LONGEST_MESSAGE = 1000
MOST_CRASHES = 16  # of a run, after which it is not the examples
PLANNED, ENCODED = 1, 2  # what a data worker is about to do with an example
# What no example is to blame for. Memory is not among it: a damaged header may ask for any amount.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, *DISK_FULL)


class Drawn(NamedTuple):
    """An example: its source, its number there, and what it is called."""

    source: int
    number: int
    name: str


class SampleSize(NamedTuple):
    """Text tokens, labelled tokens and the (t, h, w) of the media of one sample."""

    text: int
    labels: int
    grids: list[tuple[int, int, int]]

    @classmethod
    def of(cls, sample: dict) -> "SampleSize":
        grids = [tuple(grid) for name in GRIDS if name in sample for grid in sample[name].tolist()]
        return cls(len(sample["labels"]), int((sample["labels"] != IGNORED).sum()), grids)


@dataclass
class About:
    """What a batch is: its samples, where the data go on after it, and what was skipped on the way to it. `window` is
    the first draw of the shard's window; `crashed` are the examples that data workers have died of, which are left
    out; see `StreamLoader`."""

    samples: list[str]
    shard: int
    window: int
    batch: int
    skipped: list[str] = field(default_factory=list)
    sizes: list[SampleSize] = field(default_factory=list)
    error: str | None = None
    crashed: list[list] = field(default_factory=list)


@dataclass(eq=False)
class TrainingStream(IterableDataset):
    """Batches for ever; see `loader`.

    Args:
        mixture: what to draw from. collator: makes a batch of samples; its encoder plans and decodes.
        rows: samples in a batch at most; None for as many as fit (packing).
        max_video_tokens, max_text_tokens: of a batch; None for no limit.
        on_error: "skip" leaves a broken example out and says so, "raise" stops.
        seed: of the order of batches within a window.
        order: stands for all that the batches and their order follow from. It is kept with a position: what goes on
            from there has to follow from the same.
        rank, world_size: this process's shards among those of all processes.
        position: `{"next": worker, "shards": {shard: [window, batch]}, ...}` as `Position.state` returns it; see
            `check_layout`.
        once: end after every example was seen once; the last batch of a shard may hold nothing but what it skipped.
    """

    mixture: Mixture
    collator: Collator
    _: KW_ONLY
    rows: int | None = None
    max_video_tokens: int | None = None
    max_text_tokens: int | None = None
    on_error: str = "skip"
    seed: int = 0
    order: str = ""
    rank: int = 0
    world_size: int = 1
    position: dict | None = None
    once: bool = False

    def __post_init__(self):
        self.start = self.position or {"next": 0, "shards": {}}
        self.window = WINDOW if self.rows is None else self.rows * max(1, WINDOW // self.rows)
        streaming = any(source.streaming for source in self.mixture.sources)
        self.epoch = None if streaming else len(self.mixture)  # in draws
        self.data = [source.fingerprint for source in self.mixture.sources]
        self.notes: torch.Tensor | None = None  # what each data worker is about to do: (W, 3), shared with this process

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        # the loader asks worker 0 first, and it is another shard's turn where the last run ended elsewhere
        shard = self.rank * workers + (worker + self.start["next"]) % workers
        return self._batches(shard, workers * self.world_size)

    def loader(self, num_workers: int = 0, **options: Any) -> DataLoader:
        """A DataLoader of this stream's batches as they are; it draws nothing from the global random numbers, which a
        resumed run has put back where they were. It survives that a data worker dies of an example."""
        return StreamLoader(self, batch_size=None, num_workers=num_workers, generator=torch.Generator(), **options)

    def batches_per_epoch(self, shards: int = 1) -> float:
        """Of all shards together: counted if that takes few draws, else estimated from that many."""
        draws = batches = 0
        for shard in range(min(shards, self.epoch)):
            first, end = 0, len(range(shard, self.epoch, shards))
            while first < end and draws < WINDOW:
                _, plans, broken = next(self._windows(shard, shards, first))
                first, draws = first + len(plans) + len(broken), draws + len(plans) + len(broken)
                batches += len(self._fill(plans, shard, 0))
        return max(1, batches) * self.epoch / draws

    def _batches(self, shard: int, shards: int) -> Iterator[dict[str, Any]]:
        first, done = self.start["shards"].get(str(shard), (0, 0))
        skipped: list[str] = []
        try:
            for window, plans, unplanned in self._windows(shard, shards, first):
                done = done if window == first else 0
                skipped += [] if done else unplanned  # the batches before have told of them
                for index, pack in enumerate(self._fill(plans, shard, window)[done:], start=done + 1):
                    samples = self._encode(pack, skipped)
                    if samples:
                        names, samples = zip(*samples)
                        sizes = [SampleSize.of(sample) for sample in samples]
                        crashed = self.start.get("crashed", [])
                        about = About(list(names), shard, window, index, skipped, sizes, crashed=crashed)
                        yield self.collator(samples) | {ABOUT: about}
                        skipped = []
                if len(skipped) >= BROKEN_IN_A_ROW:
                    raise ExampleError(f"{len(skipped)} examples in a row were broken, the last: {skipped[-1]}")
            if skipped:  # at the end of a single pass
                yield {ABOUT: About([], shard, self.epoch, 0, skipped)}
        except UserError as error:  # told by the main process, without the worker's traceback around it
            yield {ABOUT: About([], shard, 0, 0, error=f"{error}")}

    def _windows(
        self, shard: int, shards: int, first: int
    ) -> Iterator[tuple[int, list[tuple[Drawn, Plan]], list[str]]]:
        draws = islice(self.mixture.draws(), first * shards + shard, None, shards)
        window = first
        while not (self.once and window * shards + shard >= self.epoch):
            plans: list[tuple[Drawn, Plan]] = []
            skipped: list[str] = []
            count = self.window
            if self.epoch:
                count = min(count, -(-(self.epoch - (window * shards + shard) % self.epoch) // shards))
            for source, draw in islice(draws, count):
                try:
                    name, example = self.mixture.sources[source][draw]
                except ExampleError as error:
                    self._skip(f"{error}", skipped, error)
                    continue
                drawn = Drawn(source, self.mixture.sources[source].index(draw), name)
                root = self.mixture.sources[source].media_root
                plan = self._try(PLANNED, drawn, skipped, self.collator.encoder.plan, example, root)
                if plan is not None:
                    plans.append((drawn, plan))
            yield window, plans, skipped
            window += count

    def _fill(self, plans: list[tuple[Drawn, Plan]], shard: int, window: int) -> list[list[tuple[Drawn, Plan]]]:
        sizes = [(plan.video_tokens, plan.text_tokens) for _, plan in plans]
        packs = fill_packs(sizes, (self.max_video_tokens, self.max_text_tokens), self.rows)
        random.Random(f"{self.seed} {shard} {window}").shuffle(packs)  # they come largest first
        return [[plans[index] for index in pack] for pack in packs]

    def _encode(self, pack: list[tuple[Drawn, Plan]], failed: list[str]) -> list[tuple[str, dict]]:
        """The samples of a pack with their names; what is wrong with the others comes to `failed`."""
        encode = self.collator.encoder.encode
        samples = [(drawn.name, self._try(ENCODED, drawn, failed, encode, plan)) for drawn, plan in pack]
        return [(name, sample) for name, sample in samples if sample is not None]

    def _try(self, step: int, drawn: Drawn, failed: list[str], function, *arguments):
        """What `function` returns; None if the example is not up to it, whatever the error, which comes to `failed`."""
        place = [step, drawn.source, drawn.number]
        info = get_worker_info()
        note = torch.zeros(3) if self.notes is None or info is None else self.notes[info.id]
        try:
            if reason := next((crash[3] for crash in self.start.get("crashed", []) if crash[:3] == place), None):
                raise ExampleError(reason)
            note[:] = torch.tensor(place)
            return function(*arguments)
        except Exception as error:
            self._skip(f"{drawn.name}: {reason_to_skip(error)}", failed, error)
            return None
        finally:
            note.zero_()

    def _skip(self, message: str, failed: list[str], error: Exception) -> None:
        if self.on_error == "raise":
            raise ExampleError(message) from error
        failed.append(message)


def reason_to_skip(error: Exception) -> str:
    """What an example failed for, with the type of an error that does not say what is wrong with the example.

    Raises:
        OSError, RuntimeError: no example is to blame, but a machine out of files or space, or a GPU.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _EXHAUSTED:
            raise OSError(cause.errno, f"{error}") from error
        if isinstance(cause, torch.OutOfMemoryError) or (
            isinstance(cause, RuntimeError) and "CUDA error" in f"{cause}"
        ):
            raise RuntimeError(f"{error}") from error
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(error).split())[:LONGEST_MESSAGE]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


class Position:
    """Follows a stream's batches as they are trained on; `state()` is where the next run goes on.

    Args:
        stream: the stream that is read. workers: of its loader, at least 1.

    `rows` counts the examples that this process has used or skipped since the first step.
    """

    def __init__(self, stream: TrainingStream, workers: int):
        self.layout = {"workers": workers, "world_size": stream.world_size, "order": stream.order, "data": stream.data}
        self.shards = dict(stream.start["shards"])
        self.next = stream.start["next"]
        self.skipped, self.rows = (stream.start.get(name, 0) for name in ("skipped", "rows"))
        self.crashed = stream.start.get("crashed", [])

    def advance(self, about: About) -> None:
        workers = self.layout["workers"]
        self.shards[str(about.shard)] = [about.window, about.batch]
        self.next = (about.shard % workers + 1) % workers
        self.skipped += len(about.skipped)
        self.rows += len(about.samples) + len(about.skipped)
        self.crashed = about.crashed

    def state(self) -> dict[str, Any]:
        counts = {"next": self.next, "skipped": self.skipped, "rows": self.rows, "crashed": self.crashed}
        return counts | {"shards": dict(self.shards), **self.layout}


class StreamLoader(DataLoader):
    """Batches of a `TrainingStream` as they are, from data workers, of which one may die of an example: a decoder
    crashes, or memory runs out. Without workers nobody survives a crash.

    A worker notes which example it is about to plan or decode where this process can read it. When one is dead, the
    example in its note is left out from then on, as any broken one is, and the workers start again after the last batch
    that they gave. The examples that were left out are part of the position, so a resumed run leaves out the same.

    Raises:
        UserError: too many workers have died. RuntimeError: one has that was busy with no example.
    """

    def __init__(self, stream: TrainingStream, **options: Any):
        super().__init__(stream, **options)
        self._start = stream.start
        stream.notes = torch.zeros(self.num_workers, 3, dtype=torch.int64).share_memory_() if self.num_workers else None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        stream = self.dataset
        stream.start, position = self._start, Position(stream, max(1, self.num_workers))
        while True:
            if stream.notes is not None:
                stream.notes.zero_()
            batches = super().__iter__()
            if self.num_workers:  # or torch would raise when one dies wherever this process is, in the middle of a step
                _remove_worker_pids(id(batches))
                batches._worker_pids_set = False
            try:
                for batch in batches:
                    position.advance(batch[ABOUT])
                    yield batch
                if stream.once:
                    stream.start = self._start
                    return
            except (RuntimeError, OSError, EOFError) as error:  # the latter of a batch that nobody is left to hand over
                position.crashed = stream.start.get("crashed", []) + self._find_crashes(batches, error)
                del batches  # ends the other workers
            stream.start = position.state()

    def _find_crashes(self, batches: Any, error: Exception) -> list[list]:
        """What the dead workers were about to do with which examples; raises `error` if that explains nothing."""
        workers = getattr(batches, "_workers", [])
        connection.wait([worker.sentinel for worker in workers], timeout=10)  # one that has broken off is soon dead
        dead = [(worker.exitcode, number) for number, worker in enumerate(workers) if worker.exitcode]
        known = self.dataset.start.get("crashed", [])
        found = []
        for code, worker in dead:
            step, source, index = self.dataset.notes[worker].tolist()
            if step and not any(crash[:3] == [step, source, index] for crash in known):
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                found.append([step, source, index, f"a data worker died of it ({how})"])
        if dead and not found:
            raise RuntimeError("A data worker exited unexpectedly while it was busy with no example.") from error
        if not found:
            raise error
        if len(known) + len(found) > MOST_CRASHES:
            raise UserError(
                f"{len(known) + len(found)} data workers have died, the last of them by {found[-1][3]}."
            ) from error
        return found


def check_layout(position: dict, workers: int, stream: TrainingStream) -> None:
    """Raises UserError if a position was left by another number of processes or workers, in another order, or in
    other data."""
    if (position["workers"], position["world_size"]) != (workers, stream.world_size):
        raise UserError(
            f"The checkpoint's place in the data is that of {position['world_size']} processes with "
            f"{position['workers']} data workers each; resume with as many (now {stream.world_size} and {workers})."
        )
    if position.get("data") is None:
        raise UserError(
            "The checkpoint does not say in which data its place is, as it was made by an earlier version; start anew "
            "from that checkpoint's weights."
        )
    for then, now in zip(position["data"], stream.data):
        if then != now:
            raise UserError(
                f"The checkpoint's place is one in other data: then {then}, now {now}. Put the data back as they "
                "were, or start anew from that checkpoint's weights."
            )
    if position["order"] != stream.order:
        raise UserError(
            "The checkpoint's place is one in other data: the recipe's data, batch size or seeds have changed since. "
            "Resume with the recipe it was started with, or start anew from that checkpoint's weights."
        )
