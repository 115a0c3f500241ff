"""`vamba ask`: watches a video once and answers questions about it, each by itself."""

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .checkpoint_folder import base_of, check_kind
from .console import (
    MODEL,
    MODEL_OPTIONS,
    READING_OPTIONS,
    add_generation_options,
    add_model_options,
    add_reading_options,
    chosen,
    generation,
    quiet_transformers,
)
from .errors import UserError, opening


if TYPE_CHECKING:
    from .chat import VideoChat


VIDEO = "a video or image file, a folder of images, or a saved memory (.safetensors)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", metavar="VIDEO", help=VIDEO)
    parser.add_argument(
        "questions", metavar="QUESTION", nargs="*", type=_question, help="default: the lines of standard input"
    )
    parser.add_argument("--save-memory", metavar="FILE", help="write the video memory, to be asked again later")
    parser.add_argument(
        "--where", metavar="FILE", help="write where the model looked for the last answer: .html or .png"
    )
    add_common_arguments(parser)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What `vamba ask` and `vamba chat` are told alike."""
    parser.add_argument("--model", required=True, metavar="PATH", help=MODEL)
    parser.add_argument("--allow-urls", action="store_true", help="let a video be a URL")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, only the answers")
    add_model_options(parser)
    add_reading_options(parser)
    add_generation_options(parser)


def run(args: argparse.Namespace) -> None:
    """Watches, or loads a saved memory, and prints an answer to each question."""
    kind = check_kind(base_of(args.model))  # at once, before torch is imported
    if args.where is not None and kind != "vamba":
        raise UserError(f"--where needs a Vamba, and {args.model} is a {kind}, which has no attention to look at.")
    if not args.questions and sys.stdin.isatty():
        raise UserError("A QUESTION is missing; give one or more, or write them to standard input, one a line.")
    quiet_transformers()
    from .modeling.memory_files import check_memory_path

    if args.save_memory is not None:  # before anything is watched
        try:
            with opening(args.save_memory):
                check_memory_path(args.save_memory)
        except ValueError as error:
            raise UserError(f"--save-memory: {error}") from error
    if args.where is not None:
        from .where import check_report_path

        check_report_path(args.where)
    chat = opened_chat(args, [args.video])
    if args.save_memory is not None:
        with opening(args.save_memory):
            chat.memory.save(args.save_memory)
    options = generation(args)
    for question in args.questions or _lines(sys.stdin):
        if len(args.questions) != 1:
            print(f"> {question}")
        chat.reset()
        for piece in chat.ask(question, stream=True, **options):
            print(piece, end="", flush=True)
        print(flush=True)
    if args.where is not None:
        with opening(args.where):
            chat.where().save(args.where)


def opened_chat(args: argparse.Namespace, videos: list[str]) -> "VideoChat":
    """A `VideoChat` that has watched these, the first of which may be a saved memory."""
    from .chat import load_chat
    from .video import read_video

    reading = chosen(args, READING_OPTIONS)
    for video in videos:  # tell of a bad one before loading a large model
        if not video.endswith(".safetensors"):
            known = {name: value for name, value in reading.items() if name != "max_frames"}
            read_video(video, allow_urls=args.allow_urls, **known).close()
    chat = load_chat(args.model, **chosen(args, MODEL_OPTIONS))
    chat.system = args.system
    for video in videos:
        watch(chat, video, args)
    return chat


def watch(chat: "VideoChat", video: str, args: argparse.Namespace) -> None:
    """Lets the chat watch one more video as the arguments say; a saved memory takes the place of all so far."""
    if not video.endswith(".safetensors"):
        reading = chosen(args, READING_OPTIONS)
        chat.watch(video, append=True, progress=not args.quiet, allow_urls=args.allow_urls, **reading)
        return
    from .chat import open_memory

    chat.memory = open_memory(chat.model, video)
    chat.reset()


def _lines(file) -> Iterator[str]:
    """The questions of a text, one a line; blank lines are none."""
    try:
        for line in file:
            if line.strip():
                yield line.strip()
    except UnicodeDecodeError as error:
        raise UserError(f"Standard input is not UTF-8 ({error.reason}); give text.") from error


def _question(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"it is not UTF-8 at character {error.start}") from error
    return text
