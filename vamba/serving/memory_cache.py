"""Video memories that are kept for whoever asks next: on the GPU first, then in CPU memory, then on disk.

What is unusual: the least recently used goes first, a place further down or away; what is asked goes on with its fork,
which keeps its tensors. With a folder, every memory is written there soon after it was encoded, so that a killed server
has it again when it is started. What is handed out is a fork, which shares the video and may be extended freely.
"""

import contextlib
import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from vamba.errors import opening
from vamba.modeling import StateMemory, VideoMemory
from vamba.modeling.media import side_stream


GIB = 2**30
SUFFIX = ".cached-memory.safetensors"  # nothing else in the folder is touched
logger = logging.get_logger(__name__)
Memory = VideoMemory | StateMemory


@dataclass
class _Entry:
    """A memory that is held; `place` is "gpu" or "cpu"."""

    memory: Memory
    place: str
    nbytes: int


@dataclass
class CacheCounts:
    """What has happened so far: memories that were found (by where), moved to the CPU and dropped from memory."""

    gpu: int = 0
    cpu: int = 0
    disk: int = 0
    moved: int = 0
    dropped: int = 0


class MemoryCache:
    """Memories by key, within budgets. Safe to be used by several threads.

    Args:
        kind: the class of the memories. device: of the model.
        gpu_bytes, cpu_bytes, disk_bytes: the most that is kept in each place; 0 for nothing. Where the model is on the
            CPU there is no first place.
        folder: for those on disk; None for no disk.

    Raises:
        UserError: the folder cannot be used.
    """

    def __init__(
        self,
        kind: type[Memory],
        device: torch.device | str,
        *,
        gpu_bytes: int = 8 * GIB,
        cpu_bytes: int = 16 * GIB,
        disk_bytes: int = 64 * GIB,
        folder: str | os.PathLike | None = None,
    ):
        self.kind, self.device = kind, torch.device(device)
        self.budgets = {"gpu": gpu_bytes if self.device.type == "cuda" else 0, "cpu": cpu_bytes}
        self.disk_bytes, self.folder = disk_bytes, None if folder is None else Path(folder)
        self.counts = CacheCounts()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, "vamba-memory-cache")
        self._writing: Future | None = None
        if self.folder is not None:
            with opening(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)

    def find(self, key: str) -> Memory | None:
        """A fork of the memory of this key if the GPU or the CPU holds it; from there it comes back to the GPU."""
        with self._lock:
            if (entry := self._entries.get(key)) is None:
                return None
            self._entries.move_to_end(key)
            setattr(self.counts, entry.place, getattr(self.counts, entry.place) + 1)
            if entry.place == "cpu" and 0 < entry.nbytes <= self.budgets["gpu"]:
                with contextlib.suppress(torch.OutOfMemoryError):  # then it is read from the CPU
                    entry.memory, entry.place = entry.memory.fork().to(self.device), "gpu"
                self._make_room()
            return entry.memory.fork()

    def longest(self, keys: Sequence[str]) -> tuple[Memory | None, int]:
        """Of `keys`, each of which stands for one medium more: the memory of the last that is kept anywhere, and how
        many media it is of."""
        for count in range(len(keys), 0, -1):
            memory = self.find(keys[count - 1])
            if memory is None and (memory := self._read(keys[count - 1])) is not None:
                self._hold(keys[count - 1], memory)
                memory = memory.fork()
            if memory is not None:
                return memory, count
        return None, 0

    def keep(self, key: str, memory: Memory) -> None:
        """Keeps a memory that was encoded, as far as the budgets go."""
        if self.folder is not None:
            if self._writing is not None:
                self._writing.result()  # so that no more than one waits for the disk, whatever the budgets
            self._writing = self._writer.submit(self._write, key, memory.fork(), self._encoded())
        self._hold(key, memory)

    def leave_gpu(self) -> None:
        """Moves all that the GPU holds to the CPU, or drops it there: something else has no room."""
        with self._lock:
            budget, self.budgets["gpu"] = self.budgets["gpu"], 0
            self._make_room()
            self.budgets["gpu"] = budget

    def sizes(self) -> dict[str, int]:
        """Bytes held in each place."""
        with self._lock:
            held = {place: sum(e.nbytes for e in self._entries.values() if e.place == place) for place in self.budgets}
        return held | {"disk": sum(size for _, size, _ in self._files())}

    def close(self) -> None:
        """Waits until all that is to be written is written; nothing is written afterwards."""
        self._writer.shutdown()

    def _hold(self, key: str, memory: Memory) -> None:
        place = "gpu" if self.device.type == "cuda" else "cpu"
        with self._lock:
            self._entries[key] = _Entry(memory, place, memory.video_nbytes)
            self._make_room()

    def _make_room(self) -> None:
        """Moves or drops what is beyond the budgets, the least recently used first."""
        for place, following in (("gpu", "cpu"), ("cpu", None)):
            held = sum(entry.nbytes for entry in self._entries.values() if entry.place == place)
            for key, entry in list(self._entries.items()):
                if held <= self.budgets[place]:
                    break
                if entry.place != place:
                    continue
                held -= entry.nbytes
                if following is None or entry.nbytes > self.budgets[following]:
                    del self._entries[key]
                    self.counts.dropped += 1
                else:
                    entry.memory, entry.place = entry.memory.fork().to(following), following
                    self.counts.moved += 1

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}{SUFFIX}"

    def _read(self, key: str) -> Memory | None:
        """The memory from disk; one that is damaged is deleted and encoded again."""
        if self.folder is None or not self._path(key).is_file():
            return None
        try:
            try:
                memory = self.kind.load(self._path(key), device=self.device)
            except torch.OutOfMemoryError:
                self.leave_gpu()
                memory = self.kind.load(self._path(key), device="cpu")
        except (ValueError, OSError) as error:
            logger.warning(f"{error}; it is encoded again")
            if isinstance(error, ValueError):
                with contextlib.suppress(OSError):  # where nothing can be deleted, it stays
                    self._path(key).unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(self._path(key))  # as the least recently used goes first
        self.counts.disk += 1
        return memory

    def _encoded(self) -> torch.cuda.Event | None:
        """The moment at which the GPU will have made what was just encoded."""
        return torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

    @contextlib.contextmanager
    def _beside(self, encoded: torch.cuda.Event | None) -> Iterator[None]:
        """Within, what is copied from the GPU is copied beside what the model computes there."""
        if encoded is None:
            yield
            return
        stream = side_stream(self.device, "write")
        stream.wait_event(encoded)
        with torch.cuda.stream(stream):
            yield

    def _write(self, key: str, memory: Memory, encoded: torch.cuda.Event | None) -> None:
        try:
            if memory.video_nbytes > self.disk_bytes:
                return
            with self._beside(encoded):
                memory.save(self._path(key))
            files = sorted(self._files(), key=lambda file: file[2])
            total = sum(size for _, size, _ in files)
            for path, size, _ in files:
                if total <= self.disk_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= size
        except (OSError, ValueError) as error:  # a full disk costs the next start an encoding, and nobody an answer
            logger.warning(f"{self._path(key)} was not written: {error}")

    def _files(self) -> list[tuple[Path, int, float]]:
        """Path, bytes and time of last use of those on disk."""
        found = []
        for path in self.folder.glob(f"*{SUFFIX}") if self.folder is not None else ():
            with contextlib.suppress(OSError):
                about = path.stat()
                found.append((path, about.st_size, about.st_mtime))
        return found


def keys_of(made_by: str, media: Sequence[Any], options: Mapping[str, Any]) -> list[str]:
    """The keys of the first medium, of the first two …: of what made the memory, what the media are, and how they are
    sampled."""
    texts = (
        json.dumps([made_by, media[:count], options], sort_keys=True, default=str) for count in range(1, len(media) + 1)
    )
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]
