"""A folder that appears complete or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vamba.errors import DiskFullError, OccupiedPathError, UserError, is_disk_full, opening


def check_destination(destination: Path, source: Path, overwrite: bool) -> None:
    """Refuses what must not be written over.

    Raises:
        OccupiedPathError: `destination` is a file, or holds something and `overwrite` is false, or holds no checkpoint.
        UserError: source and destination lie in each other.
    """
    if destination == source or destination in source.parents or source in destination.parents:
        raise UserError(f"Source {source} and destination {destination} must not lie in each other.")
    if not destination.exists():
        return
    if not destination.is_dir():
        raise OccupiedPathError(f"{destination} exists and is no folder.")
    if any(destination.iterdir()):
        if not overwrite:
            raise OccupiedPathError(f"{destination} is not empty; choose another folder or pass overwrite.")
        if not (destination / "config.json").is_file():
            raise OccupiedPathError(f"{destination} holds something that is no checkpoint; it is not overwritten.")


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
        _swap(staging, destination)
    except BaseException as error:
        full = isinstance(error, Exception) and is_disk_full(error, staging)
        shutil.rmtree(staging, ignore_errors=True)
        if not destination.exists():
            for parent in created:  # the innermost comes first
                if parent.exists() and not any(parent.iterdir()):
                    parent.rmdir()
        if full:
            message = f"The disk of {destination} is full; nothing was left behind."
            raise DiskFullError(message) from error
        raise


def _swap(staging: Path, destination: Path) -> None:
    if not destination.exists():
        os.rename(staging, destination)
        return
    retired = destination.with_name(f"{destination.name}.replaced-{secrets.token_hex(4)}")
    try:
        os.rename(destination, retired)
        os.rename(staging, destination)
    except BaseException:
        if retired.exists() and not destination.exists():
            os.rename(retired, destination)
        raise
    shutil.rmtree(retired)
