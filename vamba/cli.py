"""`vamba`: the command line.

What is unusual: a user's mistake is one line on stderr and exit code 2; any other exception is a fault: exit code 1 and
one line that names a file with the traceback. `--debug` shows the traceback of either.
"""

import argparse
import importlib
import os
import select
import sys
import tempfile
import traceback

import shtab

from . import __version__
from .errors import DISK_FULL, UserError


# name -> (what it does, its module): `add_arguments(parser)`, and `run(args)`, which returns the exit code or None.
# The modules import nothing heavy before they are run.
COMMANDS = {
    "ask": ("watch a video once and answer questions about it", "vamba.ask"),
    "chat": ("talk about videos in the terminal", "vamba.terminal"),
    "convert": ("make a Vamba of a Qwen2-VL, a Video-Ma2mba of a Mamba-2 …", "vamba.conversion.command_line"),
    "demo": ("learn a small task live and answer questions about new videos", "vamba.demo.command_line"),
    "bench": ("measure a model against the length of the video", "vamba.bench.command_line"),
    "finetune": ("train a checkpoint on videos and conversations, as a recipe says", "vamba.training.command_line"),
    "eval": ("ask questions about videos and count the right answers", "vamba.evaluation.command_line"),
    "serve": ("answer OpenAI's clients, each video encoded once", "vamba.serving.command_line"),
    "info": ("say what a checkpoint is", "vamba.info"),
}
FILES = ("VIDEO", "FILE", "FOLDER", "DIR", "PATH", "MODEL", "RECIPE", "DATA.jsonl", "SRC", "DST")  # a shell completes


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown and "overrides" not in args:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.overrides = unknown  # `vamba finetune` takes every key of a recipe
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # an answer may have words that the terminal does not
        sys.stdout.reconfigure(errors="backslashreplace")
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
        if isinstance(error, OSError) and error.errno in DISK_FULL and not error.filename:  # where stdout leads
            error = UserError(line)
        if isinstance(error, UserError):
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


def _log(error: Exception) -> str:
    descriptor, path = tempfile.mkstemp(prefix="vamba-", suffix=".log")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(f"{' '.join(sys.argv)}\n{''.join(traceback.format_exception(error))}")
    return path


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, as everything here does; options may stand among a list of words."""

    is_intermixing = False

    def parse_known_args(self, args=None, namespace=None):
        if self.is_intermixing or all(action.nargs != "*" for action in self._get_positional_actions()):
            return super().parse_known_args(args, namespace)
        self.is_intermixing = True  # argparse does it by this method
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.is_intermixing = False

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vamba", description="Linear-time video understanding.")
    parser.add_argument("--version", action="version", version=f"vamba {__version__}")
    shtab.add_argument_to(parser, ["--print-completion"], help="print what a shell completes commands with")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (told, module) in COMMANDS.items():
        command = importlib.import_module(module)
        command.add_arguments(subparser := commands.add_parser(name, help=told))
        subparser.set_defaults(run=command.run)
    for action in (action for command in commands.choices.values() for action in command._actions):
        if action.choices is None and isinstance(action.metavar, str) and action.metavar in FILES:
            vars(action).update(complete=shtab.FILE)
    parser.set_defaults(debug=False)
    for any_parser in (parser, *commands.choices.values()):  # before the command or after it
        any_parser.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
