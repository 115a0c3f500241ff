"""The thin command line of the converter, shared by `vamba convert` and `python -m vamba.conversion`."""

import argparse
import inspect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the converter's arguments to `parser`."""
    parser.add_argument("source", metavar="SRC", help="folder of a Qwen2-VL, Vamba or Mamba-2 checkpoint")
    parser.add_argument("destination", metavar="DST", help="folder to write; must not exist or be empty")
    parser.add_argument("--vision", metavar="CLIP", help="of a Mamba-2 SRC: folder of the CLIP it gets its eyes from")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="of a Mamba-2 SRC, where its folder has none")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the source's")
    parser.add_argument("--to", choices=("vamba", "original"), help="format to write; default: vamba")
    parser.add_argument("--seed", type=int, default=0, help="of the freshly initialised tensors; default: 0")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one output file; default: 5GB")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the checkpoint in DST once the new is complete"
    )
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")


def run(args: argparse.Namespace) -> None:
    """Converts as `args` say and prints the folder written.

    Raises UserError, with one line to show, for a user's mistake.
    """
    from .checkpoint import convert

    accepted = inspect.signature(convert).parameters
    print(convert(**{name: value for name, value in vars(args).items() if name in accepted}))
