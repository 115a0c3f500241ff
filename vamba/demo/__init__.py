"""`vamba demo`: a tiny Vamba or Video-Ma2mba learns a task on real H.264 files, from nothing, while you watch.

Nothing is prepared: videos, tokenizer and tiny checkpoints are made on the spot. The rest is what every user has: the
converter, `vamba finetune`, `from_pretrained` and `VideoChat`. Importing this package imports nothing heavy.
"""

REQUIRED_ACCURACY = 0.90


def run(output_dir="runs/demo", **options) -> dict:
    """See `vamba.demo.pipeline.run`."""
    from .pipeline import run

    return run(output_dir, **options)
