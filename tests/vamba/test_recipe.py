"""Recipes: what is shipped is sound, and every mistake is one line that names the key, before the model is loaded."""

import dataclasses
import time

import pytest
import transformers
import yaml

from vamba.cli import main
from vamba.training import RecipeError, load_recipe, parse_recipe, shipped_recipes
from vamba.training.preparation import PRESETS, prepare

from tiny_video_ma2mba import tiny_config
from training_data import write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"), 6)


def changed(values: dict, **changes) -> dict:
    """A copy with `a__b=value` put at a.b; `...` takes the key out."""
    values = yaml.safe_load(yaml.safe_dump(values))
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is ...:
            del place[key]
        else:
            place[key] = value
    return values


def test_shipped_recipes_are_the_papers():
    assert shipped_recipes() == [
        "vamba_lora", "vamba_stage1", "vamba_stage2", "video_ma2mba_stage1", "video_ma2mba_stage1_5",
        "video_ma2mba_stage2",
    ]  # fmt: skip
    recipes = {name: load_recipe(name) for name in shipped_recipes()}
    rates = {name: recipe.train["learning_rate"] for name, recipe in recipes.items()}
    assert rates["vamba_stage1"] == 1e-5 and rates["vamba_stage2"] == 5e-6
    assert rates["video_ma2mba_stage1"] == 1e-3 and rates["video_ma2mba_stage2"] == 4e-5
    for name, stage in (("vamba_stage1", "stage1"), ("vamba_stage2", "stage2")):
        recipe = recipes[name]
        assert recipe.trainable == stage and recipe.global_batch_size == 128 and recipe.data.packing
        assert recipe.data.max_video_tokens == recipe.data.batch_video_tokens == 120_000
        train = recipe.train
        assert (train["lr_scheduler_type"], train["warmup_steps"], train["weight_decay"]) == ("cosine", 0.03, 0.01)
    for name, batch in (("stage1", 512), ("stage1_5", 32), ("stage2", 32)):
        recipe = recipes[f"video_ma2mba_{name}"]
        assert recipe.global_batch_size == batch and recipe.train["weight_decay"] == 0.05
        assert [group.learning_rate for group in recipe.groups] == ([] if name == "stage1" else [4e-6])
    assert recipes["vamba_lora"].lora.r == 64 and recipes["vamba_lora"].lora.target_modules is None


def test_presets_are_what_the_stages_train(checkpoint):
    import re

    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint)

    def chosen(preset):
        return {n for n, _ in model.named_parameters() if any(re.search(pattern, n) for pattern in PRESETS[preset])}

    kinds = {"cross_attn", "video_encoder", "alpha"}
    assert chosen("stage1") == {n for n, _ in model.named_parameters() if kinds & set(n.split("."))}
    frozen = {n for n, _ in model.named_parameters()} - chosen("stage2")
    assert frozen and all(n.startswith("model.visual.") and ".merger." not in n for n in frozen)


def test_overrides_and_numbers(values, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(values))
    recipe = load_recipe(str(path), ["train.learning_rate=1e-5", "data.fps=2", "lora.r=4", "trainable=lora"])
    assert recipe.train["learning_rate"] == 1e-5 and recipe.data.fps == 2.0 and recipe.lora.r == 4
    assert recipe.data.train[0].path == values["data"]["train"]
    assert parse_recipe(changed(values, trainable="lora")).lora.r == 64
    assert parse_recipe(dataclasses.asdict(recipe)) == recipe  # as `final/recipe.yaml` holds it


def test_steps_follow_from_epochs_and_the_batch_from_its_parts(values):
    train = values["train"] | {"num_train_epochs": 3}
    del train["max_steps"]
    prepared = prepare(parse_recipe(values | {"train": train, "global_batch_size": 8}))
    assert prepared.arguments.gradient_accumulation_steps == 2
    assert prepared.arguments.max_steps == 3  # 3 epochs of 6 in steps of 8


WRONG = {
    "unknown key": ({"modle": {}}, "modle is no key, model is; accepted: model, data, train"),
    "unknown key below": ({"data__pakcing": True}, "data.pakcing is no key, packing is; accepted: train, streaming"),
    "unknown argument": ({"train__learning_rat": 1}, "train.learning_rat is no key, learning_rate is"),
    "not accepted": ({"train__gradient_accumulation_steps": 2}, "steps is not accepted: give global_batch_size"),
    "evaluation": ({"train__eval_steps": 5}, "train.eval_steps is no key"),
    "missing": ({"model__path": ...}, "model.path is missing; accepted: a text"),
    "no data": ({"data": ...}, "data is missing; accepted: the keys train, streaming"),
    "no output": ({"train__output_dir": ...}, "train.output_dir is missing"),
    "type": ({"data__packing": "perhaps"}, "data.packing is 'perhaps'; accepted: true, false"),
    "choice": ({"data__on_error": "ignore"}, "data.on_error is 'ignore'; accepted: skip, raise"),
    "enum": ({"train__lr_scheduler_type": "cosin"}, "lr_scheduler_type is 'cosin'; accepted: linear, cosine"),
    "number": ({"train__learning_rate": "fast"}, "train.learning_rate is 'fast'; accepted: a number"),
    "section": ({"lora": 8, "trainable": "lora"}, "lora is 8; accepted: r, alpha"),
    "list entry": ({"data__train": [{"path": "a", "wieght": 1}]}, "data.train[0].wieght is no key, weight is"),
    "preset": ({"trainable": "stage3"}, "trainable is 'stage3'; accepted: stage1, stage2, lora, all, a list of a text"),
    "range": ({"data__fps": 0}, "data.fps is 0.0; accepted: a number above 0"),
    "no sources": ({"data__train": []}, "data.train is empty; accepted"),
    "half the weights": ({"data__train": [{"path": "a", "weight": 1}, "b"]}, "data.train[1].weight is missing"),
    "streamed sizes": ({"data__train": ["a", "b"], "data__streaming": True}, "data.train[0].weight is missing"),
    "sample above batch": (
        {"data__max_video_tokens": 90, "data__batch_video_tokens": 60},
        "data.max_video_tokens is 90; accepted: at most data.batch_video_tokens, 60",
    ),
    "packs of rows": (
        {"data__packing": True, "data__max_length": 9, "data__batch_text_tokens": 9},
        "train.per_device_train_batch_size is 4; accepted with data.packing: 1",
    ),
    "packs without end": (
        {"data__packing": True, "train__per_device_train_batch_size": 1},
        "data.batch_video_tokens is missing; accepted with data.packing",
    ),
    "pixels": ({"data__min_pixels": 9, "data__max_pixels": 4}, "data.min_pixels is 9; accepted: at most"),
    "one frame": ({"data__max_frames": 1}, "data.max_frames is 1; accepted: a whole number of at least 2"),
    "impossible budget": ({"data__max_video_tokens": 8}, "data.max_video_tokens is 8; accepted: at least 9"),
    "no such model": ({"model__path": "/no/model"}, "model.path: /no/model is no folder; give"),
    "no such output": ({"train__output_dir": "/dev/null/out"}, "train.output_dir: /dev/null/out cannot be written"),
    "no such data": ({"data__train": "/no/data.jsonl"}, "data.train[0].path: /no/data.jsonl: there is no such file"),
    "no such root": (
        {"data__train": [{"path": "a.jsonl", "media_root": "/no/root"}]},
        "data.train[0].media_root is /no/root, no folder",
    ),
    "no such parameter": ({"trainable": ["crossattn"]}, "trainable: 'crossattn' matches no parameter; accepted: names"),
    "no such group": ({"groups": [{"pattern": "x1", "learning_rate": 1}]}, "groups[0].pattern: 'x1' matches no"),
    "bad pattern": ({"trainable": ["("]}, "trainable is '('; accepted: a regular expression"),
    "no linear layer": (
        {"trainable": "lora", "lora": {"target_modules": ["conv1d"]}},
        "lora.target_modules[0] is 'conv1d', no linear layer; accepted: ",
    ),
    "adapters and more": ({"trainable": "all", "lora": {"r": 2}}, "trainable is 'all' although lora is given"),
    "no such teacher": ({"distillation": {"teacher": "/no/teacher"}}, "distillation.teacher: /no/teacher is no"),
    "batch": ({"global_batch_size": 6}, "global_batch_size is 6; accepted: a multiple of 4"),
    "half precision": ({"model__dtype": "bfloat16"}, "model.dtype is bfloat16 while nothing computes in half"),
    "endless epochs": ({"data__streaming": True, "train__max_steps": -1}, "train.max_steps is missing; accepted with"),
    "argument's own check": ({"train__optim": "adamw_torch", "train__bf16": True, "train__fp16": True}, "train: "),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_recipe_is_one_line_before_the_model_is_loaded(mistake, values, tmp_path, capsys, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("vamba.training.finetune.load_model", load)
    changes, message = WRONG[mistake]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(changed(values, **changes)))
    assert main(["finetune", str(path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("vamba: ") and message in error, error
    assert not (tmp_path / "out").exists()


def test_data_that_teach_nothing(values, dataset, tmp_path):
    path = tmp_path / "silent.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Is anybody there?"}]}\n' * 3)
    with pytest.raises(RecipeError, match=r"data\.train\[1\]\.path is .*silent.jsonl, where none of 3 examples"):
        prepare(parse_recipe(changed(values, data__train=[str(dataset), str(path)])))


def test_a_teacher_of_another_kind(values, checkpoint):
    with pytest.raises(RecipeError, match="distillation.teacher is a vamba; accepted: a qwen2_vl"):
        prepare(parse_recipe(changed(values, distillation__teacher=str(checkpoint))))


@pytest.mark.parametrize("key", ["model__path", "distillation__teacher"])
def test_a_checkpoint_that_is_none(key, values, checkpoint, tmp_path, monkeypatch):
    """Said at once: transformers asks the Hub for half a minute, and knows no adapters."""
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "me/base"}')
    monkeypatch.chdir(tmp_path)
    wrong = {
        "runs/dmeo": "runs/dmeo: there is no such folder in runs/",
        "runs/empty": "runs/empty holds no config.json",
        "adapter": "adapter is an adapter of me/base",
    }
    for path, message in wrong.items():
        start = time.monotonic()
        with pytest.raises(RecipeError, match=rf"^{key.replace('__', '.')}: {message}"):
            prepare(parse_recipe(changed(values, **{key: path})))
        assert time.monotonic() - start < 5


def test_data_whose_media_are_missing(values, dataset, tmp_path):
    lost = [{"path": str(dataset), "media_root": str(tmp_path)}]
    with pytest.raises(RecipeError, match=rf"none of the first 6 .*mp4.*under data.train.0..media_root, {tmp_path}"):
        prepare(parse_recipe(changed(values, data__train=lost)))


def test_budgets_that_no_example_fits(values):
    with pytest.raises(RecipeError, match=r"none of the first 6 .*limit of 9 \(data.max_length\)"):
        prepare(parse_recipe(changed(values, data__max_length=9)))


def test_a_model_that_must_be_converted_first(values, checkpoint):
    with pytest.raises(RecipeError, match="qwen, a qwen2_vl; accepted: a vamba or a video_ma2mba, which `vamba conv"):
        prepare(parse_recipe(changed(values, model__path=str(checkpoint.parent / "qwen"))))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trainable", "stage1", "trainable is stage1, made for a vamba and not a video_ma2mba; accepted: lora, all"),
        ("data__packing", True, "data.packing is true, which a video_ma2mba cannot; accepted: false"),
    ],
)
def test_what_the_other_model_cannot_do(key, value, message, values, tmp_path):
    tiny_config().save_pretrained(tmp_path / "other")
    values = changed(values, data__max_video_tokens=900, data__batch_video_tokens=900)
    values = changed(values, model__path=str(tmp_path / "other"), train__per_device_train_batch_size=1)
    with pytest.raises(RecipeError, match=message):
        prepare(parse_recipe(changed(values, **{key: value})))


def test_an_output_folder_in_use_is_not_overwritten(values, tmp_path):
    folder = tmp_path / "out" / "checkpoint-4"
    folder.mkdir(parents=True)
    for name in ("trainer_state.json", "data_position_0.json"):
        (folder / name).write_text("{}")
    with pytest.raises(RecipeError, match="which holds checkpoint-4; accepted: another folder, or --resume"):
        prepare(parse_recipe(values))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.yaml"], "there is no such recipe; shipped ones are vamba_lora"),
        (["vamba_stage1", "--set", "train.max_steps"], "accepted is key=value"),
        (["vamba_stage1", "--set", "model.path.x=1"], "path has no keys of its own"),
        (["vamba_stage1", "--set", "model.path=[1"], "is no YAML"),
    ],
)
def test_usage(arguments, message, capsys):
    assert main(["finetune", *arguments]) == 2
    assert message in capsys.readouterr().err
