"""The engine of every evaluation: questions grouped by what is watched, each video encoded once.

What is unusual: each question is asked on a fork of the same memory, so a further question about a video costs its
text and answer only. A video that cannot be read costs its own questions and nothing else.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import ProcessorMixin

from vamba.chat import VideoChat
from vamba.errors import UserError, VideoReadError

from .choices import is_right, parse_choice, rotations
from .protocols import Protocol
from .questions import Question


GREEDY = {"do_sample": False, "num_beams": 1}  # unless told otherwise, as an answer is to be the same again


@dataclass(frozen=True)
class Answer:
    """What was answered to a question.

    Attributes:
        id: of the question. rotation: the order of its options, see `choices.rotations`; 0 is the file's.
        reply: what the model said; the likeliest candidate where likelihoods were compared.
        choice: the index of the option that it means, of those in the file; None if none, or of an open question.
        correct: None where the answer is not known.
        error: why the video or the question could not be used; then `correct` is False, or None.
        seconds: of video watched, None if not known.
        log_likelihoods: of the candidates, in the order in which they were shown, where they were compared.
    """

    id: str
    rotation: int = 0
    reply: str = ""
    choice: int | None = None
    correct: bool | None = None
    error: str | None = None
    seconds: float | None = None
    log_likelihoods: tuple[float, ...] | None = None

    def row(self) -> dict[str, Any]:
        """What is written of it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def answer_questions(
    chat: VideoChat,
    questions: Sequence[Question],
    protocol: Protocol,
    *,
    circular: bool = False,
    likelihood: bool = False,
    answered: Collection[tuple[str, int]] = (),
    progress: bool = True,
    allow_urls: bool = False,
    **generate_kwargs: Any,
) -> Iterator[Answer]:
    """Answers questions, one video after the other; at the end `chat` has none in memory.

    Args:
        circular: ask each multiple-choice question once for every rotation of its options.
        likelihood: compare the likelihoods of the options instead of generating; open questions are generated.
        answered: (id, rotation) of what is not to be asked again; a video with nothing left to ask is not watched.
        progress: show a progress bar of videos.
        generate_kwargs: of `VideoChat.ask`; by default answers are greedy.
    """
    groups = group(questions, answered, circular)
    bar = tqdm(groups.items(), desc="watching and asking", unit="video", disable=not progress)
    for watched, orders in bar:
        try:
            seconds = watch(chat, *watched, protocol, allow_urls=allow_urls)
        except UserError as error:
            for question, rotation in orders:
                yield Answer(question.id, rotation, correct=_wrong(question), error=f"{error}")
            continue
        for question, rotation in orders:
            yield _ask(chat, question, rotation, protocol, likelihood, seconds, generate_kwargs)
    chat.memory = None


def group(
    questions: Sequence[Question], answered: Collection[tuple[str, int]] = (), circular: bool = False
) -> dict[tuple, list[tuple[Question, int]]]:
    """What is left to be asked, (question, rotation), by what has to be watched for it; in the order of the file."""
    groups: dict[tuple, list[tuple[Question, int]]] = {}
    for question in questions:
        for rotation in range(len(question.options) if circular and question.options else 1):
            if (question.id, rotation) not in answered:
                groups.setdefault(question.watched, []).append((question, rotation))
    return groups


def watch(
    chat: VideoChat, videos: Sequence[str], start: float | None, end: float | None, protocol: Protocol, **options: Any
) -> float | None:
    """Lets `chat` watch the videos, one after the other into one memory; returns the seconds watched."""
    span = {name: value for name, value in (("start", start), ("end", end)) if value is not None}
    chat.memory = None
    for video in videos:
        chat.watch(video, append=True, progress=False, **{**protocol.reading, **span, **options})
    return None if chat.memory is None else chat.memory.seconds


def check_reading_by(processor: ProcessorMixin, reading: Mapping[str, Any]) -> None:
    """Raises UserError for options that a model's processor reads no video with, or each would be told of as broken."""
    black = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    options = {name: value for name, value in reading.items() if name not in ("start", "end")}
    try:
        processor.video_reader(black, **options).close()
    except VideoReadError as error:
        raise UserError(f"No video can be read so: {re.sub('^<array .*?>: ', '', f'{error}')}") from error


def _ask(
    chat: VideoChat,
    question: Question,
    rotation: int,
    protocol: Protocol,
    likelihood: bool,
    seconds: float | None,
    generate_kwargs: dict[str, Any],
) -> Answer:
    order = rotations(len(question.options))[rotation] if question.options else []
    prompt, log_likelihoods, place = protocol.prompt(question, order), None, None
    try:
        if likelihood and question.options:
            candidates = protocol.candidates(question, order)
            found = chat.log_likelihoods(prompt, candidates, ended=not protocol.shows_options)
            log_likelihoods = tuple(likelihood.total for likelihood in found)
            place = log_likelihoods.index(max(log_likelihoods))
            reply = candidates[place]
        else:
            options = {**GREEDY, "max_new_tokens": protocol.tokens(question), **generate_kwargs}
            reply = chat.ask([{"role": "user", "content": prompt}], **options)
            shown = [question.options[index] for index in order]
            place = parse_choice(reply, shown, lettered=protocol.shows_options) if order else None
    except UserError as error:
        return Answer(question.id, rotation, correct=_wrong(question), error=f"{error}", seconds=seconds)
    choice = None if place is None else order[place]
    if question.answer is None:
        correct = None
    else:
        correct = choice == question.answer if order else is_right(reply, question.answer)
    return Answer(question.id, rotation, reply, choice, correct, None, seconds, log_likelihoods)


def _wrong(question: Question) -> bool | None:
    return None if question.answer is None else False
