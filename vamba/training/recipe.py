"""Recipes: YAML files that say all of a training run, checked before anything large is loaded.

What is unusual: a recipe is a tree of dataclasses and nothing else is accepted. A key that is not there, a value of
another type, a file that is missing or a budget nothing could fit is a `RecipeError`: one line with the key's full name
and what is accepted. `train` is passed to transformers' `TrainingArguments` by name, under the same rules.
"""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from .strict import RecipeError, build, checked_value, key_names, unknown_key


@dataclass
class ModelRecipe:
    """path: checkpoint folder or Hub id. dtype: of the weights that do not train; those that do are float32, and
    `train.bf16` computes in bfloat16 (DeepSpeed keeps copies of its own: with it all have `dtype`)."""

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "bfloat16"
    attn_implementation: str | None = None
    quantization: Literal["nf4", "int8"] | None = None


@dataclass
class SourceRecipe:
    """path: .jsonl, .json, .parquet, a folder of them, a folder of `save_to_disk` or a Hub id. weight: relative
    frequency, for all sources or none (then every example is as frequent). media_root: what relative media paths start
    from; the file's folder if null. name, revision, data_files: of a dataset on the Hub, as for `load_dataset`."""

    path: str
    media_root: str | None = None
    weight: float | None = None
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    data_files: str | list[str] | None = None


@dataclass
class DataRecipe:
    """max_video_tokens, max_length: video and text tokens of an example. batch_video_tokens, batch_text_tokens: of a
    batch, or of a pack with `packing`; null for no limit. on_error: what a broken example does."""

    train: list[SourceRecipe]
    streaming: bool = False
    shuffle: bool = True
    fps: float | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_video_tokens: int | None = None
    max_length: int | None = None
    packing: bool = False
    batch_video_tokens: int | None = None
    batch_text_tokens: int | None = None
    on_error: Literal["skip", "raise"] = "skip"


@dataclass
class GroupRecipe:
    """Parameters whose name matches the regular expression `pattern` get this learning rate."""

    pattern: str
    learning_rate: float


@dataclass
class LoraRecipe:
    """peft's LoRA. target_modules: names of linear layers; null for all projections outside the vision tower.
    extra_modules: trained whole and saved with the adapter. merge: save the model with the adapter added to its
    weights, besides the adapter."""

    r: int = 64
    alpha: float = 128
    dropout: float = 0.05
    target_modules: list[str] | None = None
    extra_modules: list[str] = field(default_factory=list)
    merge: bool = True


@dataclass
class DistillationRecipe:
    """teacher: a Qwen2-VL with the same vocabulary, shown the same media. Its next-token distribution at `temperature`
    is matched on the assistant's tokens: loss + weight * temperature^2 * KL(teacher, student)."""

    teacher: str
    weight: float = 1.0
    temperature: float = 1.0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "bfloat16"


@dataclass
class Recipe:
    """A training run. trainable: a preset or regular expressions of parameter names. global_batch_size: rows (packs, if
    packing) of an optimizer step on all processes together. offload: with multi_axis, keep what is needed again in
    pinned CPU memory. peak_tflops: of one GPU, for the MFU in the log, where it is not known by name."""

    model: ModelRecipe
    data: DataRecipe
    train: dict[str, Any]
    trainable: Literal["stage1", "stage2", "lora", "all"] | list[str] = "all"
    groups: list[GroupRecipe] = field(default_factory=list)
    lora: LoraRecipe | None = None
    distillation: DistillationRecipe | None = None
    checkpointing: Literal["none", "gradient", "multi_axis"] = "none"
    offload: bool = False
    global_batch_size: int | None = None
    peak_tflops: float | None = None


# Decided by the recipe or meaningless without an evaluation set.
_NOT_ACCEPTED = {
    "gradient_accumulation_steps": "give global_batch_size",
    "gradient_checkpointing": "give checkpointing: gradient",
    "activation_checkpointing": "give checkpointing: gradient",
    "auto_find_batch_size": "give data.batch_video_tokens",
    "remove_unused_columns": "all columns are used",
    "resume_from_checkpoint": "pass --resume",
    "local_rank": "the launcher sets it",
    "ignore_data_skip": "the place in the data is always restored",
    "dataloader_drop_last": "the data have no end",
    "train_sampling_strategy": "give data.shuffle",
    "dataloader_in_order": "the order is part of what is restored",
    "use_liger_kernel": "the loss is computed in chunks already",
    "enable_jit_checkpoint": "SIGTERM always saves",
    "label_smoothing_factor": "it would need all logits",
}
_NO_EVALUATION = ("eval_", "batch_eval", "per_device_eval", "load_best", "metric_for", "greater_is", "do_")


def load_recipe(path: str, overrides: typing.Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, or the shipped one of that name, after `key=value` overrides; see `parse_recipe`.

    Raises:
        RecipeError: see there. FileNotFoundError: no such file and no such shipped recipe.
    """
    import yaml

    text, where = _read(path)
    try:
        values = yaml.safe_load(text) or {}
        if not isinstance(values, dict):
            raise RecipeError(f"{where} is no mapping of keys to values; accepted: {key_names(Recipe)}")
        for override in overrides:
            _override(values, override)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is no YAML: {' '.join(str(error).split())}") from error
    return parse_recipe(values)


def parse_recipe(values: Mapping[str, Any]) -> Recipe:
    """A checked `Recipe` out of nested mappings. Nothing is opened yet; `vamba.training.preparation` looks at files.

    Raises:
        RecipeError: an unknown or missing key, a value of another type or out of range, or values that exclude each
            other.
    """
    values = dict(values)
    data = values.get("data")
    if isinstance(data, Mapping) and isinstance(data.get("train"), (str, Mapping)):  # one source needs no list
        values["data"] = data | {"train": [data["train"]]}
        data = values["data"]
    if isinstance(data, Mapping) and isinstance(data.get("train"), list):
        sources = [{"path": source} if isinstance(source, str) else source for source in data["train"]]
        values["data"] = data | {"train": sources}
    recipe = build(Recipe, values, "")
    recipe.train = _training_arguments(recipe.train)
    _check_ranges(recipe)
    return recipe


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    names = [file.name for file in resources.files("vamba.recipes").iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def _read(path: str) -> tuple[str, str]:
    if Path(path).is_file():
        return Path(path).read_text(encoding="utf-8"), path
    if path in shipped_recipes():
        return resources.files("vamba.recipes").joinpath(f"{path}.yaml").read_text(encoding="utf-8"), path
    raise FileNotFoundError(f"{path}: there is no such recipe; shipped ones are {', '.join(shipped_recipes())}.")


def _override(values: dict, override: str) -> None:
    """Applies `a.b.c=value`, the value being YAML."""
    import yaml

    key, separator, value = override.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"--set {override}: accepted is key=value, e.g. train.max_steps=100")
    *parents, last = key.strip().split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise RecipeError(f"--set {override}: {parent} has no keys of its own")
    values[last] = yaml.safe_load(value)


def _training_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """`train`, checked against the fields of `TrainingArguments`; numbers that YAML read as text are numbers then."""
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    accepted = [
        known.name
        for known in dataclasses.fields(TrainingArguments)
        if known.name not in _NOT_ACCEPTED and not known.name.startswith(_NO_EVALUATION)
    ]
    checked = {}
    for key, value in values.items():
        if key in _NOT_ACCEPTED:
            raise RecipeError(f"train.{key} is not accepted: {_NOT_ACCEPTED[key]}")
        if key not in accepted:
            raise RecipeError(unknown_key(f"train.{key}", str(key), accepted))
        checked[key] = checked_value(hints[key], value, f"train.{key}")
    if not checked.get("output_dir"):
        raise RecipeError("train.output_dir is missing; accepted: a folder for checkpoints and the trained model")
    return checked


def _check_ranges(recipe: Recipe) -> None:
    data = recipe.data
    positive = {f"data.{name}": getattr(data, name) for name in (
        "fps", "max_frames", "min_pixels", "max_pixels", "max_video_tokens", "max_length", "batch_video_tokens",
        "batch_text_tokens",
    )}  # fmt: skip
    positive |= {"global_batch_size": recipe.global_batch_size, "peak_tflops": recipe.peak_tflops}
    positive |= {f"data.train[{i}].weight": source.weight for i, source in enumerate(data.train)}
    positive["train.per_device_train_batch_size"] = recipe.train.get("per_device_train_batch_size")
    if recipe.distillation:
        positive["distillation.temperature"] = recipe.distillation.temperature
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise RecipeError(f"{name} is {value}; accepted: a number above 0")
    if not data.train:
        raise RecipeError("data.train is empty; accepted: a list of sources with the keys " + key_names(SourceRecipe))
    weights = [source.weight is None for source in data.train]
    if any(weights) and (not all(weights) or (data.streaming and len(weights) > 1)):
        which = "streamed sources, which have no size" if all(weights) else "all sources or none"
        raise RecipeError(f"data.train[{weights.index(True)}].weight is missing; accepted: a weight for {which}")
    _check_budgets(recipe)
    if recipe.trainable == "lora" and recipe.lora is None:
        recipe.lora = LoraRecipe()
    if recipe.lora is not None and recipe.trainable != "lora":
        raise RecipeError(f"trainable is {recipe.trainable!r} although lora is given; accepted: lora")
    if recipe.offload and recipe.checkpointing != "multi_axis":
        raise RecipeError("offload is true; accepted: false, or checkpointing: multi_axis")
    if recipe.model.quantization and recipe.lora is None:
        raise RecipeError("model.quantization trains adapters only; accepted: null, or trainable: lora")


def _check_budgets(recipe: Recipe) -> None:
    data, rows = recipe.data, recipe.train.get("per_device_train_batch_size", 1)
    for one, all_ in (("max_video_tokens", "batch_video_tokens"), ("max_length", "batch_text_tokens")):
        single, whole = getattr(data, one), getattr(data, all_)
        if whole is not None and (single is None or single > whole):
            raise RecipeError(f"data.{one} is {single}; accepted: at most data.{all_}, {whole}")
    if data.packing and rows != 1:
        raise RecipeError(
            f"train.per_device_train_batch_size is {rows}; accepted with data.packing: 1 (a pack is a row)"
        )
    if data.packing and data.batch_video_tokens is None and data.batch_text_tokens is None:
        raise RecipeError("data.batch_video_tokens is missing; accepted with data.packing: a number above 0")
    if data.min_pixels and data.max_pixels and data.min_pixels > data.max_pixels:
        raise RecipeError(f"data.min_pixels is {data.min_pixels}; accepted: at most data.max_pixels, {data.max_pixels}")
    if data.max_frames is not None and data.max_frames < 2:
        raise RecipeError(f"data.max_frames is {data.max_frames}; accepted: a whole number of at least 2")
