"""Questions about videos, as they stand in a file of JSON lines: multiple choice, open, or without a known answer.

    {"video": "a.mp4", "question": "Which colour flashed first?", "options": ["red", "green"], "answer": "B"}

What is unusual: a file is checked as a whole before anything is watched, and every mistake names its line.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vamba.data.conversations import URL
from vamba.data.json_rows import parse, walk
from vamba.errors import UserError, opening

from .choices import LETTERS, letters, strip_letters


KEYS = ("id", "video", "question", "options", "answer", "category", "start", "end", "duration")
MISTAKES_SHOWN = 5


@dataclass(frozen=True)
class Question:
    """One question about one or several videos.

    Attributes:
        id: of the question, unlike any other's in its file.
        videos: paths or URLs, in the order in which they are watched.
        text: the question, without its options.
        options: texts to choose from, without letters; none for an open question.
        answer: the index of the right option; the text, or texts, that answer an open question; None if not known.
        category: under which the answer is counted besides, e.g. "retrieval".
        start, end: seconds of the video to be watched; None for its own.
        duration: seconds that the video takes; None for as long as was watched.
        extra: what else stands in its line.
    """

    id: str
    videos: tuple[str, ...]
    text: str
    options: tuple[str, ...] = ()
    answer: int | str | tuple[str, ...] | None = None
    category: str | None = None
    start: float | None = None
    end: float | None = None
    duration: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)

    @property
    def watched(self) -> tuple:
        """What has to be watched for it: questions that agree in this share one encoding."""
        return self.videos, self.start, self.end


def read_questions(
    path: str | Path, media_root: str | Path | None = None, *, has_letters: bool = True
) -> list[Question]:
    """The questions of a file of JSON lines, or of one list.

    Args:
        media_root: what relative paths of videos are relative to; None for the folder of the file.
        has_letters: take letters that stand before all options for those that they are shown with.

    Raises:
        UserError: the file cannot be read, holds no question, or some of its lines are none; names the first of them.
    """
    root = Path(path).parent if media_root is None else Path(media_root)
    questions, mistakes = [], []
    with opening(path):
        if not Path(path).is_file():
            raise UserError(f"{path} is no file; give a file with a question in each line.")
        for number, row in enumerate(walk([str(path)]), start=1):
            try:
                questions.append(make_question(parse(**row), f"{number}", root, has_letters))
            except UserError as error:
                mistakes.append(f"{error}" if f"{error}".startswith(row["name"]) else f"{row['name']}: {error}")
    ids: set[str] = set()
    for question in questions:
        if question.id in ids:
            mistakes.append(f"two questions have the id {question.id!r:.80}")
        ids.add(question.id)
    if mistakes:
        more = f" and {len(mistakes) - MISTAKES_SHOWN} more" if len(mistakes) > MISTAKES_SHOWN else ""
        raise UserError(f"{path}: {'; '.join(mistakes[:MISTAKES_SHOWN])}{more}.")
    if not questions:
        raise UserError(f"{path} holds no question.")
    return questions


def make_question(row: Mapping[str, Any], default_id: str, root: Path, has_letters: bool = True) -> Question:
    """A question of the keys of one line. Raises UserError for what is wrong with it."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # of half a pair of surrogates, which no tokenizer and no report takes
        raise UserError(f"it holds {error.object[error.start]!r}, which is no character") from error
    videos = row.get("video")
    videos = tuple(videos) if isinstance(videos, list) else (videos,)
    if not videos or not all(isinstance(video, str) and video.strip() for video in videos):
        raise UserError(f"video is {row.get('video')!r:.80}; give a path, or a list of them")
    text = row.get("question")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"question is {text!r:.80}; give a text")
    options = _options(row.get("options"), has_letters)
    numbers = {name: _seconds(name, row.get(name)) for name in ("start", "end", "duration")}
    if numbers["end"] is not None and numbers["end"] <= (numbers["start"] or 0):
        raise UserError(f"end is {numbers['end']:g}, which must be after start, {numbers['start'] or 0:g}")
    category = row.get("category")
    if not isinstance(category, (str, type(None))):
        raise UserError(f"category is {category!r:.80}; give a text")
    name = row.get("id", default_id)
    if isinstance(name, bool) or not isinstance(name, (str, int)) or not f"{name}".strip():
        raise UserError(f"id is {name!r:.80}; give a text or a number")
    return Question(
        id=f"{name}",
        videos=tuple(video if URL.match(video) else str(root / video) for video in videos),
        text=text.strip(),
        options=options,
        answer=_answer(row.get("answer"), options),
        category=category or None,
        extra={key: value for key, value in row.items() if key not in KEYS},
        **numbers,
    )


def _options(given: Any, has_letters: bool) -> tuple[str, ...]:
    if given is None or given == []:
        return ()
    if isinstance(given, Mapping) and list(given) == letters(len(given)):  # {"A": "red", "B": "green"}
        given = list(given.values())
    if not isinstance(given, list) or not all(isinstance(option, str) and option.strip() for option in given):
        raise UserError(f"options is {given!r:.80}; give a list of texts")
    options = [option.strip() for option in given]
    options = strip_letters(options) if has_letters else options
    if not 2 <= len(options) <= len(LETTERS):
        raise UserError(f"options has {len(options)} texts; give from 2 to {len(LETTERS)}")
    if len(set(options)) < len(options):
        raise UserError(f"options names one twice: {given!r:.200}")
    return tuple(options)


def _answer(given: Any, options: tuple[str, ...]) -> int | str | tuple[str, ...] | None:
    """An index where there are options; a text counts before a letter, as the options may be letters in other order."""
    if given is None:
        return None
    if not options:
        texts = given if isinstance(given, list) else [given]
        texts = [str(text) if type(text) in (int, float) else text for text in texts]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"answer is {given!r:.80}; give a text, or a list of all that are right")
        return tuple(texts) if len(texts) > 1 else texts[0]
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(options):
        return given
    if isinstance(given, str):
        text = given.strip()
        if text in options:
            return options.index(text)
        if text.strip("().:").upper() in letters(len(options)):
            return letters(len(options)).index(text.strip("().:").upper())
        for letter, option in zip(letters(len(options)), options):  # "B. red"
            if re.fullmatch(rf"\(?{letter}[.:)]\s*{re.escape(option)}", text):
                return options.index(option)
    last = letters(len(options))[-1]
    raise UserError(
        f"answer is {given!r:.80}; give a letter from A to {last}, an index from 0 to {len(options) - 1}, or an option"
    )


def _seconds(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        raise UserError(f"{name} is {value!r:.80}; give seconds")
    return float(value)
