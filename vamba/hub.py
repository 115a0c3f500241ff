"""What a checkpoint needs besides weights to be at home on the Hub: the model's code, and a model card.

`save_pretrained` of model and processor already bring the code along; a converter, which never builds the model,
calls `write_remote_code`.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import cached_file, logging
from yaml import YAMLError

from . import modeling
from .checkpoint_folder import adapter_config, base_of, checkpoint_folder, read_json
from .errors import UserError
from .loading import load_config, skeleton
from .modeling.configuration_vamba import VambaConfig
from .modeling.configuration_video_ma2mba import VideoMa2mbaConfig


METADATA = ("license", "license_name", "license_link", "base_model")  # of a card, that models made of a model share
_FRESH = {"vamba": "Mamba-2 blocks are", "video_ma2mba": "projector is"}
_LIMITS = {
    "converted": "The {fresh} freshly initialised: this checkpoint has to be trained before it is of use.",
    "trained": "What the model was trained on bounds what it knows; check its answers where they matter.",
}
logger = logging.get_logger(__name__)


def write_remote_code(folder: str | os.PathLike, model_type: str = "vamba") -> list[Path]:
    """Copies the files that `trust_remote_code=True` needs: processor, model, configuration and all they import.

    `model_type` is "vamba" or "video_ma2mba".
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    here = Path(modeling.__file__).parent
    files = {here / f"{part}_{model_type}.py" for part in ("modeling", "processing")}
    files |= {Path(file) for entry in list(files) for file in get_relative_import_files(str(entry))}
    return [Path(shutil.copyfile(file, Path(folder) / file.name)) for file in sorted(files)]


def write_model_card(
    folder: str | os.PathLike,
    config: VambaConfig | VideoMa2mbaConfig | None = None,
    *,
    repo_id: str | None = None,
    origin: str = "",
    state: str = "trained",
    **metadata: str | list[str] | None,
) -> Path:
    """Writes README.md for the checkpoint in `folder` from the template of its kind in model_cards/.

    Args:
        config: of the model; read from the folder if None.
        repo_id: named in the snippet; the folder's name if None.
        origin: a sentence on where the weights come from.
        state: "trained", or "converted" for a checkpoint with parts that never were; says what to expect.
        metadata: of the card, such as base_model and license, left out where None; see `inherited_metadata`.
    """
    folder = Path(folder)
    config = read_config(folder) if config is None else config
    model_type, text = config.model_type, config.text_config
    repo_id = repo_id or folder.resolve().name
    tags = [model_type.replace("_", "-"), "video", "mamba-2", "state-space-model", "custom_code"]
    data = ModelCardData(library_name="transformers", pipeline_tag="image-text-to-text", tags=tags, **metadata)
    values = {
        "name": repo_id.split("/")[-1],
        "repo_id": repo_id,
        "origin": origin,
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "parameters": _count_parameters(config),
        "limits": _LIMITS[state].format(fresh=_FRESH[model_type]) + "\n",  # the last, which jinja would take away
    }
    if model_type == "vamba":
        values["bytes_per_token"] = f"{bytes_per_token(config) / 1e3:.1f}"
    else:
        values["megabytes_of_state"] = f"{state_bytes(config) / 1e6:.1f}"
        values["tokens_per_frame"] = config.tokens_per_frame
    template = resources.files("vamba.model_cards").joinpath(f"{model_type}.md").read_text(encoding="utf-8")
    ModelCard.from_template(data, template_str=template, **values).save(path := folder / "README.md")
    return path


def inherited_metadata(source: str | os.PathLike) -> dict[str, Any]:
    """What the card of a model made of `source`, a checkpoint folder or an id on the Hub, says of license and base.

    It is what the card of `source` says; what it does not say stays unsaid. The base model is `source` itself where it
    has an id on the Hub, by which it was given or which its configuration remembers. A card that cannot be read says
    nothing: what is made of the model is worth more than its card.
    """
    quiet = ("gated_repo", "missing_entries", "connection_errors")
    card = cached_file(source, "README.md", **{f"_raise_exceptions_for_{kind}": False for kind in quiet})
    text = Path(card).read_text(encoding="utf-8", errors="replace") if card else ""
    try:
        said = ModelCard(text, ignore_metadata_errors=True).data.to_dict() if text.startswith("---") else {}
    except (YAMLError, ValueError, TypeError):
        said = {}
    metadata = {name: said[name] for name in METADATA if said.get(name)}
    known, config = f"{source}", Path(source) / "config.json"
    if Path(source).is_dir():
        known = json.loads(config.read_text(encoding="utf-8")).get("_name_or_path") or "" if config.is_file() else ""
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", known):
        metadata["base_model"] = known
    return metadata


def bytes_per_token(config: VambaConfig) -> int:
    """What a video token takes in the video memory in bfloat16: its keys and values of every layer."""
    text = config.text_config
    head_dim = text.hidden_size // text.num_attention_heads
    return 2 * text.num_key_value_heads * head_dim * text.num_hidden_layers * 2


def state_bytes(config: VideoMa2mbaConfig) -> int:
    """What one conversation of a Video-Ma2mba takes in bfloat16: its states, of which those of the scan are float32."""
    text = config.text_config
    scan = text.num_heads * text.head_dim * text.state_size * 4
    return text.num_hidden_layers * (scan + (text.conv_kernel - 1) * text.conv_dim * 2)


def read_config(folder: str | os.PathLike) -> VambaConfig | VideoMa2mbaConfig:
    """The configuration of a checkpoint of either kind.

    Raises:
        UserError: no checkpoint, another kind of one, or a config.json that no model can be built from.
    """
    return load_config(folder)


def _count_parameters(config: VambaConfig | VideoMa2mbaConfig) -> str:
    count = skeleton(config).num_parameters()
    return f"{count / 1e9:.2f} billion" if count >= 1e8 else f"{count / 1e6:.2f} million"


def push_to_hub(
    model, processor, repo_id: str, *, private: bool | None = None, token: str | None = None, **card
) -> str:
    """Uploads model, processor, code and model card as one commit; returns the commit's address.

    `card` are keyword arguments of `write_model_card`; a repository that has a card, which someone may have edited,
    keeps it. Weights are written to a temporary folder first, so an interrupted upload leaves the repository as it was.

    Raises:
        UserError: the Hub is not reached, or refuses; nothing was changed there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    with _asking_the_hub(repo_id):
        api = HfApi(token=token)
        with suppress(HfHubHTTPError):  # an answer; one question with a limit first, as the others may wait for ever
            api.model_info(repo_id, timeout=10)
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        has_card = api.file_exists(name, "README.md")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_remote_code(folder, model.config.model_type)
        if has_card:
            logger.warning(f"{name} keeps its README.md; delete it there to have a new one written.")
        else:
            write_model_card(folder, model.config, repo_id=name, **card)
        with _asking_the_hub(name):
            return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload Vamba checkpoint"))


@contextmanager
def _asking_the_hub(repo_id: str) -> Iterator[None]:
    """Whatever goes wrong in the block is the Hub's answer; of which library depends on huggingface_hub's version."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{repo_id} could not be pushed to the Hub: {reason}") from error


def describe(path: str | os.PathLike) -> dict:
    """What `vamba info` prints of a checkpoint folder or Hub id: sizes, switches, what a video takes in memory.

    Of an adapter: what it is, and the same of its base model, where that is at hand.
    """
    path = checkpoint_folder(os.fspath(path))
    if (adapter := adapter_config(path)) is not None:
        about = {"adapter": adapter.get("peft_type"), "rank": adapter.get("r")}
        about["base_model"] = adapter.get("base_model_name_or_path")
        try:
            return about | describe(base_of(os.fspath(path)))
        except UserError as error:
            return about | {"of its base model": f"unknown: {error}"}
    config = read_config(path)
    text, weights, size = config.text_config, path / "model.safetensors", None
    index = weights.with_name("model.safetensors.index.json")
    if index.exists():
        metadata = read_json(index).get("metadata")
        size = metadata.get("total_size") if isinstance(metadata, dict) else None
    elif weights.exists():
        size = weights.stat().st_size
    about = {
        "model_type": config.model_type,
        "parameters": _count_parameters(config),
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "mamba_heads": config.mamba_config.num_heads,
        "mamba_state_size": config.mamba_config.state_size,
        "vision_tower": config.vision_config.model_type,
    }
    if config.model_type == "vamba":
        for name in ("use_alpha_balancing", "cross_attn_use_layer_norm", "cross_attn_use_position_embeddings"):
            about[name] = getattr(text, name)
        about["video_memory_bytes_per_token_bf16"] = bytes_per_token(config)
    else:
        about |= {"tokens_per_frame": config.tokens_per_frame, "state_bytes_bf16": state_bytes(config)}
    return about | {"weights_bytes": size}
