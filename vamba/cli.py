"""`vamba`: the command line.

What is unusual: a user's mistake is one line on stderr and exit code 2; any other exception is a fault: exit code 1 and
one line that names a file with the traceback. `--debug` shows the traceback of either.
"""

import argparse
import os
import select
import sys
import tempfile
import traceback
from logging import ERROR, getLogger
from pathlib import Path

from .checkpoint_folder import base_of, check_kind, checkpoint_folder
from .errors import UserError, opening


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    try:
        code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():  # `vamba … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # as Python flushes it once more at its end
            return 0
        if args.debug:
            raise
        line = " ".join(str(error).split())
        if _is_mistake(error):
            print(f"vamba: {line}", file=sys.stderr)
            return 2
        print(f"vamba: {type(error).__name__}: {line} (a fault; the traceback is in {_log(error)})", file=sys.stderr)
        return 1


def _reader_has_gone() -> bool:
    """Whether it is stdout that is broken, and not some other pipe, such as one to a data worker."""
    try:
        sys.stdout.flush()
        polling = select.poll()  # as an unbuffered stdout keeps nothing back that could be flushed
        polling.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in polling.poll(0))
    except BrokenPipeError:
        return True
    except (AttributeError, OSError, ValueError):  # Windows has no poll, and what replaces stdout is no file
        return False


def _is_mistake(error: Exception) -> bool:
    """By type: ours, and that of the model's video reader, which knows nothing of us."""
    reading = sys.modules.get("vamba.modeling.frame_selection")  # which imports torch
    return isinstance(error, (UserError, *([reading.VideoReadError] if reading else [])))


def _log(error: Exception) -> str:
    descriptor, path = tempfile.mkstemp(prefix="vamba-", suffix=".log")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(f"{' '.join(sys.argv)}\n{''.join(traceback.format_exception(error))}")
    return path


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, as everything here does."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def _question(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown and "overrides" not in args:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.overrides = unknown  # `vamba finetune` takes every key of a recipe
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vamba", description="Linear-time video understanding.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    ask = commands.add_parser("ask", help="watch a video once and answer questions about it")
    ask.add_argument(
        "video", metavar="VIDEO", help="a video file, a folder of images, or a saved memory (.safetensors)"
    )
    ask.add_argument("questions", metavar="QUESTION", nargs="+", type=_question)
    ask.add_argument("--model", required=True, metavar="PATH", help="a Vamba checkpoint: a folder or Hub id")
    ask.add_argument("--fps", type=float, help="frames per second; default: the checkpoint's, or 1")
    ask.add_argument("--num-frames", type=int, help="frames spread over the video, instead of --fps")
    ask.add_argument("--start", type=float, metavar="SECONDS", help="begin here")
    ask.add_argument("--end", type=float, metavar="SECONDS", help="end here")
    ask.add_argument("--max-pixels", type=int, help="pixels per frame at most")
    ask.add_argument("--max-new-tokens", type=_positive, default=256, help="length of an answer; default: 256")
    ask.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    ask.add_argument("--device", help='e.g. "cuda:0" or "cpu"; default: the GPUs if there are any')
    ask.add_argument("--save-memory", metavar="FILE", help="write the video memory, to be asked again later")
    ask.add_argument("--allow-urls", action="store_true", help="let VIDEO be a URL")
    ask.add_argument("--quiet", action="store_true", help="no progress bar, only the answers")
    ask.set_defaults(run=_ask)

    convert = commands.add_parser("convert", help="make a Vamba of a Qwen2-VL, a Video-Ma2mba of a Mamba-2 …")
    _lazily(convert, "vamba.conversion.command_line")

    demo = commands.add_parser("demo", help="learn a small task live and answer questions about new videos")
    _lazily(demo, "vamba.demo.command_line")

    bench = commands.add_parser("bench", help="measure a model against the length of the video")
    _lazily(bench, "vamba.bench.command_line")

    finetune = commands.add_parser("finetune", help="train a checkpoint on videos and conversations, as a recipe says")
    _lazily(finetune, "vamba.training.command_line")

    info = commands.add_parser("info", help="say what a checkpoint is")
    info.add_argument("path", metavar="PATH", help="a Vamba checkpoint or an adapter: a folder or Hub id")
    info.set_defaults(run=_info)

    parser.set_defaults(debug=False)
    for any_parser in (parser, *commands.choices.values()):  # before the command or after it
        any_parser.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
    return parser


def _lazily(parser: argparse.ArgumentParser, module: str) -> None:
    """Arguments and action of a command that lives elsewhere; those modules import nothing heavy themselves."""
    import importlib

    commands = importlib.import_module(module)
    commands.add_arguments(parser)
    parser.set_defaults(run=commands.run)


def _ask(args: argparse.Namespace) -> int:
    if args.save_memory:
        with opening(memory := Path(args.save_memory)):
            if memory.is_dir():
                raise UserError(f"--save-memory {memory} is a folder; give the name of a file.")
            if not memory.resolve().parent.is_dir():
                raise UserError(f"--save-memory {memory}: there is no such folder; make it first.")
    check_kind(base_of(args.model), ("vamba", "video_ma2mba"))  # at once, before torch is imported
    _quiet_transformers()
    from .chat import MEMORIES, load_chat

    reading = {
        name: getattr(args, name)
        for name in ("fps", "num_frames", "start", "end", "max_pixels")
        if getattr(args, name) is not None
    }
    if not args.video.endswith(".safetensors"):  # tell of a bad video before loading a large model
        from .modeling import read_video

        read_video(args.video, allow_urls=args.allow_urls, **reading).close()
    chat = load_chat(args.model, dtype=args.dtype, device=args.device)
    if args.video.endswith(".safetensors"):
        try:
            with opening(args.video):
                chat.memory = MEMORIES[chat.model.config.model_type].load(args.video, device=chat.model.device)
        except ValueError as error:
            raise UserError(str(error)) from error
    else:
        chat.watch(args.video, progress=not args.quiet, allow_urls=args.allow_urls, **reading)
    if args.save_memory:
        with opening(args.save_memory):
            chat.memory.save(args.save_memory)
    for question in args.questions:
        if len(args.questions) > 1:
            print(f"> {question}")
        for piece in chat.ask(question, stream=True, max_new_tokens=args.max_new_tokens):
            print(piece, end="", flush=True)
        print(flush=True)
    return 0


def _info(args: argparse.Namespace) -> int:
    checkpoint_folder(args.path)  # at once, before transformers is imported
    _quiet_transformers()
    from .hub import describe

    for name, value in describe(args.path).items():
        print(f"{name:36} {value}")
    return 0


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("huggingface_hub").setLevel(ERROR)  # its retries, where the Hub cannot be reached


if __name__ == "__main__":
    sys.exit(main())
