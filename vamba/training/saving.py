"""What a run leaves behind: whole checkpoints, and the trained model with processor, code, card and recipe.

What is unusual: a folder gets its name when it is whole. The trained model is in `<output_dir>/final.unfinished` until
it is `<output_dir>/final`, and stays there if anything goes wrong after training.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainerState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME

from vamba.errors import UserError, check_writable
from vamba.files import publish
from vamba.hub import inherited_metadata, push_to_hub, write_model_card

from .arguments import Recipe, RecipeError


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


def save(trainer: Trainer, recipe: Recipe) -> Path:
    """Writes `<output_dir>/final` and, if asked to, uploads it.

    Merging and uploading may take longer than processes wait for each other, so the main one does that by itself after
    the last collective; the others return before it is done.
    """
    output = Path(recipe.training.output_dir)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    staging = output / UNFINISHED
    if trainer.args.should_save:
        shutil.rmtree(staging, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    dtype = str(trainer.model.config.dtype).split(".")[-1]  # some of transformers put its name there
    trainer.save_dtype = None if recipe.model.use_lora else getattr(torch, dtype)
    trainer.save_model(str(staging))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        try:
            trainer.state.save_to_json(str(staging / TRAINER_STATE_NAME))
            _finish(staging, recipe, trainer.processing_class)
            publish(staging, output / FINAL)
        except Exception as error:
            kind = OSError if isinstance(error, OSError) else RuntimeError
            raise kind(
                f"the model is trained and its weights are in {staging}, but {FINAL} could not be made of them: "
                f"{type(error).__name__}: {error}"
            ) from error
        upload(output / FINAL, recipe)
    return output / FINAL


def upload(folder: Path, recipe: Recipe) -> None:
    """Puts the trained model on the Hub if the recipe says so; what is there already is not sent again."""
    given = recipe.given
    if given.get("push_to_hub"):
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
        processor = AutoProcessor.from_pretrained(folder)
        private, token = given.get("hub_private_repo"), given.get("hub_token")
        push_to_hub(model, processor, private=private, token=token, **_card(recipe))


def _finish(folder: Path, recipe: Recipe, processor) -> None:
    """Adapters merged, the processor as it was used, the card, and the recipe that made it all."""
    unset_hf_deepspeed_config()  # models that this process alone makes from here on are whole
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, of use to Trainer's own checkpoints only
    if recipe.model.use_lora and recipe.model.lora_merge:
        _merge(folder, recipe)
    data, video = recipe.data, processor.video_processor
    video.fps = video.fps if data.fps is None else data.fps  # so that it is asked as it was trained
    for edge, area in (("shortest_edge", data.min_pixels), ("longest_edge", data.max_pixels)):
        if area is not None:
            video.size[edge] = area
    processor.save_pretrained(folder)
    if (folder / "config.json").is_file():
        write_model_card(folder, **_card(recipe))
    values = {key: value for key, value in recipe.given.items() if key != "hub_token"}
    values = json.loads(json.dumps(values))  # which makes texts of enumerations
    values["datasets"] = [vars(entry) for entry in data.sources]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _merge(folder: Path, recipe: Recipe) -> None:
    """Puts the adapter in `folder` into a subfolder, and the base model with its weights added into `folder`."""
    from peft import PeftModel

    adapter = folder / "adapter"
    adapter.mkdir()
    for file in [*folder.glob("adapter_*"), folder / "README.md"]:
        if file.is_file():
            file.rename(adapter / file.name)
    base = AutoModelForImageTextToText.from_pretrained(recipe.model.model_name_or_path, dtype=recipe.model.dtype)
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)


def _card(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of a model card."""
    base = recipe.model.model_name_or_path
    repo_id = recipe.given.get("hub_model_id") or Path(recipe.training.output_dir).resolve().name
    return {"repo_id": repo_id, "origin": f"Fine-tuned from {Path(base).name}.", **inherited_metadata(base)}
