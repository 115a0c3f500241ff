"""The files beside the weights: tokenizer, chat template, image and video processor, generation config.

The unusual: a media item is written `<|vision_start|><|vision_end|>` without a placeholder between, so the pads go
from Qwen2-VL's chat template, wherever it is kept (four places, over the years). Everything else comes along byte for
byte, but for the class of the processor and where its code is.
"""

import json
import re
import shutil
from logging import getLogger
from pathlib import Path

from vamba.modeling.configuration_vamba import AUTO_MAP, VambaConfig

from .formats import MAMBA2, QWEN2_VL, STATE_SPACES, read_json


VERBATIM = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
WITH_PROCESSOR_CLASS = (
    "tokenizer_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")
TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
PADS = re.compile(r"<\|(?:image|video)_pad\|>")


def copy_companions(source: Path, folder: Path, config: VambaConfig, processor_class: str) -> None:
    """Brings what stands beside the weights of `source` to `folder`.

    Args:
        source: the folder converted from.
        folder: the folder being written.
        config: of the model, for a generation config where the source has none.
        processor_class: named in every file that names one.

    Raises:
        ConversionError: where a file that has to be changed is not JSON.
    """
    parts = {"tokenizer": TOKENIZERS, "image processor": PROCESSORS}
    if missing := [part for part, names in parts.items() if not _matching(source, names)]:
        getLogger(__name__).warning(
            f"{source} holds no {' and no '.join(missing)}: put the files beside the converted weights before use."
        )
    for path in _matching(source, VERBATIM):
        shutil.copyfile(path, folder / path.name)
    for path in _matching(source, TEMPLATES):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        target.write_text(strip_pads(path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in _matching(source, ("chat_template.json", *WITH_PROCESSOR_CLASS)):
        _write_json(folder / path.name, _adapt(read_json(path), path.name, processor_class))
    if any((folder / name).exists() for name in WITH_PROCESSOR_CLASS):
        _complete_processor_config(folder / "processor_config.json", processor_class)
    if not (folder / "generation_config.json").exists():
        _write_json(folder / "generation_config.json", generation_config(config))


def set_generation_flag(folder: Path, name: str, value) -> None:
    """Writes a setting into generation_config.json, or takes it out for None."""
    path = folder / "generation_config.json"
    content = {key: v for key, v in read_json(path).items() if key not in (name, "_from_model_config")}
    _write_json(path, content if value is None else content | {name: value})


def write_hub_files(source: Path, folder: Path, config: VambaConfig, kind: str, name: str) -> None:
    """What a checkpoint on the Hub carries besides: the model's code, for machines without this package, and a card.

    Args:
        source: the folder converted from; its card says under which license and of what it was made.
        folder: the folder being written, under its temporary name; `name` is what it will have.
        kind: what the source is; a Qwen2-VL or a Mamba-2 has to be trained before it is of use with video.
    """
    from vamba.hub import inherited_metadata, write_model_card, write_remote_code

    write_remote_code(folder, config.model_type)
    write_model_card(
        folder,
        config,
        repo_id=name,
        **inherited_metadata(source),
        origin=f"Converted from {source.name} ({kind}).",
        state="converted" if kind in (QWEN2_VL, STATE_SPACES, MAMBA2) else "trained",
    )


def strip_pads(template: str) -> str:
    """A chat template without placeholders for images and videos."""
    return PADS.sub("", template)


def generation_config(config: VambaConfig) -> dict:
    """The tokens that generation needs, as far as the model's configuration knows them."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {name: getattr(config.text_config, name) for name in names}
    return {"_from_model_config": True} | {name: value for name, value in tokens.items() if value is not None}


def _adapt(content: dict, name: str, processor_class: str) -> dict:
    if "chat_template" in content:  # one, several in a list, or several by name
        content["chat_template"] = json.loads(strip_pads(json.dumps(content["chat_template"])))
    if name in WITH_PROCESSOR_CLASS:
        content["processor_class"] = processor_class
        parts = [content.get(part) for part in ("image_processor", "video_processor")]
        for part in (content, *(part for part in parts if isinstance(part, dict))):
            part.pop("auto_map", None)  # names code beside the source, which is not copied
            if "processor_class" in part:
                part["processor_class"] = processor_class
    return content


def _complete_processor_config(path: Path, processor_class: str) -> None:
    """The file that names the processor first, made if need be; ours also says where `trust_remote_code` finds it."""
    content = read_json(path) if path.exists() else {"processor_class": processor_class}
    entry = AUTO_MAP["AutoProcessor"]
    if entry.endswith("." + processor_class):
        content["auto_map"] = {"AutoProcessor": entry}
    _write_json(path, content)


def _matching(source: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(source.glob(pattern)) if path.is_file()]


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
