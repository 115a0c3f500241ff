"""Evaluation while training: what it measures, which model it picks, and that neither signals nor ranks change that."""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoProcessor

from vamba import VideoChat
from vamba.data import Collator, ConversationEncoder
from vamba.demo.videos import QUESTIONS
from vamba.training import NonFiniteLossError, RecipeError, finetune, load_recipe, prepare
from vamba.training import evaluation as evaluation_module
from vamba.training.evaluation import Evaluation

from training_data import load, recipe_values, run, run_together, write_dataset, write_rows


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A folder of three videos: train.jsonl, broken.jsonl with one that is gone, and questions.jsonl."""
    folder = write_dataset(tmp_path_factory.mktemp("held-out"), 3, seed=1).parent
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows[1]["messages"][0]["content"][0]["video"] = "gone.mp4"
    write_rows(folder / "broken.jsonl", rows)
    question = {"question": "Which?", "options": ["red", "green"], "answer": "A"}
    write_rows(folder / "questions.jsonl", [{"video": f"{n}.mp4", **question} for n in range(2)])
    return folder


def evaluated(values: dict, folder: Path, **keys) -> dict:
    """The recipe with an evaluation after each step. The greatest loss is asked for, which is the first one."""
    values = values | {"eval_datasets": [str(folder / "train.jsonl")], "max_steps": 5, "learning_rate": 5e-3}
    values |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 3}
    values |= {"load_best_model_at_end": True, "greater_is_better": True}
    values |= {"trainable": "lora", "lora_r": 4, "lora_dropout": 0.3, "lora_merge": False}
    return values | {"per_device_train_batch_size": 2} | keys


def metrics(result) -> dict:
    """Of each evaluation, without how long it took."""
    return {step: {n: v for n, v in found.items() if n != "eval_runtime"} for step, found in result.evaluations.items()}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def are_equal(one: Path, other: Path) -> bool:
    before, after = adapter(one), adapter(other)
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def measured(values: dict, model, **keys) -> dict[str, float]:
    prepared = prepare(load_recipe(values | keys))
    return prepared.evaluation.measure(model, prepared.processor, lambda stream: stream.loader())


# --- what is measured -------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_a_hand_computation(values, held_out, monkeypatch):
    """However the examples are put together, each once; the broken one is named."""
    told = []
    monkeypatch.setattr(evaluation_module.logger, "warning_once", told.append)
    model = load(values["model_name_or_path"]).eval()
    encoder = ConversationEncoder(AutoProcessor.from_pretrained(values["model_name_or_path"]), fps=8)
    encoder.media_root = str(held_out)
    total = targets = 0.0
    for line in (held_out / "train.jsonl").read_text().splitlines():
        batch = Collator(encoder)([json.loads(line)])
        count = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            loss = model(**batch).loss.item() * count
        total, targets = total + loss, targets + count
        if json.loads(line)["id"] == "v1":
            broken, missing = loss, count
    values = evaluated(values, held_out)
    packs = {"packing": True, "batch_text_tokens": 200, "max_length": 200}
    for change in ({}, {"per_device_eval_batch_size": 2}, packs | {"per_device_train_batch_size": 1}):
        found = measured(values, model, **change)
        assert found == {"loss": pytest.approx(total / targets, rel=1e-5), "skipped_samples": 0}
    assert not told
    several = [str(held_out / f"{name}.jsonl") for name in ("train", "broken", "train")]
    found = measured(values, model, eval_datasets=several, metric_for_best_model="train_3_loss")
    assert found["skipped_samples"] == 1 and "gone.mp4" in told[0] and told[0].startswith("skipped broken.jsonl#v1")
    assert found["train_loss"] == found["train_3_loss"] == pytest.approx(total / targets, rel=1e-5)
    rest, left = total - broken, targets - missing
    assert found["broken_loss"] == pytest.approx(rest / left, rel=1e-5)
    assert found["loss"] == pytest.approx((2 * total + rest) / (2 * targets + left), rel=1e-5)


def test_the_accuracy_is_that_of_asking(values, held_out, tmp_path):
    """Videos are watched as the recipe says; one that is gone makes a wrong answer."""
    model, processor = (
        load(values["model_name_or_path"]).eval(),
        AutoProcessor.from_pretrained(values["model_name_or_path"]),
    )
    chat, rows = VideoChat(model, processor), []
    for number in range(3):
        chat.watch(str(held_out / f"{number}.mp4"), fps=8, progress=False)
        for question in QUESTIONS.values():
            reply = chat.ask([{"role": "user", "content": question}], max_new_tokens=3)
            video = str(held_out / f"{number}.mp4") if number < 2 else str(tmp_path / "gone.mp4")
            answer = reply if len(rows) % 2 else "another"
            rows.append({"video": video, "question": question, "answer": answer})
    values = evaluated(values, held_out, eval_questions=str(write_rows(tmp_path / "q.jsonl", rows)))
    del values["eval_datasets"]
    prepared = prepare(load_recipe(values | {"metric_for_best_model": "accuracy"}))
    asked = replace(prepared.evaluation, protocol=replace(prepared.evaluation.protocol, max_open_tokens=3))
    assert asked.protocol.reading == {"fps": 8}
    right = sum(row["answer"] != "another" and "gone" not in row["video"] for row in rows)
    failed = sum("gone" in row["video"] for row in rows)
    assert 0 < right < failed + right < len(rows)
    found = asked.measure(model, processor, lambda stream: stream.loader())
    assert found == {"accuracy": right / len(rows), "failed_questions": failed}


def test_a_loss_that_is_no_number_names_the_batch(values, held_out):
    model = load(values["model_name_or_path"]).eval()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"loss is nan for the samples train.jsonl#v\d, train.jsonl#v\d; look"):
        measured(evaluated(values, held_out), model)


# --- what follows from it ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(checkpoint, dataset, held_out, tmp_path_factory):
    """A run with dropout of which every checkpoint is kept: its values, its result, and its folder."""
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    values = evaluated(recipe_values(checkpoint, dataset, output), held_out)
    return values, run(values), output


def best_so_far(losses: dict[int, float]) -> list[int]:
    """The steps with a greater loss than any before."""
    return [step for step in losses if all(losses[step] > losses[before] for before in range(1, step))]


def test_the_best_model_is_the_result(uninterrupted):
    """Also where its step was none of `save_steps`."""
    values, result, output = uninterrupted
    losses = {step: found["eval_loss"] for step, found in result.evaluations.items()}
    assert [*losses] == [1, 2, 3, 4, 5]
    *_, best = highest = best_so_far(losses)
    assert best not in (3, 5)  # or this test would show nothing
    saved = [f"checkpoint-{step}" for step in sorted({3, 5, *highest})]
    assert sorted(path.name for path in output.iterdir()) == [*saved, "curves.png", "final"]
    assert are_equal(output / "final", output / f"checkpoint-{best}")
    assert not are_equal(output / "final", output / "checkpoint-5")
    state = json.loads((output / "final" / "trainer_state.json").read_text())
    assert state["best_metric"] == losses[best] and state["best_model_checkpoint"] == f"checkpoint-{best}"
    state = json.loads((output / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(output / f"checkpoint-{best}")
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    again = load_recipe(output / "final" / "recipe.yaml").data
    assert again.eval_sources[0].path.endswith("train.jsonl") and not os.path.isabs(again.eval_sources[0].path)


def test_tied_weights_are_not_missed_where_the_best_model_is_loaded(ma2mba, dataset, held_out, tmp_path, caplog):
    values = evaluated(recipe_values(ma2mba, dataset, tmp_path / "out"), held_out, max_steps=2)
    values = {name: value for name, value in values.items() if not name.startswith("lora_")} | {"trainable": "all"}
    result = run(values)
    best = json.loads((result.folder / "trainer_state.json").read_text())["best_model_checkpoint"]
    best = load_file(tmp_path / "out" / best / "model.safetensors")
    assert "lm_head.weight" not in best and "missing keys" not in caplog.text
    tied = "model.language_model.embed_tokens.weight"
    assert torch.equal(load_file(result.folder / "model.safetensors")[tied], best[tied])


def test_an_evaluation_changes_nothing_of_the_training(uninterrupted, tmp_path):
    values, expected, _ = uninterrupted
    plain = {key: value for key, value in values.items() if not key.startswith(("eval_", "load_best", "greater_is"))}
    assert run(plain, output_dir=str(tmp_path / "out"), save_strategy="no").losses == expected.losses


def copied(output: Path, folder: Path, step: int) -> Path:
    """What a run had saved until `step`, in another folder: what is left of one that was killed after that."""
    for checkpoint in output.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) <= step:
            shutil.copytree(checkpoint, folder / "out" / checkpoint.name)
    return folder / "out"


@pytest.mark.parametrize(("step", "limit"), [(3, None), (5, 1)])
def test_resumed_is_uninterrupted(uninterrupted, step, limit, tmp_path):
    """Also between an evaluation and its checkpoint, and in a folder that was moved."""
    values, expected, output = uninterrupted
    there = copied(output, tmp_path, step)
    found = run(values, resume=True, output_dir=str(there), save_total_limit=limit)
    assert found.losses == expected.losses and metrics(found) == metrics(expected)
    assert are_equal(found.folder, expected.folder)
    best = json.loads((found.folder / "trainer_state.json").read_text())["best_model_checkpoint"]
    left = {path.name for path in there.glob("checkpoint-*")}
    assert left == ({best, "checkpoint-5"} if limit else {path.name for path in output.glob("checkpoint-*")})


def test_a_best_checkpoint_that_is_damaged_is_no_result(uninterrupted, tmp_path):
    values, _, output = uninterrupted
    shutil.copytree(output, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "final")
    best = json.loads((output / "final" / "trainer_state.json").read_text())["best_model_checkpoint"]
    file = tmp_path / "out" / best / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x80")
    values = values | {"output_dir": str(tmp_path / "out")}
    with pytest.raises(
        ValueError, match=f"{best}, the best, cannot be loaded: adapter_model.safetensors is damaged; put"
    ):
        run(values, resume=True)
    result = run(values, resume=True, load_best_model_at_end=False)
    assert are_equal(result.folder, output / "checkpoint-5")


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_a_signal_in_an_evaluation_saves_and_stops(uninterrupted, strategy, tmp_path, monkeypatch):
    """The evaluation is given up at once, and made up for when the run goes on."""
    values, expected, output = uninterrupted
    values = values | {"output_dir": str(copied(output, tmp_path, 3)), "save_strategy": strategy}
    measure = Evaluation.measure

    def interrupted(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "measure", interrupted)
        stopped = run(values, resume=True)
    assert stopped.folder is None and stopped.steps == 4 and [*stopped.evaluations] == [1, 2, 3]
    assert (tmp_path / "out" / "checkpoint-4").is_dir()
    found = run(values, resume=True)
    assert found.losses == expected.losses and metrics(found) == metrics(expected)
    assert are_equal(found.folder, expected.folder)


def test_early_stopping_ends_a_run_for_good(uninterrupted, tmp_path):
    """Also where it is killed before the trained model is written; with more patience the run goes on."""
    values, expected, output = uninterrupted
    losses = {step: found["eval_loss"] for step, found in expected.evaluations.items()}
    assert best_so_far(losses) == [1]
    values = values | {"output_dir": str(copied(output, tmp_path, 1)), "early_stopping_patience": 2}
    found = run(values, resume=True)
    assert found.steps == 3 and metrics(found) == {n: metrics(expected)[n] for n in (1, 2, 3)}
    assert run(values, resume=True).trained is False
    shutil.rmtree(found.folder)
    assert run(values, resume=True).steps == 3 and found.folder.is_dir()
    goes_on = run(values, resume=True, early_stopping_patience=9)
    assert goes_on.losses == expected.losses and metrics(goes_on) == metrics(expected)
    assert are_equal(goes_on.folder, expected.folder)


def test_without_matplotlib_a_line_says_so(uninterrupted, held_out, tmp_path, monkeypatch):
    """Adapters answer questions, too."""
    told = []
    monkeypatch.setattr("vamba.training.curves.logger.warning_once", told.append)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    values = uninterrupted[0] | {"output_dir": str(tmp_path / "out"), "max_steps": 1}
    found = run(values, eval_questions=str(held_out / "questions.jsonl")).evaluations[1]
    assert 0 <= found["eval_accuracy"] <= 1 and found["eval_failed_questions"] == 0
    assert told[0] == "curves.png was not drawn: plots need matplotlib (pip install matplotlib)"


def test_a_scheduler_that_follows_the_loss(uninterrupted, tmp_path):
    values = uninterrupted[0] | {"output_dir": str(tmp_path / "out"), "max_steps": 3, "save_strategy": "no"}
    values |= {"lr_scheduler_type": "reduce_lr_on_plateau", "load_best_model_at_end": False, "learning_rate": 0.1}
    values |= {"lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 0.5}}
    history = json.loads((run(values).folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["learning_rate"] for entry in history if "learning_rate" in entry] == [0.1, 0.1, 0.05]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"video": "gone.mp4", "question": "Which?", "answer": "red"}], "none of whose videos is there"),
        ([{"video": "0.mp4", "question": "Which?"}], "where no answer is known"),
        ([{"video": "0.mp4"}], "eval_questions: .*question is None; give a text"),
    ],
)
def test_questions_that_cannot_be_asked(values, held_out, tmp_path, rows, message):
    for row in rows:
        row["video"] = str(held_out / row["video"])
    values = evaluated(values, held_out, eval_questions=str(write_rows(tmp_path / "q.jsonl", rows)))
    with pytest.raises(RecipeError, match=message):
        prepare(load_recipe(values))


def test_a_protocol_that_the_models_videos_cannot_be_read_by(values, held_out, ma2mba, tmp_path):
    values = evaluated(values, held_out, eval_questions=str(held_out / "questions.jsonl"))
    values |= {"model_name_or_path": str(ma2mba), "eval_protocol": "vamba-lvbench"}
    values = {name: value for name, value in values.items() if not name.endswith("_pixels")}
    with pytest.raises(RecipeError, match="eval_protocol is vamba-lvbench: .* 32 x 32 pixels only"):
        prepare(load_recipe(values))
    assert prepare(load_recipe(values | {"eval_protocol": "video-ma2mba"})).evaluation.protocol.reading == {"fps": 1.0}


# --- several processes ------------------------------------------------------------------------------------------------

TWO = """
import json, os, sys
import torch, torch.distributed as dist
from transformers import AutoModelForImageTextToText
from vamba.cli import main
from vamba.training import load_recipe, prepare
from vamba.training.evaluation import Stopped
recipe = sys.argv[1]
assert main(["finetune", recipe]) == 0
prepared = prepare(load_recipe(recipe, ["--output_dir", sys.argv[2]]))

from torch.distributed.fsdp import fully_shard
mesh, rank = dist.device_mesh.init_device_mesh("cpu", (2,)), dist.get_rank()
model = AutoModelForImageTextToText.from_pretrained(prepared.recipe.model.model_name_or_path, dtype=torch.float32)
for module in model.modules():
    if type(module).__name__ in model._no_split_modules:
        fully_shard(module, mesh=mesh)
model = fully_shard(model, mesh=mesh).eval()
common = model, prepared.processor, lambda stream: stream.loader()
found = prepared.evaluation.measure(*common)
try:
    prepared.evaluation.measure(*common, lambda: rank == 1)
except Stopped:
    found["stopped"] = True
print(json.dumps(found))
"""


def test_two_processes_evaluate_as_one(checkpoint, held_out, tmp_path):
    """Under DDP while training, and where they share the weights; 3 examples are no even number of batches. A signal to
    one of them stops both."""
    data = write_dataset(tmp_path / "data", 8)
    values = recipe_values(checkpoint, data, tmp_path / "two", max_steps=2, global_batch_size=8)
    values |= {"eval_strategy": "steps", "eval_steps": 2, "eval_datasets": [str(held_out / "broken.jsonl")]}
    model, rows = load(checkpoint).eval(), []
    chat = VideoChat(model, AutoProcessor.from_pretrained(checkpoint))
    for number in range(3):  # of the model's own answers to the question alone, two of three are right
        chat.watch(str(held_out / f"{number}.mp4"), fps=8, progress=False)
        options = [chat.ask("Which?", max_new_tokens=16), "another"]
        video = str(held_out / f"{number}.mp4")
        rows.append({"video": video, "question": "Which?", "options": options, "answer": "AAB"[number]})
    values |= {"eval_questions": str(write_rows(tmp_path / "q.jsonl", rows)), "eval_protocol": "plain"}
    values |= {"per_device_eval_batch_size": 1}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    printed = run_together(TWO, [str(tmp_path / "r.yaml"), str(tmp_path / "other")], tmp_path)
    shared = [json.loads(text.splitlines()[-1]) for text in printed]
    expected = measured(values, model, output_dir=str(tmp_path / "one"))
    assert shared[0] == shared[1] == {**expected, "loss": pytest.approx(expected["loss"], rel=1e-5), "stopped": True}
    assert expected["skipped_samples"] == 1 and expected["accuracy"] == 2 / 3
    state = json.loads((tmp_path / "two" / "final" / "trainer_state.json").read_text())
    two = {entry["step"]: entry for entry in state["log_history"] if "eval_loss" in entry}
    alone = finetune(values | {"output_dir": str(tmp_path / "alone"), "dataloader_num_workers": 2})
    for step, found in metrics(alone).items():
        assert {name: two[step][name] for name in found} == pytest.approx(found, rel=1e-4)
