"""The formats there are, and what `convert` has to know to make one of another.

A new source is a line in `format_of`, a table and a `Conversion` beside those of vamba_family.py or video_ma2mba.py.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedConfig

from vamba.loading import expected_shapes
from vamba.weight_files import CheckpointReader, TorchReader

from .planning import DROPPED, ConversionError, Rules, Table


QWEN2_VL, ORIGINAL, VAMBA = "a Qwen2-VL checkpoint", "an original Vamba checkpoint", "a Vamba checkpoint"
EARLIER = "a Vamba checkpoint in the earlier format"
STATE_SPACES, MAMBA2 = "a state-spaces Mamba-2 checkpoint", "a transformers Mamba-2 checkpoint"
VIDEO_MA2MBA = "a Video-Ma2mba checkpoint"
SUPPORTED = (
    "Supported: a Qwen2-VL checkpoint (model_type qwen2_vl) to vamba, an original Vamba checkpoint (model_type "
    "qwen2_vl with vision_mamba_mixer_config) to vamba, and a Vamba checkpoint (model_type vamba) to original or, "
    "for another dtype or sharding or from the earlier format, to vamba; a Mamba-2 language model (model_type mamba2, "
    "or with ssm_cfg as state-spaces has it) and a CLIP to video_ma2mba."
)


class Conversion(NamedTuple):
    """One conversion, prepared: all that can be wrong with the source but its tensors' names has been found."""

    kind: str  # of the source
    config: PreTrainedConfig  # of the model, in our terms
    readers: Sequence[CheckpointReader | TorchReader]  # where the tensors are
    rules: Rules  # what becomes of them
    write_companions: Callable[[Path], None]  # what stands beside the weights, once the dtype is in `config`


def read_config(folder: Path) -> dict:
    """The source's config.json. Raises ConversionError if there is none or it is no JSON object."""
    path = folder / "config.json"
    if not path.is_file() and (folder / "adapter_config.json").is_file():
        raise ConversionError(
            f"{folder} holds an adapter only; merge it into its base model (peft's merge_and_unload) with the version "
            "of vamba that made it, save that and convert it."
        )
    if not path.is_file():
        raise ConversionError(f"{folder} holds no config.json; the source is the folder of a checkpoint.")
    return read_json(path)


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises ConversionError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} is not a JSON object.")
    return content


def write_json(path: Path, content: dict, sort_keys: bool = False) -> None:
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=sort_keys).encode()
    except UnicodeEncodeError as error:  # an escape in the source that stands for half a character
        raise ConversionError(f"A text in {path.name} is no Unicode; fetch the checkpoint again.") from error
    path.write_bytes(text + b"\n")


def format_of(config: dict) -> str:
    """One of the formats named above. Raises ConversionError naming the values that fit none of them."""
    if config.get("quantization_config"):
        raise ConversionError("The source has a quantization_config; convert the unquantized checkpoint.")
    model_type, mixer = config.get("model_type"), config.get("vision_mamba_mixer_config")
    if model_type in (known := {"vamba": VAMBA, "mamba2": MAMBA2, "video_ma2mba": VIDEO_MA2MBA}):
        return known[model_type]
    if isinstance(config.get("ssm_cfg"), dict):
        return STATE_SPACES
    if model_type == "qwen2_vl" and mixer is None:
        return QWEN2_VL
    if model_type == "qwen2_vl" and isinstance(mixer, dict) and mixer.get("enable", True):
        return ORIGINAL
    if model_type == "qwen2_vl":
        raise ConversionError(
            "The source's vision_mamba_mixer_config.enable is false: a Vamba without Mamba blocks is not supported. "
            + SUPPORTED
        )
    raise ConversionError(f"The source's model_type is {model_type!r}. " + SUPPORTED)


def rules_for(config: PreTrainedConfig, table: Table, inverse: Table, fresh: str = "") -> Rules:
    """The rules for our checkpoint of a model."""
    if config.tie_word_embeddings:  # there is no head of its own; a source may hold one all the same
        table = ((r"lm_head\.weight", DROPPED), *table)
    return Rules(expected_shapes(config), table, inverse, fresh)
