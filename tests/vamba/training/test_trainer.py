"""What the trainer does in each step, what it logs, and what happens when a step or a save goes wrong."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import Trainer, TrainingArguments

from vamba.cli import main
from vamba.errors import DiskFullError
from vamba.training import NonFiniteLossError, VambaTrainer, load_recipe, make_trainer, prepare
from vamba.training import data as data_module
from vamba.training import trainer as trainer_module

from training_data import (
    run,
)


def test_learning_rates_by_pattern(values):
    values |= {"learning_rates": {"visual": 1e-6, "alpha|A_log": 0}}
    trainer = make_trainer(prepare(load_recipe(values)))
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    found = {}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            found[names[id(parameter)]] = group["lr"], group["weight_decay"] > 0
    assert found.keys() == set(names.values())
    for name, (rate, decays) in found.items():
        assert rate == (1e-6 if "visual" in name else 0 if "alpha" in name or "A_log" in name else 2e-3)
        assert not decays  # the recipe asks for none
    trainer.optimizer, trainer.args.weight_decay = None, 0.1
    decaying = {
        names[id(p)]
        for group in trainer.create_optimizer().param_groups
        if group["weight_decay"]
        for p in group["params"]
    }
    assert not any(part in name for name in decaying for part in ("norm", "bias", "A_log", "alpha", ".D"))
    assert any("in_proj" in name for name in decaying) and any("lm_head" in name for name in decaying)


def test_packs_train(values):
    values |= {"packing": True, "max_video_tokens": 270, "batch_video_tokens": 270}
    losses = run(values, max_steps=8, per_device_train_batch_size=1, lr_scheduler_type="constant").losses
    assert losses[8] < 0.9 * losses[1]


def test_the_log_tells_of_speed(values, monkeypatch):
    logged = []
    monkeypatch.setattr(Trainer, "log", lambda self, logs, start_time=None: logged.append(logs))
    run(values | {"peak_tflops": 1e-3}, max_steps=2, logging_steps=2)
    entry = next(logs for logs in logged if "loss" in logs)
    assert entry["video_tokens_per_second"] > 0 and entry["text_tokens_per_second"] > 0
    assert 0 < entry["mfu"] < 100 and entry["skipped_samples"] == 0
    assert entry["video_tokens_per_second"] / entry["text_tokens_per_second"] == pytest.approx(108 / 45, rel=0.5)


def test_tensorboard_gets_the_log(values, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run(values, max_steps=1, report_to="tensorboard")
    assert any(b"video_tokens_per_second" in file.read_bytes() for file in (tmp_path / "board").rglob("events*"))


def test_several_gpus_in_one_process_use_one(values, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: getattr(self, "_n_gpu", 4)))
    assert prepare(load_recipe(values)).recipe.training._n_gpu <= 1


def test_a_full_disk_leaves_the_earlier_checkpoints(values, tmp_path, monkeypatch):
    save = torch.save

    def full(thing, path, *args, **kwargs):
        if "checkpoint-4" in str(path) and "optimizer" in str(path):
            raise OSError(28, "No space left on device")
        save(thing, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        DiskFullError, match="checkpoint-4 could not be written .*No space left.*the earlier checkpoints"
    ):
        run(values, save_strategy="steps", save_steps=2, save_total_limit=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    found = run(values, resume=True, save_strategy="steps", save_steps=2, save_total_limit=1)
    assert found.steps == 6 and sorted(p.name for p in (tmp_path / "out").iterdir()) == ["checkpoint-6", "final"]


def test_a_fault_while_saving_keeps_its_type(values, monkeypatch):
    def broken(*args, **kwargs):
        raise ConnectionResetError("the other process has gone")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(ConnectionResetError, match="^the other process has gone$"):
        run(values, save_strategy="steps", save_steps=2)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file or directory", "/proc/bug"), BrokenPipeError(32, "Broken pipe")]
)
def test_what_fails_inside_a_step_is_a_fault(error, values, tmp_path, monkeypatch, capsys):
    """Whatever its type: the user gave no such path, and stdout is not what broke."""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(VambaTrainer, "training_step", fail)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    assert main(["finetune", str(tmp_path / "r.yaml")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"vamba: {type(error).__name__}: ") and "a fault; the traceback is in" in line
    Path(line.rsplit(" ", 1)[1].rstrip(")")).unlink()


def test_epochs_are_counted_in_examples(values, dataset, tmp_path):
    """Also after a resume. Batches of 5 make 12 examples three steps, and packs of any size one step."""
    rows = dataset.read_text().splitlines(keepends=True)
    data = tmp_path / "train.jsonl"
    data.write_text("".join(rows))
    values |= {"datasets": [{"path": str(data), "media_root": str(dataset.parent)}]}
    values |= {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 5}
    values |= {"save_strategy": "steps", "save_steps": 3}
    run(values)
    assert run(values, resume=True, num_train_epochs=2).steps == 6
    last = tmp_path / "out" / "checkpoint-6"
    state = json.loads((last / "trainer_state.json").read_text())
    logged = [entry["epoch"] for entry in state["log_history"] if "loss" in entry]
    assert logged[2] == 1.0 and 1 < logged[3] < logged[4] < logged[5] == state["epoch"] == 2.0
    assert json.loads((last / "data_position_0.json").read_text())["rows"] == 24
    data.write_text("".join(rows[:8]))
    with pytest.raises(ValueError, match="other data: then train.jsonl with 12 rows.*now train.jsonl with 8 rows"):
        run(values, resume=True)
    values |= {"packing": True, "max_video_tokens": 270, "batch_video_tokens": 10**6}
    values |= {"output_dir": str(tmp_path / "packs"), "per_device_train_batch_size": 1}
    assert prepare(load_recipe(values)).recipe.training.max_steps == 1


def test_a_step_that_sees_the_data_more_than_once_is_warned_of(values, monkeypatch):
    told = []
    monkeypatch.setattr(data_module.logger, "warning", told.append)
    for steps in (6, -1):
        values |= {"global_batch_size": 12}
        prepare(load_recipe(values | {"max_steps": steps}))
        assert not told
        values |= {"global_batch_size": 16}
        prepare(load_recipe(values | {"max_steps": steps}))
        assert told.pop().startswith("A step takes 4 batches, and all data make 3: it sees examples more than once")


def test_a_loss_that_is_no_number_stops_and_names_the_batch(values, tmp_path, monkeypatch):
    step = VambaTrainer.training_step

    def poisoned(self, model, inputs, *args):
        if self.state.global_step == 3:
            inputs["pixel_values_videos"][0, 0] = float("inf")
        return step(self, model, inputs, *args)

    monkeypatch.setattr(VambaTrainer, "training_step", poisoned)
    with pytest.raises(
        NonFiniteLossError, match=r"loss of step 4 is nan for the samples train.jsonl#v\d+, train"
    ) as error:
        run(values, save_strategy="steps", save_steps=2)
    assert str(error.value).count("#v") == 4
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]


@pytest.fixture
def broken(dataset, tmp_path):
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    rows[3]["messages"][0]["content"][0]["video"] = "gone.mp4"
    path = tmp_path / "broken.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path), "media_root": str(dataset.parent)}


def test_broken_examples_are_skipped_logged_and_counted(values, broken, monkeypatch):
    told, logged = [], []
    monkeypatch.setattr(trainer_module.logger, "warning", told.append)
    monkeypatch.setattr(Trainer, "log", lambda self, logs, start_time=None: logged.append(logs))
    values |= {"datasets": [broken]}
    run(values, max_steps=6)
    assert told and all("skipped broken.jsonl#v3" in line and "gone.mp4" in line for line in told)
    assert logged[5]["skipped_samples"] == len(told)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_example_stops_the_run_if_asked(values, broken, workers, tmp_path, capsys):
    values |= {"datasets": [broken], "on_error": "raise"}
    values |= {"dataloader_num_workers": workers}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    assert main(["finetune", str(tmp_path / "r.yaml")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("vamba: broken.jsonl#v3: ") and "gone.mp4" in line
