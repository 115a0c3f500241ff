"""What commands of the command line share."""

import argparse
from logging import ERROR, getLogger


def positive(text: str) -> int:
    """An argument's type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("huggingface_hub").setLevel(ERROR)  # its retries, where the Hub cannot be reached
