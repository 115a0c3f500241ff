"""`vamba info`: says what a checkpoint is."""

import argparse

from .checkpoint_folder import checkpoint_folder
from .console import quiet_transformers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a Vamba checkpoint or an adapter: a folder or Hub id")


def run(args: argparse.Namespace) -> None:
    """Prints what `vamba.hub.describe` says."""
    checkpoint_folder(args.path)  # at once, before transformers is imported
    quiet_transformers()
    from .hub import describe

    for name, value in describe(args.path).items():
        print(f"{name:36} {value}")
