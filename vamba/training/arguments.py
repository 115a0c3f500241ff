"""A recipe: the keys of a training run, read from YAML and the command line, checked before anything is opened.

The keys are the fields of three flat dataclasses; the third is transformers' `TrainingArguments` with a few fields
more, so all that `Trainer` can do is said in its own words. The file and the overrides go through one
`HfArgumentParser`: a recipe is a command line that is written down.

What is unusual: `TrainingArguments` looks at the machine and meets the other processes as soon as it is made. Ours does
so in `set_up`, as a recipe may be read where it is not run. A mistake is a `RecipeError`: one line that names the key.
"""

import difflib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import HfArgumentParser, TrainingArguments

from vamba.errors import UserError, opening


Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class RecipeError(UserError):
    """A recipe that cannot be followed: one line that names the key and what is accepted."""


@dataclass
class ModelArguments:
    """What is trained, and who teaches it.

    model_name_or_path: a checkpoint folder or Hub id; --model on the command line.
    dtype: of the weights that do not train; those that do are float32, and `bf16` computes in bfloat16 all the same
        (DeepSpeed keeps copies of its own: with it all weights have this dtype).
    trainable: "stage1" or "stage2" of Vamba's paper, "all", "lora" for adapters, or regular expressions of the names of
        the parameters that train.
    lora_target_modules: names of linear layers; all projections outside the vision tower by default.
    lora_modules_to_save: trained whole and saved with the adapter.
    lora_merge: save the model with the adapter added to its weights, besides the adapter.
    teacher_model_name_or_path: a Qwen2-VL with the same vocabulary, shown the same media. Its next-token distribution
        at `distillation_temperature` is matched on the assistant's tokens:
        loss + distillation_weight * temperature^2 * KL(teacher, student).
    """

    model_name_or_path: str = field(metadata={"aliases": ["--model"]})  # as other commands call it
    dtype: Dtype = "bfloat16"
    attn_implementation: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    trainable: list[str] = field(default_factory=lambda: ["all"])
    lora_r: int = 64
    lora_alpha: float = 128
    lora_dropout: float = 0.05
    lora_target_modules: list[str] | None = None
    lora_modules_to_save: list[str] | None = None
    lora_merge: bool = True
    teacher_model_name_or_path: str | None = None
    teacher_dtype: Dtype = "bfloat16"
    distillation_weight: float = 1.0
    distillation_temperature: float = 1.0

    @property
    def use_lora(self) -> bool:
        return self.trainable == ["lora"]


@dataclass
class DatasetArguments:
    """One entry of `datasets`: a path, or a mapping of these keys.

    path: .jsonl, .json, .parquet, a folder of them, a folder of `save_to_disk` or a Hub id.
    media_root: what relative media paths start from; the file's folder by default.
    weight: relative frequency, for all datasets or none (then every example is as frequent); not of `eval_datasets`.
    split, name, revision, data_files: of a dataset on the Hub, as for `load_dataset`.
    """

    path: str
    media_root: str | None = None
    weight: float | None = None
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    data_files: list[str] | None = None


@dataclass
class DataArguments:
    """What is learnt from.

    datasets: paths, or mappings with the keys of `DatasetArguments`; `sources` are those.
    fps, max_frames, min_pixels, max_pixels: how videos are sampled where an example does not say; see
        `vamba.data.ConversationEncoder`.
    max_video_tokens, max_length: video and text tokens of an example; no limit, and the model's positions by default.
    batch_video_tokens, batch_text_tokens: of a batch, or of a pack with `packing`; no limit by default.
    on_error: what a broken example does.
    allow_urls: whether images and videos may be URLs.
    eval_datasets: as `datasets`; their loss is computed at each evaluation. `eval_sources` are those.
    eval_questions: a file of questions (`vamba.evaluation.questions`), which are answered at each evaluation.
    eval_protocol: how they are asked, a name among `vamba.evaluation.protocols`; videos are read as the recipe says
        unless the protocol does.
    """

    # what is evaluated is left out of `repr`, from which the order of the batches has its name
    datasets: list[str] = field(repr=False, compare=False)
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
    allow_urls: bool = False
    eval_datasets: list[str] | None = field(default=None, repr=False)
    eval_questions: str | None = field(default=None, repr=False)
    eval_protocol: str = field(default="letters", repr=False)
    sources: list[DatasetArguments] = field(init=False)
    eval_sources: list[DatasetArguments] = field(init=False, repr=False)

    def __post_init__(self):
        self.sources = [_dataset(entry, f"datasets[{index}]: ") for index, entry in enumerate(self.datasets)]
        entries = enumerate(self.eval_datasets or ())
        self.eval_sources = [_dataset(entry, f"eval_datasets[{index}]: ") for index, entry in entries]

    @property
    def eval_names(self) -> list[str]:
        """What metrics call each of `eval_datasets`: its file's name, with a number where that is another's already."""
        names: list[str] = []
        for entry in self.eval_sources:
            name = re.sub(r"\.(jsonl?|parquet)$", "", Path(entry.path).name)
            names.append(name if name not in names else f"{name}_{len(names) + 1}")
        return names

    @property
    def eval_metrics(self) -> list[str]:
        """What an evaluation measures, each in the log with `eval_` before it."""
        losses = [f"{name}_loss" for name in self.eval_names] if len(self.eval_sources) > 1 else []
        losses += ["loss"] if self.eval_sources else []
        return [*losses, "accuracy"] if self.eval_questions is not None else losses


@dataclass
class VambaTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults of ours and a few fields more.

    global_batch_size: rows (packs, with `packing`) of an optimizer step on all processes together, instead of
        `gradient_accumulation_steps`.
    learning_rates: {regular expression of parameter names: learning rate} of those that do not get `learning_rate`.
    multi_axis_checkpointing: recompute in the backward pass in cells of layers and sequence.
    multi_axis_offload: with it, keep what is needed again in pinned CPU memory.
    peak_tflops: of one GPU, for the MFU in the log, where it is not known by name.
    early_stopping_patience: evaluations in a row without a better `metric_for_best_model` after which the run ends.
    early_stopping_threshold: by how much it has to be better.
    """

    report_to: None | str | list[str] = "none"
    remove_unused_columns: bool = False
    activation_checkpointing_kwargs: dict[str, Any] | str | None = None
    ignore_data_skip: bool = True  # the place in the data is always restored
    logging_nan_inf_filter: bool = False  # such a loss stops the run
    ddp_find_unused_parameters: bool | None = True
    metric_for_best_model: str | None = None
    use_cache: bool = True  # False would be written into the trained model; steps say so by themselves
    global_batch_size: int | None = None
    learning_rates: dict | str | None = None
    multi_axis_checkpointing: bool = False
    multi_axis_offload: bool = False
    peak_tflops: float | None = None
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0

    def __post_init__(self):
        if isinstance(self.learning_rates, str):
            try:
                rates = json.loads(self.learning_rates).items()
                self.learning_rates = {pattern: float(rate) for pattern, rate in rates}
                if not all(0 <= rate < math.inf for rate in self.learning_rates.values()):
                    raise ValueError("a rate that is none")
            except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
                accepted = "a mapping of patterns to learning rates"
                raise RecipeError(f"learning_rates is {self.learning_rates}; accepted: {accepted}") from error

    def set_up(self) -> None:
        """What `TrainingArguments` does when it is made, and what follows from how many processes there are."""
        if not self.dataloader_num_workers:
            self.dataloader_prefetch_factor = self.dataloader_multiprocessing_context = None  # which are of workers
        self.push_to_hub, self.hub_token = False, None  # `finetune` uploads once, with code and card
        if self.early_stopping_patience is not None and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.multi_axis_checkpointing:  # of the layers outside the cells, which is the text's
            self.activation_checkpointing = True
        try:
            super().__post_init__()
        except (ValueError, ImportError, TypeError, OSError, KeyError, AttributeError) as error:
            raise RecipeError(" ".join(str(error).split())) from error
        if self.activation_checkpointing and self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = {"use_reentrant": False}
        self._n_gpu = min(self.n_gpu, 1)  # with several, Trainer would cut a batch's patches anywhere
        if self.global_batch_size is not None:
            rows = self.per_device_train_batch_size * self.world_size
            if self.global_batch_size % rows:
                raise RecipeError(
                    f"global_batch_size is {self.global_batch_size}; accepted: a multiple of {rows} "
                    "(per_device_train_batch_size x processes)"
                )
            self.gradient_accumulation_steps = self.global_batch_size // rows


class Recipe(NamedTuple):
    """A checked recipe; `given` are the keys that it names, with their values."""

    model: ModelArguments
    data: DataArguments
    training: VambaTrainingArguments
    given: dict[str, Any]


LARGEST, MOST_VALUES = 2**18, 50_000  # bytes of a file, and values in it
_NO_LOGITS = "an evaluation keeps no logits"
# Fields of `TrainingArguments` that contradict how training works here, and what to do instead.
_REFUSED = {
    "auto_find_batch_size": "give batch_video_tokens",
    "batch_eval_metrics": _NO_LOGITS,
    "dataloader_drop_last": "the data have no end",
    "dataloader_in_order": "the order is part of what is restored",
    "do_eval": "give eval_strategy",
    "do_predict": "`vamba eval` does",
    "do_train": "a run trains",
    "enable_jit_checkpoint": "SIGTERM always saves",
    "eval_accumulation_steps": _NO_LOGITS,
    "eval_do_concat_batches": _NO_LOGITS,
    "eval_use_gather_object": _NO_LOGITS,
    "hub_always_push": "the trained model is uploaded once",
    "hub_revision": "the trained model is uploaded to the main branch",
    "hub_strategy": "the trained model is uploaded once",
    "ignore_data_skip": "the place in the data is always restored",
    "label_smoothing_factor": "it would need all logits",
    "local_rank": "the launcher sets it",
    "logging_nan_inf_filter": "such a loss stops the run",
    "remove_unused_columns": "all columns are used",
    "resume_from_checkpoint": "pass --resume",
    "train_sampling_strategy": "give shuffle",
    "use_liger_kernel": "the loss is computed in chunks already",
}
_POSITIVE = (
    "fps", "max_frames", "min_pixels", "max_pixels", "max_video_tokens", "max_length", "batch_video_tokens",
    "batch_text_tokens", "global_batch_size", "peak_tflops", "per_device_train_batch_size", "distillation_temperature",
    "per_device_eval_batch_size", "early_stopping_patience",
)  # fmt: skip
_OF_EVALUATION = ("eval_", "per_device_eval_", "load_best_", "metric_for_", "greater_is_", "early_stopping_")


class _Parser(HfArgumentParser):
    """Reads a mapping, and words of a command line that override it. Says a mistake in one line, by its key."""

    def __init__(self, *kinds: type, where: str = ""):
        super().__init__(kinds, add_help=False, allow_abbrev=False)
        self.where = where

    def error(self, message: str):
        raise RecipeError(self.where + re.sub(r"(argument )?--(\w+)(/--[\w-]+)*", r"\2", message))

    def parse(self, values: Mapping[str, Any], overrides: Sequence[str] = ()) -> tuple:
        """The dataclasses, and all keys that are given with their values."""
        written = [word for key, value in values.items() for word in self._words(key, value)]
        namespace, unknown = self.parse_known_args([*written, *overrides])
        known = vars(namespace)
        if unknown:
            if not unknown[0].startswith("--"):
                raise RecipeError(f"{unknown[0]} follows no key; overrides are written --key value")
            key = unknown[0][2:].partition("=")[0]
            close = difflib.get_close_matches(key, known, 1)
            self.error(f"{key} is no key{f', {close[0]} is' if close else ''}")
        flags = [word[2:].partition("=")[0] for word in overrides if word.startswith("--")]
        names = [str(name).replace("-", "_").removeprefix("no_") for name in (*values, *flags)]
        return (*self.parse_dict(known), {name: known[name] for name in dict.fromkeys(names) if name in known})

    def _takes_lists(self, key: str) -> bool:
        """Whether a field may be a list besides a text; what it may be, argparse has forgotten."""
        ancestors = [ancestor for kind in self.dataclass_types for ancestor in kind.__mro__]
        return any("list" in f"{vars(kind).get('__annotations__', {}).get(key)}" for kind in ancestors)

    def _words(self, key: str, value: Any) -> list[str]:
        """A key as it is written on a command line."""
        action = self._option_string_actions.get(f"--{key}")
        if value is None and action is not None:
            if action.default is not None:
                self.error(f"{key} is null; leave it out for its default, {action.default}")
            return []
        if isinstance(value, list) and action is not None and action.nargs != "+":
            if not self._takes_lists(key):
                self.error(f"{key} is a list, {value!r:.80}; accepted: one value")
            self.set_defaults(**{key: value})  # which `TrainingArguments` takes as well as one text
            return []
        if isinstance(value, list):
            return [f"--{key}", *map(_word, value)]
        return [f"--{key}={_word(value)}"]


def load_recipe(recipe: str | os.PathLike | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, the shipped one of that name, or a mapping of keys.

    Args:
        overrides: as on the command line, `["--learning_rate", "1e-5"]`.

    Raises:
        RecipeError: no such file; an unknown or missing key, a value of another type or out of range, or values that
            exclude each other. Data and models are not opened yet.
    """
    values = dict(recipe) if isinstance(recipe, Mapping) else _read(os.fspath(recipe))
    _check_values(values)
    if nested := [key for key in ("model", "data", "train") if isinstance(values.get(key), Mapping)]:
        raise RecipeError(
            f"the recipe has the sections of an earlier format ({', '.join(nested)}); its keys stand on one level "
            "now (docs/training.md): model.path is model_name_or_path, data.train is datasets, train.X is X"
        )
    checked = Recipe(*_Parser(ModelArguments, DataArguments, VambaTrainingArguments).parse(values, overrides))
    if mistake := next(_mistakes(*checked), None):
        raise RecipeError(mistake)
    return checked


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    names = [file.name for file in resources.files("vamba.recipes").iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def _read(path: str) -> dict[str, Any]:
    import yaml

    with opening(path):
        if Path(path).is_file():
            if Path(path).stat().st_size > LARGEST:
                raise RecipeError(f"{path} is larger than {LARGEST // 1024} KB, which no recipe is")
            text = Path(path).read_bytes()
        elif path in shipped_recipes():
            text = resources.files("vamba.recipes").joinpath(f"{path}.yaml").read_bytes()
        else:
            raise RecipeError(f"{path}: there is no such recipe; shipped ones are {', '.join(shipped_recipes())}.")
    try:
        values = yaml.safe_load(text.decode("utf-8-sig")) or {}
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:  # of a date without month
        raise RecipeError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is no mapping of keys to values")
    return values


def _check_values(values: Mapping[str, Any]) -> None:
    """Raises RecipeError for what cannot be written on a command line, and for more of it than a recipe may hold, which
    a few nested aliases of YAML are enough for."""
    waiting: list[tuple[str, Any]] = []
    for key, value in values.items():
        if not isinstance(key, str) or not re.fullmatch(r"[\w-]+", key):
            raise RecipeError(f"{key!r:.80} is no key")
        waiting.append((key, value))
    for _ in range(MOST_VALUES):
        if not waiting:
            return
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(key, inner) for pair in value.items() for inner in pair]
        elif isinstance(value, (list, tuple)):
            waiting += [(key, inner) for inner in value]
        elif isinstance(value, str):
            if "\0" in value or not value.isascii() and value.encode(errors="replace").decode() != value:
                raise RecipeError(f"{key} is {value!r:.80}, no text that can be written")
            if os.path.exists(value) and not (os.path.isfile(value) or os.path.isdir(value)):
                raise RecipeError(f"{key} is {value}, a device or a pipe; accepted: a file or a folder")
        elif not isinstance(value, (bool, int, float, os.PathLike, date, Enum, type(None))):
            raise RecipeError(
                f"{key} has a value of type {type(value).__name__}; accepted: texts, numbers and lists of them"
            )
    raise RecipeError(f"the recipe holds more than {MOST_VALUES} values; does it nest aliases?")


def _word(value: Any) -> str:
    """Text as the parser reads it. YAML takes `no` for false, which is a choice of some keys."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _dataset(entry: str, where: str) -> DatasetArguments:
    try:
        values = json.loads(entry) if entry.startswith("{") else {"path": entry}
        _check_values(values)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{where}{entry:.80} is no mapping; accepted: one, or a path") from error
    return _Parser(DatasetArguments, where=where).parse(values)[0]


def _mistakes(
    model: ModelArguments, data: DataArguments, training: VambaTrainingArguments, given: dict[str, Any]
) -> Iterator[str]:
    """Keys that are not for recipes, values out of range, and values that exclude each other."""
    for key in given:
        if reason := _REFUSED.get(key):
            yield f"{key} is not accepted: {reason}"
    for key, value in given.items():
        if isinstance(value, (int, float)) and not abs(value) < 2**63:  # NaN is not either
            yield f"{key} is {value}; accepted: a finite number"
    if not training.output_dir:
        yield "output_dir is missing; accepted: a folder for checkpoints and the trained model"
    yield from _data_mistakes(data, training, given)
    yield from _evaluation_mistakes(data, training, given)
    if training.global_batch_size and training.gradient_accumulation_steps != 1:
        yield "gradient_accumulation_steps is given beside global_batch_size; accepted: one of them"
    if training.multi_axis_offload and not training.multi_axis_checkpointing:
        yield "multi_axis_offload is true; accepted: false, or multi_axis_checkpointing: true"
    adapting = next((key for key in given if key.startswith(("lora_", "load_in_"))), None)
    if adapting and not model.use_lora:
        yield f"trainable is {', '.join(model.trainable)} although {adapting} is given; accepted: lora"
    if model.load_in_4bit and model.load_in_8bit:
        yield "load_in_8bit is true beside load_in_4bit; accepted: one of them"
    if training.push_to_hub and model.use_lora and not model.lora_merge:
        yield "lora_merge is false; accepted with push_to_hub: true"
    if training.push_to_hub and (refusal := _refused_name(training)):
        yield refusal
    if model.dtype in ("bfloat16", "float16") and not (training.bf16 or training.fp16 or model.use_lora):
        yield f"dtype is {model.dtype} while nothing computes in half precision; accepted: float32, or bf16: true"


def _evaluation_mistakes(data: DataArguments, training: VambaTrainingArguments, given: dict[str, Any]) -> Iterator[str]:
    from vamba.evaluation.protocols import PROTOCOLS

    known, needed = data.eval_metrics, next((key for key in given if key.startswith(_OF_EVALUATION)), None)
    if needed and not known:
        yield f"{needed} is given, but nothing to evaluate on; accepted with eval_datasets or eval_questions"
    if not known:
        return
    if "eval_strategy" not in given:
        yield f"eval_strategy is missing; accepted with {needed}: steps, or no"
    if training.eval_strategy == "epoch":
        yield "eval_strategy is epoch; accepted: steps, with eval_steps (0.1 is a tenth of all), or no"
    if data.eval_protocol not in PROTOCOLS:
        yield f"eval_protocol is {data.eval_protocol}; accepted: {', '.join(PROTOCOLS)}"
    for index, entry in enumerate(data.eval_sources):
        if entry.weight is not None:
            yield f"eval_datasets[{index}].weight is {entry.weight}; leave it out, as every example is seen once"
    if data.packing and "per_device_eval_batch_size" in given:
        yield "per_device_eval_batch_size is given; leave it out with packing, where a pack is a row"
    stops = training.early_stopping_patience is not None
    metric = training.metric_for_best_model
    if stops or training.load_best_model_at_end or training.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        metric = metric or "loss"
    if metric is not None and metric.removeprefix("eval_") not in known:
        yield f"metric_for_best_model is {metric}; accepted: {', '.join(known)}"
    if stops and training.eval_strategy == "no":
        yield "early_stopping_patience is given although eval_strategy is no; accepted: steps"


def _refused_name(training: TrainingArguments) -> str | None:
    """What is wrong with the name that the model is to have on the Hub, which would show after the training only."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = training.hub_model_id or Path(training.output_dir or "").resolve().name
    try:
        validate_repo_id(name)
        return None
    except HFValidationError as error:
        return f"hub_model_id is {name}; accepted: owner/name or a name ({error})"


def _data_mistakes(data: DataArguments, training: TrainingArguments, given: dict[str, Any]) -> Iterator[str]:
    numbers = {key: given.get(key) for key in _POSITIVE}
    numbers |= {f"datasets[{index}].weight": entry.weight for index, entry in enumerate(data.sources)}
    for key, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            yield f"{key} is {value}; accepted: a number above 0"
    weights = [entry.weight is None for entry in data.sources]
    if any(weights) and (not all(weights) or (data.streaming and len(weights) > 1)):
        which = "streamed datasets, which have no size" if all(weights) else "all datasets or none"
        yield f"datasets[{weights.index(True)}].weight is missing; accepted: a weight for {which}"
    if data.streaming and training.max_steps <= 0:
        yield "max_steps is missing; accepted with streaming: a number of steps above 0"
    for one, all_ in (("max_video_tokens", "batch_video_tokens"), ("max_length", "batch_text_tokens")):
        single, whole = getattr(data, one), getattr(data, all_)
        if whole is not None and (single is None or single > whole):
            yield f"{one} is {single}; accepted: at most {all_}, {whole}"
    rows = training.per_device_train_batch_size
    if data.packing and rows != 1:
        yield f"per_device_train_batch_size is {rows}; accepted with packing: 1 (a pack is a row)"
    if data.packing and data.batch_video_tokens is None and data.batch_text_tokens is None:
        yield "batch_video_tokens is missing; accepted with packing: a number above 0"
    if data.min_pixels and data.max_pixels and data.min_pixels > data.max_pixels:
        yield f"min_pixels is {data.min_pixels}; accepted: at most max_pixels, {data.max_pixels}"
    if data.max_frames is not None and data.max_frames < 2:
        yield f"max_frames is {data.max_frames}; accepted: a whole number of at least 2"
