"""What commands of the command line share."""

import argparse
from collections.abc import Sequence
from logging import ERROR, getLogger
from typing import Any


def positive(text: str) -> int:
    """An argument's type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


# What every command calls them, and `load_chat` and `VideoChat.watch` as well.
MODEL_OPTIONS = ("dtype", "device", "adapter", "load_in_4bit", "load_in_8bit", "attn_implementation")
READING_OPTIONS = ("fps", "num_frames", "start", "end", "max_pixels")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded; see `load_chat`."""
    options = parser.add_argument_group("the model")
    options.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    options.add_argument("--device", help='e.g. "cuda:0" or "cpu"; default: the GPUs if there are any')
    options.add_argument("--adapter", metavar="PATH", help="a PEFT adapter to be added to the model")
    options.add_argument("--load-in-4bit", action="store_true", help="quantise the weights with bitsandbytes")
    options.add_argument("--load-in-8bit", action="store_true", help="quantise the weights with bitsandbytes")
    options.add_argument("--attn-implementation", metavar="NAME", help="of transformers, e.g. sdpa")


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """What is taken of a video; see `read_video`."""
    options = parser.add_argument_group("what is taken of a video")
    options.add_argument("--fps", type=float, help="frames per second; default: the checkpoint's, or 1")
    options.add_argument("--num-frames", type=int, help="frames spread over the video, instead of --fps")
    options.add_argument("--start", type=float, metavar="SECONDS", help="begin here")
    options.add_argument("--end", type=float, metavar="SECONDS", help="end here")
    options.add_argument("--max-pixels", type=int, help="pixels per frame at most")


def chosen(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those of the options that were given."""
    given = {name: getattr(args, name) for name in names}
    return {name: value for name, value in given.items() if value is not None and value is not False}


def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("huggingface_hub").setLevel(ERROR)  # its retries, where the Hub cannot be reached
