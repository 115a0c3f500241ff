"""The folder of an evaluation: what was asked how, the answers so far, and the report.

    run.json        how it was asked      questions.jsonl   what was asked
    answers.jsonl   what was answered     report.md, report.png, summary.json

What is unusual: while a run is under way each process adds its answers, one line each, to a file of its own, so that
a killed run loses at most the question under way. A line that was cut off is dropped. Answers that are an error are
asked again, as the video may be mended meanwhile.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from vamba.data.conversations import URL
from vamba.errors import DiskFullError, OccupiedPathError, UserError, check_writable, is_disk_full, opening
from vamba.files import PARTIAL, locked_folder, written_whole

from .asking import Answer
from .questions import Question, read_questions


SETTINGS, QUESTIONS, ANSWERS, SUMMARY = "run.json", "questions.jsonl", "answers.jsonl", "summary.json"
PART = "answers.rank{rank}.jsonl"  # of one process
_NAMES = {field.name for field in fields(Answer)}


class RunFolder:
    """An evaluation's folder.

    Raises:
        UserError: it cannot be written, is something else, or is in use.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within, no other process writes to the folder."""
        check_writable(self.folder)
        with opening(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            ours = (SETTINGS, QUESTIONS)  # the latter where it was killed, or the disk full, as it began
            names = {path.name for path in self.folder.iterdir() if not path.name.startswith(PARTIAL)}
            if SETTINGS not in names and names.difference(ours):
                raise OccupiedPathError(f"{self.folder} holds something that is no evaluation; choose another folder.")
        with ExitStack() as stack:
            with opening(self.folder):
                stack.enter_context(locked_folder(self.folder))
            yield

    def begin(self, settings: Mapping[str, Any], questions: Iterable[Question]) -> None:
        """Notes what is asked and how. Raises UserError where the folder holds the answers to something else."""
        settings, rows = json.loads(json.dumps(settings)), [json.dumps(row_of(question)) for question in questions]
        if (self.folder / SETTINGS).is_file() and self.answers():
            earlier = self.settings()
            for name in {**earlier, **settings}:
                if earlier.get(name) != settings.get(name):
                    raise UserError(
                        f"{self.folder} holds the answers of another run: {name} was {earlier.get(name)!r:.200} and is "
                        f"{settings.get(name)!r:.200}; choose another folder."
                    )
            path = self.folder / QUESTIONS
            with opening(path):
                asked = path.read_bytes().splitlines() if path.is_file() else []  # a pipe would be waited for
            if asked != [row.encode() for row in rows]:
                raise UserError(f"{self.folder} holds the answers to other questions; choose another folder.")
            return
        self.write(QUESTIONS, "".join(f"{row}\n" for row in rows))
        self.write(SETTINGS, json.dumps(settings, indent=1) + "\n")  # last, as it stands for both

    def settings(self) -> dict[str, Any]:
        return _read_json(self.folder / SETTINGS)

    def questions(self) -> list[Question]:
        return read_questions(self.folder / QUESTIONS, has_letters=False)

    def answers(self) -> list[Answer]:
        """All answers so far, an error only where nothing better was found since."""
        found: dict[tuple[str, int], Answer] = {}
        for path in [self.folder / ANSWERS, *sorted(self.folder.glob(PART.format(rank="*")))]:
            for answer in _read_answers(path):
                key = answer.id, answer.rotation
                if key not in found or found[key].error:
                    found[key] = answer
        return list(found.values())

    @contextmanager
    def adding(self, rank: int) -> Iterator[Any]:
        """A function that adds an answer to this process's file. Raises DiskFullError where there is no room."""
        path = self.folder / PART.format(rank=rank)
        if os.path.lexists(path) and not path.is_file():  # a pipe, say, which would be waited for
            raise OccupiedPathError(f"{path} is no file; move it away.")
        with opening(path), open(path, "ab", buffering=0) as file:
            _drop_torn_line(path)

            def add(answer: Answer) -> None:
                place, line = file.seek(0, os.SEEK_END), f"{json.dumps(answer.row())}\n".encode()
                try:
                    while line:
                        line = line[file.write(line) :]
                except OSError as error:
                    os.truncate(path, place)
                    if is_disk_full(error, self.folder):
                        message = f"{path} cannot grow ({error.strerror}); what is answered is kept."
                        raise DiskFullError(message) from error
                    raise

            yield add

    def finish(self, answers: Iterable[Answer]) -> None:
        """Writes all answers in one file and removes those of the processes."""
        self.write(ANSWERS, "".join(f"{json.dumps(answer.row())}\n" for answer in answers))
        for path in self.folder.glob(PART.format(rank="*")):
            path.unlink()

    def write(self, name: str, text: str) -> None:
        """A file as a whole, or as it was before."""
        with self.replacing(name) as path:
            path.write_text(text, encoding="utf-8")

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """Within, where to write what then becomes the file `name` as a whole, if anything was written.

        Raises:
            DiskFullError: there is no room. OccupiedPathError: something else is in the way.
        """
        path = self.folder / name
        try:
            with written_whole(path) as partial:
                yield partial
        except OSError as error:
            if is_disk_full(error, self.folder):
                raise DiskFullError(
                    f"{path} cannot be written ({error.strerror}); what is answered is kept."
                ) from error
            raise OccupiedPathError(f"{path} cannot be written ({error.strerror}); move it away.") from error


def open_run(folder: str | os.PathLike) -> RunFolder:
    """The folder of a run that has been started. Raises UserError where there is none."""
    run = RunFolder(folder)
    if not (run.folder / SETTINGS).is_file():
        raise UserError(f"{folder} holds no {SETTINGS}; give the output folder of `vamba eval`.")
    return run


def row_of(question: Question) -> dict[str, Any]:
    """A question as it is written in a file, its videos by their absolute paths."""
    row = asdict(question)
    row |= {"video": row.pop("videos"), "question": row.pop("text"), **row.pop("extra")}
    row["video"] = [video if URL.match(video) else os.path.abspath(video) for video in row["video"]]
    return {name: value for name, value in row.items() if value is not None and value != ()}


def _read_answers(path: Path) -> Iterator[Answer]:
    with opening(path):
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):  # the process was killed while it wrote
            return
        try:
            row = json.loads(line)
            if not row.keys() <= _NAMES or not isinstance(row["id"], str):
                raise ValueError(f"it is no answer: {line[:80]!r}")
            likelihoods = row.get("log_likelihoods")
            yield Answer(**row | {"log_likelihoods": None if likelihoods is None else tuple(likelihoods)})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} line {number} is damaged ({error}); delete the line and start again.") from error


def _drop_torn_line(path: Path) -> None:
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _read_json(path: Path) -> dict[str, Any]:
    with opening(path):
        text = path.read_bytes()
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); choose another folder.") from error
