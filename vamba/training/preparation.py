"""All that can be wrong with a run, found before the model is loaded: files, budgets, data, names of parameters.

What is unusual: the model is built on the meta device, without weights, to look at the names of its parameters; and
each source is read up to its first example that has something to learn and whose media can be opened and fit.
"""

import hashlib
import inspect
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig, TrainingArguments
from transformers.utils import is_bitsandbytes_available, logging

from vamba.checkpoint_folder import kind_of
from vamba.data import Collator, ConversationEncoder, ExampleError, Mixture, Source, TrainingStream, check_layout
from vamba.data.encoding import tokens_of_pixels
from vamba.data.stream import EXAMPLE_ERRORS, raise_fault
from vamba.errors import UserError, check_writable

from .agreement import agreed
from .distillation import teacher_mismatch
from .flops import FlopsModel
from .recipe import Recipe
from .strict import RecipeError
from .trainer import FINAL, UNFINISHED, last_checkpoint, read_position


# What the two stages of Vamba's paper train, as regular expressions of parameter names.
PRESETS = {
    "stage1": [r"\.cross_attn\.", r"\.video_encoder\.", r"\.alpha$"],
    "stage2": [r"\.visual\.merger\.", r"\.video_encoder\.", r"\.language_model\.", r"^lm_head\."],
    "all": [""],
    "lora": [],
}
PROBED = 16  # examples of a source that are tried before it is given up
logger = logging.get_logger(__name__)


@dataclass
class Prepared:
    """What `finetune` needs besides the weights."""

    recipe: Recipe
    arguments: TrainingArguments
    config: PreTrainedConfig
    processor: Any
    stream: TrainingStream
    checkpoint: Path | None
    flops: FlopsModel


def prepare(recipe: Recipe, resume: bool = False) -> Prepared:
    """Checks a recipe against the world.

    Args:
        resume: go on from the last whole checkpoint in `train.output_dir`; from the start if there is none.

    Raises:
        RecipeError: with the key and what is accepted. OSError: a file that cannot be read.
    """
    config = _load(AutoConfig, recipe.model.path, "model.path")
    _check_parameters(recipe, config)
    if recipe.distillation:
        teacher = _load(AutoConfig, recipe.distillation.teacher, "distillation.teacher")
        if mismatch := teacher_mismatch(teacher, config):
            raise RecipeError(f"distillation.teacher is {mismatch}")
    processor = _load(AutoProcessor, recipe.model.path, "model.path")
    encoder = _encoder(recipe, config, processor)
    _check_saving(recipe)
    flops = FlopsModel(config)  # before the arguments, which under ZeRO-3 have every new model's weights shared out
    arguments = _arguments(recipe)
    checkpoint = agreed(lambda: _checkpoint(recipe, resume), decided_by_main=True)
    mixture = agreed(lambda: _mixture(recipe, _data_seed(arguments)))
    fingerprints = agreed(lambda: [source.fingerprint for source in mixture.sources], decided_by_main=True)
    for source, fingerprint in zip(mixture.sources, fingerprints):
        source.fingerprint = fingerprint
    agreed(lambda: _check_sources(mixture, encoder), decided_by_main=True)
    stream = agreed(lambda: _stream(recipe, mixture, encoder, arguments, checkpoint))
    arguments.max_steps = agreed(lambda: _steps(recipe, arguments, stream), decided_by_main=True)
    return Prepared(recipe, arguments, config, processor, stream, checkpoint, flops)


def trainable_patterns(recipe: Recipe) -> list[str]:
    """Regular expressions of the names of the parameters that train (besides adapters)."""
    return PRESETS[recipe.trainable] if isinstance(recipe.trainable, str) else recipe.trainable


def _load(auto, path: str, key: str):
    try:
        kind_of(path)  # at once, where transformers would ask the Hub for half a minute about a mistyped folder
        return auto.from_pretrained(path)
    except UserError as error:
        raise RecipeError(f"{key}: {error}") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"{key} is {path}, no checkpoint that can be read: {' '.join(str(error).split())}") from error


def _check_parameters(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Do the patterns name parameters, and can this model do what is asked of it?"""
    if config.model_type not in ("vamba", "video_ma2mba"):
        raise RecipeError(
            f"model.path is {recipe.model.path}, a {config.model_type}; accepted: a vamba or a video_ma2mba, which "
            "`vamba convert` makes of published checkpoints"
        )
    if recipe.trainable in ("stage1", "stage2") and config.model_type != "vamba":
        raise RecipeError(
            f"trainable is {recipe.trainable}, made for a vamba and not a {config.model_type}; accepted: lora, all, or "
            "regular expressions of parameter names"
        )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    names = [name for name, _ in model.named_parameters()]
    patterns = [("trainable", pattern) for pattern in recipe.trainable] if isinstance(recipe.trainable, list) else []
    patterns += [(f"groups[{i}].pattern", group.pattern) for i, group in enumerate(recipe.groups)]
    for key, pattern in patterns:
        if not _matches(key, pattern, names):
            parts = sorted({".".join(name.split(".")[:2]) for name in names})
            raise RecipeError(f"{key}: {pattern!r} matches no parameter; accepted: names under {', '.join(parts)}")
    if recipe.data.packing and "packed_lengths" not in inspect.signature(model.forward).parameters:
        raise RecipeError(f"data.packing is true, which a {config.model_type} cannot; accepted: false")
    if recipe.lora:
        _check_lora(recipe, model)


def _check_lora(recipe: Recipe, model: nn.Module) -> None:
    if recipe.model.quantization and not is_bitsandbytes_available():
        raise RecipeError(f"model.quantization is {recipe.model.quantization}; accepted without bitsandbytes: null")
    linear = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    modules = [name for name, _ in model.named_modules()]
    for index, name in enumerate(recipe.lora.target_modules or ()):
        if name.split(".")[-1] not in linear:
            raise RecipeError(
                f"lora.target_modules[{index}] is {name!r}, no linear layer; accepted: {', '.join(sorted(linear))}"
            )
    for index, name in enumerate(recipe.lora.extra_modules):
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            raise RecipeError(f"lora.extra_modules[{index}] is {name!r}; accepted: a module such as {modules[1]}")


def _matches(key: str, pattern: str, names: list[str]) -> bool:
    try:
        return any(re.search(pattern, name) for name in names)
    except re.error as error:
        raise RecipeError(f"{key} is {pattern!r}; accepted: a regular expression ({error})") from error


def _encoder(recipe: Recipe, config: PreTrainedConfig, processor) -> ConversationEncoder:
    data = recipe.data
    least = tokens_of_pixels(processor.video_processor, data.min_pixels)
    if data.max_video_tokens is not None and data.max_video_tokens < least:
        raise RecipeError(
            f"data.max_video_tokens is {data.max_video_tokens}; accepted: at least {least}, two frames of the least "
            "size (data.min_pixels)"
        )
    names = ("fps", "max_frames", "min_pixels", "max_pixels", "max_video_tokens", "max_length")
    dtype = str(config.dtype).split(".")[-1] if recipe.model.dtype == "auto" else recipe.model.dtype
    return ConversationEncoder(
        processor,
        **{name: getattr(data, name) for name in names},
        pixel_dtype=torch.bfloat16 if dtype == "bfloat16" and recipe.train.get("bf16") else None,
    )


def _mixture(recipe: Recipe, seed: int) -> Mixture:
    """The opened sources."""
    data, sources = recipe.data, []
    for index, source in enumerate(data.train):
        key = f"data.train[{index}]"
        if source.media_root is not None and not Path(source.media_root).is_dir():
            raise RecipeError(f"{key}.media_root is {source.media_root}, no folder; accepted: a folder of media")
        try:
            opened = Source(
                source.path,
                split=source.split,
                name=source.name,
                revision=source.revision,
                data_files=source.data_files,
                streaming=data.streaming,
                media_root=source.media_root,
                shuffle=data.shuffle,
                seed=seed,
            )
        except (OSError, ValueError) as error:
            raise RecipeError(f"{key}.path: {' '.join(str(error).split())}") from error
        sources.append(opened)
    weights = [source.weight for source in data.train]
    return Mixture(sources, None if None in weights else weights)


def _check_sources(mixture: Mixture, encoder: ConversationEncoder) -> None:
    for index, source in enumerate(mixture.sources):
        _check_source(f"data.train[{index}]", source, encoder)


def _check_source(key: str, source: Source, encoder: ConversationEncoder) -> None:
    """Raises RecipeError if all examples of a source have nothing to say, or the first that do cannot be used."""
    silent, unusable, reason = 0, 0, "it is empty"
    for example in source.rows:
        try:
            encoder.check_text(example)
        except ExampleError as error:
            silent, reason = silent + 1, str(error)
            continue
        try:
            encoder.plan(example, source.media_root)
            return
        except EXAMPLE_ERRORS as error:
            raise_fault(error)
            unusable, reason = unusable + 1, " ".join(str(error).split())
        if unusable == PROBED:
            break
    if unusable:
        raise RecipeError(
            f"{key}.path is {source.path}, where none of the first {unusable} examples can be used (the last: "
            f"{reason}); accepted: media under {key}.media_root, {source.media_root}, within the limits of data"
        )
    raise RecipeError(
        f"{key}.path is {source.path}, where none of {silent} examples can be learnt from (the last: {reason}); "
        "accepted: `messages` or `conversations` with an assistant turn"
    )


def _checkpoint(recipe: Recipe, resume: bool) -> Path | None:
    output = Path(recipe.train["output_dir"])
    if output.exists() and not output.is_dir():
        raise RecipeError(f"train.output_dir is {output}, a file; accepted: a folder, new or empty")
    try:
        check_writable(output)
    except UserError as error:
        raise RecipeError(f"train.output_dir: {error}") from error
    checkpoint, results = last_checkpoint(output), [output / name for name in (FINAL, UNFINISHED)]
    if checkpoint is not None and not resume:
        raise RecipeError(
            f"train.output_dir is {output}, which holds {checkpoint.name}; accepted: another folder, or --resume"
        )
    if checkpoint is None and (result := next((path for path in results if path.exists()), None)):
        raise RecipeError(
            f"train.output_dir is {output}, which holds {result.name}, a trained model, and no checkpoint to go on "
            "from; accepted: another folder, or this one without it"
        )
    return checkpoint


def _check_saving(recipe: Recipe) -> None:
    half = recipe.train.get("bf16") or recipe.train.get("fp16")
    if recipe.model.dtype in ("bfloat16", "float16") and not half and recipe.lora is None:
        raise RecipeError(
            f"model.dtype is {recipe.model.dtype} while nothing computes in half precision; accepted: float32, or "
            "train.bf16: true"
        )
    if recipe.train.get("push_to_hub") and recipe.lora is not None and not recipe.lora.merge:
        raise RecipeError("lora.merge is false; accepted with train.push_to_hub: true")


def _arguments(recipe: Recipe) -> TrainingArguments:
    """`TrainingArguments` with what the recipe decides; on several GPUs one process works with one of them."""
    # Trainer would write `use_cache: false` into the trained model's configuration; steps say so by themselves
    values = {"report_to": "none", "ddp_find_unused_parameters": True, "use_cache": True, **recipe.train}
    for name in ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_token"):
        values.pop(name, None)  # `finetune` uploads by itself, with code and card
    if not values.get("dataloader_num_workers"):
        values.pop("dataloader_prefetch_factor", None)  # without workers nothing is fetched ahead
    try:
        arguments = TrainingArguments(**values, remove_unused_columns=False, ignore_data_skip=True)
    except (ValueError, ImportError, TypeError) as error:
        raise RecipeError(f"train: {' '.join(str(error).split())}") from error
    arguments._n_gpu = min(arguments.n_gpu, 1)  # with several, Trainer would cut a batch's patches anywhere
    arguments.logging_nan_inf_filter = False  # such a loss stops the run
    if recipe.global_batch_size is not None:
        rows = arguments.per_device_train_batch_size * arguments.world_size
        if recipe.global_batch_size % rows:
            raise RecipeError(
                f"global_batch_size is {recipe.global_batch_size}; accepted: a multiple of {rows} "
                "(train.per_device_train_batch_size x processes)"
            )
        arguments.gradient_accumulation_steps = recipe.global_batch_size // rows
    if recipe.checkpointing != "none":  # with multi_axis that of the layers outside the cells, which is the text's
        arguments.activation_checkpointing = True
        arguments.activation_checkpointing_kwargs = {"use_reentrant": False}
    return arguments


def _stream(recipe: Recipe, mixture, encoder, arguments: TrainingArguments, checkpoint: Path | None) -> TrainingStream:
    data, rank, world = recipe.data, arguments.process_index, arguments.world_size
    rows = None if data.packing else arguments.per_device_train_batch_size
    order = hashlib.sha256(repr((data, rows, _data_seed(arguments))).encode()).hexdigest()
    position = None if checkpoint is None else read_position(checkpoint, rank)
    stream = TrainingStream(
        mixture,
        Collator(encoder, packing=data.packing),
        rows=rows,
        max_video_tokens=data.batch_video_tokens,
        max_text_tokens=data.batch_text_tokens,
        on_error=data.on_error,
        seed=_data_seed(arguments),
        order=order,
        rank=rank,
        world_size=world,
        position=position,
    )
    if position is not None:
        check_layout(position, max(1, arguments.dataloader_num_workers), stream)
    return stream


def _data_seed(arguments: TrainingArguments) -> int:
    return arguments.seed if arguments.data_seed is None else arguments.data_seed


def _steps(recipe: Recipe, arguments: TrainingArguments, stream: TrainingStream) -> int:
    """Steps that see every example `num_train_epochs` times, where the recipe does not say how many."""
    given, world = arguments.max_steps, arguments.world_size
    if recipe.data.streaming:
        if given > 0:
            return given
        raise RecipeError("train.max_steps is missing; accepted with data.streaming: a number of steps above 0")
    taken = world * arguments.gradient_accumulation_steps  # batches of a step
    if given > 0:  # as many as there may be, as counting them would open many videos
        batches = stream.epoch / (stream.rows or 1)
    else:
        batches = stream.batches_per_epoch(world * max(1, arguments.dataloader_num_workers))
    if round(taken / batches, 6) > 1:
        logger.warning(
            f"A step takes {taken} batches, and all data make {batches:.3g}: it sees examples more than once. Lower "
            "global_batch_size or train.gradient_accumulation_steps, or give more data."
        )
    if given > 0:
        return given
    steps = max(1, math.ceil(round(arguments.num_train_epochs * batches / taken, 6)))
    logger.info(f"{arguments.num_train_epochs} epochs are about {steps} steps")
    return steps
