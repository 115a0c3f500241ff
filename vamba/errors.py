"""A user's mistake, as opposed to a fault of the program: what the command line answers to with one line."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


LONGEST = 1000  # characters of a message
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of the disk, of the user, or of one file


class UserError(ValueError):
    """What was asked for cannot be done: one line that names the value and the remedy. A fault is anything else."""

    def __str__(self) -> str:
        said = super().__str__()
        return said if len(said) <= LONGEST else f"{said[: LONGEST - 300]} … {said[-290:]}"  # of megabytes


class VideoReadError(UserError):
    """A video that cannot be read, or not as asked: one line that names the source, the value and the remedy."""


class MissingPathError(UserError, FileNotFoundError):
    """A path that was given is not there."""


class OccupiedPathError(UserError, FileExistsError):
    """Where something is to be written there is something else."""


class DiskFullError(UserError, OSError):
    """There is no room for what is to be written."""


@contextmanager
def opening(path: str | os.PathLike) -> Iterator[None]:
    """Makes an OSError of the block a UserError: for where a path is opened that the user gave, and nothing else."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}" if error.strerror else " ".join(str(error).split())) from error


def check_writable(folder: str | os.PathLike) -> None:
    """Raises UserError where `folder` is not there and cannot be made, or cannot be written to."""
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written: {existing} is not a folder that can be written to.")


def is_disk_full(error: BaseException | None, folder: str | os.PathLike) -> bool:
    """Whether an exception comes from the full disk that `folder` is on.

    safetensors says so in words; torch, which writes zip files, says only that one came out shorter than it should.
    """
    while error is not None:
        if "unexpected pos" in str(error) and shutil.disk_usage(folder).free < 2**20:
            return True
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        if any(os.strerror(number) in str(error) for number in DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False
