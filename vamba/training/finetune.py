"""From a recipe to a trained model: prepare, load, choose what trains, train, save.

What is unusual: weights that train are float32 whatever `model.dtype` says (small steps would be lost in bfloat16) and
the rest stay as they are loaded; `train.bf16` computes in bfloat16 all the same. The trained model, processor, code and
card appear in `<output_dir>/final` once they are whole. Until then the model is in `<output_dir>/final.unfinished`,
where it stays if anything goes wrong after training.
"""

import dataclasses
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from .agreement import agreed, ending_together
from .distillation import Distillation, load_teacher
from .flops import peak_flops
from .preparation import Prepared, prepare, trainable_patterns
from .recipe import Recipe
from .trainer import FINAL, UNFINISHED, VambaTrainer, publish


# Attention, MLP and Mamba projections of the language model and the video encoder, as a regular expression.
ADAPTED = r"(?!.*\bvisual\.).*\.([qkvo]_proj|gate_proj|up_proj|down_proj|in_proj|out_proj)"


@dataclass
class Result:
    """folder: the trained model, None where SIGTERM stopped the run; the main process writes it, the others may return
    before it is there. losses: as logged, by step. trained: False where the run to resume was finished already."""

    folder: Path | None
    steps: int
    losses: dict[int, float]
    trained: bool = True


def finetune(recipe: Recipe, *, resume: bool = False) -> Result:
    """Trains as a recipe says.

    Args:
        recipe: see `load_recipe`. resume: go on from the last whole checkpoint in `train.output_dir`, if there is one.
            Nothing is trained of a run that has done its steps: its model is saved, unless that was done too.

    Raises:
        RecipeError: before the model is loaded. NonFiniteLossError, ExampleError, OSError: while training; the
        checkpoints are whole. OSError, RuntimeError: the trained model could not be finished; names where it is.
    """
    prepared = prepare(recipe, resume)
    if (state := agreed(lambda: _finished(prepared), decided_by_main=True)) is not None:
        return Result(Path(prepared.arguments.output_dir) / FINAL, state.global_step, _losses(state), trained=False)
    with ending_together():
        trainer = make_trainer(prepared)
        try:
            trainer.train(resume_from_checkpoint=str(prepared.checkpoint) if prepared.checkpoint else None)
        finally:
            trainer.stopping.restore()
        folder = None if trainer.stopping.received else save(trainer, prepared)
    return Result(folder, trainer.state.global_step, _losses(trainer.state))


def _losses(state: TrainerState) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in state.log_history if "loss" in entry}


def _finished(prepared: Prepared) -> TrainerState | None:
    """Where the checkpoint to resume has done all steps and `final` is made of it: the state it was left in."""
    final = Path(prepared.arguments.output_dir) / FINAL / TRAINER_STATE_NAME
    if prepared.checkpoint is None or not final.is_file():
        return None
    done, state = (TrainerState.load_from_json(str(file)) for file in (prepared.checkpoint / final.name, final))
    return state if done.global_step == state.global_step >= prepared.arguments.max_steps else None


def make_trainer(prepared: Prepared) -> VambaTrainer:
    """The model, with what trains, in a `VambaTrainer`."""
    recipe, arguments = prepared.recipe, prepared.arguments
    torch.manual_seed(arguments.seed)  # adapters start from random numbers
    model = load_model(prepared)
    model = choose_trainable(model, prepared)
    prepared.flops.trains(model)
    distillation = None
    if recipe.distillation:
        teacher = load_teacher(recipe.distillation.teacher, recipe.distillation.dtype)
        weight, temperature = recipe.distillation.weight, recipe.distillation.temperature
        distillation = Distillation(teacher, prepared.config, weight=weight, temperature=temperature)
    return VambaTrainer(
        model,
        arguments,
        stream=prepared.stream,
        processing_class=prepared.processor,
        learning_rates=[(group.pattern, group.learning_rate) for group in recipe.groups],
        distillation=distillation,
        flops=prepared.flops,
        peak_flops=recipe.peak_tflops * 1e12 if recipe.peak_tflops else peak_flops(arguments.device),
        tokens_per_patch=1 / prepared.processor.video_processor.merge_size**2,
    )


def load_model(prepared: Prepared) -> PreTrainedModel:
    """The weights, and how the backward pass saves memory."""
    recipe = prepared.recipe
    options = {"dtype": recipe.model.dtype}
    if recipe.model.attn_implementation is not None:
        options["attn_implementation"] = recipe.model.attn_implementation
    if recipe.model.quantization is not None:
        options["quantization_config"] = _quantization(recipe.model.quantization)
    model = AutoModelForImageTextToText.from_pretrained(recipe.model.path, **options)
    if recipe.checkpointing == "multi_axis":
        model.enable_multi_axis_checkpointing(
            layer_interval="auto", sequence_interval="auto", **({"offload": True} if recipe.offload else {})
        )
    return model


def choose_trainable(model: PreTrainedModel, prepared: Prepared) -> nn.Module:
    """Freezes what the recipe does not name, or adds adapters."""
    recipe = prepared.recipe
    if recipe.lora is not None:
        return add_adapters(model, recipe)
    patterns = trainable_patterns(recipe)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(re.search(pattern, name) for pattern in patterns))
    if not _keeps_copies(prepared):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def add_adapters(model: PreTrainedModel, recipe: Recipe) -> nn.Module:
    """peft's LoRA on the linear layers that the recipe names."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if recipe.model.quantization is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = recipe.lora
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=ADAPTED if lora.target_modules is None else lora.target_modules,
        modules_to_save=lora.extra_modules or None,
    )
    return get_peft_model(model, config)


def save(trainer: VambaTrainer, prepared: Prepared) -> Path:
    """Writes `<output_dir>/final` and, if asked to, uploads it.

    Merging and uploading may take longer than processes wait for each other, so the main one does that by itself after
    the last collective; the others return before it is done.
    """
    recipe, output = prepared.recipe, Path(prepared.arguments.output_dir)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    staging = output / UNFINISHED
    if trainer.args.should_save:
        shutil.rmtree(staging, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_dtype = None if recipe.lora else _dtype(prepared)
    trainer.save_model(str(staging))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        try:
            trainer.state.save_to_json(str(staging / TRAINER_STATE_NAME))
            _finish(staging, prepared)
            publish(staging, output / FINAL)
        except Exception as error:
            kind = OSError if isinstance(error, OSError) else RuntimeError
            raise kind(
                f"the model is trained and its weights are in {staging}, but {FINAL} could not be made of them: "
                f"{type(error).__name__}: {error}"
            ) from error
        if recipe.train.get("push_to_hub"):
            _push(output / FINAL, prepared)
    return output / FINAL


def _finish(folder: Path, prepared: Prepared) -> None:
    """Adapters merged, the processor as it was used, the card, and the recipe that made it all."""
    import yaml
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from vamba.hub import write_model_card

    unset_hf_deepspeed_config()  # models that this process alone makes from here on are whole
    recipe, processor = prepared.recipe, prepared.processor
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, of use to Trainer's own checkpoints only
    if recipe.lora is not None and recipe.lora.merge:
        _merge(folder, recipe)
    video = processor.video_processor
    video.fps = video.fps if recipe.data.fps is None else recipe.data.fps  # so that it is asked as it was trained
    for edge, area in (("shortest_edge", recipe.data.min_pixels), ("longest_edge", recipe.data.max_pixels)):
        if area is not None:
            video.size[edge] = area
    processor.save_pretrained(folder)
    if (folder / "config.json").is_file():
        write_model_card(folder, repo_id=_repo_id(recipe), **_card(recipe))
    values = dataclasses.asdict(recipe)
    values["train"].pop("hub_token", None)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _merge(folder: Path, recipe: Recipe) -> None:
    """Puts the adapter in `folder` into a subfolder, and the base model with its weights added into `folder`."""
    from peft import PeftModel

    adapter = folder / "adapter"
    adapter.mkdir()
    for file in [*folder.glob("adapter_*"), folder / "README.md"]:
        if file.is_file():
            file.rename(adapter / file.name)
    base = AutoModelForImageTextToText.from_pretrained(recipe.model.path, dtype=recipe.model.dtype)
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)


def _push(folder: Path, prepared: Prepared) -> None:
    from vamba.hub import push_to_hub

    train = prepared.recipe.train
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    push_to_hub(
        model,
        prepared.processor,
        _repo_id(prepared.recipe),
        private=train.get("hub_private_repo"),
        token=train.get("hub_token"),
        **_card(prepared.recipe),
    )


def _card(recipe: Recipe) -> dict:
    from vamba.hub import inherited_metadata

    return {"origin": f"Fine-tuned from {Path(recipe.model.path).name}.", **inherited_metadata(recipe.model.path)}


def _repo_id(recipe: Recipe) -> str:
    return recipe.train.get("hub_model_id") or Path(recipe.train["output_dir"]).resolve().name


def _quantization(kind: str):
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _dtype(prepared: Prepared) -> torch.dtype | None:
    """Of the trained model's weights on disk; None leaves them as they are."""
    name = prepared.recipe.model.dtype
    return prepared.config.dtype if name == "auto" else getattr(torch, name)


def _keeps_copies(prepared: Prepared) -> bool:
    """Whether DeepSpeed keeps float32 copies of what trains; it wants one dtype of all weights."""
    return prepared.arguments.deepspeed_plugin is not None
