"""Folders that appear complete or not at all: the converter's, the trainer's and the demo's.

`staged_folder` writes beside the destination and publishes at the end; `publish` is that last step by itself, for a
folder that has to survive what goes wrong before.

What is unusual: the folder beside the destination always has the same name and is locked by whoever writes it. So a
second writer is refused, and one that nobody has locked is what a killed run left, which the next run removes. On
Linux the old and the new folder change places in one step, so that a kill never leaves the destination missing.
"""

import ctypes
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from fnmatch import fnmatchcase
from pathlib import Path

import xxhash

from .errors import DiskFullError, OccupiedPathError, UserError, is_disk_full, opening
from .modeling.memory_files import held


PARTIAL = "partial_"  # how a file begins to be called while it is written
BLOCK = 2**24
_CONTENT = "content"  # of a staging folder
_WEIGHTS = tuple(
    f"{prefix}{name}"
    for name in ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "model.bin")
    for prefix in ("", "adapter_")
)
_BESIDE_WEIGHTS = (
    *("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json", "config.json"),
    *("adapter_config.json", "adapter/adapter_config.json", "adapter/README.md", *(f"adapter/{n}" for n in _WEIGHTS)),
    *("generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"),
    *("merges.txt", "added_tokens.json", "special_tokens_map.json", "processor_config.json", "chat_template.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "chat_template.jinja"),
    *("additional_chat_templates/*.jinja", "README.md", "LICENSE*", "NOTICE*", ".gitattributes"),
    *("recipe.yaml", "trainer_state.json", "training_args.bin"),
)


def checkpoint_files() -> list[str]:
    """Names, with wildcards, of all that a checkpoint of ours may hold, converted, fine-tuned or from the Hub."""
    from . import modeling

    return [*_WEIGHTS, *_BESIDE_WEIGHTS, *(path.name for path in Path(modeling.__path__[0]).glob("*.py"))]


def size_and_digest(path: str | os.PathLike) -> tuple[int, str]:
    """Bytes of a file, and their xxh3 digest; some 5 GB/s of what lies in memory."""
    digest, size, block = xxhash.xxh3_128(), 0, memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            size += count
    return size, digest.hexdigest()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Within, where to write what becomes the file `path` in one step when the block ends, if anything was written.

    After an error `path` is as it was. A killed process leaves a file whose name begins with `PARTIAL`.
    """
    partial = path.with_name(f"{PARTIAL}{path.name}")  # with its suffix, by which some writers choose a format
    try:
        yield partial
        if partial.exists():
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def locked_folder(folder: str | os.PathLike) -> AbstractContextManager:
    """Within, no other process is in such a block with this folder; on Windows, where folders cannot be locked, any is.

    Raises:
        FileExistsError: one is. OSError: there is no such folder.
    """
    if sys.platform == "win32":
        return nullcontext()
    return held(folder, lambda: os.open(folder, os.O_RDONLY))


def check_apart(destination: Path, *sources: Path) -> None:
    """Raises UserError where `destination` lies in one of the folders that are read, or the other way round."""
    for source in sources:
        if destination == source or destination in source.parents or source in destination.parents:
            raise UserError(f"Source {source} and destination {destination} must not lie in each other.")


def check_destination(destination: Path, overwrite: bool) -> None:
    """Refuses what the converter must not write over.

    Raises:
        OccupiedPathError: see `check_replaceable`; or `destination` holds something and `overwrite` is false.
    """
    if not overwrite and destination.is_dir() and any(destination.iterdir()):
        raise OccupiedPathError(f"{destination} is not empty; choose another folder or pass overwrite.")
    check_replaceable(destination, "checkpoint", "config.json", checkpoint_files())


def check_replaceable(folder: Path, kind: str, mark: str, files: Sequence[str]) -> None:
    """Refuses to replace what a user may miss.

    Args:
        files: names of all files that a `kind` may hold, relative to `folder`, with wildcards.

    Raises:
        OccupiedPathError: `folder` is a file, or holds something but not the file `mark` of each `kind`, or a file
            that is none of `files`.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OccupiedPathError(f"{folder} exists and is no folder; choose another.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if os.path.ismount(folder):
        raise OccupiedPathError(f"{folder} is where a disk is mounted; choose a folder in it.")
    if not (folder / mark).is_file():
        raise OccupiedPathError(f"{folder} holds something that is no {kind}; choose another folder.")
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        known = any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in files)
        if not known and (path.is_symlink() or not path.is_dir()):
            raise OccupiedPathError(f"{folder} holds {name}, which is not of a {kind}; move it away first.")


def check_space(destination: Path, needed: int) -> None:
    """Raises DiskFullError if the disk of `destination` has less than `needed` bytes."""
    existing = next(parent for parent in destination.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DiskFullError(f"{destination} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free.")


@contextmanager
def staged_folder(destination: Path, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A new folder to write into, which becomes `destination` when the block ends.

    On any exception, KeyboardInterrupt included, it is removed with all it holds, and a `destination` that was there
    is still there. What a killed process leaves, `<destination>.partial`, is removed by the next to come here.

    Args:
        check: raises where `destination` must not be replaced; asked at the start, and again at the very end.

    Raises:
        OccupiedPathError: another process writes to `destination`. DiskFullError: the disk is full.
    """
    if not destination.name:
        raise UserError(f"{destination} cannot be replaced; choose a folder in it.")
    partial = destination.with_name(f"{destination.name}.partial")
    created = [parent for parent in partial.parents if not parent.exists()]
    content = partial / _CONTENT
    try:
        with _held(partial, destination):
            with opening(destination):
                check()
                content.mkdir()
            try:
                yield content
                with opening(destination):
                    publish(content, destination, check)
            except Exception as error:
                if is_disk_full(error, partial):
                    raise DiskFullError(
                        f"The disk of {destination} is full ({error}); nothing was left behind."
                    ) from error
                raise
    except BaseException:
        for parent in created:  # the innermost comes first
            with suppress(OSError):  # it holds something, of another process
                parent.rmdir()
        raise


def publish(folder: Path, destination: Path, check: Callable[[], None] = lambda: None) -> None:
    """Makes a folder that was written elsewhere appear as `destination` at once, its contents on the disk before it.

    At every moment `destination` is the old folder or the new one, both whole; the old one is deleted last, under the
    name of `folder`. Where the system cannot exchange two folders, the old one is `.replaced` beside `folder` for the
    moment between two renames. All files get the mode that `folder` has, as libraries make some for the owner alone.
    """
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)
        _flush(path)
    check()
    replaced = _replaced(folder, destination)
    if not destination.exists():
        os.rename(folder, destination)
    elif not destination.is_dir():
        raise OccupiedPathError(f"{destination} exists and is no folder; choose another.")
    elif not _exchange(folder, destination):
        shutil.rmtree(replaced, ignore_errors=True)  # of a run that was killed before it had deleted it
        os.rename(destination, replaced)
        try:
            os.rename(folder, destination)
        except BaseException:
            os.rename(replaced, destination)
            raise
    _flush(destination.parent)
    for old in (folder, replaced):
        shutil.rmtree(old, ignore_errors=True)


def _replaced(folder: Path, destination: Path) -> Path:
    return folder.with_name(f"{destination.name}.replaced")


def _exchange(one: Path, other: Path) -> bool:
    """Whether two folders have changed places in one step, which only Linux can, and not on every filesystem."""
    if sys.platform != "linux" or (rename := getattr(ctypes.CDLL(None), "renameat2", None)) is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _flush(path: Path) -> None:
    """Brings a file, or what a folder lists, to the disk."""
    on_windows = sys.platform == "win32"  # where folders cannot be opened
    if path.is_file() or (path.is_dir() and not on_windows):
        descriptor = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _held(partial: Path, destination: Path) -> Iterator[None]:
    """Within, the staging folder `partial` exists, is empty and belongs to this process; afterwards it is gone."""

    def opened() -> int:
        while True:
            partial.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # whoever held it has removed it meanwhile
                return os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)

    with ExitStack() as stack:
        with opening(partial):
            if sys.platform == "win32":  # where folders cannot be locked
                partial.mkdir(parents=True, exist_ok=True)
            else:
                stack.enter_context(held(partial, opened))
            replaced = _replaced(partial / _CONTENT, destination)
            if foreign := {path.name for path in partial.iterdir()} - {_CONTENT, replaced.name}:
                raise OccupiedPathError(f"{partial} holds {min(foreign)}, which no run left there; move it away.")
            if replaced.exists() and not destination.exists():  # killed between the two renames
                os.rename(replaced, destination)
            for rest in (partial / _CONTENT, replaced):
                if rest.exists():
                    shutil.rmtree(rest)
        try:
            yield
        finally:
            shutil.rmtree(partial, ignore_errors=True)
