"""Where a run goes on: the last whole checkpoint in its output folder, its place in the data, and whether it is done.

What is unusual: a checkpoint is whole if its manifest holds, which names every file of all processes with its size and
digest and is written last. So nothing damaged reaches what would unpickle it, and nothing is missing unnoticed.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from vamba.errors import UserError, check_writable
from vamba.files import size_and_digest
from vamba.loading import check_weights, load_config

from .arguments import RecipeError
from .evaluation import has_stopped_early


# Folders in `output_dir`: the trained model, the same while it is finished, and a checkpoint while it is written.
FINAL, UNFINISHED, STAGING = "final", "final.unfinished", ".saving"
POSITION_FILE = "data_position_{rank}.json"
MANIFEST = "files.json"
RECIPE_FILE = "recipe.yaml"  # the last that is written of the trained model
logger = logging.get_logger(__name__)


def find_checkpoint(output_dir: str, resume: bool) -> Path | None:
    """The checkpoint that a run goes on from; None for a new run, and for one of which only the result is left.

    Raises:
        RecipeError: the folder cannot be used, holds what would be overwritten, or no checkpoint in it is whole.
    """
    output = Path(output_dir)
    if os.path.exists(output) and not output.is_dir():
        raise RecipeError(f"output_dir is {output}, a file; accepted: a folder, new or empty")
    try:
        check_writable(output)
    except (UserError, OSError) as error:
        raise RecipeError(f"output_dir: {error}") from error
    if blocked := [path for path in output.glob("checkpoint-*") if not path.is_dir()]:
        raise RecipeError(
            f"output_dir is {output}, which holds a file {blocked[0].name}; accepted: a folder without it"
        )
    if resume and _result(output):
        try:
            return last_checkpoint(output)
        except RecipeError as error:  # of no consequence if the run is finished
            logger.warning(f"{error}")
            return None
    if resume and _checkpoints(output):
        return last_checkpoint(output)
    if found := _checkpoints(output):
        raise RecipeError(
            f"output_dir is {output}, which holds {found[-1].name}; accepted: another folder, or --resume"
        )
    if result := next((output / name for name in (FINAL, UNFINISHED) if (output / name).exists()), None):
        raise RecipeError(
            f"output_dir is {output}, which holds {result.name}, a trained model, and no checkpoint to go on from; "
            "accepted: another folder, or this one without it"
        )
    return None


def remove_leftovers(output_dir: str, checkpoint: Path | None = None, limit: int | None = None) -> None:
    """Deletes what a run that was killed has left beside whole folders of the same name, and the checkpoints that it
    had no time to delete before it goes on from `checkpoint`."""
    output = Path(output_dir)
    shutil.rmtree(output / STAGING, ignore_errors=True)
    for path in [*_checkpoints(output), output / FINAL]:
        if path.exists():
            shutil.rmtree(path.with_name(f"{path.name}.replaced"), ignore_errors=True)
    if (output / UNFINISHED).exists() and (result := _result(output)) is not None:  # asked last, as it reads headers
        unfinished = _state(output / UNFINISHED)
        if unfinished is None or unfinished.global_step <= result.global_step:
            shutil.rmtree(output / UNFINISHED, ignore_errors=True)
    if checkpoint is not None:
        state = _state(checkpoint)
        rotate(output, limit, _step(checkpoint), None if state is None else state.best_global_step)


def last_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The latest whole checkpoint in a folder, None if there is no checkpoint at all.

    Raises:
        RecipeError: there are some, and none is whole.
    """
    refused: list[str] = []
    for checkpoint in reversed(_checkpoints(Path(output_dir))):
        damage = find_damage(checkpoint)
        if damage is None:
            if refused:
                logger.warning(f"Going on from {checkpoint.name}, as {'; '.join(refused)}.")
            return checkpoint
        refused.append(f"{checkpoint.name} is not whole: {damage}")
    if refused:
        raise RecipeError(f"output_dir is {output_dir}, where {'; '.join(refused)}; accepted: a whole checkpoint")
    return None


def write_manifest(checkpoint: Path) -> None:
    """Writes down what is in a checkpoint, after all processes have written what is theirs."""
    files = {f"{path.relative_to(checkpoint)}": path for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    entries = dict(zip(files, _entries(files.values())))
    (checkpoint / MANIFEST).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def find_damage(checkpoint: Path) -> str | None:
    """What of a checkpoint is missing or not as it was written; None if it is whole."""
    try:
        _check_is_file(checkpoint / MANIFEST)
        entries = dict(json.loads((checkpoint / MANIFEST).read_bytes()))
        files = {name: checkpoint / name for name in (TRAINER_STATE_NAME, POSITION_FILE.format(rank=0), *entries)}
        found = dict(zip(files, _entries(files.values())))
    except FileNotFoundError as error:
        name = os.path.relpath(error.filename, checkpoint)
        why = " (saved with save_only_model, or by an earlier version)" if name == MANIFEST else ""
        return f"{name} is missing{why}"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (ValueError, TypeError, RecursionError):
        return f"{MANIFEST} is damaged"
    return next((f"{name} is damaged" for name, entry in found.items() if entries.get(name) != entry), None)


def rotate(output: Path, limit: int | None, step: int, best: int | None = None) -> None:
    """Deletes checkpoints beyond `limit`: first those after `step`, which are not whole, as the run would have gone on
    from them; then the oldest. That of `step` and that of the step `best` are kept."""
    if limit is None or limit <= 0:
        return
    found = _checkpoints(output)
    others = sorted((path for path in found if _step(path) not in (step, best)), key=lambda path: _step(path) <= step)
    for path in others[: max(0, len(found) - limit)]:
        shutil.rmtree(path, ignore_errors=True)


def check_best(checkpoint: Path, weights_only: bool) -> None:
    """Raises UserError if the best checkpoint of a run, which is to be its result, is not whole; without a manifest
    (`weights_only`) it has to be there."""
    damage = None if checkpoint.is_dir() else "it is missing"
    damage = damage if damage or weights_only else find_damage(checkpoint)
    if damage:
        raise UserError(
            f"{checkpoint}, the best, cannot be loaded: {damage}; put it back, or run again with --resume and "
            "--load_best_model_at_end no, which takes the model of the last step."
        )


def read_position(checkpoint: Path, rank: int) -> dict[str, Any]:
    """A process's place in the data when `checkpoint` was saved.

    Raises:
        UserError: this process took no part in it.
    """
    path = checkpoint / POSITION_FILE.format(rank=rank)
    if not path.is_file():
        raise UserError(f"{checkpoint} has no place in the data for process {rank}: resume with as many processes.")
    return json.loads(path.read_text(encoding="utf-8"))


def finished_state(
    output_dir: str, checkpoint: Path | None, max_steps: int, patience: int | None = None
) -> TrainerState | None:
    """The state a run was left in whose result has done all steps, or was stopped early; None if some are left to do.

    Raises:
        RecipeError: there are, and no checkpoint to go on from.
    """
    result = _result(Path(output_dir))
    if result is not None and (result.global_step >= max_steps or has_stopped_early(result, patience)):
        return result
    if result is not None and checkpoint is None:
        raise RecipeError(
            f"output_dir is {output_dir}, which holds {FINAL}, a trained model of {result.global_step} of {max_steps} "
            "steps, and no checkpoint to go on from; accepted: another folder, or this one without it"
        )
    return None


def _checkpoints(output: Path) -> list[Path]:
    """Folders that are called checkpoints, the oldest first."""
    found = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _result(output: Path) -> TrainerState | None:
    """The state that the trained model was left in, None if there is none or it is not whole."""
    final = output / FINAL
    if not (final / RECIPE_FILE).is_file():
        return None
    try:
        if (final / "config.json").is_file():
            check_weights(final, load_config(final))
        else:
            with safe_open(final / "adapter_model.safetensors", framework="pt"):
                pass
    except (UserError, OSError, SafetensorError) as error:
        logger.warning(f"{final} is not whole: {error}")
        return None
    return _state(final)


def _state(folder: Path) -> TrainerState | None:
    try:
        state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    except (OSError, ValueError, TypeError):
        return None
    return state if isinstance(state.global_step, int) else None


def _entries(paths: Iterable[Path]) -> list[list]:
    """Size and digest of each file; in threads, as hashing needs no GIL."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(_entry, paths))


def _check_is_file(path: Path) -> None:
    if not path.is_file():  # a pipe, say, which would be waited for
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _entry(path: Path) -> list:
    _check_is_file(path)
    return [*size_and_digest(path)]
