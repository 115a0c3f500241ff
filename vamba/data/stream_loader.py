"""A stream's batches from data workers, of which one may die of an example: a decoder crashes, or memory runs out.

A worker notes which example it is about to plan or decode where this process can read it. When one is dead, the example
in its note is left out from then on, as any broken one is, and the workers start again after the last batch that they
gave. The examples that were left out are part of the position, so a resumed run leaves out the same.
"""

import signal
from collections.abc import Iterator
from multiprocessing import connection
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from vamba.errors import UserError

from .stream import ABOUT, Position, TrainingStream


MOST_CRASHES = 16  # of a run, after which it is not the examples


class StreamLoader(DataLoader):
    """Batches of a `TrainingStream` as they are. Without workers nobody survives a crash.

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
            except (RuntimeError, OSError, EOFError) as error:  # the latter of a batch that nobody is left to hand over
                position.crashed = stream.start.get("crashed", []) + self._find_crashes(batches, error)
                del batches  # ends the other workers
            stream.start = position.state()

    def _find_crashes(self, batches: Any, error: Exception) -> list[list]:
        """What the dead workers were about to do with which examples; raises `error` if that explains nothing."""
        workers = getattr(batches, "_workers", [])
        connection.wait([worker.sentinel for worker in workers], timeout=1)  # one that has broken off is soon dead
        dead = [(worker.exitcode, number) for number, worker in enumerate(workers) if worker.exitcode]
        known = self.dataset.start.get("crashed", [])
        found = []
        for code, worker in dead:
            step, source, index = self.dataset.notes[worker].tolist()
            if step and not any(crash[:3] == [step, source, index] for crash in known):
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                found.append([step, source, index, f"a data worker died of it ({how})"])
        if not found:
            raise error
        if len(known) + len(found) > MOST_CRASHES:
            raise UserError(
                f"{len(known) + len(found)} data workers have died, the last of them by {found[-1][3]}."
            ) from error
        return found
