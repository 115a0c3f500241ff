"""Examples in files of JSON, one a line or all in a list, each read and understood when it is drawn.

So one that is broken costs nothing but itself: it is an `ExampleError` that names file and line. A list is looked
through when it is opened, as nobody can tell where the examples of a broken one end.

What is unusual: of a file nothing is kept but where each example begins, 8 bytes (16 where there are blank lines), and
it is opened anew for each, so there is no handle that processes would share.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vamba.errors import UserError

from .conversations import ExampleError


LONGEST = 2**28  # bytes of one line
_BETWEEN = re.compile(r"[ \t\n\r,]*")  # what stands between the examples of a list


class JsonRows:
    """The examples of all `files`, by their number.

    Raises:
        UserError: a file that begins as a list is none. OSError: one cannot be read. When drawn from: ExampleError.
    """

    def __init__(self, files: Sequence[Path]):
        self._files = [_JsonFile(path) for path in files]
        self._ends = np.cumsum([len(file) for file in self._files])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return parse(**self._files[number].read(index - int(self._ends[number - 1] if number else 0)))


def walk(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What `parse` takes of each example, in order, without looking through files of lines first."""
    for path in map(Path, files):
        if _is_list(path):
            listed = _JsonFile(path)
            yield from map(listed.read, range(len(listed)))
        else:
            yield from ({"name": f"{path.name} line {number}", "text": text} for number, _, text in _lines(path))


def parse(name: str, text: bytes | None) -> dict[str, Any]:
    """The example that stands in `text`, which is None where it is too long to be read.

    Raises:
        ExampleError: it is none.
    """
    try:
        if text is None:
            raise ValueError(f"it is longer than {LONGEST // 2**20} MB")
        row = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_object)
        if not isinstance(row, dict):
            raise ValueError(f"it is a {type(row).__name__}, no object with `messages` or `conversations`")
        return row
    except UnicodeDecodeError as error:
        raise ExampleError(f"{name}: it is not UTF-8 from byte {error.start} on") from error
    except json.JSONDecodeError as error:
        raise ExampleError(f"{name}: it is no JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise ExampleError(f"{name}: it is nested too deeply") from error
    except ValueError as error:
        raise ExampleError(f"{name}: {error}") from error


class _JsonFile:
    """Where the examples of one file begin, and its end; `numbers` of their lines where some are blank."""

    def __init__(self, path: Path):
        self.path, self.numbers, self.listed = path, None, _is_list(path)
        if self.listed:
            self.starts = _list_starts(path)
            return
        places = ((number, start) for number, start, _ in _lines(path))
        numbers, starts = np.fromiter(places, np.dtype((np.uint64, 2))).T
        self.starts = np.append(starts, np.uint64(path.stat().st_size))
        if len(numbers) and numbers[-1] != len(numbers):
            self.numbers = numbers.copy()

    def __len__(self) -> int:
        return len(self.starts) - 1

    def read(self, index: int) -> dict[str, Any]:
        start, end = map(int, self.starts[index : index + 2])
        number = index + 1 if self.numbers is None else int(self.numbers[index])
        name, text = f"{self.path.name} {'item' if self.listed else 'line'} {number}", None
        if end - start <= LONGEST:
            with open(self.path, "rb") as file:
                file.seek(start)
                text = file.read(end - start)
            text = text.rstrip(b" \t\n\r,]") if self.listed else text
        return {"name": name, "text": text}


def _lines(path: Path) -> Iterator[tuple[int, int, bytes | None]]:
    """Number, first byte and text of each line that is not blank; None for the text of one that is too long."""
    number = start = 0
    with open(path, "rb") as file:
        while line := file.readline(LONGEST + 1):
            number += 1
            if not line.isspace():
                yield number, start, None if len(line) > LONGEST else line
            while len(line) > LONGEST and not line.endswith(b"\n"):
                line = file.readline(LONGEST + 1)
            start = file.tell()


def _is_list(path: Path) -> bool:
    """Whether a file is one list of examples; one whose first line is a whole list has lines if there are more."""
    with open(path, "rb") as file:
        first = b"\n"
        while first and first.removeprefix(b"\xef\xbb\xbf").isspace():
            first = file.readline(LONGEST)
        if not first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            return False
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            return True
        more = b"\n"
        while more.isspace():
            more = file.readline(LONGEST)
        return not more


def _list_starts(path: Path) -> np.ndarray:
    """Where the examples of a list begin, and the end of the file."""
    content = path.read_bytes()
    # what is wrong within an example, numbers of any length included, comes later
    decoder = json.JSONDecoder(object_pairs_hook=lambda pairs: None, parse_int=str)
    try:
        count = len(decoder.decode(content.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 from byte {error.start} on.") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise UserError(f"{path} is no whole list of examples: {error.msg} at {where}.") from error
    except RecursionError as error:
        raise UserError(f"{path}: an example of the list is nested too deeply.") from error
    text = content.decode("latin-1")  # in which each byte is a character
    starts, end = [], text.index("[") + 1
    for _ in range(count):
        starts.append(end + len(_BETWEEN.findall(text, end)[0]))
        end = decoder.raw_decode(text, starts[-1])[1]
    return np.array([*starts, len(content)], np.uint64)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object in it has a key twice")
    return found
