"""Where a checkpoint lies, found before anything heavy is imported: a folder, or the Hub's files in the local cache.

What is unusual: `runs/dmeo` could be an id on the Hub. Where `runs` is a folder here it is taken for a mistyped path
and answered at once; the Hub is asked only about what can be nothing else.
"""

import json
import re
from pathlib import Path

from .errors import UserError, opening


KINDS = ("vamba", "video_ma2mba")  # the model types that we have
CONFIG, ADAPTER = "config.json", "adapter_config.json"


def checkpoint_folder(path: str) -> Path:
    """The folder that holds config.json or adapter_config.json of a checkpoint, given as a folder or an id on the Hub.

    Raises:
        UserError: there is no such folder, it is no checkpoint, or the Hub does not have it.
    """
    try:
        folder = Path(path).expanduser()
    except (TypeError, RuntimeError) as error:  # a user who is not known
        raise UserError(f"{path!r:.80} is no path of a folder; give the folder of a checkpoint.") from error
    with opening(path):
        if folder.is_dir():
            if not any((folder / name).is_file() for name in (CONFIG, ADAPTER)):
                raise UserError(f"{path} holds no config.json; give the folder of a checkpoint.")
            return folder
        is_file = folder.exists()
    if is_file or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)):
        raise UserError(f"{path} is no folder; give the folder of a checkpoint or its id on the Hub (owner/name).")
    return _from_hub(str(path), folder.parent)


def _from_hub(repo_id: str, owner: Path) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    for name in (CONFIG, ADAPTER):
        if isinstance(found := try_to_load_from_cache(repo_id, name), str):
            return Path(found).parent
    if owner.is_dir():
        raise UserError(f"{repo_id}: there is no such folder in {owner}/; give the folder of a checkpoint.")
    try:  # one question first, as a download that fails is tried again for half a minute
        files = {file.rfilename for file in HfApi().model_info(repo_id, timeout=10).siblings}
        name = next((name for name in (CONFIG, ADAPTER) if name in files), None)
        if name is not None:
            return Path(hf_hub_download(repo_id, name)).parent
    except Exception as error:  # of which library depends on the version of huggingface_hub
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{repo_id} is no folder here, and the Hub does not give it: {reason}") from error
    raise UserError(f"{repo_id} on the Hub holds no config.json; it is no checkpoint.")


def read_json(file: Path) -> dict:
    """A JSON object from a file of a checkpoint. Raises UserError if it is none."""
    with opening(file):
        if not file.is_file():  # which a pipe or a device is not
            raise UserError(f"{file} is no file; fetch the checkpoint again.")
        text = file.read_bytes()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON object ({error}); fetch the checkpoint again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is no JSON object; fetch the checkpoint again.")
    return content


def adapter_config(folder: Path) -> dict | None:
    """adapter_config.json where `folder` holds a PEFT adapter instead of a whole model."""
    if (folder / CONFIG).is_file() or not (folder / ADAPTER).is_file():
        return None
    return read_json(folder / ADAPTER)


def base_of(path: str) -> str:
    """The checkpoint an adapter was trained on, or `path` itself.

    Raises:
        UserError: either is not there, or the checkpoint is an adapter too.
    """
    adapter = adapter_config(checkpoint_folder(path))
    if adapter is None:
        return path
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path} is an adapter whose adapter_config.json names no base model.")
    try:
        folder = checkpoint_folder(base)
    except UserError as error:
        raise UserError(f"{path} is an adapter, and its base model is not here: {error}") from error
    if adapter_config(folder) is not None:
        raise UserError(f"{path} is an adapter of {base}, an adapter itself; merge that one into its base model first.")
    return base


def kind_of(path: str) -> str | None:
    """The model type of a whole checkpoint. Raises UserError where it is an adapter, or no checkpoint."""
    folder = checkpoint_folder(path)
    if (adapter := adapter_config(folder)) is not None:
        base = adapter.get("base_model_name_or_path")
        raise UserError(f"{path} is an adapter of {base}; merge it into that model, or give that model.")
    return read_json(folder / CONFIG).get("model_type")


def check_kind(path: str) -> str:
    """The model type of a whole checkpoint. Raises UserError where it is none of ours."""
    if (kind := kind_of(path)) not in KINDS:
        raise UserError(
            f"{path} is a {kind} checkpoint, not a Vamba; `vamba convert` makes one of a Qwen2-VL or a Mamba-2."
        )
    return kind
