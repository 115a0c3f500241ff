"""`vamba finetune`: what trains, what is logged, and that nothing that happens to a run is lost or goes unnoticed."""

import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from vamba import VideoChat
from vamba.cli import main
from vamba.data import Collator, ConversationEncoder, Source
from vamba.demo.tiny_checkpoints import tiny_neox_tokenizer
from vamba.errors import DiskFullError
from vamba.modeling import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor, shared_model
from vamba.modeling.decoder_layer import VambaMLP
from vamba.modeling.mamba2 import Mamba2Mixer
from vamba.training import load_recipe, parse_recipe, preparation
from vamba.training import trainer as trainer_module
from vamba.training.finetune import finetune, make_trainer, save
from vamba.training.preparation import prepare
from vamba.training.trainer import NonFiniteLossError, VambaTrainer, last_checkpoint, publish

from tiny_video_ma2mba import tiny_config
from training_data import free_port, recipe_values, start, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"), 12)


def run(values: dict, resume: bool = False, **train):
    values = values | {"train": values["train"] | train}
    return finetune(parse_recipe(values), resume=resume)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


# --- training ---------------------------------------------------------------------------------------------------------


def test_what_is_trained_can_be_asked(values, dataset, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["finetune", str(path), "--set", "train.max_steps=4"]) == 0
    assert "trained 4 steps; the model is in" in capsys.readouterr().out
    final = tmp_path / "out" / "final"
    model, processor = AutoModelForImageTextToText.from_pretrained(final), AutoProcessor.from_pretrained(final)
    assert processor.video_processor.fps == 8  # it is asked as it was trained
    chat = VideoChat(model.eval(), processor)
    chat.watch(str(dataset.parent / "0.mp4"), progress=False)
    assert chat.ask("Which colour flashed first?", max_new_tokens=4)
    assert getattr(model.config, "use_cache", True)
    card = (final / "README.md").read_text()
    assert "Fine-tuned from" in card and "license" not in card and (final / "modeling_vamba.py").is_file()
    assert yaml.safe_load((final / "recipe.yaml").read_text())["train"]["max_steps"] == 4
    assert not (final / "training_args.bin").exists() and not (tmp_path / "out" / ".saving").exists()


def test_only_the_stage_trains(values, checkpoint):
    folder = run(values | {"trainable": "stage1"}, max_steps=2).folder
    before, after = weights(checkpoint), weights(folder)
    for name in before:
        trained = any(part in name for part in ("cross_attn", "video_encoder", "alpha"))
        assert trained or torch.equal(before[name], after[name]), name
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("cross_attn.k_proj" in name for name in moved) and any("A_log" in name for name in moved)


def test_learning_rates_by_pattern(values):
    values |= {"groups": [{"pattern": "visual", "learning_rate": 1e-6}, {"pattern": "alpha|A_log", "learning_rate": 0}]}
    trainer = make_trainer(prepare(parse_recipe(values)))
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


def test_half_precision_trains_float32_weights(values, checkpoint):
    values |= {"trainable": "stage1", "model": values["model"] | {"dtype": "bfloat16"}}
    trainer = make_trainer(prepare(parse_recipe(values | {"train": values["train"] | {"bf16": True}})))
    for parameter in trainer.model.parameters():
        kept = parameter.requires_grad
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16)
    result = run(values, bf16=True, max_steps=8, lr_scheduler_type="constant")
    exact = run(values | {"model": {"path": str(checkpoint), "dtype": "float32"}},
                max_steps=8, lr_scheduler_type="constant", output_dir=f"{values['train']['output_dir']}2")  # fmt: skip
    assert result.losses[8] < result.losses[1] - 0.1
    assert all(abs(result.losses[step] - exact.losses[step]) < 0.1 for step in (1, 4, 8))
    saved = AutoModelForImageTextToText.from_pretrained(result.folder, dtype="auto").state_dict()
    assert {value.dtype for name, value in saved.items() if "A_log" not in name} >= {torch.bfloat16}
    assert saved["model.language_model.layers.0.cross_attn.k_proj.weight"].dtype == torch.bfloat16


def test_tied_weights_are_saved_once(values, checkpoint, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "tied")
    values |= {"model": {"path": str(tmp_path / "tied"), "dtype": "bfloat16"}}
    with safe_open(run(values, bf16=True, max_steps=1).folder / "model.safetensors", "pt") as saved:
        assert "lm_head.weight" not in saved.keys() and len(list(saved.keys())) == len(model.state_dict()) - 1


def test_checkpointing_changes_nothing_but_memory(values, tmp_path, monkeypatch):
    """With either, text layers run again in the backward pass; the Mamba blocks in cells, or as the others do."""
    plain = run(values, max_steps=3).losses
    runs = []
    for kind in (VambaMLP, Mamba2Mixer):
        monkeypatch.setattr(kind, "forward", lambda *a, f=kind.forward, kind=kind: (runs.append(kind), f(*a))[1])
    for checkpointing in ("gradient", "multi_axis"):
        runs.clear()
        options = {"checkpointing": checkpointing}
        saving = run(values | options, max_steps=3, output_dir=str(tmp_path / checkpointing)).losses
        assert all(abs(plain[step] - saving[step]) < 1e-4 for step in plain)
        assert (runs.count(VambaMLP), runs.count(Mamba2Mixer)) == (3 * 2 * 3, 3 * 2 * 2)  # steps, twice, layers


def test_packs_train(values):
    values["data"] |= {"packing": True, "max_video_tokens": 270, "batch_video_tokens": 270}
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
    assert prepare(parse_recipe(values)).arguments._n_gpu <= 1


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory):
    """A tiny Video-Ma2mba."""
    folder = tmp_path_factory.mktemp("other")
    tokenizer = tiny_neox_tokenizer(["Which colour flashed first?"])
    config = tiny_config(vocab_size=len(tokenizer) + 16)
    VideoMa2mbaProcessor.for_model(config, tokenizer).save_pretrained(folder)  # which adds the vision tokens
    for name in ("vision_start", "vision_end", "image", "video"):
        token = f"<|{name}_pad|>" if name in ("image", "video") else f"<|{name}|>"
        setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    VideoMa2mbaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_the_other_model_goes_through_its_stages(other_checkpoint, values, tmp_path, monkeypatch):
    """Each of the shipped recipes from where the last one ended, as `vamba finetune` runs them one after the other."""
    monkeypatch.chdir(tmp_path)  # the recipes' folders are relative, and each names that of the stage before
    common = ["model.dtype=float32", f"data.train={values['data']['train']}", "global_batch_size=2", "peak_tflops=1"]
    common += ["train.bf16=false", "train.use_cpu=true", "train.report_to=none", "train.dataloader_num_workers=0"]
    common += ["train.max_steps=3", "train.lr_scheduler_type=constant", "train.save_strategy=no"]
    logged = []
    monkeypatch.setattr(Trainer, "log", lambda self, logs, start_time=None: logged.append(logs))
    before = other_checkpoint
    for stage in ("stage1", "stage1_5", "stage2"):
        overrides = [*common, f"model.path={before}"] if stage == "stage1" else common
        recipe = load_recipe(f"video_ma2mba_{stage}", overrides)
        assert Path(recipe.model.path) == before
        result = finetune(recipe)
        old, new = weights(before), weights(result.folder)
        moved = {name.removeprefix("model.").split(".")[0] for name in old if not torch.equal(old[name], new[name])}
        moved.discard("lm_head")  # tied to the embedding
        assert moved == ({"projector"} if stage == "stage1" else {"projector", "language_model", "visual"})
        before = result.folder
    assert "Fine-tuned from" in (before / "README.md").read_text()
    entries = [logs for logs in logged if "loss" in logs]
    assert len(entries) == 9 and all(0 < logs["mfu"] < 1 for logs in entries)


# --- what happens to a run --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(checkpoint, dataset, tmp_path_factory):
    """A run of six steps with a checkpoint after each: two workers, accumulation, a dropout that needs its seed."""
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    values = recipe_values(checkpoint, dataset, output, save_strategy="steps", save_steps=1, dataloader_num_workers=2)
    values["train"]["per_device_train_batch_size"] = 2
    values |= {"global_batch_size": 4, "trainable": "lora", "lora": {"r": 4, "dropout": 0.3}}
    return values, run(values), output


@pytest.mark.parametrize("step", [1, 4, 6])  # after 6 there is nothing left to train
def test_resumed_is_uninterrupted(uninterrupted, step, tmp_path):
    values, expected, output = uninterrupted
    shutil.copytree(output / f"checkpoint-{step}", tmp_path / "out" / f"checkpoint-{step}")
    found = run(values, resume=True, output_dir=str(tmp_path / "out"))
    assert found.losses == expected.losses and found.steps == 6
    before, after = weights(expected.folder), weights(found.folder)
    assert all(torch.equal(before[name], after[name]) for name in before)


KILLED = """
import multiprocessing, os, signal, sys
from vamba.cli import main
from vamba.training.trainer import VambaTrainer
saved = VambaTrainer._save_rng_state
def killed(self, folder):
    if self.state.global_step == 4:
        assert os.listdir(folder)  # in the middle of a save
        for worker in multiprocessing.active_children():
            worker.kill()
        os.kill(os.getpid(), signal.SIGKILL)
    saved(self, folder)
VambaTrainer._save_rng_state = killed
main(["finetune", sys.argv[1]])
"""


def test_killed_in_the_middle_of_a_save(uninterrupted, tmp_path):
    values, expected, _ = uninterrupted
    output = tmp_path / "out"
    values = values | {"train": values["train"] | {"output_dir": str(output), "save_steps": 2}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    process = start(KILLED, [str(tmp_path / "r.yaml")], tmp_path / "killed")
    process.join(100)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "killed.err").read_text()
    assert sorted(path.name for path in output.iterdir()) == [".saving", "checkpoint-2"]
    assert last_checkpoint(output).name == "checkpoint-2"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = run(values, resume=True)
    finally:
        torch.set_num_threads(threads)
    assert found.losses.keys() == expected.losses.keys() and not (output / ".saving").exists()
    assert [found.losses[step] for step in (1, 2)] == pytest.approx(
        [expected.losses[step] for step in (1, 2)], rel=1e-5
    )
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)  # another number of threads may round otherwise


def test_a_signal_saves_and_stops(uninterrupted, tmp_path, monkeypatch):
    values, expected, _ = uninterrupted
    values = values | {"train": values["train"] | {"output_dir": str(tmp_path / "out"), "save_steps": 100}}
    before = signal.getsignal(signal.SIGTERM)
    step = VambaTrainer.training_step

    def interrupted(self, *args):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(VambaTrainer, "training_step", interrupted)
        stopped = run(values)
    assert stopped.folder is None and stopped.steps == 3 and signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    assert run(values, resume=True).losses == expected.losses


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


FAILING = """
import os, sys, time
from vamba.cli import main
from vamba.training.trainer import VambaTrainer
step = VambaTrainer.training_step
def failing(self, *args):
    if self.state.global_step == 1 and os.environ["RANK"] == os.environ["FAILS"]:
        raise RuntimeError("out of memory, say")
    if self.state.global_step == 1 and os.environ["WAITS"] == "1":
        time.sleep(60)  # as a collective of a GPU would
    return step(self, *args)
VambaTrainer.training_step = failing
sys.exit(main(["finetune", sys.argv[1]]))
"""


@pytest.mark.parametrize(("processes", "waits"), [(1, False), (2, False), (3, True)])
def test_an_error_ends_the_run_and_its_data_workers(values, tmp_path, processes, waits):
    """The other processes end too, as they find nobody to share their gradients with or, on GPUs, are told."""
    values["train"] |= {"dataloader_num_workers": 2}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"FAILS": str(processes - 1), "WAITS": str(int(waits))}
    running = [
        start(FAILING, [str(tmp_path / "r.yaml")], tmp_path / str(rank), RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in range(processes)
    ]
    until = time.monotonic() + 30
    for process in running:
        process.join(until - time.monotonic())
    ended = [process.exitcode for process in running]
    for process in running:
        process.kill()
    assert ended == [1] * processes
    assert "RuntimeError: out of memory, say" in (tmp_path / f"{processes - 1}.err").read_text()


def test_a_run_in_another_thread(values):
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(run, values, max_steps=1).result().steps == 1


def test_a_result_is_not_overwritten(values, tmp_path, capsys):
    run(values, max_steps=1)
    mine = tmp_path / "out" / "final" / "notes.txt"
    mine.write_text("mine")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    for options in ([], ["--resume"]):
        assert main(["finetune", str(tmp_path / "r.yaml"), *options]) == 2
        assert "which holds final, a trained model" in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_a_finished_run_stays_as_it_is(values, tmp_path, capsys):
    """Unless its model is from before the last checkpoint, as after a kill between the two."""
    values["train"] |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    losses = run(values).losses
    mine = tmp_path / "out" / "final" / "notes.txt"
    mine.write_text("mine")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    assert main(["finetune", str(tmp_path / "r.yaml"), "--resume"]) == 0
    out = capsys.readouterr().out
    assert "the run is finished: it has trained 2 steps, and the model is in" in out and "trained 3" not in out
    assert run(values, resume=True).losses == losses and mine.read_text() == "mine"
    shutil.copytree(mine.parent, tmp_path / "old")
    expected = weights(run(values, resume=True, max_steps=3, save_steps=3).folder)
    shutil.rmtree(mine.parent)
    (tmp_path / "old").rename(mine.parent)
    found = run(values, resume=True, max_steps=3, save_steps=3)
    assert found.steps == 3 and not mine.exists()
    assert all(torch.equal(expected[name], value) for name, value in weights(found.folder).items())


@pytest.mark.parametrize("card", [b"---\nlicense: [apache\n---\n", b"---\nlicense: mit\n---\n\xe9"])
def test_a_base_models_card_may_be_unreadable(card, values, checkpoint, tmp_path):
    base = shutil.copytree(checkpoint, tmp_path / "base")
    (base / "README.md").write_bytes(card)
    values["model"]["path"] = str(base)
    assert ("license: mit" in (run(values, max_steps=1).folder / "README.md").read_text()) == (b"mit" in card)


def test_what_is_trained_is_kept_whatever_goes_wrong_after(values, checkpoint, tmp_path):
    """Here nothing can be put where the model belongs."""
    final, kept = tmp_path / "out" / "final", tmp_path / "out" / "final.unfinished"
    trainer = make_trainer(prepared := prepare(parse_recipe(values | {"train": values["train"] | {"max_steps": 1}})))
    trainer.train()
    (final.with_name("final.replaced")).write_text("")
    final.mkdir()
    with pytest.raises(OSError, match=f"the model is trained and its weights are in {kept}, but final could not"):
        save(trainer, prepared)
    expected = trainer.model.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in weights(kept).items())
    shutil.rmtree(final)
    with pytest.raises(ValueError, match="which holds final.unfinished, a trained model"):
        run(values)


def test_what_is_published_replaces_or_leaves_all_as_it_was(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    publish(tmp_path / "old", tmp_path / "final")
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "gone", tmp_path / "final")
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["old"]
    publish(tmp_path / "new", tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["new"]


def test_epochs_are_counted_in_examples(values, dataset, tmp_path):
    """Also after a resume. Batches of 5 make 12 examples three steps, and packs of any size one step."""
    rows = dataset.read_text().splitlines(keepends=True)
    data = tmp_path / "train.jsonl"
    data.write_text("".join(rows))
    values["data"] |= {"train": [{"path": str(data), "media_root": str(dataset.parent)}]}
    values["train"] |= {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 5}
    values["train"] |= {"save_strategy": "steps", "save_steps": 3}
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
    values["data"] |= {"packing": True, "max_video_tokens": 270, "batch_video_tokens": 10**6}
    values["train"] |= {"output_dir": str(tmp_path / "packs"), "per_device_train_batch_size": 1}
    assert prepare(parse_recipe(values)).arguments.max_steps == 1


def test_a_step_that_sees_the_data_more_than_once_is_warned_of(values, monkeypatch):
    told = []
    monkeypatch.setattr(preparation.logger, "warning", told.append)
    for steps in (6, -1):
        values |= {"global_batch_size": 12}
        prepare(parse_recipe(values | {"train": values["train"] | {"max_steps": steps}}))
        assert not told
        values |= {"global_batch_size": 16}
        prepare(parse_recipe(values | {"train": values["train"] | {"max_steps": steps}}))
        assert told.pop().startswith("A step takes 4 batches, and all data make 3: it sees examples more than once")


def test_incomplete_checkpoints_are_passed_over(tmp_path):
    for name, files in {"checkpoint-3": 2, "checkpoint-10": 1, "checkpoint-x": 2, ".saving/checkpoint-12": 2}.items():
        (tmp_path / name).mkdir(parents=True)
        for file in ("trainer_state.json", "data_position_0.json")[:files]:
            (tmp_path / name / file).write_text("{}")
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    assert last_checkpoint(tmp_path / "checkpoint-3") is None


def test_another_number_of_workers_cannot_go_on(uninterrupted, tmp_path):
    values, _, output = uninterrupted
    shutil.copytree(output / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    with pytest.raises(ValueError, match="1 processes with 2 data workers each; resume with as many"):
        run(values, resume=True, output_dir=str(tmp_path / "out"), dataloader_num_workers=1)


@pytest.mark.parametrize("change", [{"per_device_train_batch_size": 1}, {"seed": 7}])
def test_a_place_in_other_batches_is_refused(uninterrupted, tmp_path, change):
    values, _, output = uninterrupted
    shutil.copytree(output / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    with pytest.raises(ValueError, match="data, batch size or seeds have changed since"):
        run(values, resume=True, output_dir=str(tmp_path / "out"), **change)


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
    values |= {"data": values["data"] | {"train": broken}}
    run(values, max_steps=6)
    assert told and all("skipped broken.jsonl#v3" in line and "gone.mp4" in line for line in told)
    assert logged[5]["skipped_samples"] == len(told)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_example_stops_the_run_if_asked(values, broken, workers, tmp_path, capsys):
    values |= {"data": values["data"] | {"train": broken, "on_error": "raise"}}
    values["train"] |= {"dataloader_num_workers": workers}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    assert main(["finetune", str(tmp_path / "r.yaml")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("vamba: broken.jsonl#v3: ") and "gone.mp4" in line


def test_push_to_hub_uploads_all_of_it(values, checkpoint, tmp_path, monkeypatch):
    uploaded = {}
    base = shutil.copytree(checkpoint, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: cc-by-nc-4.0\nbase_model: some/base\n---\n# Base\n")
    values["model"]["path"] = str(base)

    class StandIn:
        """Of huggingface_hub.HfApi: the calls an upload makes."""

        def __init__(self, token=None):
            uploaded["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            uploaded["private"] = private
            return type("RepoUrl", (), {"repo_id": repo_id})

        def file_exists(self, repo_id, filename):
            return False

        def upload_folder(self, repo_id, folder_path, commit_message):
            files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            uploaded.update(repo_id=repo_id, files=files)
            return "https://hub/commit/1"

    monkeypatch.setattr("huggingface_hub.HfApi", StandIn)
    result = run(values, max_steps=1, push_to_hub=True, hub_model_id="me/tuned", hub_private_repo=True, hub_token="t")
    assert (uploaded["repo_id"], uploaded["private"], uploaded["token"]) == ("me/tuned", True, "t")
    wanted = {"config.json", "model.safetensors", "modeling_vamba.py", "processor_config.json", "tokenizer.json"}
    assert wanted <= uploaded["files"].keys()
    for card in (uploaded["files"]["README.md"].decode(), (result.folder / "README.md").read_text()):
        front = yaml.safe_load(card.split("---")[1])
        assert (front["license"], front["base_model"]) == ("cc-by-nc-4.0", "some/base") and "Fine-tuned from" in card
    assert uploaded["files"]["model.safetensors"] == (result.folder / "model.safetensors").read_bytes()
    assert "hub_token" not in (result.folder / "recipe.yaml").read_text()


# --- the collator with others' trainers -------------------------------------------------------------------------------


def arguments(folder, kind=TrainingArguments, **options):
    common = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 2e-3, "use_cpu": True}
    common |= {"remove_unused_columns": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    return kind(output_dir=str(folder), disable_tqdm=True, **common, **options)


def test_a_plain_trainer(checkpoint, dataset, tmp_path):
    source = Source(dataset)
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(checkpoint),
        AutoProcessor.from_pretrained(checkpoint),
    )
    collator = Collator(ConversationEncoder(processor, fps=8, media_root=source.media_root))
    options = arguments(tmp_path, dataloader_num_workers=1)
    trainer = Trainer(model, options, data_collator=collator, train_dataset=source.rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[2] < losses[0]


def test_trls_trainer(checkpoint, dataset, tmp_path):
    trl = pytest.importorskip("trl")
    source = Source(dataset)
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(checkpoint),
        AutoProcessor.from_pretrained(checkpoint),
    )
    collator = Collator(ConversationEncoder(processor, fps=8, media_root=source.media_root))
    options = arguments(tmp_path, trl.SFTConfig, dataset_kwargs={"skip_prepare_dataset": True}, bf16=False)
    trainer = trl.SFTTrainer(
        model, options, data_collator=collator, train_dataset=source.rows, processing_class=processor
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[2] < losses[0]


def test_trls_own_collator_is_warned_of(checkpoint, tmp_path, monkeypatch):
    """It knows images only: the text keeps the marks of the videos, and the model is not given them."""
    trl = pytest.importorskip("trl")
    told = []
    monkeypatch.setattr(shared_model.logger, "warning_once", told.append)
    turns = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    rows = Dataset.from_list([{"messages": turns}] * 4)
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(checkpoint),
        AutoProcessor.from_pretrained(checkpoint),
    )
    options = arguments(tmp_path, trl.SFTConfig, bf16=False, max_length=None)
    options.max_steps = 1
    trl.SFTTrainer(model, options, train_dataset=rows, processing_class=processor).train()
    assert told and "neither images, videos nor a memory were given" in told[0]
