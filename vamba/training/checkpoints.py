"""Where a run goes on: the last whole checkpoint in its output folder, its place in the data, and whether it is done.

What is unusual: a checkpoint counts if it has both Trainer's state and the place in the data of the main process.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from vamba.errors import UserError, check_writable

from .arguments import RecipeError


# Folders in `output_dir`: the trained model, the same while it is finished, and a checkpoint while it is written.
FINAL, UNFINISHED, STAGING = "final", "final.unfinished", ".saving"
POSITION_FILE = "data_position_{rank}.json"


def find_checkpoint(output_dir: str, resume: bool) -> Path | None:
    """The checkpoint that a run goes on from.

    Raises:
        RecipeError: the folder cannot be used, or holds what would be overwritten.
    """
    output = Path(output_dir)
    if output.exists() and not output.is_dir():
        raise RecipeError(f"output_dir is {output}, a file; accepted: a folder, new or empty")
    try:
        check_writable(output)
    except UserError as error:
        raise RecipeError(f"output_dir: {error}") from error
    checkpoint, results = last_checkpoint(output), [output / name for name in (FINAL, UNFINISHED)]
    if checkpoint is not None and not resume:
        raise RecipeError(
            f"output_dir is {output}, which holds {checkpoint.name}; accepted: another folder, or --resume"
        )
    if checkpoint is None and (result := next((path for path in results if path.exists()), None)):
        raise RecipeError(
            f"output_dir is {output}, which holds {result.name}, a trained model, and no checkpoint to go on from; "
            "accepted: another folder, or this one without it"
        )
    return checkpoint


def last_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The latest whole checkpoint in a folder, None if there is none."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    whole = [p for p in found if (p / TRAINER_STATE_NAME).is_file() and (p / POSITION_FILE.format(rank=0)).is_file()]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


def read_position(checkpoint: Path, rank: int) -> dict[str, Any]:
    """A process's place in the data when `checkpoint` was saved.

    Raises:
        UserError: this process took no part in it.
    """
    path = checkpoint / POSITION_FILE.format(rank=rank)
    if not path.is_file():
        raise UserError(f"{checkpoint} has no place in the data for process {rank}: resume with as many processes.")
    return json.loads(path.read_text(encoding="utf-8"))


def finished_state(checkpoint: Path | None, max_steps: int) -> TrainerState | None:
    """Where `checkpoint` has done all steps and `final` is made of it: the state it was left in."""
    final = None if checkpoint is None else checkpoint.parent / FINAL / TRAINER_STATE_NAME
    if final is None or not final.is_file():
        return None
    done, state = (TrainerState.load_from_json(str(file)) for file in (checkpoint / final.name, final))
    return state if done.global_step == state.global_step >= max_steps else None
