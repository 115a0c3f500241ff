"""Configuration, processor and model of a checkpoint, checked before they are used: the one door to them.

What is unusual: a file may be anyone's, and what a damaged one raises inside transformers is without number. Here all
of it becomes a UserError that names the file. transformers only warns of weights that are missing, and leaves random
ones in their place; here names, shapes and dtypes in the headers are compared with a model on the meta device before a
weight is read, and the weights are looked through for NaN and infinity afterwards (16 GB/s on a CPU).
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.integrations import deepspeed
from transformers.utils import is_bitsandbytes_available

from .checkpoint_folder import CONFIG, KINDS, check_kind, checkpoint_folder, kind_of, read_json
from .errors import UserError, opening, reason_of
from .modeling.configuration_vamba import EARLIER_FORMAT, EARLIER_KEYS
from .weight_files import BIN, INDEX, NAMES, SINGLE, CheckpointError, open_checkpoint, raise_problems


REMEDY = " Fetch the checkpoint again, or convert it again."
FLOATS = (*NAMES, torch.float64, "F64")
VISION_SIZES = ("patch_size", "temporal_patch_size", "spatial_merge_size")
# Of generation_config.json and of what `generate` is told: from the least to the greatest value.
COUNT, SHARE = (0, 2**24), (0, 1)
GENERATION_BOUNDS = {
    **dict.fromkeys(("max_length", "max_new_tokens", "num_beams", "num_return_sequences"), (1, 2**24)),
    **dict.fromkeys(("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size"), COUNT),
    **dict.fromkeys(("temperature", "repetition_penalty"), (0, 1e6)),
    "length_penalty": (-1e6, 1e6),
    "max_time": (0, 1e9),
    **dict.fromkeys(("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"), SHARE),
}
WHOLE = {name for name, bounds in GENERATION_BOUNDS.items() if bounds[1] == 2**24}
SPECIAL_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
TEXT_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SWITCHES = ("do_sample", "use_cache", "output_scores", "output_hidden_states", "return_dict_in_generate")


@contextmanager
def reading(what: str, remedy: str = REMEDY) -> Iterator[None]:
    """Makes whatever the content of a file raises in the block a UserError; `what` names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the values of a file raise anything, from anywhere in transformers
        raise UserError(f"{what}: {reason_of(error)}.{remedy}") from error


def load_config(path: str | os.PathLike, *, any_kind: bool = False) -> PreTrainedConfig:
    """The configuration of a checkpoint folder or Hub id.

    Raises:
        UserError: no checkpoint, not one of ours (unless of `any_kind`), or a config.json that no model can be built
            from.
    """
    path = os.fspath(path)
    kind_of(path) if any_kind else check_kind(path)
    with reading(str(folder := checkpoint_folder(path) / CONFIG)):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        for name in config.sub_configs:
            if not isinstance(kind := getattr(getattr(config, name), "model_type", ""), str):
                raise UserError(f"{folder}: {name}.model_type is {kind!r:.80}; it must be a text.")
        dtype = config.dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise UserError(f"{folder}: dtype is {dtype}; it must be float32, bfloat16 or float16.")
        if config.model_type in KINDS:
            check_consistency(config)
        return config


def check_consistency(config: PreTrainedConfig) -> None:
    """Raises ValueError for values of a configuration that do not go together, of which a checkpoint has none.

    Each of them is within its bounds, or the configuration itself would have refused it.
    """
    text, vision = config.text_config, config.vision_config
    width = "embed_dim" if hasattr(vision, "embed_dim") else "hidden_size"
    if heads := getattr(vision, "num_attention_heads", None) or getattr(vision, "num_heads", None):
        rotary = 4 if width == "embed_dim" else 1  # rows and columns of a frame turn two numbers of a head each
        name = f"{rotary} times its number of heads"
        check_divides(name, rotary * heads, f"vision_config.{width}", getattr(vision, width))
    check_token_ids(config, SPECIAL_IDS, text.vocab_size)
    check_token_ids(text, TEXT_IDS, text.vocab_size)
    if config.model_type == "vamba":
        check_divides("num_attention_heads", text.num_attention_heads, "hidden_size", text.hidden_size)
        check_divides("num_key_value_heads", text.num_key_value_heads, "num_attention_heads", text.num_attention_heads)
        check_divides("2", 2, "hidden_size / num_attention_heads", text.hidden_size // text.num_attention_heads)
        check_rope_sections(text)


def check_divides(name: str, value: int, whole_name: str, whole: int) -> None:
    """Raises ValueError unless `whole` is a multiple of `value`."""
    if whole % value:
        raise ValueError(f"{whole_name} is {whole}; it must be a multiple of {name}, which is {value}.")


def check_rope_sections(config: PreTrainedConfig) -> None:
    """Raises ValueError unless time, height and width share out all rotary frequencies, as reading any text needs."""
    sections = config.rope_parameters.get("mrope_section", [16, 24, 24])  # Qwen2-VL's default
    half = config.hidden_size // config.num_attention_heads // 2
    whole = isinstance(sections, (list, tuple)) and all(type(part) is int and part >= 0 for part in sections)
    if not whole or len(sections) != 3 or sum(sections) != half:
        raise ValueError(
            f"rope_parameters['mrope_section'] is {sections!r:.80}; it must be three numbers that add up to half of "
            f"hidden_size / num_attention_heads, {half}."
        )


def check_token_ids(config: Any, names: tuple[str, ...], vocab_size: int, least: int = -1) -> None:
    """Raises ValueError for an id of a token beyond the vocabulary, unless it was just not said for a small one; -1 is
    the field's word for none."""
    for name in names:
        value = getattr(config, name, None)
        if value is None or value == getattr(type(config), name, None):
            continue
        for token in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(token, bool) or not isinstance(token, int) or not least <= token < vocab_size:
                raise ValueError(f"{name} is {value!r:.80}; it must be from 0 to {vocab_size - 1} (vocab_size - 1)")


@contextmanager
def whole_models() -> Iterator[None]:
    """Within, each process makes whole models for itself, although ZeRO-3 shares out the weights of new ones."""
    shared = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = shared


def skeleton(config: PreTrainedConfig, where: str = "config.json") -> PreTrainedModel:
    """The model without weights, on the meta device. Raises UserError where it cannot be built."""
    with reading(where), whole_models(), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=False)


def expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of our checkpoint, in the model's order, asked from the model without allocating it."""
    shapes = {key: tuple(tensor.shape) for key, tensor in skeleton(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def check_weights(folder: Path, config: PreTrainedConfig) -> None:
    """Compares the headers of the files of weights with what the model expects; reads no weight.

    Raises:
        CheckpointError: a UserError that names the first missing, unknown or misshaped tensors, or the damaged file.
    """
    specs, index = open_checkpoint(folder).specs, folder / INDEX
    if not (folder / SINGLE).is_file() and index.is_file() and not isinstance(read_json(index).get("metadata"), dict):
        raise CheckpointError(f"{index} has no metadata, which transformers asks for.{REMEDY}")
    if getattr(config, "quantization_config", None) is not None:
        return  # its tensors have names and shapes of their own
    if any(map(EARLIER_KEYS.search, specs)):
        raise CheckpointError(EARLIER_FORMAT)
    expected = expected_shapes(config)
    shapes = {key: (list(specs[key].shape), list(expected[key])) for key in specs.keys() & expected}
    problems = {
        "missing tensors": expected.keys() - specs.keys(),
        "unknown tensors": specs.keys() - expected.keys(),
        "wrongly shaped tensors": [
            f"{key} is {is_}, must be {must}" for key, (is_, must) in shapes.items() if is_ != must
        ],
        "tensors that are no floats": [
            f"{key} is {spec.dtype}" for key, spec in specs.items() if spec.dtype not in FLOATS
        ],
    }
    raise_problems(str(folder), problems, REMEDY)


def load_model(path: str | os.PathLike, *, any_kind: bool = False, **options: Any) -> PreTrainedModel:
    """`AutoModelForImageTextToText.from_pretrained(path, **options)`, every weight of which comes from the checkpoint.

    Raises:
        UserError: see `load_config` and `check_weights`; a weight is NaN or infinite.
    """
    config, folder = load_config(path, any_kind=any_kind), checkpoint_folder(os.fspath(path))
    if (folder / "adapter_config.json").is_file():  # of which transformers would load the base model instead
        raise UserError(
            f"{path} holds both config.json and adapter_config.json; keep the adapter in a folder of its own."
        )
    if config.model_type in KINDS and (
        Path(path).is_dir() or any((folder / name).is_file() for name in (SINGLE, INDEX, BIN))
    ):  # those on the Hub may not have been fetched yet
        check_weights(folder, config)
    check_generation_file(folder, config)
    quantized = options.get("quantization_config")
    if getattr(quantized, "load_in_4bit", False) and not torch.accelerator.is_available():
        quantized.llm_int8_skip_modules = ["lm_head", *_unfit_for_cpus(config)]
    with opening(path):
        model, report = AutoModelForImageTextToText.from_pretrained(
            path, output_loading_info=True, trust_remote_code=False, **options
        )
    mismatched = [str(key) for key in report.get("mismatched_keys", ())]
    raise_problems(str(path), {"missing tensors": report["missing_keys"], "wrong tensors": mismatched}, REMEDY)
    check_finite(model, path)
    return model


def quantization(load_in_4bit: bool = False, load_in_8bit: bool = False) -> BitsAndBytesConfig | None:
    """How bitsandbytes is to quantise the weights; None if not at all.

    Raises:
        UserError: both are asked for, or bitsandbytes is not installed.
    """
    if not load_in_4bit and not load_in_8bit:
        return None
    if load_in_4bit and load_in_8bit:
        raise UserError("load_in_8bit is true beside load_in_4bit; give one of them.")
    if not is_bitsandbytes_available():
        raise UserError("load_in_4bit and load_in_8bit need bitsandbytes; install it, or leave them out.")
    return BitsAndBytesConfig(
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _unfit_for_cpus(config: PreTrainedConfig) -> list[str]:
    """Names of layers of which bitsandbytes has no 4 bits on a CPU, as its kernels there take whole blocks only.

    Of the 7B these are the `in_proj`, with their 14,704 rows.
    """
    layers = {name: layer for name, layer in skeleton(config).named_modules() if isinstance(layer, nn.Linear)}
    return [name for name, layer in layers.items() if layer.out_features % 32 or layer.in_features % 64]


def merge_adapter(model: PreTrainedModel, path: str | os.PathLike) -> PreTrainedModel:
    """The model with a PEFT adapter added to its weights.

    Raises:
        UserError: the adapter is damaged, incomplete, or one of another model.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    with opening(path), reading(f"{path} holds no adapter that can be read", " Save or fetch it again."):
        weights = load_peft_weights(os.fspath(path), device="cpu")
        if any(map(EARLIER_KEYS.search, weights)):
            raise UserError(
                f"{path} is an adapter of a Vamba in the earlier format: merge it with the version of vamba that "
                "made it, and give what `vamba convert` makes of the merged model."
            )
        with warnings.catch_warnings():  # of the keys that are missing, which are an error here
            warnings.simplefilter("ignore")
            # on the meta device first, as the ranks in adapter_config.json may be any numbers
            adapted = PeftModel.from_pretrained(model, os.fspath(path), low_cpu_mem_usage=True)
        expected = get_peft_model_state_dict(adapted)
        problems = {
            "missing tensors": expected.keys() - weights.keys(),
            "unknown tensors": weights.keys() - expected.keys(),
        }
        raise_problems(str(path), problems, " Save or fetch it again.", "adapter_config.json")
        merged = adapted.merge_and_unload()
    check_finite(merged, path)
    return merged


def check_finite(model: nn.Module, path: str | os.PathLike) -> None:
    """Raises UserError that names weights that are NaN or infinite; quantized and absent ones are passed by."""
    extremes: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, weight in model.state_dict().items():
        if weight.dtype in FLOATS and weight.numel() and not weight.is_meta:
            extremes.setdefault(weight.device, {})[name] = torch.stack(torch.aminmax(weight.detach())).float()
    for of_device in extremes.values():
        finite = torch.stack(list(of_device.values())).isfinite().all(1).tolist()  # one wait for the device
        if bad := [name for name, is_finite in zip(of_device, finite) if not is_finite]:
            raise UserError(f"{path}: {len(bad)} weights are NaN or infinite: {', '.join(bad[:5])}.{REMEDY}")


def check_generation_file(folder: Path, config: PreTrainedConfig) -> None:
    """Raises UserError for a generation_config.json, where there is one, with values that `generate` cannot use."""
    if (file := folder / "generation_config.json").exists():
        values = read_json(file)
        with reading(str(file)):
            check_generation(SimpleNamespace(**values), config.get_text_config().vocab_size)
            GenerationConfig.from_dict(dict(values)).validate()


def check_generation(generation: GenerationConfig | SimpleNamespace, vocab_size: int) -> None:
    """Raises ValueError for the first number, switch or token that `generate` cannot use, whatever is asked of it."""
    for name, (low, high) in GENERATION_BOUNDS.items():
        value = getattr(generation, name, None)
        kind, said = (int, "whole number") if name in WHOLE else ((int, float), "number")
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high):
            raise ValueError(f"{name} is {value!r:.80}; it must be a {said} from {low:g} to {high:g}")
    for name in SWITCHES:
        if (value := getattr(generation, name, None)) not in (None, False, True):
            raise ValueError(f"{name} is {value!r:.80}; it must be true or false")
    ids = {name: getattr(generation, name, None) for name in (*TEXT_IDS, "decoder_start_token_id")}
    ids = {name: value.tolist() if torch.is_tensor(value) else value for name, value in ids.items()}
    check_token_ids(SimpleNamespace(**ids), tuple(ids), vocab_size, least=0)


def load_processor(path: str | os.PathLike, config: PreTrainedConfig) -> ProcessorMixin:
    """The processor of a checkpoint, which suits a model of this configuration.

    Raises:
        UserError: there is none, a file of it is damaged, or it was made for another model.
    """
    where = f"{path} holds no processor and tokenizer that can be read"
    with opening(path), reading(where, " Copy the processor's and the tokenizer's files there."):
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
        words = processor.tokenizer.get_vocab()
    text = config.get_text_config()
    if (largest := max(words.values())) >= text.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has a word {largest}, and the model {text.vocab_size} words from 0 on.{REMEDY}"
        )
    for side in ("start", "end"):
        token, expected = f"<|vision_{side}|>", getattr(config, f"vision_{side}_token_id")
        if words.get(token) != expected:
            raise UserError(
                f"{path}: {token} is {words.get(token)} in the tokenizer, {expected} in config.json.{REMEDY}"
            )
    for part in ("image_processor", "video_processor"):
        with reading(f"{path}: the {part} cannot be used"):
            _check_media_processor(getattr(processor, part), part, config)
    if processor.chat_template is not None:
        with reading(f"{path}: the chat template cannot be used"):
            content = [{"type": "video"}, {"type": "text", "text": "Hello"}]
            text = processor.apply_chat_template([{"role": "user", "content": content}])
            if not text.find("<|vision_start|>") < text.find("Hello") or "<|vision_start|>" not in text:
                raise UserError(
                    f"{path}: the chat template leaves out the video or the question; copy that of its origin."
                )
    with reading(f"{path}: the tokenizer cannot be used"):
        processor.tokenizer.decode(processor.tokenizer("Hello")["input_ids"])
    return processor


def _check_media_processor(processor, name: str, config: PreTrainedConfig) -> None:
    """Raises ValueError for sizes other than the model's, or anything else where a small black frame is too much."""
    for size in VISION_SIZES:
        value, must = getattr(processor, size.removeprefix("spatial_")), getattr(config.vision_config, size)
        if value != must:
            raise ValueError(f"its {size} is {value!r:.80}, the model's {must}")
    least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
    if not all(type(area) is int for area in (least, most)) or not 1 <= least <= most <= 2**40 or least > 2**24:
        raise ValueError(
            f"its size is {dict(processor.size)!r:.120}; it must be two numbers of pixels, least and greatest"
        )
    side = processor.patch_size * processor.merge_size
    black = torch.zeros(processor.temporal_patch_size, 3, side, side, dtype=torch.uint8)
    kind = name.removesuffix("_processor")
    given = [black] if kind == "video" else [black[0]]
    patches = processor(given, return_tensors="pt")["pixel_values_videos" if kind == "video" else "pixel_values"]
    numbers = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
    if patches.shape[1:] != (numbers,) or not patches.isfinite().all():
        raise ValueError(f"it makes patches of {list(patches.shape[1:])} numbers, or NaN; the model takes {numbers}")
