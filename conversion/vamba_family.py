"""Qwen2-VL, the original Vamba, our format and the earlier one: the tables between their keys, and what is written.

The unusual: two rules drop or add tensors on purpose. The original's last Mamba block is computed for nothing (its
output V_L is never read), so we do not have it; and the cross-attention of a Vamba made from Qwen2-VL starts as a copy
of the self-attention (arXiv 2503.11579, section 4).
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

from vamba.errors import UserError
from vamba.modeling.configuration_vamba import EARLIER_KEYS, VambaConfig
from vamba.modeling.mamba2 import Mamba2Block
from vamba.weight_files import CheckpointReader

from .companions import copy_companions, set_generation_flag
from .configs import config_from_original, config_from_qwen2_vl, config_to_original, naming_bad_values
from .formats import EARLIER, ORIGINAL, QWEN2_VL, SUPPORTED, VAMBA, Conversion, read_config, rules_for, write_json
from .planning import DROPPED, UNCHANGED, ConversionError, Rules, Table, rename


TEXT = r"model\.(?:language_model\.)?"
TEXT_LAYER = TEXT + r"layers\.(\d+)\."
LAYER, LEVEL = r"model.language_model.layers.\1.", r"model.video_encoder.levels.\1."
OUR_LAYER, OUR_LEVEL = r"model\.language_model\.layers\.(\d+)\.", r"model\.video_encoder\.levels\.(\d+)\."

_SHARED: Table = (
    (r"(?:model\.)?visual\.(.+)", (r"model.visual.\1",)),
    (TEXT + r"(embed_tokens|norm)\.weight", (r"model.language_model.\1.weight",)),
    (TEXT_LAYER + r"(mlp\..+|input_layernorm\.weight|post_attention_layernorm\.weight)", (LAYER + r"\2",)),
    (r"lm_head\.weight", ("lm_head.weight",)),
    (r".+\.rotary_(?:pos_)?emb\.inv_freq", DROPPED),  # a buffer that very old checkpoints store; computed anew
)
FROM_QWEN2_VL: Table = (
    *_SHARED,
    (TEXT_LAYER + r"self_attn\.([kv]_proj\..+)", (LAYER + r"self_attn.\2", LEVEL + r"\2")),
    (TEXT_LAYER + r"self_attn\.(.+)", (LAYER + r"self_attn.\2", LAYER + r"cross_attn.\2")),
)
# What Qwen2-VL does not have: the Mamba blocks and alpha.
FRESH = OUR_LEVEL + r"block\..+|" + OUR_LAYER + "alpha"
FROM_ORIGINAL: Table = (
    *_SHARED,
    (TEXT_LAYER + r"cross_attn\.([kv]_proj\..+)", (LEVEL + r"\2",)),
    (TEXT_LAYER + r"((?:self_attn|cross_attn)\..+|alpha)", (LAYER + r"\2",)),
    (TEXT_LAYER + r"vision_mixer\.(norm\.weight|mixer\..+)", (LEVEL + r"block.\2",)),
)
TO_ORIGINAL: Table = (
    (r"model\.visual\.(.+)", (r"visual.\1",)),
    (r"model\.language_model\.(.+)", (r"model.\1",)),
    (OUR_LEVEL + r"([kv]_proj\..+)", (r"model.layers.\1.cross_attn.\2",)),
    (OUR_LEVEL + r"block\.(.+)", (r"model.layers.\1.vision_mixer.\2",)),
    (r"lm_head\.weight", ("lm_head.weight",)),
)
# How a missing tensor is called in a Qwen2-VL checkpoint.
TO_QWEN2_VL: Table = (
    (OUR_LAYER + r"cross_attn\.(.+)", (r"model.layers.\1.self_attn.\2",)),
    (OUR_LEVEL + r"([kv]_proj\..+)", (r"model.layers.\1.self_attn.\2",)),
    *TO_ORIGINAL,
)
# Until November 2026 the decoder layers held the keys' and values' projections of their level.
FROM_EARLIER: Table = (
    (OUR_LAYER + r"cross_attn\.([kv]_proj\..+)", (LEVEL + r"\2",)),
    (r"model\.video_encoder\.layers\.(\d+)\.(.+)", (LEVEL + r"block.\2",)),
    *UNCHANGED,
)
TO_EARLIER: Table = (
    (OUR_LEVEL + r"([kv]_proj\..+)", (LAYER + r"cross_attn.\2",)),
    (OUR_LEVEL + r"block\.(.+)", (r"model.video_encoder.layers.\1.\2",)),
    *UNCHANGED,
)


def is_earlier_format(keys: Iterable[str]) -> bool:
    """Whether the tensors of a Vamba checkpoint, or of an adapter of one, have the names of the earlier format."""
    return any(map(EARLIER_KEYS.search, keys))


def prepare(kind: str, source: Path, to: str | None, mamba_config: dict | None) -> Conversion:
    """See `convert`; `kind` is QWEN2_VL, ORIGINAL or VAMBA."""
    if to not in (None, "vamba", "original"):
        raise UserError(f"to is {to!r}, must be 'vamba' (as None) or 'original'.")
    reader = CheckpointReader(source)
    if kind == VAMBA and is_earlier_format(reader.specs):
        kind = EARLIER
    if kind != VAMBA and to == "original":
        remedy = (
            "it is in that format already" if kind == ORIGINAL else "convert it to vamba first, then that to original"
        )
        raise ConversionError(f"The source is {kind} and to is 'original': {remedy}. {SUPPORTED}")
    if mamba_config and kind != QWEN2_VL:
        raise ConversionError(f"mamba_config is for a Qwen2-VL source; the source is {kind}, with sizes of its own.")
    if kind == QWEN2_VL:
        config = config_from_qwen2_vl(read_config(source), mamba_config)
    elif kind == ORIGINAL:
        with naming_bad_values():
            config = config_from_original(read_config(source))
    else:
        with naming_bad_values():
            config = VambaConfig.from_pretrained(source, local_files_only=True)
    write_companions = partial(_write_companions, source, config, kind, to)
    return Conversion(kind, config, [reader], vamba_rules(kind, config, to), write_companions)


def vamba_rules(kind: str, config: VambaConfig, to: str | None = None) -> Rules:
    """What becomes of the keys of a source of this kind."""
    last = config.text_config.num_hidden_layers - 1
    if kind == QWEN2_VL:
        return rules_for(config, FROM_QWEN2_VL, TO_QWEN2_VL, FRESH)
    if kind == ORIGINAL:
        unread = (TEXT + rf"layers\.{last}\.vision_mixer\..+", DROPPED)
        return rules_for(config, (unread, *FROM_ORIGINAL), TO_ORIGINAL)
    if kind == EARLIER:
        return rules_for(config, FROM_EARLIER, TO_EARLIER)
    if to != "original":
        return rules_for(config, UNCHANGED, UNCHANGED)
    rules, mixer = rules_for(config, TO_ORIGINAL, FROM_ORIGINAL), f"model.layers.{last}.vision_mixer."
    with torch.device("meta"):
        block = Mamba2Block(config.mamba_config).state_dict()
    expected = {rename(key, TO_ORIGINAL)[0]: shape for key, shape in rules.expected.items()}
    expected |= {mixer + key: tuple(tensor.shape) for key, tensor in block.items()}
    return rules._replace(expected=expected, fresh=mixer.replace(".", r"\.") + ".+")


def _write_companions(source: Path, config: VambaConfig, kind: str, to: str | None, folder: Path) -> None:
    if to == "original":
        write_json(folder / "config.json", config_to_original(config), sort_keys=True)
        copy_companions(source, folder, config, "Qwen2VLProcessor")
        set_generation_flag(folder, "unrotate_video_keys", None)
        return
    copy_companions(source, folder, config, "VambaProcessor")
    if kind == ORIGINAL and config.text_config.cross_attn_use_position_embeddings:
        # the original decodes with unrotated keys: VambaForConditionalGeneration.prepare_inputs_for_generation
        set_generation_flag(folder, "unrotate_video_keys", True)
