"""`vamba chat`: a conversation about videos in the terminal.

Answers are written as they are generated; Ctrl-C ends one, and keeps what was said. Lines that begin with "/" are
commands (`COMMANDS`). What goes wrong with one line is told, and the conversation goes on; where the lines come from a
file or a pipe it ends there, with exit code 2.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, NamedTuple

from .ask import VIDEO, add_common_arguments, opened_chat, watch
from .checkpoint_folder import base_of, check_kind
from .console import generation, quiet_transformers
from .errors import UserError, opening


if TYPE_CHECKING:
    from .chat import VideoChat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("videos", metavar="VIDEO", nargs="*", help=VIDEO)
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Watches, then answers line by line until there are no more."""
    check_kind(base_of(args.model))  # at once, before torch is imported
    quiet_transformers()
    chat = opened_chat(args, args.videos)
    options = generation(args)
    is_typed = sys.stdin.isatty()
    if is_typed:
        _help(chat, "", args)
    for line in _typed_lines() if is_typed else sys.stdin:
        try:
            _answer(chat, line.strip(), args, options)
        except UserError as error:
            if not is_typed:
                raise
            print(f"! {' '.join(str(error).split())}")
        except KeyboardInterrupt:
            if not is_typed:
                raise
            print(" (ended)")
        except EOFError:
            return


def _answer(chat: "VideoChat", line: str, args: argparse.Namespace, options: dict) -> None:
    """Does what a line says: runs its command, or asks it and prints the answer."""
    if not line:
        return
    if line.startswith("/"):
        name, _, rest = line.partition(" ")
        if name not in COMMANDS:
            raise UserError(f"{name} is no command; there are {', '.join(COMMANDS)}.")
        COMMANDS[name].function(chat, rest.strip(), args)
        return
    if chat.memory is None:
        raise UserError("Nothing was watched yet; /watch FILE does.")
    with closing(chat.ask(line, stream=True, **options)) as pieces:  # closed, it ends what is being generated
        for piece in pieces:
            print(piece, end="", flush=True)
    print(flush=True)


def _typed_lines() -> Iterator[str]:
    """What is typed at a prompt, with the keys for editing and history where there are any."""
    with suppress(ImportError):
        import readline  # noqa: F401  `input` uses it
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:  # gives the line up, as in a shell
            print()
        except EOFError:
            print()
            return


def _watch(chat: "VideoChat", file: str, args: argparse.Namespace) -> None:
    if not file:
        raise UserError("/watch needs a FILE.")
    watch(chat, file, args)
    print(f"watched {len(chat.memory.media[0])} in all: {chat.memory!r}")


def _reset(chat: "VideoChat", rest: str, args: argparse.Namespace) -> None:
    chat.reset()
    print("a new conversation about the same videos")


def _save(chat: "VideoChat", file: str, args: argparse.Namespace) -> None:
    if not file or chat.memory is None:
        raise UserError("/save needs a FILE, and something that was watched.")
    file = file if file.endswith(".safetensors") else f"{file}.safetensors"
    with opening(file):
        chat.memory.save(file)
    print(f"the memory is in {file}")


def _where(chat: "VideoChat", file: str, args: argparse.Namespace) -> None:
    where = chat.where()
    for moment in where.moments():
        medium = f"  {where.curves[moment.medium].kind} {moment.medium + 1}" if len(where.curves) > 1 else ""
        print(f"{moment}{medium}")
    if file:
        with opening(file):
            where.save(file)
        print(f"the report is in {file}")


def _help(chat: "VideoChat", rest: str, args: argparse.Namespace) -> None:
    for name, command in COMMANDS.items():
        print(f"{name:7} {command.argument:7} {command.help}")


def _quit(chat: "VideoChat", rest: str, args: argparse.Namespace) -> None:
    raise EOFError


class Command(NamedTuple):
    """What a line that begins with "/" does."""

    argument: str
    help: str
    function: Callable[["VideoChat", str, argparse.Namespace], None]


COMMANDS = {
    "/watch": Command("FILE", "watch a further video or image; or go on from a saved memory", _watch),
    "/reset": Command("", "begin a new conversation about what was watched", _reset),
    "/save": Command("FILE", "write the video memory, to be asked again later", _save),
    "/where": Command(
        "[FILE]", "say where the model looked for the last answer, and write a report (.html, .png)", _where
    ),
    "/help": Command("", "show this list", _help),
    "/quit": Command("", "end; Ctrl-D does, too. Ctrl-C ends an answer", _quit),
}
