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

from .formats import read_json, write_json
from .planning import ConversionError


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
WITH_TEMPLATE_OR_CLASS = ("chat_template.json", *WITH_PROCESSOR_CLASS)
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
        ConversionError: where a file that has to be changed is not JSON, or a template not UTF-8.
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
        try:
            template = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConversionError(f"{path} is not UTF-8; fetch the checkpoint again.") from error
        target.write_text(strip_pads(template), encoding="utf-8")
    changed = {path.name: _adapt(path, processor_class) for path in _matching(source, WITH_TEMPLATE_OR_CLASS)}
    if any(name in WITH_PROCESSOR_CLASS for name in changed):  # transformers looks for the processor's name here first
        processor = changed.setdefault("processor_config.json", {"processor_class": processor_class})
        entry = AUTO_MAP["AutoProcessor"]  # where `trust_remote_code` finds ours
        if entry.endswith("." + processor_class):
            processor["auto_map"] = {"AutoProcessor": entry}
    if not (folder / "generation_config.json").exists():
        tokens = {f"{name}_token_id": getattr(config.text_config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        known = {name: value for name, value in tokens.items() if value is not None}
        changed["generation_config.json"] = {"_from_model_config": True} | known
    for name, content in changed.items():
        write_json(folder / name, content)


def set_generation_flag(folder: Path, name: str, value) -> None:
    """Writes a setting into generation_config.json, or takes it out for None."""
    path = folder / "generation_config.json"
    content = {key: v for key, v in read_json(path).items() if key not in (name, "_from_model_config")}
    write_json(path, content if value is None else content | {name: value})


def strip_pads(template: str) -> str:
    """A chat template without placeholders for images and videos."""
    return PADS.sub("", template)


def _adapt(path: Path, processor_class: str) -> dict:
    content = read_json(path)
    if "chat_template" in content:  # one, several in a list, or several by name
        content["chat_template"] = json.loads(strip_pads(json.dumps(content["chat_template"])))
    if path.name in WITH_PROCESSOR_CLASS:
        content["processor_class"] = processor_class
        parts = [content.get(part) for part in ("image_processor", "video_processor")]
        for part in (content, *(part for part in parts if isinstance(part, dict))):
            part.pop("auto_map", None)  # names code beside the source, which is not copied
            if "processor_class" in part:
                part["processor_class"] = processor_class
    return content


def _matching(source: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(source.glob(pattern)) if path.is_file()]
