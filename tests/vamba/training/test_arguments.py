"""Recipes: what is shipped is sound, and every mistake is one line that names the key, before the model is loaded."""

import dataclasses
import time

import pytest
import transformers
import yaml

from vamba.cli import main
from vamba.training import RecipeError, load_recipe, prepare, shipped_recipes
from vamba.training.arguments import DatasetArguments

from tiny_video_ma2mba import tiny_config
from training_data import write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"), 6)


def changed(values: dict, **changes) -> dict:
    """A copy with other values; `...` takes a key out."""
    return {key: value for key, value in (values | changes).items() if value is not ...}


def test_shipped_recipes_are_the_papers():
    assert shipped_recipes() == [
        "vamba_lora", "vamba_stage1", "vamba_stage2", "video_ma2mba_stage1", "video_ma2mba_stage1_5",
        "video_ma2mba_stage2",
    ]  # fmt: skip
    recipes = {name: load_recipe(name) for name in shipped_recipes()}
    rates = {name: recipe.training.learning_rate for name, recipe in recipes.items()}
    assert rates["vamba_stage1"] == 1e-5 and rates["vamba_stage2"] == 5e-6
    assert rates["video_ma2mba_stage1"] == 1e-3 and rates["video_ma2mba_stage2"] == 4e-5
    for name, stage in (("vamba_stage1", "stage1"), ("vamba_stage2", "stage2")):
        model, data, train, _ = recipes[name]
        assert model.trainable == [stage] and train.global_batch_size == 128 and data.packing
        assert data.max_video_tokens == data.batch_video_tokens == 120_000
        assert (train.lr_scheduler_type, train.warmup_steps, train.weight_decay) == ("cosine", 0.03, 0.01)
    for name, batch in (("stage1", 512), ("stage1_5", 32), ("stage2", 32)):
        train = recipes[f"video_ma2mba_{name}"].training
        assert train.global_batch_size == batch and train.weight_decay == 0.05
        assert list((train.learning_rates or {}).values()) == ([] if name == "stage1" else [4e-6])
    assert recipes["vamba_lora"].model.lora_r == 64 and recipes["vamba_lora"].model.lora_target_modules is None


def test_overrides_and_numbers(values, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        yaml.safe_dump(values | {"weight_decay": "1e-2", "save_strategy": False, "lr_scheduler_kwargs": {"a": 1}})
    )
    recipe = load_recipe(path, "--learning_rate 1e-5 --fps=2 --lora-r 4 --trainable lora --save_total_limit 1".split())
    assert recipe.training.learning_rate == 1e-5 and recipe.data.fps == 2.0 and recipe.model.lora_r == 4
    assert recipe.training.weight_decay == 0.01 and recipe.training.save_strategy == "no"  # as YAML 1.1 reads them
    assert recipe.data.sources == [DatasetArguments(values["datasets"][0])]
    assert load_recipe(values | {"trainable": "lora"}).model.lora_r == 64
    assert load_recipe(values, ["--model", "another"]).model.model_name_or_path == "another"  # as `vamba ask` says it
    recipe.training.set_up()
    assert recipe.training.lr_scheduler_kwargs == {"a": 1}
    several = load_recipe(values, ["--datasets", "a.jsonl", '{"path": "b.jsonl", "split": "test"}']).data
    assert [(entry.path, entry.split) for entry in several.sources] == [("a.jsonl", "train"), ("b.jsonl", "test")]


def test_every_field_of_trainers_arguments_is_a_key(values):
    recipe = load_recipe(values | {"report_to": ["tensorboard", "wandb"], "gradient_accumulation_steps": 2})
    assert recipe.training.report_to == ["tensorboard", "wandb"] and recipe.training.gradient_accumulation_steps == 2
    theirs = {known.name for known in dataclasses.fields(transformers.TrainingArguments)}
    assert theirs <= {known.name for known in dataclasses.fields(type(recipe.training))}


def test_steps_follow_from_epochs_and_the_batch_from_its_parts(values):
    prepared = prepare(load_recipe(changed(values, max_steps=..., num_train_epochs=3, global_batch_size=8)))
    assert prepared.recipe.training.gradient_accumulation_steps == 2
    assert prepared.recipe.training.max_steps == 3  # 3 epochs of 6 in steps of 8


WRONG = {
    "unknown key": ({"modle_name_or_path": "a"}, "modle_name_or_path is no key, model_name_or_path is"),
    "unknown argument": ({"learning_rat": 1}, "learning_rat is no key, learning_rate is"),
    "two ways of one": (
        {"gradient_accumulation_steps": 2, "global_batch_size": 8},
        "gradient_accumulation_steps is given beside global_batch_size",
    ),
    "not accepted": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is not accepted: it would need all"),
    "nothing to evaluate on": ({"eval_steps": 5}, "eval_steps is given, but nothing to evaluate on; accepted"),
    "nothing to stop by": ({"early_stopping_patience": 2}, "early_stopping_patience is given, but nothing to evaluate"),
    "no strategy": ({"eval_datasets": "a.jsonl"}, "eval_strategy is missing; accepted with eval_datasets: steps"),
    "epochs": ({"eval_datasets": "a.jsonl", "eval_strategy": "epoch"}, "eval_strategy is epoch; accepted: steps, with"),
    "weighed evaluation": (
        {"eval_datasets": [{"path": "a", "weight": 1}], "eval_strategy": "steps"},
        "eval_datasets[0].weight is 1.0; leave it out",
    ),
    "evaluated path": (
        {"eval_datasets": "/no/data.jsonl", "eval_strategy": "steps"},
        "eval_datasets[0]: /no/data.jsonl: there is no such file",
    ),
    "no questions": (
        {"eval_questions": "/no/q.jsonl", "eval_strategy": "steps"},
        "eval_questions: /no/q.jsonl is no file",
    ),
    "unknown metric": (
        {"eval_questions": "q.jsonl", "eval_strategy": "steps", "load_best_model_at_end": True},
        "metric_for_best_model is loss; accepted: accuracy",
    ),
    "unknown metric of several": (
        {"eval_datasets": ["a/x.jsonl", "b/x.json"], "eval_strategy": "steps", "metric_for_best_model": "eval_x"},
        "metric_for_best_model is eval_x; accepted: x_loss, x_2_loss, loss",
    ),
    "protocol": (
        {"eval_questions": "q.jsonl", "eval_strategy": "steps", "eval_protocol": "x"},
        "eval_protocol is x; accepted: letters, ",
    ),
    "evaluated packs": (
        {"eval_datasets": "a.jsonl", "eval_strategy": "no", "per_device_eval_batch_size": 2, "packing": True}
        | {"per_device_train_batch_size": 1, "batch_video_tokens": 9, "max_video_tokens": 9},
        "per_device_eval_batch_size is given; leave it out with packing",
    ),
    "stopped by nothing": (
        {"eval_datasets": "a.jsonl", "eval_strategy": "no", "early_stopping_patience": 2},
        "early_stopping_patience is given although eval_strategy is no",
    ),
    "kept logits": ({"eval_accumulation_steps": 5}, "eval_accumulation_steps is not accepted: an evaluation keeps"),
    "missing": ({"model_name_or_path": ...}, "the following arguments are required: model_name_or_path"),
    "no data": ({"datasets": ...}, "the following arguments are required: datasets"),
    "no output": ({"output_dir": ...}, "output_dir is missing"),
    "earlier format": ({"model": {"path": "a"}}, "the recipe has the sections of an earlier format (model); its keys"),
    "type": ({"packing": "perhaps"}, "packing: Truthy value expected: got perhaps"),
    "no value": ({"learning_rate": None}, "learning_rate is null; leave it out for its default"),
    "choice": ({"on_error": "ignore"}, "on_error: invalid choice: 'ignore' (choose from "),
    "enum": ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type: invalid choice: 'cosin' (choose from "),
    "number": ({"learning_rate": "fast"}, "learning_rate: invalid float value: 'fast'"),
    "whole number": ({"max_steps": 1.5}, "max_steps: invalid int value: '1.5'"),
    "mapping": ({"learning_rates": 8}, "learning_rates is 8; accepted: a mapping of patterns"),
    "mapped number": ({"learning_rates": {"a": "fast"}}, 'learning_rates is {"a": "fast"}; accepted: a mapping of'),
    "list entry": ({"datasets": [{"path": "a", "wieght": 1}]}, "datasets[0]: wieght is no key, weight is"),
    "no path": ({"datasets": [{"weight": 1}]}, "datasets[0]: the following arguments are required: path"),
    "list entry's type": ({"datasets": [{"path": "a", "weight": "x"}]}, "datasets[0]: weight: invalid float value"),
    "preset": ({"trainable": "stage3"}, "trainable: 'stage3' matches no parameter; accepted: stage1, stage2, all"),
    "range": ({"fps": 0}, "fps is 0.0; accepted: a number above 0"),
    "no sources": ({"datasets": []}, "datasets: expected at least one argument"),
    "half the weights": ({"datasets": [{"path": "a", "weight": 1}, "b"]}, "datasets[1].weight is missing"),
    "no weight": ({"datasets": [{"path": "a", "weight": 0}]}, "datasets[0].weight is 0.0; accepted: a number above 0"),
    "streamed sizes": ({"datasets": ["a", "b"], "streaming": True}, "datasets[0].weight is missing"),
    "sample above batch": (
        {"max_video_tokens": 90, "batch_video_tokens": 60},
        "max_video_tokens is 90; accepted: at most batch_video_tokens, 60",
    ),
    "packs of rows": (
        {"packing": True, "max_length": 9, "batch_text_tokens": 9},
        "per_device_train_batch_size is 4; accepted with packing: 1",
    ),
    "packs without end": (
        {"packing": True, "per_device_train_batch_size": 1},
        "batch_video_tokens is missing; accepted with packing",
    ),
    "pixels": ({"min_pixels": 9, "max_pixels": 4}, "min_pixels is 9; accepted: at most max_pixels, 4"),
    "one frame": ({"max_frames": 1}, "max_frames is 1; accepted: a whole number of at least 2"),
    "impossible budget": ({"max_video_tokens": 8}, "max_video_tokens is 8; accepted: at least 9"),
    "offloaded nothing": ({"multi_axis_offload": True}, "multi_axis_offload is true; accepted: false, or multi_axis"),
    "no such model": ({"model_name_or_path": "/no/model"}, "model_name_or_path: /no/model is no folder; give"),
    "no such output": ({"output_dir": "/dev/null/out"}, "output_dir: /dev/null/out cannot be written"),
    "no such data": ({"datasets": "/no/data.jsonl"}, "datasets[0]: /no/data.jsonl: there is no such file"),
    "no such root": (
        {"datasets": [{"path": "a.jsonl", "media_root": "/no/root"}]},
        "datasets[0].media_root is /no/root, no folder",
    ),
    "no such parameter": ({"trainable": ["crossattn"]}, "trainable: 'crossattn' matches no parameter; accepted: "),
    "no such group": ({"learning_rates": {"x1": 1}}, "learning_rates: 'x1' matches no parameter; accepted: names"),
    "bad pattern": ({"trainable": ["("]}, "trainable is '('; accepted: a regular expression"),
    "no linear layer": (
        {"trainable": "lora", "lora_target_modules": ["conv1d"]},
        "lora_target_modules has 'conv1d', no linear layer; accepted: ",
    ),
    "no module": ({"trainable": "lora", "lora_modules_to_save": ["x"]}, "lora_modules_to_save has 'x', no module"),
    "adapters and more": ({"trainable": "all", "lora_r": 2}, "trainable is all although lora_r is given"),
    "quantized weights": ({"load_in_4bit": True}, "trainable is all although load_in_4bit is given; accepted: lora"),
    "no such teacher": ({"teacher_model_name_or_path": "/no/teacher"}, "teacher_model_name_or_path: /no/teacher is no"),
    "batch": ({"global_batch_size": 6}, "global_batch_size is 6; accepted: a multiple of 4"),
    "half precision": ({"dtype": "bfloat16"}, "dtype is bfloat16 while nothing computes in half"),
    "endless epochs": ({"streaming": True, "max_steps": -1}, "max_steps is missing; accepted with streaming"),
    "argument's own check": ({"bf16": True, "fp16": True}, "At most one of fp16 and bf16 can be True"),
}  # fmt: skip


STRANGE = [
    10**400,
    float("nan"),
    float("inf"),
    "many",
    "\0",
    "\ud800",
    [[]],
    [None],
    ["a", 1],
    {},
    {"a": {"b": 1}},
    b"1",
    {1},
]


@pytest.mark.parametrize(
    "key", ["fps", "max_frames", "max_video_tokens", "learning_rate", "max_steps", "learning_rates", "packing"]
)
@pytest.mark.parametrize("value", STRANGE, ids=str)
def test_values_of_another_type(key, value, values):
    """Budgets as text and numbers that are none among them."""
    if not (key == "learning_rates" and value == {}):
        with pytest.raises(RecipeError, match=f"^{key}"):
            load_recipe(values | {key: value})


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghij", "bcdefghijk")
)
NO_RECIPES = {
    "latin-1": b"output_dir: \xe9",
    "UTF-16": "max_steps: 1".encode("utf-16"),
    "laughs": LAUGHS.encode(),
    "itself": b"datasets: &a [*a]",
    "deep": b"[" * 100_000,
    "tag": b"output_dir: !!python/object/apply:os.system [id]",
    "no date": b"output_dir: 2024-99-99",
    "large": b"a: 1\n" * 2_000_000,
    "number": b"max_steps: " + b"9" * 5000,
    "keys": b"1: 2",
    "option": b'"max_steps=3": 1',
    "list": b"- a",
    "binary": b"output_dir: !!binary gIGC",
    "device": b"datasets: /dev/zero",
}


@pytest.mark.parametrize("kind", NO_RECIPES)
def test_files_that_are_no_recipe(kind, tmp_path, capsys):
    (tmp_path / "r.yaml").write_bytes(NO_RECIPES[kind])
    begin = time.monotonic()
    assert main(["finetune", str(tmp_path / "r.yaml")]) == 2
    assert time.monotonic() - begin < 5
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and len(line) < 400


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_recipe_is_one_line_before_the_model_is_loaded(mistake, values, tmp_path, capsys, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("vamba.training.run.load_model", load)
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
    with pytest.raises(RecipeError, match=r"datasets\[1\] is .*silent.jsonl, where none of the first 3 examples"):
        prepare(load_recipe(changed(values, datasets=[str(dataset), str(path)])))


def test_a_teacher_of_another_kind(values, checkpoint):
    with pytest.raises(RecipeError, match="teacher_model_name_or_path is a vamba; accepted: a qwen2_vl"):
        prepare(load_recipe(changed(values, teacher_model_name_or_path=str(checkpoint))))


@pytest.mark.parametrize("key", ["model_name_or_path", "teacher_model_name_or_path"])
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
        with pytest.raises(RecipeError, match=rf"^{key}: {message}"):
            prepare(load_recipe(changed(values, **{key: path})))


def test_data_whose_media_are_missing(values, dataset, tmp_path):
    lost = [{"path": str(dataset), "media_root": str(tmp_path)}]
    with pytest.raises(RecipeError, match=rf"none of the first 6 .*mp4.*under datasets.0..media_root, {tmp_path}"):
        prepare(load_recipe(changed(values, datasets=lost)))


def test_budgets_that_no_example_fits(values):
    with pytest.raises(RecipeError, match=r"none of the first 6 .*limit of 9 \(max_length\)"):
        prepare(load_recipe(changed(values, max_length=9)))
    assert prepare(load_recipe(values)).stream.collator.encoder.max_length == 2048  # the positions that the model has


def test_a_model_that_must_be_converted_first(values, checkpoint):
    with pytest.raises(RecipeError, match="qwen, a qwen2_vl; accepted: a vamba or a video_ma2mba, which `vamba conv"):
        prepare(load_recipe(changed(values, model_name_or_path=str(checkpoint.parent / "qwen"))))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trainable", "stage1", "trainable is stage1, made for a vamba and not a video_ma2mba; accepted: lora, all"),
        ("packing", True, "packing is true, which a video_ma2mba cannot; accepted: false"),
        ("min_pixels", 900, "min_pixels is 900, but a video_ma2mba has frames of one size; leave it out"),
    ],
)
def test_what_the_other_model_cannot_do(key, value, message, values, tmp_path):
    tiny_config().save_pretrained(tmp_path / "other")
    values = changed(values, max_video_tokens=900, batch_video_tokens=900)
    values = changed(values, model_name_or_path=str(tmp_path / "other"), per_device_train_batch_size=1)
    with pytest.raises(RecipeError, match=message):
        prepare(load_recipe(changed(values, **{key: value})))


def test_an_output_folder_in_use_is_not_overwritten(values, tmp_path):
    folder = tmp_path / "out" / "checkpoint-4"
    folder.mkdir(parents=True)
    for name in ("trainer_state.json", "data_position_0.json"):
        (folder / name).write_text("{}")
    with pytest.raises(RecipeError, match="which holds checkpoint-4; accepted: another folder, or --resume"):
        prepare(load_recipe(values))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.yaml"], "there is no such recipe; shipped ones are vamba_lora"),
        (["vamba_stage1", "--max_steps"], "max_steps: expected one argument"),
        (["vamba_stage1", "--max_stepz", "3"], "max_stepz is no key, max_steps is"),
        (["vamba_stage1", "--max_steps", "3", "4"], "4 follows no key; overrides are written --key value"),
    ],
)
def test_usage(arguments, message, capsys):
    assert main(["finetune", *arguments]) == 2
    assert message in capsys.readouterr().err
