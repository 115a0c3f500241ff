"""`vamba demo`: a tiny Vamba or Video-Ma2mba learns a task on real H.264 files, from nothing, while you watch.

What is unusual: nothing is prepared. Videos, tokenizer and tiny checkpoints to convert are made on the spot; the real
converter, `Trainer`, `from_pretrained` and `VideoChat` do the rest. Importing this package imports nothing heavy.
"""

from .command_line import add_arguments
from .command_line import run as main


REQUIRED_ACCURACY = 0.90


def run(output_dir="runs/demo", **options) -> dict:
    """See `vamba.demo.pipeline.run`."""
    from .pipeline import run

    return run(output_dir, **options)


__all__ = ["REQUIRED_ACCURACY", "add_arguments", "main", "run"]
