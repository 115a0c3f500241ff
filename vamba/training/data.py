"""The data of a run: sources opened and looked at, an encoder for the model, and the stream of batches.

What is unusual: each source is read up to its first example that has something to learn and whose media can be opened
and fit, so that wrong paths and budgets are met before the model is loaded.
"""

import hashlib
import math
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from vamba.agreement import agreed
from vamba.data import (
    Collator,
    ConversationEncoder,
    ExampleError,
    Mixture,
    Source,
    TrainingStream,
    check_layout,
)
from vamba.data.conversations import URL
from vamba.data.encoding import tokens_of_pixels
from vamba.data.stream import reason_to_skip
from vamba.errors import UserError
from vamba.evaluation.asking import check_reading_by
from vamba.evaluation.protocols import PROTOCOLS
from vamba.evaluation.questions import Question, read_questions

from .arguments import DataArguments, DatasetArguments, Recipe, RecipeError, VambaTrainingArguments
from .checkpoints import read_position
from .evaluation import Evaluation


PROBED = 16  # examples of a source that are tried before it is given up
logger = logging.get_logger(__name__)


def open_data(recipe: Recipe, config: PreTrainedConfig, processor, checkpoint: Path | None) -> TrainingStream:
    """The batches from where `checkpoint` was saved; `max_steps` of the arguments are known then.

    Raises:
        RecipeError: a budget is impossible, a source cannot be opened or used, or `checkpoint` was saved in other data.
    """
    data, arguments = recipe.data, recipe.training
    encoder = _make_encoder(recipe, config, processor)
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    mixture = agreed(lambda: _open_mixture(data, seed))
    fingerprints = agreed(lambda: [source.fingerprint for source in mixture.sources], decided_by_main=True)
    for source, fingerprint in zip(mixture.sources, fingerprints):
        source.fingerprint = fingerprint
    for index, source in enumerate(mixture.sources):
        agreed(partial(_check_source, f"datasets[{index}]", source, encoder), decided_by_main=True)
    position = agreed(lambda: None if checkpoint is None else read_position(checkpoint, arguments.process_index))
    rows = None if data.packing else arguments.per_device_train_batch_size
    stream = TrainingStream(
        mixture,
        Collator(encoder, packing=data.packing),
        rows=rows,
        max_video_tokens=data.batch_video_tokens,
        max_text_tokens=data.batch_text_tokens,
        on_error=data.on_error,
        seed=seed,
        order=hashlib.sha256(repr((data, rows, seed)).encode()).hexdigest(),
        rank=arguments.process_index,
        world_size=arguments.world_size,
        position=position,
    )
    if position is not None:
        agreed(lambda: check_layout(position, max(1, arguments.dataloader_num_workers), stream))
    arguments.max_steps = agreed(lambda: _count_steps(data, arguments, stream), decided_by_main=True)
    return stream


def _make_encoder(recipe: Recipe, config: PreTrainedConfig, processor) -> ConversationEncoder:
    """Examples to inputs of the model, within the recipe's limits."""
    data = recipe.data
    least = tokens_of_pixels(processor.video_processor, data.min_pixels)
    if data.max_video_tokens is not None and data.max_video_tokens < least:
        raise RecipeError(
            f"max_video_tokens is {data.max_video_tokens}; accepted: at least {least}, two frames of the least size "
            "(min_pixels)"
        )
    dtype = str(config.dtype).split(".")[-1] if recipe.model.dtype == "auto" else recipe.model.dtype
    names = ("fps", "max_frames", "min_pixels", "max_pixels", "max_video_tokens", "max_length", "allow_urls")
    options = {name: getattr(data, name) for name in names}
    if options["max_length"] is None:  # a text that no position is left for could only end the run
        options["max_length"] = getattr(config.text_config, "max_position_embeddings", None)
    return ConversationEncoder(
        processor,
        **options,
        pixel_dtype=torch.bfloat16 if dtype == "bfloat16" and recipe.training.bf16 else None,
    )


def open_evaluation(recipe: Recipe, config: PreTrainedConfig, processor) -> Evaluation | None:
    """What is evaluated while training, within the limits of training; None for nothing.

    Raises:
        RecipeError: data or questions cannot be opened or used, or no video can be read as the protocol says.
    """
    data, arguments = recipe.data, recipe.training
    if arguments.eval_strategy == "no":
        return None
    encoder = _make_encoder(recipe, config, processor)
    sources = agreed(lambda: _open_sources("eval_datasets", data.eval_sources, shuffle=False))
    for index, source in enumerate(sources):
        agreed(partial(_check_source, f"eval_datasets[{index}]", source, encoder), decided_by_main=True)
    given = "per_device_eval_batch_size" in recipe.given  # or as many as in training, as they take much memory
    rows = arguments.per_device_eval_batch_size if given else arguments.per_device_train_batch_size
    streams = {
        name: TrainingStream(
            Mixture([source]),
            Collator(encoder, packing=data.packing),
            rows=None if data.packing else rows,
            max_video_tokens=data.batch_video_tokens,
            max_text_tokens=data.batch_text_tokens,
            on_error=data.on_error,
            rank=arguments.process_index,
            world_size=arguments.world_size,
            once=True,
        )
        for name, source in zip(data.eval_names, sources)
    }
    sampling = {name: getattr(data, name) for name in ("fps", "max_frames", "min_pixels", "max_pixels")}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    protocol = PROTOCOLS[data.eval_protocol]
    protocol = replace(protocol, reading=protocol.reading or sampling)
    questions = agreed(lambda: _read_questions(data))
    if questions:
        try:
            check_reading_by(processor, protocol.reading)
        except UserError as error:
            raise RecipeError(f"eval_protocol is {protocol.name}: {error}") from error
    return Evaluation(streams, questions, protocol, data.allow_urls)


def _read_questions(data: DataArguments) -> list[Question]:
    if data.eval_questions is None:
        return []
    try:
        questions = read_questions(data.eval_questions)
    except UserError as error:
        raise RecipeError(f"eval_questions: {error}") from error
    if all(question.answer is None for question in questions):
        raise RecipeError(f"eval_questions is {data.eval_questions}, where no answer is known; accepted: with answers")
    videos = [video for question in questions for video in question.videos]
    if not any(URL.match(video) or os.path.exists(video) for video in videos):
        raise RecipeError(
            f"eval_questions is {data.eval_questions}, none of whose videos is there (the first: {videos[0]}); "
            "accepted: absolute paths, or such as start from the folder of that file"
        )
    return questions


def _open_mixture(data: DataArguments, seed: int) -> Mixture:
    options = {"streaming": data.streaming, "shuffle": data.shuffle, "seed": seed}
    weights = [entry.weight for entry in data.sources if entry.weight is not None]  # of all or none
    return Mixture(_open_sources("datasets", data.sources, **options), weights or None)


def _open_sources(key: str, entries: list[DatasetArguments], **how: Any) -> list[Source]:
    sources = []
    for index, entry in enumerate(entries):
        if entry.media_root is not None and not Path(entry.media_root).is_dir():
            raise RecipeError(
                f"{key}[{index}].media_root is {entry.media_root}, no folder; accepted: a folder of media"
            )
        options = {name: value for name, value in vars(entry).items() if name != "weight"}
        try:
            sources.append(Source(**options, **how))
        except (OSError, ValueError) as error:
            raise RecipeError(f"{key}[{index}]: {' '.join(str(error).split())}") from error
    return sources


def _check_source(key: str, source: Source, encoder: ConversationEncoder) -> None:
    """Raises RecipeError if no example says anything, or the first that do cannot be used."""
    tried, unusable, reason = 0, 0, "it is empty"
    for example in source.examples():
        tried, says_something = tried + 1, False
        try:
            if isinstance(example, ExampleError):
                raise example
            encoder.check_text(example)
            says_something = True
            encoder.plan(example, source.media_root)
            return
        except Exception as error:
            unusable, reason = unusable + says_something, reason_to_skip(error)
        if unusable == PROBED:
            break
    raise RecipeError(
        f"{key} is {source.path}, where none of the first {tried} examples can be learnt from (the last: {reason}); "
        f"accepted: `messages` or `conversations` with an assistant turn, and media under {key}.media_root, "
        f"{source.media_root}, within the recipe's limits"
    )


def _count_steps(data: DataArguments, arguments: VambaTrainingArguments, stream: TrainingStream) -> int:
    """Steps that see every example `num_train_epochs` times, where the recipe does not say how many."""
    given, world = arguments.max_steps, arguments.world_size
    if data.streaming:
        return given
    taken = world * arguments.gradient_accumulation_steps  # batches of a step
    if given > 0:  # as many as there may be, as counting them would open many videos
        batches = stream.epoch / (stream.rows or 1)
    else:
        batches = stream.batches_per_epoch(world * max(1, arguments.dataloader_num_workers))
    if round(taken / batches, 6) > 1:
        logger.warning(
            f"A step takes {taken} batches, and all data make {batches:.3g}: it sees examples more than once. Lower "
            "global_batch_size or gradient_accumulation_steps, or give more data."
        )
    if given > 0:
        return given
    steps = max(1, math.ceil(round(arguments.num_train_epochs * batches / taken, 6)))
    logger.info(f"{arguments.num_train_epochs} epochs are about {steps} steps")
    return steps
