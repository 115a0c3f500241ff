"""`convert`: a checkpoint folder in one format becomes a checkpoint folder in another.

Everything that can be wrong with the source is found from its config.json and the headers of its files, before
any weight is written. Then the tensors stream through, one at a time, into a folder that is renamed at the end.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from vamba.errors import MissingPathError, UserError
from vamba.files import check_apart, check_destination, check_space, staged_folder
from vamba.hub import inherited_metadata, write_model_card, write_remote_code

from . import vamba_family, video_ma2mba
from .formats import MAMBA2, STATE_SPACES, VIDEO_MA2MBA, format_of, read_config
from .initialization import fresh_tensor
from .planning import DTYPES, ConversionError, Step, TensorSpec, dominant_dtype, plan
from .safetensors_io import write_files


EMBEDDING_OR_HEAD = r"(?:model\.(?:language_model\.)?embed_tokens|backbone\.embeddings?|lm_head)\.weight"


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    to: str | None = None,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = True,
    mamba_config: dict | None = None,
    vision: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> Path:
    """Converts the checkpoint in `source`, whose config.json says what it is.

    - Qwen2-VL → Vamba: the cross-attention is a copy of the self-attention, the Mamba blocks are initialised as the
      original does (arXiv 2503.11579), alpha is 0.5.
    - Original Vamba → Vamba: the last layer's `vision_mixer`, which nothing reads, is dropped.
    - Vamba → original (`to="original"`): bit for bit the tensors that came from it. The last layer's `vision_mixer` is
      initialised afresh, because the original's loader expects it; no output depends on it.
    - Vamba → Vamba, Video-Ma2mba → Video-Ma2mba: another dtype or sharding. A Vamba in the format of before November
      2026, in which the decoder layers held the keys' and values' projections of their level, comes out in today's.
    - Mamba-2 (state-spaces' format or transformers' `mamba2`) and a CLIP → Video-Ma2mba: the projector between the two
      is initialised; CLIP's last layer, which nothing reads, is dropped.

    Args:
        source: folder with config.json and safetensors, in one file or sharded with an index.
        destination: folder to write, which appears only when complete.
        dtype: "float32", "bfloat16", "float16" or the torch.dtype; None keeps every tensor's. A_log, D and dt_bias are
            float32 in any case.
        to: "vamba" (as None) or "original".
        seed: of freshly initialised tensors; the same seed gives the same file, however it is sharded.
        max_shard_size: of one output file, in bytes or as "5GB".
        overwrite: replace the checkpoint in `destination`, which stays until the new one is complete.
        progress: show a progress bar.
        mamba_config: for a Qwen2-VL source, sizes that differ from `VambaMamba2Config`'s, such as {"head_dim": 16}.
        vision: for a Mamba-2 source, the folder of the CLIP.
        tokenizer: for a Mamba-2 source, the folder of its tokenizer; None where it is in the source's.

    Returns:
        `destination`, absolute.

    Raises:
        ConversionError: a ValueError naming the keys or values that cannot be converted, before anything is written.
        ValueError: an argument is not one of those above.
        OSError: the source is not there, the destination is in the way, or the disk is full.
    """
    source, destination = _absolute(source), _absolute(destination)
    if not source.is_dir():
        raise MissingPathError(
            f"{source} is not a folder; a checkpoint on the Hub is fetched with `hf download REPO --local-dir FOLDER`."
        )
    dtype = _checked_dtype(dtype)
    check_apart(destination, source, *(_absolute(folder) for folder in (vision, tokenizer) if folder))
    with staged_folder(destination, partial(check_destination, destination, overwrite)) as folder:
        if (kind := format_of(read_config(source))) in (STATE_SPACES, MAMBA2, VIDEO_MA2MBA):
            if to is not None or mamba_config:
                raise ConversionError(f"The source is {kind}: `to` and `mamba_config` are for the Vamba family.")
            conversion = video_ma2mba.prepare(kind, source, vision, tokenizer)
        else:
            if vision or tokenizer:
                raise ConversionError(f"The source is {kind}: `vision` and `tokenizer` are for a Mamba-2 checkpoint.")
            conversion = vamba_family.prepare(kind, source, to, mamba_config)
        config = conversion.config
        home = {key: reader for reader in conversion.readers for key in reader.specs}
        specs = {key: reader.specs[key] for key, reader in home.items()}

        def read(key: str) -> torch.Tensor:
            return home[key].read(key)

        steps = plan(specs, conversion.rules, dtype)
        if config.tie_word_embeddings:
            _check_tied_head(specs, read)
        config.dtype = dtype or dominant_dtype(specs.values())

        total = sum(step.nbytes for step in steps)
        check_space(destination, total)
        with tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=not progress) as bar:
            produce = partial(_produce, config=config, seed=seed, read=read)
            write_files(folder, steps, produce, max_shard_size, bar.update)
        conversion.write_companions(folder)
        if to != "original":
            config.save_pretrained(folder)
            write_remote_code(folder, config.model_type)
            write_model_card(
                folder,
                config,
                repo_id=destination.name,
                origin=f"Converted from {source.name} ({conversion.kind}).",
                state="converted" if conversion.rules.fresh else "trained",
                **inherited_metadata(source),
            )
    return destination


def _absolute(path: str | Path) -> Path:
    try:
        absolute = Path(path).expanduser().resolve()
        str(absolute).encode()  # as safetensors and model cards are in UTF-8
        return absolute
    except (TypeError, ValueError, RuntimeError, OSError) as error:  # a loop of links, a user who is not known
        raise UserError(f"{path!r:.80} is no path of a folder: {error}") from error


def _produce(step: Step, config: PreTrainedConfig, seed: int, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The tensor of one step. Raises ConversionError where a finite value does not fit the new dtype."""
    if step.source is None:
        return fresh_tensor(step.key, step.shape, config, seed).to(step.dtype)
    tensor = read(step.source)
    if tensor.dtype == step.dtype:
        return tensor
    converted = tensor.to(step.dtype)
    if step.dtype == torch.float16 and not converted.isfinite().all() and tensor.isfinite().all():
        raise ConversionError(f"{step.source} has values beyond float16's range; choose bfloat16.")
    return converted


def _checked_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    names = {str(known).removeprefix("torch."): known for known in DTYPES}
    if dtype is None or dtype in DTYPES:
        return dtype
    if dtype not in names:
        raise UserError(f"dtype is {dtype!r}, must be one of {', '.join(names)} or None for the source's.")
    return names[dtype]


def _check_tied_head(specs: Mapping[str, TensorSpec], read: Callable[[str], torch.Tensor]) -> None:
    """A head stored beside tied embeddings is dropped; one that differs would be lost."""
    names = [key for key in specs if re.fullmatch(EMBEDDING_OR_HEAD, key)]
    if len(names) < 2:
        return
    left, right = map(read, names)
    if left.dtype != right.dtype or not torch.equal(left, right):
        raise ConversionError(
            f"config.json says tie_word_embeddings (tie_embeddings for state-spaces), but {' and '.join(names)} "
            "differ; set it to false to keep both."
        )
