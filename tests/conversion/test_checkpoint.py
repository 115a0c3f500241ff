"""conversion/checkpoint.py: whole folders, from and to each format."""

import json
import os
import resource
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

from vamba.conversion import ConversionError, convert
from vamba.conversion.formats import expected_shapes
from vamba.errors import DiskFullError, UserError
from vamba.modeling.configuration_vamba import VambaConfig
from vamba.weight_files import CheckpointReader

import kill_points
from tiny_checkpoints import tiny_qwen2_vl


MAMBA = {"head_dim": 16, "state_size": 8, "chunk_size": 16}
TEXT, VIDEO = "model.language_model.", "model.video_encoder."


def tensors_of(folder):
    return {key: tensor for path in folder.glob("model*.safetensors") for key, tensor in load_file(path).items()}


def same(left, right):
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )


def quietly(source, destination, **options):
    return convert(source, destination, progress=False, **options)


@pytest.fixture
def convert_qwen(qwen2_vl, tmp_path):
    def run(name="ours", **options):
        return quietly(qwen2_vl, tmp_path / name, **({"mamba_config": MAMBA} | options))

    return run


def test_qwen2_vl(qwen2_vl, convert_qwen, tmp_path):
    assert convert_qwen() == tmp_path / "ours"
    source, ours = tensors_of(qwen2_vl), tensors_of(tmp_path / "ours")
    assert all(
        torch.equal(ours[key.replace("visual.", "model.visual.", 1)], source[key]) for key in source if "visual." in key
    )
    assert torch.equal(ours["lm_head.weight"], source["lm_head.weight"])
    assert torch.equal(ours[TEXT + "norm.weight"], source["model.norm.weight"])
    for layer in range(3):
        theirs = f"model.layers.{layer}."
        for key in (key.removeprefix(theirs) for key in source if key.startswith(theirs)):
            assert torch.equal(ours[f"{TEXT}layers.{layer}.{key}"], source[theirs + key]), key
            if key.startswith("self_attn"):
                copy = f"{TEXT}layers.{layer}.{key.replace('self', 'cross', 1)}"
                if key.startswith(("self_attn.k_proj", "self_attn.v_proj")):
                    copy = f"{VIDEO}levels.{layer}.{key.removeprefix('self_attn.')}"
                assert torch.equal(ours[copy], source[theirs + key]), key
        assert ours[f"{TEXT}layers.{layer}.alpha"].tolist() == [0.5]
    assert {key.split(".")[3] for key in ours if key.startswith(VIDEO) and ".block." in key} == {"0", "1"}
    block = VIDEO + "levels.{}.block.mixer."
    assert (ours[block.format(0) + "D"] == 1).all() and ours[block.format(1) + "in_proj.weight"].std() > 0.01


def test_both_generations_of_key_names(qwen2_vl, convert_qwen):
    before = tensors_of(convert_qwen())
    newer = {}
    for key, tensor in tensors_of(qwen2_vl).items():
        key = key.replace("model.", TEXT, 1) if key.startswith("model.") else key
        newer["model." + key if key.startswith("visual.") else key] = tensor
    assert sum(key.startswith(TEXT) for key in newer) > 30
    save_file(newer, qwen2_vl / "model.safetensors", metadata={"format": "pt"})
    assert same(before, tensors_of(convert_qwen("newer")))


def test_converted_checkpoints_load_without_a_missing_or_unexpected_key(qwen2_vl, convert_qwen):
    from vamba.modeling.modeling_vamba import VambaForConditionalGeneration

    folder = convert_qwen(dtype="bfloat16")
    model, info = VambaForConditionalGeneration.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored = tensors_of(folder)
    assert model.dtype == torch.bfloat16 and same(stored, {key: model.state_dict()[key] for key in stored})


def test_original_there_and_back(golden, tmp_path):
    ours = quietly(golden, tmp_path / "ours")
    back = quietly(ours, tmp_path / "back", to="original")
    source, returned = tensors_of(golden), tensors_of(back)
    unread = "model.layers.2.vision_mixer."
    assert any(key.startswith(unread) for key in source) and not any(
        ".levels.2.block." in key for key in tensors_of(ours)
    )
    assert source.keys() == returned.keys()
    assert {key: list(tensor.shape) for key, tensor in source.items()} == {
        key: list(tensor.shape) for key, tensor in returned.items()
    }
    read = [key for key in source if not key.startswith(unread)]
    assert same({key: source[key] for key in read}, {key: returned[key] for key in read})
    assert same(tensors_of(ours), tensors_of(quietly(back, tmp_path / "again")))
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == json.loads((ours / "config.json").read_text())


def test_last_mixer_for_the_originals_loader_is_initialised(golden, tmp_path):
    back = quietly(quietly(golden, tmp_path / "ours"), tmp_path / "back", to="original", dtype="bfloat16")
    mixer = {key.split("vision_mixer.")[1]: t for key, t in tensors_of(back).items() if "layers.2.vision" in key}
    assert (mixer["norm.weight"] == 1).all() and mixer["mixer.in_proj.weight"].float().std() > 0.01
    assert mixer["mixer.A_log"].dtype == torch.float32 and mixer["mixer.in_proj.weight"].dtype == torch.bfloat16


def test_configuration_and_companions_go_with_the_weights(convert_qwen, tmp_path):
    folder = convert_qwen(dtype="bfloat16")
    config = VambaConfig.from_pretrained(folder)
    assert config.dtype == torch.bfloat16 and config.architectures == ["VambaForConditionalGeneration"]
    assert config.mamba_config.head_dim == 16 and config.text_config.rope_parameters["rope_theta"] == 5e5
    assert "image_pad" not in (folder / "chat_template.jinja").read_text() and (folder / "tokenizer.json").is_file()
    for module in {entry.split(".")[0] for entry in config.auto_map.values()}:
        assert (folder / f"{module}.py").is_file()
    back = quietly(folder, tmp_path / "back", to="original")
    written = json.loads((back / "config.json").read_text())
    assert written["model_type"] == "qwen2_vl" and written["torch_dtype"] == "bfloat16"
    assert json.loads((back / "preprocessor_config.json").read_text())["processor_class"] == "Qwen2VLProcessor"
    assert json.loads((back / "processor_config.json").read_text()) == {"processor_class": "Qwen2VLProcessor"}
    assert not list(back.glob("*.py"))


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16])
def test_dtype(convert_qwen, dtype):
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    wide, narrow = tensors_of(convert_qwen("wide")), tensors_of(convert_qwen("narrow", dtype=dtype))
    state_space = [key for key in wide if key.endswith((".A_log", ".D", ".dt_bias"))]
    assert len(state_space) == 6
    assert all(narrow[key].dtype == torch.float32 and torch.equal(wide[key], narrow[key]) for key in state_space)
    others = wide.keys() - state_space
    assert same({key: wide[key].to(expected) for key in others}, {key: narrow[key] for key in others})


def test_source_dtype_is_kept_tensor_by_tensor(qwen2_vl, convert_qwen):
    tensors = {key: tensor.bfloat16() for key, tensor in tensors_of(qwen2_vl).items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, qwen2_vl / "model.safetensors")
    folder = convert_qwen()
    dtypes = {key: tensor.dtype for key, tensor in tensors_of(folder).items()}
    assert dtypes[TEXT + "norm.weight"] == dtypes[VIDEO + "levels.0.block.mixer.A_log"] == torch.float32
    assert dtypes[TEXT + "layers.0.alpha"] == dtypes[VIDEO + "levels.0.block.mixer.in_proj.weight"] == torch.bfloat16
    assert VambaConfig.from_pretrained(folder).dtype == torch.bfloat16


def test_values_beyond_float16_are_not_made_infinite(qwen2_vl, convert_qwen, tmp_path):
    tensors = tensors_of(qwen2_vl)
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, qwen2_vl / "model.safetensors")
    with pytest.raises(ConversionError, match="model.norm.weight has values beyond float16"):
        convert_qwen(dtype="float16")
    assert not (tmp_path / "ours").exists()
    convert_qwen(dtype="bfloat16")


def test_ours_to_another_dtype_and_sharding(convert_qwen, tmp_path):
    folder = convert_qwen()
    half = quietly(folder, tmp_path / "half", dtype="bfloat16", max_shard_size="50KB")
    assert len(list(half.glob("model-*-of-*.safetensors"))) > 3
    assert same(tensors_of(half), tensors_of(convert_qwen("direct", dtype="bfloat16")))


def test_result_depends_on_the_seed_but_not_on_the_sharding(qwen2_vl, convert_qwen):
    whole, again, shards = convert_qwen("a"), convert_qwen("b"), convert_qwen("c", max_shard_size=40_000)
    assert (whole / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    index = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 5 and index.keys() == tensors_of(whole).keys()
    assert same(tensors_of(whole), tensors_of(shards))
    other = tensors_of(convert_qwen("d", seed=1))
    changed = {key for key, tensor in tensors_of(whole).items() if not torch.equal(tensor, other[key])}
    assert changed and all(key.startswith(VIDEO) for key in changed)


def test_sharded_source(qwen2_vl, convert_qwen):
    expected = tensors_of(convert_qwen("whole"))
    model = Qwen2VLForConditionalGeneration.from_pretrained(qwen2_vl)
    (qwen2_vl / "model.safetensors").unlink()
    model.save_pretrained(qwen2_vl, max_shard_size="50KB")
    assert len(list(qwen2_vl.glob("model-*.safetensors"))) > 3
    assert same(expected, tensors_of(convert_qwen("sharded")))


@pytest.fixture
def tied(tmp_path):
    folder = tmp_path / "tied"
    Qwen2VLForConditionalGeneration(tiny_qwen2_vl(tie_word_embeddings=True)).save_pretrained(folder)
    return folder


def test_tied_embeddings_have_no_head(tied, tmp_path):
    assert "lm_head.weight" not in tensors_of(tied)
    ours = quietly(tied, tmp_path / "ours", mamba_config=MAMBA)
    assert "lm_head.weight" not in tensors_of(ours) and VambaConfig.from_pretrained(ours).tie_word_embeddings
    back = quietly(ours, tmp_path / "back", to="original")
    assert "lm_head.weight" not in tensors_of(back)
    assert json.loads((back / "config.json").read_text())["tie_word_embeddings"] is True


def test_head_stored_beside_tied_embeddings(tied, tmp_path):
    tensors = tensors_of(tied)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, tied / "model.safetensors")
    ours = quietly(tied, tmp_path / "same", mamba_config=MAMBA)
    assert "lm_head.weight" not in tensors_of(ours)
    head[5, 5] += 1
    save_file(tensors | {"lm_head.weight": head}, tied / "model.safetensors")
    with pytest.raises(ConversionError, match="lm_head.weight and model.embed_tokens.weight differ"):
        quietly(tied, tmp_path / "different", mamba_config=MAMBA)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "1 missing keys: model.layers.1.mlp.up_proj.weight"),
        ({"lm_head.weight": None}, "1 missing keys: lm_head.weight"),
        (
            {"model.layers.3.mlp.up_proj.weight": (96, 64)},
            r"1 unknown keys: model.layers.3.mlp.up_proj.weight \[96, 64",
        ),
        ({"model.rotary": (4,)}, "1 unknown keys: model.rotary"),
        ({"model.layers.0.cross_attn.q_proj.bias": (64,)}, "1 unknown keys: model.layers.0.cross_attn.q_proj.bias"),
        ({"model.norm.weight": (65,)}, r"model.norm.weight is \[65\], must be \[64\]"),
    ],
)
def test_keys_that_do_not_fit(qwen2_vl, convert_qwen, tmp_path, change, says):
    tensors = tensors_of(qwen2_vl)
    for key, shape in change.items():
        if shape is None:
            del tensors[key]
        else:
            tensors[key] = torch.zeros(shape)
    save_file(tensors, qwen2_vl / "model.safetensors")
    with pytest.raises(ConversionError, match=says):
        convert_qwen()
    assert [path.name for path in tmp_path.iterdir()] == ["qwen2_vl"]


def test_original_keys_that_do_not_fit(golden_copy, tmp_path):
    tensors = tensors_of(golden_copy)
    del tensors["model.layers.1.vision_mixer.mixer.A_log"]
    tensors["model.layers.0.cross_attn.q_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, golden_copy / "model.safetensors")
    with pytest.raises(ConversionError) as caught:
        quietly(golden_copy, tmp_path / "ours")
    assert "1 missing keys: model.layers.1.vision_mixer.mixer.A_log;" in str(caught.value)
    assert "model.layers.0.cross_attn.q_proj.weight is [3, 3], must be [64, 64]" in str(caught.value)


def test_original_without_the_unread_mixer_is_complete(golden_copy, tmp_path):
    tensors = {key: t for key, t in tensors_of(golden_copy).items() if "layers.2.vision_mixer" not in key}
    save_file(tensors, golden_copy / "model.safetensors")
    quietly(golden_copy, tmp_path / "ours")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_run_leaves_nothing_and_keeps_the_old(qwen2_vl, convert_qwen, tmp_path, monkeypatch, error):
    old = tensors_of(convert_qwen())
    read, count = CheckpointReader.read, []

    def interrupted(self, key):
        count.append(key)
        if len(count) == 20:
            assert (tmp_path / "ours.partial").is_dir()
            raise error
        return read(self, key)

    monkeypatch.setattr(CheckpointReader, "read", interrupted)
    with pytest.raises(error):
        convert_qwen(overwrite=True, seed=5)
    assert len(count) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "qwen2_vl"]
    assert same(old, tensors_of(tmp_path / "ours"))


@pytest.mark.parametrize("size", [0, 100, 200_000])
def test_without_room_the_old_one_stays(convert_qwen, tmp_path, size):
    old, limits = tensors_of(convert_qwen()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(DiskFullError, match=r"ours is full .*too large.*; nothing was left behind"):
            convert_qwen(overwrite=True, seed=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "qwen2_vl"]
    assert same(old, tensors_of(tmp_path / "ours"))


def test_too_small_a_disk_is_refused_before_anything_is_written(convert_qwen, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="ours needs .* GB are free"):
        convert_qwen()
    assert [path.name for path in tmp_path.iterdir()] == ["qwen2_vl"]


def test_destination_in_the_way(convert_qwen, tmp_path):
    old = tensors_of(convert_qwen())
    with pytest.raises(FileExistsError, match="not empty"):
        convert_qwen(seed=5)
    assert same(old, tensors_of(tmp_path / "ours"))
    (tmp_path / "ours" / "results.txt").write_text("x")
    with pytest.raises(FileExistsError, match="holds results.txt"):
        convert_qwen(seed=5, overwrite=True)
    (tmp_path / "ours" / "results.txt").unlink()
    (tmp_path / "link").symlink_to("ours")
    convert_qwen(name="link", seed=5, overwrite=True, max_shard_size="100KB")
    assert (tmp_path / "link").is_symlink() and not same(old, tensors_of(tmp_path / "ours"))
    convert_qwen(seed=0, overwrite=True)
    assert same(old, tensors_of(tmp_path / "ours"))
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "ours").iterdir()} == {0o666 & ~umask()}


def umask():
    os.umask(mask := os.umask(0))
    return mask


def test_what_is_read_is_never_replaced(convert_qwen, qwen2_vl, tmp_path):
    convert_qwen()
    for name in ("vision", "tokenizer"):
        with pytest.raises(UserError, match="must not lie in each other"):
            quietly(qwen2_vl, tmp_path / "ours", overwrite=True, **{name: tmp_path / "ours"})
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", tmp_path / "with\0zero", "~nobody-of-that-name/x", None, b"bytes", "\udcff"):
        with pytest.raises(UserError, match="no path of a folder|is no folder"):
            quietly(qwen2_vl, path)


def convert_again(source, folder, seed, overwrite):
    convert(source, folder, mamba_config=MAMBA, seed=seed, overwrite=overwrite, progress=False)


@pytest.mark.parametrize("overwrite", [True, False])
def test_killed_at_any_moment(convert_qwen, qwen2_vl, tmp_path, overwrite):
    """The destination is absent, the old one or the new one; after the next run nothing else is left."""
    known = {seed: tensors_of(convert_qwen(name=f"{seed}", seed=seed)) for seed in range(2)}
    seconds, operations = kill_points.run_to_the_end(convert_again, qwen2_vl, tmp_path / "ours", 0, False)
    beside = {path.name for path in tmp_path.iterdir()}
    kills = [{"seconds": moment} for moment in kill_points.moments(seconds)]
    kills += [{"step": step} for step in kill_points.steps(operations)]
    for kill in kills:
        if not overwrite:
            shutil.rmtree(tmp_path / "ours", ignore_errors=True)
        kill_points.kill_at(convert_again, qwen2_vl, tmp_path / "ours", 1, overwrite, **kill)
        if overwrite or (tmp_path / "ours").exists():
            assert any(same(tensors_of(tmp_path / "ours"), tensors) for tensors in known.values())
            assert (tmp_path / "ours" / "README.md").is_file()
        try:
            convert_again(qwen2_vl, tmp_path / "ours", 0, overwrite)
        except FileExistsError:
            assert not overwrite
        assert {path.name for path in tmp_path.iterdir()} == beside
        assert same(tensors_of(tmp_path / "ours"), known[0]) or not overwrite


def test_of_converts_at_once_to_one_folder_one_succeeds(convert_qwen, qwen2_vl, tmp_path):
    convert_qwen(name="1", seed=1)
    at_once = [kill_points.start(convert_again, qwen2_vl, tmp_path / "ours", 1, False) for _ in range(4)]
    for process in at_once:
        process.join()
    assert sorted(process.exitcode for process in at_once) == [0, 1, 1, 1]
    assert same(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "1"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "ours", "qwen2_vl"]


def test_arguments_that_make_no_sense(qwen2_vl, convert_qwen, golden, tmp_path):
    with pytest.raises(ValueError, match="dtype is 'int8', must be one of float32, bfloat16, float16"):
        convert_qwen(dtype="int8")
    with pytest.raises(ValueError, match="dtype is torch.int8"):
        convert_qwen(dtype=torch.int8)
    with pytest.raises(ValueError, match="to is 'llama', must be 'vamba'"):
        convert_qwen(to="llama")
    with pytest.raises(ValueError, match="is a Qwen2-VL checkpoint and to is 'original': convert it to vamba first"):
        convert_qwen(to="original")
    with pytest.raises(ValueError, match="is an original Vamba checkpoint and to is 'original': it is in that format"):
        quietly(golden, tmp_path / "ours", to="original")
    with pytest.raises(ValueError, match="mamba_config is for a Qwen2-VL source"):
        quietly(golden, tmp_path / "ours", mamba_config=MAMBA)
    with pytest.raises(FileNotFoundError, match="hf download"):
        quietly(tmp_path / "nowhere", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["qwen2_vl"]


def test_one_layer_has_no_mamba_block(tmp_path):
    config = tiny_qwen2_vl()
    config.text_config.num_hidden_layers = 1
    config.text_config.layer_types = ["full_attention"]
    Qwen2VLForConditionalGeneration(config).save_pretrained(tmp_path / "one")
    ours = quietly(tmp_path / "one", tmp_path / "ours", mamba_config=MAMBA)
    assert not any(".block." in key for key in tensors_of(ours))
    back = tensors_of(quietly(ours, tmp_path / "back", to="original"))
    assert sum("layers.0.vision_mixer." in key for key in back) == 9


def test_expected_shapes_allocate_nothing_and_are_the_models():
    shapes = expected_shapes(VambaConfig())
    assert shapes["model.video_encoder.levels.26.block.mixer.in_proj.weight"] == (14704, 3584)
    assert "model.video_encoder.levels.27.block.norm.weight" not in shapes
    assert shapes["model.video_encoder.levels.27.k_proj.weight"] == (512, 3584)
