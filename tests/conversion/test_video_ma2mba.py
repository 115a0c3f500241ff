"""conversion/video_ma2mba.py: Mamba-2 and CLIP in their formats, against what transformers computes with them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    Mamba2ForCausalLM,
)

from vamba.conversion import ConversionError, convert
from vamba.demo.tiny_checkpoints import make_tiny_clip, make_tiny_mamba2
from vamba.errors import UserError


CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders `mamba2` and `clip` as transformers writes them; for reading only."""
    folder = tmp_path_factory.mktemp("sources")
    make_tiny_mamba2(folder / "mamba2", ["What happens?"])
    make_tiny_clip(folder / "clip", width=32, image_size=16, patch_size=4, depth=3)
    for name in ("mamba2", "clip"):  # off their trivial values, so that a swap of two norms shows
        path = folder / name / "model.safetensors"
        state = {
            key: t + 0.05 * torch.randn_like(t) if t.is_floating_point() else t for key, t in load_file(path).items()
        }
        save_file(state, path, metadata={"format": "pt"})
    return folder


@pytest.fixture
def mamba2(sources, tmp_path):
    """A copy of the language model that a test may spoil."""
    return shutil.copytree(sources / "mamba2", tmp_path / "mamba2")


@pytest.fixture
def state_spaces(sources, tmp_path):
    """The same language model as state-spaces publishes one: no tokenizer, no safetensors, another config.json."""
    folder = tmp_path / "state-spaces"
    folder.mkdir()
    theirs = json.loads((sources / "mamba2" / "config.json").read_text())
    ssm_cfg = {"layer": "Mamba2", "d_state": 16, "headdim": 16, "chunk_size": 16}
    config = {
        "d_model": theirs["hidden_size"], "d_intermediate": 0, "n_layer": theirs["num_hidden_layers"],
        "vocab_size": theirs["vocab_size"] - 5, "ssm_cfg": ssm_cfg, "attn_layer_idx": [], "attn_cfg": {},
        "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(sources / "mamba2" / "model.safetensors")
    state["backbone.embedding.weight"] = state["lm_head.weight"] = state.pop("backbone.embeddings.weight")
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def check_parity(folder, sources):
    """Text and vision of a converted checkpoint are those of its sources."""
    model, loading = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, 250, (2, 21))
    with torch.no_grad():
        expected = Mamba2ForCausalLM.from_pretrained(sources / "mamba2").eval()(ids).logits
        torch.testing.assert_close(model.eval()(ids).logits, expected, **CLOSE)
        pictures = torch.rand(2, 3, 16, 16)
        clip = CLIPVisionModel.from_pretrained(sources / "clip").eval()(pictures, output_hidden_states=True)
        blocks = pictures.view(2, 3, 2, 2, 4, 2, 2, 4).permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, 48)
        features = model.get_image_features(blocks, torch.tensor([[1, 4, 4]] * 2), return_dict=True)
    torch.testing.assert_close(features.last_hidden_state, clip.hidden_states[-2][:, 1:].flatten(0, 1), **CLOSE)
    return model


def test_transformers_format(sources, tmp_path):
    folder = convert(sources / "mamba2", tmp_path / "out", vision=sources / "clip", progress=False)
    model = check_parity(folder, sources)
    processor = AutoProcessor.from_pretrained(folder)
    ids = processor.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    assert [model.config.vision_start_token_id, model.config.vision_end_token_id] == ids
    assert len(processor.tokenizer) <= model.config.text_config.vocab_size
    assert model.generation_config.eos_token_id == [processor.tokenizer.convert_tokens_to_ids("<|im_end|>"), 0]
    card = (folder / "README.md").read_text()
    assert "projector is freshly initialised" in card and "{{" not in card and "base_model" not in card
    assert {"modeling_video_ma2mba.py", "processing_video_ma2mba.py", "mamba2.py"} <= {f.name for f in folder.iterdir()}
    state = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in state and not any("encoder.layers.2" in key or "post_lay" in key for key in state)


def test_state_spaces_format(sources, state_spaces, tmp_path):
    options = {"vision": sources / "clip", "progress": False}
    with pytest.raises(ConversionError, match="holds no tokenizer.*gpt-neox-20b's .*--tokenizer"):
        convert(state_spaces, tmp_path / "out", **options)
    folder = convert(state_spaces, tmp_path / "out", tokenizer=sources / "mamba2", **options)
    check_parity(folder, sources)


def test_a_whole_clip_in_a_bin_file(sources, tmp_path):
    """As openai/clip-vit-large-patch14-336 is published."""
    vision = json.loads((sources / "clip" / "config.json").read_text())
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(text_config=small, vision_config=vision, projection_dim=32))
    tower = load_file(sources / "clip" / "model.safetensors")
    prefix = "" if any(key.startswith("vision_model.") for key in tower) else "vision_model."
    state = clip.state_dict() | {prefix + key: t for key, t in tower.items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    (tmp_path / "clip").mkdir()
    clip.config.save_pretrained(tmp_path / "clip")
    torch.save(state, tmp_path / "clip" / "pytorch_model.bin")
    check_parity(convert(sources / "mamba2", tmp_path / "out", vision=tmp_path / "clip", progress=False), sources)


def test_fresh_values_depend_on_the_seed_alone(sources, tmp_path):
    made = [
        load_file(
            convert(sources / "mamba2", tmp_path / name, vision=sources / "clip", seed=seed, progress=False)
            / "model.safetensors"
        )
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    projector = [key for key in made[0] if key.startswith("model.projector.")]
    assert len(projector) == 4 and all(torch.equal(made[0][key], made[1][key]) for key in made[0])
    changed = [key for key in made[0] if not torch.equal(made[0][key], made[2][key])]
    assert changed == [key for key in made[0] if key in projector and key.endswith("weight")]


def test_dtype_and_sharding(sources, tmp_path):
    options = {"vision": sources / "clip", "progress": False}
    first = convert(sources / "mamba2", tmp_path / "float32", **options)
    half = convert(first, tmp_path / "half", dtype="bfloat16", max_shard_size="100KB", progress=False)
    assert len(list(half.glob("model-*.safetensors"))) > 2
    model = AutoModelForImageTextToText.from_pretrained(half)
    assert model.dtype == torch.bfloat16 and model.model.language_model.layers[0].mixer.A_log.dtype == torch.float32
    direct = convert(sources / "mamba2", tmp_path / "direct", dtype="bfloat16", **options)
    for key, tensor in AutoModelForImageTextToText.from_pretrained(direct).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key])
    assert AutoProcessor.from_pretrained(half).chat_template == AutoProcessor.from_pretrained(first).chat_template
    assert "trained" in (half / "README.md").read_text()


@pytest.mark.parametrize("problem", ["unknown", "missing", "misshaped", "untied"])
def test_keys_that_do_not_fit_are_named(sources, mamba2, tmp_path, problem):
    path = mamba2 / "model.safetensors"
    state = load_file(path)
    key = "backbone.layers.1.mixer.D"
    if problem == "unknown":
        state["backbone.layers.1.mlp.fc1.weight"] = torch.ones(2)
    elif problem == "missing":
        del state[key]
    elif problem == "misshaped":
        state[key] = torch.ones(3)
    else:
        state["lm_head.weight"] = state["backbone.embeddings.weight"] + 1
    save_file(state, path, metadata={"format": "pt"})
    match = {
        "unknown": r"1 unknown keys: backbone\.layers\.1\.mlp\.fc1\.weight",
        "missing": r"1 missing keys: backbone\.layers\.1\.mixer\.D",
        "misshaped": r"backbone\.layers\.1\.mixer\.D is \[3\], must be \[8\]",
        "untied": "backbone.embeddings.weight and lm_head.weight differ",
    }[problem]
    with pytest.raises(ConversionError, match=match):
        convert(mamba2, tmp_path / "out", vision=sources / "clip", progress=False)
    assert not (tmp_path / "out").exists()


def test_an_untied_head_is_kept(sources, mamba2, tmp_path, edit_json):
    state = load_file(mamba2 / "model.safetensors")
    state["lm_head.weight"] = torch.randn_like(state["backbone.embeddings.weight"])
    save_file(state, mamba2 / "model.safetensors", metadata={"format": "pt"})
    edit_json(mamba2 / "config.json", tie_word_embeddings=False)
    folder = convert(mamba2, tmp_path / "out", vision=sources / "clip", progress=False)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"]) and not model.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"attn_layer_idx": [1]}, r"attn_layer_idx = \[1\] is not supported"),
        ({"ssm_cfg": {"layer": "Mamba1"}}, "ssm_cfg.layer = 'Mamba1'"),
        ({"ssm_cfg": {}}, "ssm_cfg.layer = 'Mamba1'"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "ssm_cfg.norm_before_gate = True"),
        ({"ssm_cfg": {"layer": "Mamba2", "A_init": 3}}, "ssm_cfg.A_init = 3"),
        ({"rms_norm": False}, "rms_norm = False"),
    ],
)
def test_language_models_of_another_kind_are_refused(sources, state_spaces, tmp_path, edit_json, changes, match):
    edit_json(state_spaces / "config.json", **changes)
    with pytest.raises(ConversionError, match=match):
        convert(state_spaces, tmp_path / "out", vision=sources / "clip", tokenizer=sources / "mamba2", progress=False)


def test_a_config_without_sizes(sources, state_spaces, tmp_path):
    content = json.loads((state_spaces / "config.json").read_text())
    del content["d_model"]
    (state_spaces / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConversionError, match="config.json: d_model is missing"):
        convert(state_spaces, tmp_path / "out", vision=sources / "clip", progress=False)


def test_an_embedding_without_spare_rows(sources, mamba2, tmp_path, edit_json):
    state = load_file(mamba2 / "model.safetensors")
    rows = json.loads((mamba2 / "config.json").read_text())["vocab_size"] - 16
    state["backbone.embeddings.weight"] = state["backbone.embeddings.weight"][:rows].clone()
    save_file(state, mamba2 / "model.safetensors", metadata={"format": "pt"})
    edit_json(mamba2 / "config.json", vocab_size=rows)
    with pytest.raises(ConversionError, match=rf"the embedding of the source only {rows} rows"):
        convert(mamba2, tmp_path / "out", vision=sources / "clip", progress=False)


def test_arguments_that_make_no_sense(sources, qwen2_vl, tmp_path):
    mamba2, clip, out = sources / "mamba2", sources / "clip", tmp_path / "out"
    for source, options, match in (
        (mamba2, {}, "no vision tower; give the folder of a CLIP.*--vision"),
        (mamba2, {"vision": mamba2}, "is a mamba2 checkpoint; the vision tower is that of a CLIP"),
        (mamba2, {"vision": clip, "to": "original"}, "are for the Vamba family"),
        (clip, {}, "model_type is 'clip_vision_model'.*a Mamba-2 language model"),
        (qwen2_vl, {"vision": clip}, "`vision` and `tokenizer` are for a Mamba-2"),
    ):
        with pytest.raises(ConversionError, match=match):
            convert(source, out, progress=False, **options)
    ours = convert(mamba2, out, vision=clip, progress=False)
    with pytest.raises(ConversionError, match="a vision tower and a tokenizer of its own"):
        convert(ours, tmp_path / "again", vision=clip, progress=False)


def test_a_bin_file_runs_no_code(sources, state_spaces, tmp_path):
    class Surprise:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    for content in ({"backbone.norm_f.weight": Surprise()}, b"no pickle at all"):
        if isinstance(content, bytes):
            (state_spaces / "pytorch_model.bin").write_bytes(content)
        else:
            torch.save(content, state_spaces / "pytorch_model.bin")
        with pytest.raises(UserError, match="pytorch_model.bin is damaged, or no file of tensors"):
            convert(
                state_spaces, tmp_path / "out", vision=sources / "clip", tokenizer=sources / "mamba2", progress=False
            )
    assert not (tmp_path / "harm").exists()
