"""The model of a run: checks that need no weights, then the weights, what of them trains, adapters, and the teacher.

What is unusual: the model is first built on the meta device, without weights, to look at the names of its parameters.
Weights that train are float32 whatever `dtype` says (small steps would be lost in bfloat16) and the rest stay as they
are loaded; `bf16` computes in bfloat16 all the same.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed
from transformers.utils import is_bitsandbytes_available

from vamba.checkpoint_folder import KINDS, kind_of
from vamba.errors import UserError
from vamba.loading import load_config, load_processor, quantization, skeleton
from vamba.loading import load_model as load_whole_model

from .arguments import ModelArguments, Recipe, RecipeError
from .distillation import teacher_mismatch


# What `trainable` may say instead of regular expressions: what the two stages of Vamba's paper train, and all.
PRESETS = {
    "stage1": [r"\.cross_attn\.", r"\.video_encoder\.", r"\.alpha$"],
    "stage2": [r"\.visual\.merger\.", r"\.video_encoder\.", r"\.language_model\.", r"^lm_head\."],
    "all": [""],
}
# Attention, MLP and Mamba projections of the language model and the video encoder, as a regular expression.
ADAPTED = r"(?!.*\bvisual\.).*\.([qkvo]_proj|gate_proj|up_proj|down_proj|in_proj|out_proj)"
_FSDP_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # in the environment, where accelerate sets it


def check_model(recipe: Recipe) -> tuple[PreTrainedConfig, Any]:
    """Configuration and processor of the model, which can do what the recipe asks of it.

    Raises:
        RecipeError: it cannot, or there is none, or names of parameters, layers or the teacher are wrong.
    """
    path, teacher = recipe.model.model_name_or_path, recipe.model.teacher_model_name_or_path
    with _naming("model_name_or_path"):
        if (kind := kind_of(path)) not in KINDS:
            raise RecipeError(
                f"model_name_or_path is {path}, a {kind}; accepted: a vamba or a video_ma2mba, which `vamba convert` "
                "makes of published checkpoints"
            )
        config = load_config(path)
        if mistake := next(_mistakes(recipe, skeleton(config, path)), None):
            raise RecipeError(mistake)
    if teacher:
        with _naming("teacher_model_name_or_path"):
            if mismatch := teacher_mismatch(load_config(teacher, any_kind=True), config):
                raise RecipeError(f"teacher_model_name_or_path is {mismatch}")
    with _naming("model_name_or_path"):
        return config, load_processor(path, config)


def trainable_patterns(chosen: ModelArguments) -> list[str]:
    """Regular expressions of the names of the parameters that train (besides adapters)."""
    if chosen.use_lora:
        return []
    return PRESETS.get(chosen.trainable[0], chosen.trainable) if len(chosen.trainable) == 1 else chosen.trainable


def load_model(recipe: Recipe) -> nn.Module:
    """The weights, with what trains, and how the backward pass saves memory."""
    chosen, arguments = recipe.model, recipe.training
    torch.manual_seed(arguments.seed)  # adapters start from random numbers
    options: dict[str, Any] = {}
    if chosen.attn_implementation is not None:
        options["attn_implementation"] = chosen.attn_implementation
    if chosen.load_in_4bit or chosen.load_in_8bit:
        options["quantization_config"] = quantization(chosen.load_in_4bit, chosen.load_in_8bit)
    model = load_whole_model(chosen.model_name_or_path, dtype=chosen.dtype, **options)
    if arguments.multi_axis_checkpointing:
        model.enable_multi_axis_checkpointing("auto", "auto", offload=arguments.multi_axis_offload)
    if chosen.use_lora:
        return _add_adapters(model, chosen)
    patterns = trainable_patterns(chosen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(re.search(pattern, name) for pattern in patterns))
        # DeepSpeed keeps float32 copies of what trains by itself, and wants one dtype of all weights
        if parameter.requires_grad and arguments.deepspeed_plugin is None:
            parameter.data = parameter.data.float()
    return model


def load_teacher(path: str, dtype: str) -> PreTrainedModel:
    """The teacher with its weights on the CPU; it moves to where the first batch is.

    It is whole in every process: nothing gathers what ZeRO-3 would share out or FSDP would load on the main process
    only, as the Trainer knows of the student alone.
    """
    shared, loading = deepspeed._hf_deepspeed_config_weak_ref, os.environ.pop(_FSDP_LOADING, None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        return load_whole_model(path, any_kind=True, dtype=dtype)
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = shared
        if loading is not None:
            os.environ[_FSDP_LOADING] = loading


@contextmanager
def _naming(key: str) -> Iterator[None]:
    """Makes a UserError one about the recipe's `key`."""
    try:
        yield
    except RecipeError:
        raise
    except UserError as error:
        raise RecipeError(f"{key}: {error}") from error


def _mistakes(recipe: Recipe, skeleton: PreTrainedModel) -> Iterator[str]:
    """What this model cannot do, and names of parameters and layers that it does not have."""
    chosen, data, kind = recipe.model, recipe.data, skeleton.config.model_type
    if kind != "vamba" and chosen.trainable[0] in ("stage1", "stage2"):
        accepted = "lora, all, or regular expressions of parameter names"
        yield f"trainable is {chosen.trainable[0]}, made for a vamba and not a {kind}; accepted: {accepted}"
    if kind != "vamba" and data.packing:
        yield f"packing is true, which a {kind} cannot; accepted: false"
    for key in ("min_pixels", "max_pixels"):
        if kind == "video_ma2mba" and getattr(data, key) is not None:
            yield f"{key} is {getattr(data, key)}, but a {kind} has frames of one size; leave it out"
    names = [name for name, _ in skeleton.named_parameters()]
    parts = "names under " + ", ".join(sorted({".".join(name.split(".")[:2]) for name in names}))
    known = {"trainable": f"{', '.join(PRESETS)}, lora or {parts}", "learning_rates": parts}
    patterns = {"trainable": trainable_patterns(chosen), "learning_rates": recipe.training.learning_rates or ()}
    for key, pattern in ((key, pattern) for key, all_ in patterns.items() for pattern in all_):
        try:
            if not any(re.search(pattern, name) for name in names):
                yield f"{key}: {pattern!r} matches no parameter; accepted: {known[key]}"
        except re.error as error:
            yield f"{key} is {pattern!r}; accepted: a regular expression ({error})"
    if (chosen.load_in_4bit or chosen.load_in_8bit) and not is_bitsandbytes_available():
        yield "load_in_4bit and load_in_8bit need bitsandbytes; install it, or leave them out"
    modules = dict(skeleton.named_modules())
    linear = sorted({name.split(".")[-1] for name, module in modules.items() if isinstance(module, nn.Linear)})
    for name in chosen.lora_target_modules or ():
        if name.split(".")[-1] not in linear:
            yield f"lora_target_modules has {name!r}, no linear layer; accepted: {', '.join(linear)}"
    for name in chosen.lora_modules_to_save or ():
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            yield f"lora_modules_to_save has {name!r}, no module; accepted: one such as {list(modules)[1]}"


def _add_adapters(model: PreTrainedModel, chosen: ModelArguments) -> nn.Module:
    """peft's LoRA on the linear layers that the recipe names."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if chosen.load_in_4bit or chosen.load_in_8bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        r=chosen.lora_r,
        lora_alpha=chosen.lora_alpha,
        lora_dropout=chosen.lora_dropout,
        target_modules=ADAPTED if chosen.lora_target_modules is None else chosen.lora_target_modules,
        modules_to_save=chosen.lora_modules_to_save,
    )
    return get_peft_model(model, config)
