"""`convert`: a checkpoint folder in one format becomes a checkpoint folder in another.

Everything that can be wrong with the source is found from its config.json and the headers of its files, before
anything is written. Then the tensors stream through, one at a time, into a folder that is renamed at the end.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from vamba.errors import MissingPathError, UserError
from vamba.modeling.configuration_vamba import VambaConfig

from . import table as tables
from .companions import copy_companions, set_generation_flag, write_hub_files
from .configs import (
    MAMBA2,
    ORIGINAL,
    QWEN2_VL,
    STATE_SPACES,
    SUPPORTED,
    VAMBA,
    VIDEO_MA2MBA,
    config_from_original,
    config_from_qwen2_vl,
    config_from_vamba,
    config_to_original,
    format_of,
    read_config,
)
from .initialization import fresh_tensor, is_fresh, mixer_shapes
from .safetensors_io import CheckpointReader, size_of, split_into_files, write_file, write_index
from .staging import check_destination, check_space, staged_folder
from .table import ConversionError, Step, TensorSpec, dominant_dtype, plan, rename


DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in tables.DTYPES}


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
    - Vamba → Vamba, Video-Ma2mba → Video-Ma2mba: another dtype or sharding.
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
    source, destination = Path(source).expanduser().resolve(), Path(destination).expanduser().resolve()
    if not source.is_dir():
        raise MissingPathError(
            f"{source} is not a folder; a checkpoint on the Hub is fetched with `hf download REPO --local-dir FOLDER`."
        )
    dtype = _checked_dtype(dtype)
    check_destination(destination, source, overwrite)
    if (kind := format_of(read_config(source))) in (STATE_SPACES, MAMBA2, VIDEO_MA2MBA):
        from .video_ma2mba import convert_video_ma2mba

        if to is not None or mamba_config:
            raise ConversionError(f"The source is {kind}: `to` and `mamba_config` are for the Vamba family.")
        options = {"dtype": dtype, "seed": seed, "max_shard_size": max_shard_size, "progress": progress}
        convert_video_ma2mba(kind, source, destination, vision=vision, tokenizer=tokenizer, **options)
        return destination
    if vision or tokenizer:
        raise ConversionError(f"The source is {kind}: `vision` and `tokenizer` are for a Mamba-2 checkpoint.")
    kind, config = _source_config(source, to, mamba_config)
    reader = CheckpointReader(source)
    steps = plan_checkpoint(kind, config, reader.specs, to=to, dtype=dtype)
    if config.tie_word_embeddings:
        _check_tied_head(reader)
    config.dtype = dtype or dominant_dtype(reader.specs.values())

    def companions(folder: Path) -> None:
        _write_companions(source, folder, config, kind, to)
        if to != "original":
            write_hub_files(source, folder, config, kind, destination.name)

    make = partial(produce, config=config, seed=seed, read=reader.read)
    write_checkpoint(destination, steps, make, companions, max_shard_size, progress)
    return destination


def write_checkpoint(
    destination: Path,
    steps: list[Step],
    make: Callable[[Step], torch.Tensor],
    companions: Callable[[Path], None],
    max_shard_size: int | str,
    progress: bool,
) -> None:
    """Writes what was planned into a folder that is renamed to `destination` at the end.

    Args:
        make: the tensor of a step. companions: writes the files beside the weights into the folder it is given.
    """
    files = split_into_files(steps, max_shard_size)
    total = sum(map(size_of, steps))
    check_space(destination, total)
    with staged_folder(destination) as folder:
        with tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=not progress) as bar:
            for name, held in files.items():
                write_file(folder / name, held, make, bar.update)
        write_index(folder, files)
        companions(folder)


def plan_checkpoint(
    kind: str,
    config: VambaConfig,
    specs: Mapping[str, TensorSpec],
    *,
    to: str | None = None,
    dtype: torch.dtype | None = None,
) -> list[Step]:
    """What a conversion writes, from the source's shapes and dtypes alone; reads and allocates no tensor.

    Args:
        kind: QWEN2_VL, ORIGINAL or VAMBA, what `specs` is of.
        config: of the model, in our terms.
        specs: shape and dtype of every tensor of the source.
        to: "vamba" (as None) or "original".
        dtype: of the target, or None to keep the source's.

    Raises:
        ConversionError: naming keys that are unknown, missing or wrongly shaped.
    """
    num_layers = config.text_config.num_hidden_layers
    expected, is_new = expected_shapes(config), lambda key: False
    if kind == QWEN2_VL:
        table, inverse, is_new = tables.FROM_QWEN2_VL, tables.TO_QWEN2_VL, is_fresh
    elif kind == ORIGINAL:
        table, inverse = tables.drop_last_mixer(tables.FROM_ORIGINAL, num_layers), tables.TO_ORIGINAL
    elif to == "original":
        last = f"model.layers.{num_layers - 1}.vision_mixer."
        table, inverse = tables.TO_ORIGINAL, tables.FROM_ORIGINAL
        expected = {rename(key, table)[0]: shape for key, shape in expected.items()}
        expected |= {last + name: shape for name, shape in mixer_shapes(config.mamba_config).items()}
        is_new = partial(_starts_with, last)
    else:
        table = inverse = tables.TO_VAMBA
    if config.tie_word_embeddings:
        table = tables.drop_tied_head(table)
    return plan(specs, expected, table, inverse=inverse, is_fresh=is_new, dtype=dtype)


def expected_shapes(config: VambaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of our checkpoint, in the model's order, asked from the model without allocating it."""
    from vamba.modeling.modeling_vamba import VambaForConditionalGeneration

    with torch.device("meta"):
        model = VambaForConditionalGeneration(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def produce(step: Step, config: VambaConfig, seed: int, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The tensor of one step. Raises ConversionError where a finite value does not fit the new dtype."""
    if step.source is None:
        ours = step.key if is_fresh(step.key) else rename(step.key, tables.FROM_ORIGINAL)[0]
        return fresh_tensor(ours, step.shape, config, seed).to(step.dtype)
    return cast(read(step.source), step)


def cast(tensor: torch.Tensor, step: Step) -> torch.Tensor:
    """`tensor` in the step's dtype. Raises ConversionError where a finite value does not fit it."""
    if tensor.dtype == step.dtype:
        return tensor
    converted = tensor.to(step.dtype)
    if step.dtype == torch.float16 and not converted.isfinite().all() and tensor.isfinite().all():
        raise ConversionError(f"{step.source} has values beyond float16's range; choose bfloat16.")
    return converted


def _checked_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, must be one of {', '.join(DTYPES)} or None for the source's.")
    return DTYPES[dtype]


def _source_config(source: Path, to: str | None, mamba_config: dict | None) -> tuple[str, VambaConfig]:
    """What the source is, and the model's configuration; refuses a `to` that makes no sense for it."""
    if to not in (None, "vamba", "original"):
        raise UserError(f"to is {to!r}, must be 'vamba' (as None) or 'original'.")
    raw = read_config(source)
    kind = format_of(raw)
    if kind != VAMBA and to == "original":
        remedy = (
            "it is in that format already" if kind == ORIGINAL else "convert it to vamba first, then that to original"
        )
        raise ConversionError(f"The source is {kind} and to is 'original': {remedy}. {SUPPORTED}")
    if mamba_config and kind != QWEN2_VL:
        raise ConversionError(f"mamba_config is for a Qwen2-VL source; the source is {kind}, with sizes of its own.")
    if kind == QWEN2_VL:
        return kind, config_from_qwen2_vl(raw, mamba_config)
    return kind, config_from_original(raw) if kind == ORIGINAL else config_from_vamba(source)


def _check_tied_head(reader: CheckpointReader) -> None:
    """A head stored beside tied embeddings is dropped; one that differs would be lost."""
    names = [key for key in reader.specs if re.fullmatch(tables.TEXT + r"embed_tokens\.weight|lm_head\.weight", key)]
    if len(names) < 2:
        return
    left, right = map(reader.read, names)
    if left.dtype != right.dtype or not torch.equal(left, right):
        raise ConversionError(
            f"config.json says tie_word_embeddings, but {' and '.join(names)} differ; set it to false to keep both."
        )


def _write_companions(source: Path, folder: Path, config: VambaConfig, kind: str, to: str | None) -> None:
    if to == "original":
        content = json.dumps(config_to_original(config), indent=2, sort_keys=True)
        (folder / "config.json").write_text(content + "\n", encoding="utf-8")
        copy_companions(source, folder, config, "Qwen2VLProcessor")
        set_generation_flag(folder, "unrotate_video_keys", None)
        return
    config.save_pretrained(folder)
    copy_companions(source, folder, config, "VambaProcessor")
    if kind == ORIGINAL and config.text_config.cross_attn_use_position_embeddings:
        # the original decodes with unrotated keys: VambaForConditionalGeneration.prepare_inputs_for_generation
        set_generation_flag(folder, "unrotate_video_keys", True)


def _starts_with(prefix: str, key: str) -> bool:
    return key.startswith(prefix)
