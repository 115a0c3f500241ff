"""`vamba ask`: watches a video once and answers questions about it."""

import argparse

from .checkpoint_folder import base_of, check_kind
from .console import (
    MODEL_OPTIONS,
    READING_OPTIONS,
    add_model_options,
    add_reading_options,
    chosen,
    positive,
    quiet_transformers,
)
from .errors import UserError, opening


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "video", metavar="VIDEO", help="a video file, a folder of images, or a saved memory (.safetensors)"
    )
    parser.add_argument("questions", metavar="QUESTION", nargs="+", type=_question)
    parser.add_argument("--model", required=True, metavar="PATH", help="a Vamba checkpoint: a folder or Hub id")
    parser.add_argument("--max-new-tokens", type=positive, default=256, help="length of an answer; default: 256")
    parser.add_argument("--save-memory", metavar="FILE", help="write the video memory, to be asked again later")
    parser.add_argument("--allow-urls", action="store_true", help="let VIDEO be a URL")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, only the answers")
    add_model_options(parser)
    add_reading_options(parser)


def run(args: argparse.Namespace) -> None:
    """Watches, or loads a saved memory, and prints an answer to each question."""
    check_kind(base_of(args.model))  # at once, before torch is imported
    quiet_transformers()
    from .chat import MEMORIES, load_chat
    from .modeling.memory_files import check_memory_path

    if args.save_memory is not None:  # before anything is watched
        try:
            with opening(args.save_memory):
                check_memory_path(args.save_memory)
        except ValueError as error:
            raise UserError(f"--save-memory: {error}") from error
    reading = chosen(args, READING_OPTIONS)
    saved = args.video.endswith(".safetensors")
    if not saved:  # tell of a bad video before loading a large model
        from .video import read_video

        read_video(args.video, allow_urls=args.allow_urls, **reading).close()
    chat = load_chat(args.model, **chosen(args, MODEL_OPTIONS))
    if saved:
        kind = MEMORIES[chat.model.config.model_type]
        try:
            with opening(args.video):
                watched = chat.memory = kind.load(args.video, device=chat.model.device)
            if len(watched.media) != 1:
                raise UserError(f"{args.video} holds {len(watched.media)} rows of videos; a question needs one.")
            chat.model.model.check_weights(watched)
        except ValueError as error:
            raise UserError(str(error)) from error
    else:
        watched = chat.watch(args.video, progress=not args.quiet, allow_urls=args.allow_urls, **reading)
    if args.save_memory is not None:
        with opening(args.save_memory):
            watched.save(args.save_memory)
    for question in args.questions:
        if len(args.questions) > 1:
            print(f"> {question}")
        for piece in chat.ask(question, stream=True, max_new_tokens=args.max_new_tokens):
            print(piece, end="", flush=True)
        print(flush=True)


def _question(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"it is not UTF-8 at character {error.start}") from error
    return text
