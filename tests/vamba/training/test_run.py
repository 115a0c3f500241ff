"""`vamba finetune`: a run from beginning to end, and that nothing that happens to it is lost or goes unnoticed."""

import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer

from vamba import VideoChat
from vamba.cli import main
from vamba.demo.tiny_checkpoints import tiny_neox_tokenizer
from vamba.modeling import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor
from vamba.training import VambaTrainer, checkpoints, finetune, load_recipe
from vamba.training.checkpoints import find_checkpoint, last_checkpoint

from tiny_video_ma2mba import tiny_config
from training_data import free_port, recipe_values, run, start, weights


def test_what_is_trained_can_be_asked(values, dataset, tmp_path, capsys, monkeypatch):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["finetune", str(path), "--max_steps", "4"]) == 0
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
    monkeypatch.chdir(tmp_path / "out")
    again = load_recipe("final/recipe.yaml")  # as it was, with the overrides, and paths from the output folder on
    assert again.given.keys() == values.keys() and again.training.max_steps == 4
    assert [os.path.realpath(source.path) for source in again.data.sources] == values["datasets"]
    assert os.path.realpath(again.model.model_name_or_path) == values["model_name_or_path"]
    assert "hub_token" not in again.given
    for file in final.rglob("*.*"):
        assert b"/tmp" not in (content := file.read_bytes()) and os.fsencode(Path.home()) + b"/" not in content, file
    assert not (final / "training_args.bin").exists() and not (tmp_path / "out" / ".saving").exists()


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
    common = f"--dtype float32 --datasets {values['datasets'][0]} --global_batch_size 2 --peak_tflops 1 --bf16 no"
    common += " --use_cpu --report_to none --dataloader_num_workers 0 --max_steps 3 --save_strategy no"
    common = f"{common} --lr_scheduler_type constant".split()
    logged = []
    monkeypatch.setattr(Trainer, "log", lambda self, logs, start_time=None: logged.append(logs))
    before = other_checkpoint
    for stage in ("stage1", "stage1_5", "stage2"):
        overrides = [*common, "--model_name_or_path", str(before)] if stage == "stage1" else common
        assert Path(load_recipe(f"video_ma2mba_{stage}", overrides).model.model_name_or_path) == before
        result = finetune(f"video_ma2mba_{stage}", overrides)
        old, new = weights(before), weights(result.folder)
        moved = {name.removeprefix("model.").split(".")[0] for name in old if not torch.equal(old[name], new[name])}
        moved.discard("lm_head")  # tied to the embedding
        assert moved == ({"projector"} if stage == "stage1" else {"projector", "language_model", "visual"})
        before = result.folder
    assert "Fine-tuned from" in (before / "README.md").read_text()
    entries = [logs for logs in logged if "loss" in logs]
    assert len(entries) == 9 and all(0 < logs["mfu"] < 1 for logs in entries)


@pytest.fixture(scope="module")
def uninterrupted(checkpoint, dataset, tmp_path_factory):
    """A run of six steps with a checkpoint after each: two workers, accumulation, a dropout that needs its seed."""
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    values = recipe_values(checkpoint, dataset, output, save_strategy="steps", save_steps=1, dataloader_num_workers=2)
    values["per_device_train_batch_size"] = 2
    values |= {"global_batch_size": 4, "trainable": "lora", "lora_r": 4, "lora_dropout": 0.3}
    return values, run(values), output


@pytest.mark.parametrize("step", [1, 4, 6])  # after 6 there is nothing left to train
def test_resumed_is_uninterrupted(uninterrupted, step, tmp_path):
    values, expected, output = uninterrupted
    shutil.copytree(output / f"checkpoint-{step}", tmp_path / "out" / f"checkpoint-{step}")
    found = run(values, resume=True, output_dir=str(tmp_path / "out"))
    assert found.losses == expected.losses and found.steps == 6
    before, after = weights(expected.folder), weights(found.folder)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_damaged_checkpoint_is_passed_over(uninterrupted, tmp_path, monkeypatch):
    """Whichever of its files, and none of them is looked into: the losses are those of the whole one before."""
    values, expected, output = uninterrupted
    told = []
    monkeypatch.setattr(checkpoints.logger, "warning", told.append)
    copied = tmp_path / "out"
    for step in (4, 5):
        shutil.copytree(output / f"checkpoint-{step}", copied / f"checkpoint-{step}")
    names = {file.name for file in (copied / "checkpoint-5").iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors", "files.json"} <= names
    for name in names:
        file = copied / "checkpoint-5" / name
        whole = file.read_bytes()
        for damaged in (whole[: len(whole) // 2], whole[:-9] + b"\x80" + whole[-8:], None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            assert find_checkpoint(str(copied), resume=True) == copied / "checkpoint-4"
            assert name in told.pop() or name == "files.json"
        file.write_bytes(whole)
    assert find_checkpoint(str(copied), resume=True) == copied / "checkpoint-5" and not told
    (copied / "checkpoint-5" / "scheduler.pt").unlink()
    assert run(values, resume=True, output_dir=str(copied), save_total_limit=1).losses == expected.losses
    assert {path.name for path in copied.iterdir()} == {"checkpoint-6", "final"}


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
    values = values | {"output_dir": str(output), "save_steps": 2}
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
    values = values | {"output_dir": str(tmp_path / "out"), "save_steps": 100}
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
    values |= {"dataloader_num_workers": 2}
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
