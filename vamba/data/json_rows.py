"""Examples in files of JSON, one a line or all in a list, each read and understood when it is drawn.

So one that is broken costs nothing but itself: it is an `ExampleError` that names file and line. A list is looked
through when it is opened, as nobody can tell where the examples of a broken one end.

What is unusual: of a file nothing is kept but where each example begins, 8 bytes (16 where there are blank lines), and
it is opened anew for each, so there is no handle that processes would share.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vamba.errors import UserError

from .conversations import ExampleError


LONGEST = 2**28  # bytes of one line
BLOCK = 2**24
_WHITE = np.isin(np.arange(256), list(b" \t\n\r\v\f"))
_FILLED = re.compile(r"[^ \t\n\r]")


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
            continue
        number = 0
        with open(path, "rb") as file:
            while line := file.readline(LONGEST + 1):
                number += 1
                if not line.isspace():
                    yield {"name": f"{path.name} line {number}", "text": None if len(line) > LONGEST else line}
                while len(line) > LONGEST and not line.endswith(b"\n"):
                    line = file.readline(LONGEST + 1) or b"\n"


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
        self.path, self.numbers = path, None
        self.listed = _is_list(path)
        if self.listed:
            self.starts = _list_starts(path)
        else:
            self.starts, self.numbers = _line_starts(path)

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


def _line_starts(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Where lines that are not blank begin, with the end of the file; and their numbers where some are blank."""
    starts: list[np.ndarray] = []
    numbers: list[np.ndarray] = []
    lines, offset, inside = 0, 0, False
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            if not block.endswith(b"\n"):
                block += file.readline(LONGEST)
            data = np.frombuffer(block, np.uint8)
            begins: np.ndarray = np.flatnonzero(data[:-1] == ord("\n")) + 1
            begins = begins if inside else np.concatenate([[0], begins])  # inside: of a line that is too long
            ends: np.ndarray = np.append(begins[1:], len(block))
            filled: np.ndarray = np.ones(len(begins), bool)
            for index in np.flatnonzero(_WHITE[data[begins]]):
                filled[index] = not block[begins[index] : ends[index]].isspace()
            starts.append(begins[filled].astype(np.uint64) + np.uint64(offset))
            numbers.append((np.flatnonzero(filled) + lines + 1).astype(np.uint64))
            lines, offset, inside = lines + len(begins), offset + len(block), not block.endswith(b"\n")
    found = np.concatenate([*starts, np.array([offset], np.uint64)])
    return found, None if len(found) == lines + 1 else np.concatenate([*numbers, np.empty(0, np.uint64)])


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
            more = file.readline(BLOCK)
        return not more


def _list_starts(path: Path) -> np.ndarray:
    """Where the examples of a list begin, and the end of the file."""
    text = _decoded(path)
    decoder = json.JSONDecoder(parse_int=str)  # numbers of any length; what is wrong within an example comes later
    place = _after_blanks(text, 0) + 1
    offset, counted = os.path.getsize(path) - len(text.encode()), 0  # at first, the mark of UTF-8
    starts: list[int] = []
    try:
        place = _after_blanks(text, place)
        while text[place : place + 1] != "]" or starts:
            offset, counted = offset + len(text[counted:place].encode()), place
            starts.append(offset)
            place = _after_blanks(text, decoder.raw_decode(text, place)[1])
            if text[place : place + 1] == "]":
                break
            if text[place : place + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
            place = _after_blanks(text, place + 1)
        if rest := text[place + 1 :].strip(" \t\n\r"):
            raise json.JSONDecodeError("Extra data", text, text.index(rest, place + 1))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise UserError(f"{path} is no whole list of examples: {error.msg} at {where}.") from error
    except RecursionError as error:
        raise UserError(f"{path}: example {len(starts)} of the list is nested too deeply.") from error
    return np.array([*starts, os.path.getsize(path)], np.uint64)


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 from byte {error.start} on.") from error


def _after_blanks(text: str, place: int) -> int:
    found = _FILLED.search(text, place)
    return found.start() if found else len(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object in it has a key twice")
    return found
