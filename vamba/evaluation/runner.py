"""`vamba eval` from a model and questions to a report; on one process or on those that `accelerate launch` starts.

What is unusual: processes share out what is watched, so all questions about a video are asked where it was encoded,
and meet only at the end: none waits for another in a collective while it works, however different their videos are.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from vamba.agreement import agreed, ending_together
from vamba.chat import VideoChat, load_chat
from vamba.checkpoint_folder import base_of, check_kind, checkpoint_folder
from vamba.errors import UserError
from vamba.video import check_reading

from .asking import Answer, answer_questions, check_reading_by, group
from .protocols import PROTOCOLS, Protocol
from .questions import Question, read_questions
from .report import write_report
from .run_folder import RunFolder
from .scoring import summarize


LONGEST_WAIT = timedelta(days=30)  # for the process with the longest videos
_DEFAULTS = (None, False, "auto")  # of options of loading, which say nothing
_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja")  # of what a checkpoint is loaded from


def evaluate(
    model: str | VideoChat,
    questions: str | os.PathLike | Sequence[Question],
    output_dir: str | os.PathLike,
    *,
    protocol: str | Protocol = "letters",
    reading: Mapping[str, Any] | None = None,
    circular: bool = False,
    likelihood: bool = False,
    max_new_tokens: int | None = None,
    media_root: str | os.PathLike | None = None,
    limit: int | None = None,
    allow_urls: bool = False,
    progress: bool = True,
    **loading: Any,
) -> dict[str, Any]:
    """Asks a model questions about videos and writes answers, numbers and a report into a folder.

    A folder with some of the answers is completed, and nothing is asked twice.

    Args:
        model: a checkpoint as `load_chat` takes it, or a `VideoChat`.
        questions: a file of JSON lines, see `read_questions`, or what was read from one.
        protocol: of `PROTOCOLS`, or one of your own.
        reading: options of `VideoChat.watch` that take the place of the protocol's.
        circular, likelihood: see `answer_questions`.
        max_new_tokens: of an answer; None for the protocol's.
        media_root: what relative paths of videos are relative to; None for the folder of the file.
        limit: ask the first so many questions only.
        loading: of `load_chat`.

    Returns:
        What `summarize` counts; the same on all processes.

    Raises:
        UserError: anything given cannot be used; the folder holds other answers. What is answered is kept.
    """
    protocol = _protocol(protocol, reading, max_new_tokens)
    if not isinstance(questions, (list, tuple)):
        questions = read_questions(questions, media_root)
    questions = questions[:limit]
    state, run = processes(loading.get("device")), RunFolder(output_dir)
    how = {"circular": circular, "likelihood": likelihood}
    settings = {"model": _name_of(model), "weights": _files_of(model, loading.get("adapter"))}
    settings |= {"protocol": asdict(protocol), **how, "questions": len(questions)}
    settings |= {name: f"{value}" for name, value in loading.items() if name != "device" and value not in _DEFAULTS}
    with ending_together(), run.locked() if state.is_main_process else nullcontext():
        earlier = agreed(lambda: _begin(run, settings, questions), decided_by_main=True)
        answered = {(answer.id, answer.rotation) for answer in earlier}
        new: list[Answer] = []
        if mine := _share(state, questions, answered, circular):
            chat = model if isinstance(model, VideoChat) else load_chat(model, **_placed(state, loading))
            check_reading_by(chat.processor, protocol.reading)
            options = {"answered": answered, "allow_urls": allow_urls, "progress": progress and state.is_main_process}
            with run.adding(state.process_index) as add:
                for answer in answer_questions(chat, mine, protocol, **how, **options):
                    add(answer)
                    new.append(answer)
        answers = in_order(questions, [*earlier, *gather_object(new)])
        summary = summarize(questions, answers, circular)
        if state.is_main_process:
            run.finish(answers)
            write_report(run, summary, questions, answers)
        state.wait_for_everyone()
    return summary


def processes(device: str | None) -> PartialState:
    """The processes that a launcher has started, which accelerate overlooks where there is no GPU unless told."""
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu or parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)


def in_order(questions: Sequence[Question], answers: Sequence[Answer]) -> list[Answer]:
    """Answers in the order of their questions."""
    places = {question.id: place for place, question in enumerate(questions)}
    return sorted(answers, key=lambda answer: (places[answer.id], answer.rotation))


def _share(
    state: PartialState, questions: Sequence[Question], answered: Collection[tuple[str, int]], circular: bool
) -> list[Question]:
    """Every n-th of the videos that something is left to be asked about, for this process: the questions about them."""
    mine = set(list(group(questions, answered, circular))[state.process_index :: state.num_processes])
    return [question for question in questions if question.watched in mine]


def _begin(run: RunFolder, settings: Mapping[str, Any], questions: Sequence[Question]) -> list[Answer]:
    """The answers of an earlier start, in which nothing was different; errors are asked again."""
    run.begin(settings, questions)
    return [answer for answer in run.answers() if not answer.error]


def _protocol(protocol: str | Protocol, reading: Mapping[str, Any] | None, max_new_tokens: int | None) -> Protocol:
    if not isinstance(protocol, Protocol):
        if protocol not in PROTOCOLS:
            raise UserError(f"protocol is {protocol!r:.80}; give one of {', '.join(PROTOCOLS)}.")
        protocol = PROTOCOLS[protocol]
    given = {name: value for name, value in (reading or {}).items() if value is not None}
    protocol = replace(protocol, reading=protocol.reading_with(given))
    check_reading(**protocol.reading)  # or each video would be told of as if it were broken
    if max_new_tokens is not None:
        protocol = replace(protocol, max_new_tokens=max_new_tokens, max_open_tokens=max_new_tokens)
    return protocol


def _placed(state: PartialState, loading: Mapping[str, Any]) -> dict[str, Any]:
    """Where several processes run, each has a device of its own."""
    if state.num_processes > 1 and not loading.get("device"):
        return {**loading, "device": str(state.device)}
    return dict(loading)


def _name_of(model: str | VideoChat) -> str:
    name = model if isinstance(model, str) else model.model.config._name_or_path
    return os.path.abspath(name) if os.path.isdir(name) else name


def _files_of(model: str | VideoChat, adapter: str | None) -> list[list]:
    """Name, size and time of the files that a model is loaded from: what changes when it is trained further."""
    if isinstance(model, VideoChat) and not os.path.isdir(_name_of(model)):
        return []
    name = _name_of(model)
    base = base_of(name)
    check_kind(base)
    folders = [checkpoint_folder(path) for path in dict.fromkeys((base, name, adapter)) if path is not None]
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.suffix in _SUFFIXES]
    return [[file.name, file.stat().st_size, int(file.stat().st_mtime)] for file in files]
