"""A training run from a recipe to a trained model: arguments, data, model, trainer, saving, in that order.

All that can be wrong with a recipe is found before the model is loaded.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, TrainerState

from vamba.agreement import agreed, ending_together
from vamba.data import TrainingStream

from .arguments import Recipe, load_recipe
from .checkpoints import FINAL, find_checkpoint, finished_state, remove_leftovers
from .data import open_data, open_evaluation
from .distillation import Distillation
from .evaluation import Evaluation
from .flops import FlopsModel
from .model import check_model, load_model, load_teacher
from .saving import save, upload
from .trainer import VambaTrainer


@dataclass
class Result:
    """folder: the trained model, None where SIGTERM stopped the run; the main process writes it, the others may return
    before it is there. losses: as logged, by step. trained: False where the run to resume was finished already.
    evaluations: the metrics of each, by step."""

    folder: Path | None
    steps: int
    losses: dict[int, float]
    trained: bool = True
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)


@dataclass
class Prepared:
    """What a run needs besides the weights."""

    recipe: Recipe
    config: PreTrainedConfig
    processor: Any
    stream: TrainingStream
    checkpoint: Path | None
    flops: FlopsModel
    evaluation: Evaluation | None = None


def finetune(
    recipe: str | os.PathLike | Mapping[str, Any], overrides: Sequence[str] = (), *, resume: bool = False
) -> Result:
    """Trains as a recipe says.

    Args:
        recipe, overrides: a YAML file, a shipped recipe's name or a mapping of keys; see `load_recipe`.
        resume: go on from the last whole checkpoint in `output_dir`, if there is one. Nothing is trained of a run that
            has done its steps: its model is saved, unless that was done too, and uploaded if the recipe says so. A
            checkpoint that is not whole is passed over with a warning that names it.

    Raises:
        RecipeError: before the model is loaded. NonFiniteLossError, ExampleError, OSError: while training; the
        checkpoints are whole. OSError, RuntimeError: the trained model could not be finished; names where it is.
    """
    prepared = prepare(load_recipe(recipe, overrides), resume)
    arguments, checkpoint = prepared.recipe.training, prepared.checkpoint
    output = arguments.output_dir
    limits = arguments.max_steps, arguments.early_stopping_patience
    state = agreed(lambda: finished_state(output, checkpoint, *limits), decided_by_main=True)
    agreed(lambda: remove_leftovers(output, checkpoint, arguments.save_total_limit), decided_by_main=True)
    if state is not None:
        final = Path(output) / FINAL
        if arguments.should_save:
            upload(final, prepared.recipe)
        return _result(final, state, trained=False)
    with ending_together():
        trainer = make_trainer(prepared)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        folder = None if trainer.stopped else save(trainer, prepared.recipe)
    return _result(folder, trainer.state)


def prepare(recipe: Recipe, resume: bool = False) -> Prepared:
    """Checks a recipe against the world: checkpoint, names of parameters, folders, data.

    Raises:
        RecipeError: with the key and what is accepted. OSError: a file that cannot be read.
    """
    config, processor = check_model(recipe)
    flops = FlopsModel(config)  # before the set-up, after which ZeRO-3 shares out the weights of every new model
    recipe.training.set_up()
    checkpoint = agreed(lambda: find_checkpoint(recipe.training.output_dir, resume), decided_by_main=True)
    stream = open_data(recipe, config, processor, checkpoint)
    evaluation = open_evaluation(recipe, config, processor)
    return Prepared(recipe, config, processor, stream, checkpoint, flops, evaluation)


def make_trainer(prepared: Prepared) -> VambaTrainer:
    """The model, with what trains, in a `VambaTrainer`; beside its teacher, if it has one."""
    model, chosen, distillation = load_model(prepared.recipe), prepared.recipe.model, None
    if chosen.teacher_model_name_or_path is not None:
        teacher = load_teacher(chosen.teacher_model_name_or_path, chosen.teacher_dtype)
        options = {"weight": chosen.distillation_weight, "temperature": chosen.distillation_temperature}
        distillation = Distillation(teacher, prepared.config, **options)
    prepared.flops.trains(model)
    return VambaTrainer(
        model,
        prepared.recipe.training,
        stream=prepared.stream,
        processing_class=prepared.processor,
        distillation=distillation,
        evaluation=prepared.evaluation,
        flops=prepared.flops,
    )


def _result(folder: Path | None, state: TrainerState, trained: bool = True) -> Result:
    losses = {entry["step"]: entry["loss"] for entry in state.log_history if "loss" in entry}
    measured = (
        (entry["step"], {name: value for name, value in entry.items() if name.startswith("eval_")})
        for entry in state.log_history
    )
    evaluations = {step: metrics for step, metrics in measured if metrics}
    return Result(folder, state.global_step, losses, trained, evaluations)
