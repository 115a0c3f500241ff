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


def _seed(text: str) -> int:
    """An argument's type: what numpy takes too."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no number from 0 to {2**32 - 1}")
    return int(text)


# What every command calls them, and `load_chat`, `VideoChat.watch`, `generate` and the recipes of training as well.
MODEL_OPTIONS = ("dtype", "device", "adapter", "load_in_4bit", "load_in_8bit", "attn_implementation")
READING_OPTIONS = ("fps", "num_frames", "max_frames", "start", "end", "min_pixels", "max_pixels")
MODEL = "a Vamba checkpoint, one of a training run, or an adapter: a folder or Hub id"


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
    options.add_argument("--max-frames", type=int, help="frames at most: fewer a second of a long video")
    options.add_argument("--start", type=float, metavar="SECONDS", help="begin here")
    options.add_argument("--end", type=float, metavar="SECONDS", help="end here")
    options.add_argument("--min-pixels", type=int, help="pixels per frame at least")
    options.add_argument("--max-pixels", type=int, help="pixels per frame at most")


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """How an answer is generated; see `generation`."""
    options = parser.add_argument_group("the answer")
    options.add_argument("--max-new-tokens", type=positive, default=256, help="length of an answer; default: 256")
    options.add_argument(
        "--temperature", type=float, help="of sampling; 0: the likeliest token each time; default: the checkpoint's"
    )
    options.add_argument("--top-p", type=float, metavar="SHARE", help="sample among tokens of this probability in all")
    options.add_argument("--top-k", type=int, metavar="N", help="sample among the N likeliest tokens")
    options.add_argument("--seed", type=_seed, metavar="N", help="of what is sampled")
    options.add_argument("--system", metavar="TEXT", help="what every conversation begins with: a system prompt")


def generation(args: argparse.Namespace) -> dict[str, Any]:
    """What `generate` is told; as a side effect, its random numbers begin at the seed."""
    if args.seed is not None:
        from transformers import set_seed

        set_seed(args.seed)
    options = chosen(args, ("max_new_tokens", "top_p", "top_k"))
    if args.temperature == 0:
        return options | {"do_sample": False}
    if args.temperature is not None:
        options["temperature"] = args.temperature
    return options | ({"do_sample": True} if options.keys() - {"max_new_tokens"} else {})


def chosen(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those of the options that were given."""
    given = {name: getattr(args, name) for name in names}
    return {name: value for name, value in given.items() if value is not None and value is not False}


def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("huggingface_hub").setLevel(ERROR)  # its retries, where the Hub cannot be reached
    getLogger("bitsandbytes").setLevel(ERROR)  # which kernels it lacks on a CPU, also where nothing is quantised
