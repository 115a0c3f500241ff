"""Folders that appear complete or not at all: the converter's, the trainer's and the demo's.

`staged_folder` writes beside the destination and publishes at the end; `publish` is that last step by itself, for a
folder that has to survive what goes wrong before.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DiskFullError, OccupiedPathError, UserError, is_disk_full, opening


def check_destination(destination: Path, source: Path, overwrite: bool) -> None:
    """Refuses what the converter must not write over.

    Raises:
        OccupiedPathError: see `check_replaceable`; or `destination` holds something and `overwrite` is false.
        UserError: source and destination lie in each other.
    """
    if destination == source or destination in source.parents or source in destination.parents:
        raise UserError(f"Source {source} and destination {destination} must not lie in each other.")
    if not overwrite and destination.is_dir() and any(destination.iterdir()):
        raise OccupiedPathError(f"{destination} is not empty; choose another folder or pass overwrite.")
    check_replaceable(destination, "checkpoint", "config.json")


def check_replaceable(folder: Path, kind: str, mark: str) -> None:
    """Raises OccupiedPathError if `folder` is a file, or holds something but not the file `mark` of each `kind`."""
    if folder.exists() and not folder.is_dir():
        raise OccupiedPathError(f"{folder} exists and is no folder; choose another.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file():
        raise OccupiedPathError(f"{folder} holds something that is no {kind}; choose another folder.")


def check_space(destination: Path, needed: int) -> None:
    """Raises DiskFullError if the disk of `destination` has less than `needed` bytes."""
    existing = next(parent for parent in destination.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DiskFullError(f"{destination} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free.")


@contextmanager
def staged_folder(destination: Path) -> Iterator[Path]:
    """A new sibling folder to write into, which becomes `destination` when the block ends.

    On any exception, KeyboardInterrupt included, it is removed with all it holds, and a `destination` that was there
    is still there. A full disk raises DiskFullError, an OSError, with a message that says so.
    """
    staging = destination.with_name(f"{destination.name}.partial-{secrets.token_hex(4)}")
    created = [parent for parent in staging.parents if not parent.exists()]
    try:
        with opening(destination):
            staging.mkdir(parents=True)
        yield staging
        publish(staging, destination)
    except BaseException as error:
        full = isinstance(error, Exception) and is_disk_full(error, staging)
        shutil.rmtree(staging, ignore_errors=True)
        for parent in created:  # the innermost comes first
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()
        if full:
            raise DiskFullError(f"The disk of {destination} is full; nothing was left behind.") from error
        raise


def publish(folder: Path, destination: Path) -> None:
    """Makes a folder that was written elsewhere appear as `destination` at once, its contents on the disk before it.

    What was there before is deleted last: at every moment one of the two is whole, the old one as `.replaced` for the
    moment between two renames.
    """
    for file in (file for file in folder.rglob("*") if file.is_file()):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    replaced = destination.with_name(f"{destination.name}.replaced")
    if destination.exists():
        shutil.rmtree(replaced, ignore_errors=True)  # of a run that was killed before it had deleted it
        os.rename(destination, replaced)
    try:
        os.rename(folder, destination)
    except BaseException:
        if replaced.exists() and not destination.exists():
            os.rename(replaced, destination)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
