"""A Mamba-2 language model and a CLIP vision tower become a Video-Ma2mba, whose projector starts afresh.

The unusual: two sources, each in one of several formats. The language model comes as state-spaces published it
(pytorch_model.bin, and a config.json of its own) or as transformers writes it (`mamba2`); the tower out of a whole CLIP
or as CLIP's vision model. The vision tokens are added to the tokenizer in the rows that pad the embedding, so every
weight stays as it is. CLIP's last layer, whose output is not read, is dropped.
"""

from pathlib import Path

from transformers import AutoTokenizer, CLIPVisionConfig, GenerationConfig, Mamba2Config

from vamba.modeling.configuration_video_ma2mba import VideoMa2mbaConfig, VideoMa2mbaVisionConfig
from vamba.modeling.processing_video_ma2mba import VideoMa2mbaProcessor
from vamba.weight_files import open_checkpoint

from .configs import MAMBA_FIELDS, MAMBA_FIXED, naming_bad_values, own_values
from .formats import STATE_SPACES, VIDEO_MA2MBA, Conversion, read_config, rules_for
from .planning import DROPPED, UNCHANGED, ConversionError, Table


FROM_MAMBA2: Table = (
    # state-spaces and old transformers have it in the singular
    (r"backbone\.embeddings?\.weight", ("model.language_model.embed_tokens.weight",)),
    (r"backbone\.norm_f\.weight", ("model.language_model.norm.weight",)),
    (r"backbone\.layers\.(\d+)\.(norm\.weight|mixer\..+)", (r"model.language_model.layers.\1.\2",)),
    (r"lm_head\.weight", ("lm_head.weight",)),
)
TO_MAMBA2: Table = (
    (r"model\.language_model\.embed_tokens\.weight", ("backbone.embeddings.weight",)),
    (r"model\.language_model\.norm\.weight", ("backbone.norm_f.weight",)),
    (r"model\.language_model\.(layers\..+)", (r"backbone.\1",)),
    (r"model\.visual\.(.+)", (r"vision_model.\1",)),
    (r"lm_head\.weight", ("lm_head.weight",)),
)
# What a state-spaces config.json must say for the model that we have.
FIXED = {"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")


def from_clip(num_layers: int) -> Table:
    """The table of a CLIP with so many layers; its last, and all that has to do with text, is dropped."""
    return (
        (r".*\bposition_ids", DROPPED),  # a buffer that old checkpoints store
        (r"text_model\..+|(?:text|visual)_projection\.weight|logit_scale", DROPPED),
        (rf"(?:vision_model\.)?(?:encoder\.layers\.{num_layers - 1}|post_layernorm)\..+", DROPPED),
        (r"(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder)\..+)", (r"model.visual.\1",)),
    )


def prepare(kind: str, source: Path, vision: str | Path | None, tokenizer: str | Path | None) -> Conversion:
    """See `convert`; `kind` is STATE_SPACES, MAMBA2 or VIDEO_MA2MBA."""
    if kind == VIDEO_MA2MBA:
        if vision or tokenizer:
            raise ConversionError("The source is a Video-Ma2mba, with a vision tower and a tokenizer of its own.")
        with naming_bad_values():
            config = VideoMa2mbaConfig.from_pretrained(source, local_files_only=True)
        with naming_bad_values(f"{source} holds no processor that can be read: "):
            processor = VideoMa2mbaProcessor.from_pretrained(source, local_files_only=True)
        readers, rules = [open_checkpoint(source)], rules_for(config, UNCHANGED, UNCHANGED)
    else:
        if vision is None:
            raise ConversionError(
                f"The source is {kind}, which has no vision tower; give the folder of a CLIP, such as "
                "openai/clip-vit-large-patch14-336, with --vision."
            )
        vision = Path(vision).expanduser().resolve()
        with naming_bad_values():
            config = VideoMa2mbaConfig(
                architectures=["VideoMa2mbaForConditionalGeneration"],
                **(_from_state_spaces(source) if kind == STATE_SPACES else _from_mamba2(source)),
                vision_config=_vision_config(vision),
            )
        processor = _processor(config, source if tokenizer is None else Path(tokenizer).expanduser().resolve())
        readers = [open_checkpoint(source), open_checkpoint(vision)]
        table = FROM_MAMBA2 + from_clip(config.vision_config.num_hidden_layers)
        rules = rules_for(config, table, TO_MAMBA2, fresh=r"model\.projector\..+")

    def write_companions(folder: Path) -> None:
        text, end = config.text_config, processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        tokens = {"bos_token_id": text.bos_token_id, "pad_token_id": text.pad_token_id}
        GenerationConfig(**tokens, eos_token_id=[end, text.eos_token_id], do_sample=False).save_pretrained(folder)
        processor.save_pretrained(folder)

    return Conversion(kind, config, readers, rules, write_companions)


def _from_state_spaces(source: Path) -> dict:
    """Fields of `VideoMa2mbaConfig` from a config.json of state-spaces/mamba."""
    raw = read_config(source)
    mixer = dict(raw["ssm_cfg"])
    refused = [f"{key} = {raw[key]!r}" for key, value in FIXED.items() if raw.get(key, value) != value]
    refused += [f"ssm_cfg.layer = {layer!r}"] if (layer := mixer.pop("layer", "Mamba1")) != "Mamba2" else []
    ours = {theirs: name for name, theirs in MAMBA_FIELDS.items() if name != "hidden_size"}
    refused += [
        f"ssm_cfg.{key} = {value!r}"
        for key, value in mixer.items()
        if key not in ours and MAMBA_FIXED.get(key) != value
    ]
    if refused:
        raise ConversionError(
            f"The source's config.json: {', '.join(refused)} is not supported, as this model has Mamba-2 blocks only."
        )
    if absent := [key for key in ("d_model", "n_layer", "vocab_size") if key not in raw]:
        raise ConversionError(f"The source's config.json: {', '.join(absent)} is missing.")
    multiple = raw.get("pad_vocab_size_multiple", 8)
    text = {
        "hidden_size": raw["d_model"],
        "num_hidden_layers": raw["n_layer"],
        "vocab_size": -(-raw["vocab_size"] // multiple) * multiple,
        "residual_in_fp32": raw.get("residual_in_fp32", True),
    }
    text |= {ours[key]: value for key, value in mixer.items() if key in ours}
    return {"text_config": text, "tie_word_embeddings": raw.get("tie_embeddings", True)}


def _from_mamba2(source: Path) -> dict:
    """Fields of `VideoMa2mbaConfig` from a config.json of transformers' `mamba2`."""
    with naming_bad_values():
        theirs = Mamba2Config.from_pretrained(source, local_files_only=True)
    if theirs.hidden_act not in ("silu", "swish"):
        raise ConversionError(f"The source has hidden_act {theirs.hidden_act!r}; Mamba-2's is 'silu'.")
    names = (set(MAMBA_FIELDS) - {"A_init_bounds"}) | {
        "vocab_size", "num_hidden_layers", "residual_in_fp32", "layer_norm_epsilon",
    }  # fmt: skip
    text = {name: getattr(theirs, name) for name in names}
    return {"text_config": text, "tie_word_embeddings": theirs.tie_word_embeddings}


def _vision_config(folder: Path) -> VideoMa2mbaVisionConfig:
    raw = read_config(folder)
    if (kind := raw.get("model_type")) not in ("clip", "clip_vision_model"):
        raise ConversionError(f"{folder} is a {kind} checkpoint; the vision tower is that of a CLIP.")
    theirs = CLIPVisionConfig.from_dict(raw["vision_config"] if kind == "clip" else raw)
    return VideoMa2mbaVisionConfig(**own_values(theirs))


def _processor(config: VideoMa2mbaConfig, folder: Path) -> VideoMa2mbaProcessor:
    """The processor with the tokenizer in `folder`; writes the tokens' ids into `config`."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConversionError(
            f"{folder} holds no tokenizer; give the folder of one, such as EleutherAI/gpt-neox-20b's for the models of "
            "state-spaces, with --tokenizer."
        )
    with naming_bad_values(f"{folder} holds no tokenizer that can be read: "):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    processor = VideoMa2mbaProcessor.for_model(config, tokenizer)
    if len(tokenizer) > config.text_config.vocab_size:
        raise ConversionError(
            f"With the vision and chat tokens the tokenizer has {len(tokenizer)} tokens, and the embedding of the "
            f"source only {config.text_config.vocab_size} rows: it must be padded."
        )
    for name in ("vision_start", "vision_end", "image", "video"):
        mark = {"image": processor.image_token, "video": processor.video_token}.get(name, f"<|{name}|>")
        setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(mark))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, name, getattr(tokenizer, name))
    return processor
