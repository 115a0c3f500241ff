"""What a run leaves behind: the trained model with processor, code, card and recipe.

What is unusual: a folder gets its name when it is whole. The trained model is in `<output_dir>/final.unfinished` until
it is `<output_dir>/final`, and stays there if anything goes wrong after training.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoProcessor, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME

from vamba.errors import DiskFullError, UserError, is_disk_full
from vamba.files import publish
from vamba.hub import inherited_metadata, push_to_hub, write_model_card
from vamba.loading import load_model, merge_adapter

from .arguments import Recipe
from .checkpoints import FINAL, RECIPE_FILE, UNFINISHED


def save(trainer: Trainer, recipe: Recipe) -> Path:
    """Writes `<output_dir>/final` and, if asked to, uploads it. What was there stays until the new one is whole.

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
    try:
        trainer.save_model(str(staging))
    except Exception as error:
        if not is_disk_full(error, output):
            raise
        if trainer.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        checkpoints = any(output.glob("checkpoint-*"))
        rest = "make room and run again with --resume" if checkpoints else "and there is no checkpoint to go on from"
        raise DiskFullError(
            f"The disk of {output} is full: the trained model could not be written. What was there before is as it was "
            f"({', '.join(sorted(path.name for path in output.iterdir())) or 'nothing'}); {rest}."
        ) from error
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        try:
            trainer.state.save_to_json(str(staging / TRAINER_STATE_NAME))
            _finish(staging, recipe, trainer.processing_class)
            publish(staging, output / FINAL)
        except Exception as error:
            full = is_disk_full(error, output)
            kind = DiskFullError if full else OSError if isinstance(error, OSError) else RuntimeError
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
        model = load_model(folder, dtype="auto")
        processor = AutoProcessor.from_pretrained(folder)
        private, token = given.get("hub_private_repo"), given.get("hub_token")
        try:
            push_to_hub(model, processor, private=private, token=token, **_card(recipe))
        except UserError as error:
            raise UserError(f"The trained model is in {folder}; run again with --resume to push it: {error}") from error


def _finish(folder: Path, recipe: Recipe, processor) -> None:
    """Adapters merged, the processor as it was used, the card, and the recipe that made it all."""
    unset_hf_deepspeed_config()  # models that this process alone makes from here on are whole
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, of use to Trainer's own checkpoints only
    base = recipe.model.model_name_or_path
    if recipe.model.use_lora and os.path.isabs(base):  # of which PEFT's card would tell where it lies on this machine
        card = folder / "README.md"
        card.write_text(card.read_text(encoding="utf-8").replace(base, Path(base).name), encoding="utf-8")
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
    if data.eval_sources:
        values["eval_datasets"] = [vars(entry) for entry in data.eval_sources]
    values = _without_absolute(values, Path(recipe.training.output_dir).resolve())
    text = "# Paths that were absolute start from the output folder here, or are names where they are far from it.\n"
    (folder / RECIPE_FILE).write_text(text + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _without_absolute(value: Any, output: Path) -> Any:
    """`value` with absolute paths in it as seen from `output`. They say nothing of the machine: where the way leads
    through its root or the folder of all homes, the name of the file is left."""
    if isinstance(value, dict):
        return {key: _without_absolute(inner, output) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_absolute(inner, output) for inner in value]
    if not isinstance(value, str) or not os.path.isabs(value):
        return value
    shared = Path(os.path.commonpath([output, value]))
    if shared in (Path(output.anchor), Path.home().parent):
        return Path(value).name
    return os.path.relpath(value, output)


def _merge(folder: Path, recipe: Recipe) -> None:
    """Puts the adapter in `folder` into a subfolder, and the base model with its weights added into `folder`."""
    adapter = folder / "adapter"
    adapter.mkdir()
    for file in [*folder.glob("adapter_*"), folder / "README.md"]:
        if file.is_file():
            file.rename(adapter / file.name)
    base = load_model(recipe.model.model_name_or_path, dtype=recipe.model.dtype)
    merge_adapter(base, adapter).save_pretrained(folder)


def _card(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of a model card."""
    base = recipe.model.model_name_or_path
    repo_id = recipe.given.get("hub_model_id") or Path(recipe.training.output_dir).resolve().name
    return {"repo_id": repo_id, "origin": f"Fine-tuned from {Path(base).name}.", **inherited_metadata(base)}
