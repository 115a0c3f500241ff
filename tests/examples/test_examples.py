"""The examples run as they stand: one in a process of its own, the others, to save its imports, in this one."""

import importlib.util
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vamba
from vamba.training.model import ADAPTED


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(script, *arguments):
    """The names that the script leaves behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")


@pytest.fixture
def desk(clip, tmp_path, monkeypatch):
    """The working folder of a test: clip.mp4, and talks.jsonl with conversations about it."""
    shutil.copy(clip, tmp_path)
    content = [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "What happens in the video?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "A square."}]
    (tmp_path / "talks.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_ask_many(checkpoint, desk, capsys):
    run("ask_many", checkpoint, "clip.mp4", "What happens?", "Where?")
    assert capsys.readouterr().out.count("\n> ") == 2
    assert (desk / "clip.memory.safetensors").is_file()


def test_live_camera(checkpoint, desk, monkeypatch, capsys):
    """A file in place of the camera; the questions are there from the start, and wait for the first frames."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("What happens?\n\nWhere?\n"))
    memory = run("live_camera", checkpoint, "clip.mp4")["chat"].memory
    printed = capsys.readouterr().out
    assert printed.startswith("> What happens?\n") and "\n> Where?\n" in printed
    assert printed.endswith("\n2.0 seconds were watched\n")
    assert len(memory.media[0]) == 1  # one video, although it came in pieces


def test_a_camera_that_cannot_be_opened(checkpoint, desk, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("What happens?\n"))
    monkeypatch.setattr(threading, "excepthook", lambda failed: print(failed.exc_type.__name__))
    run("live_camera", checkpoint, "missing.mp4")
    assert sorted(capsys.readouterr().out.split("\n")) == ["", "FileNotFoundError", "nothing was seen"]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized(checkpoint, desk, bits, capsys):
    pytest.importorskip("bitsandbytes")
    layers = run("quantized", checkpoint, "clip.mp4", "What happens?", bits)["model"].modules()
    assert f"Linear{bits}bit" in str({type(layer).__name__ for layer in layers})
    assert "MiB of weights" in capsys.readouterr().out


TRAINING = "--max_steps 3 --per_device_train_batch_size 2 --learning_rate 1e-3 --logging_steps 1 --use_cpu --bf16 no"


def test_plain_trainer(checkpoint, desk, monkeypatch):
    """With W&B, which keeps what it is told in a folder, where it is installed."""
    log = "wandb" if importlib.util.find_spec("wandb") else "none"
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer = run(
        "plain_trainer", checkpoint, "talks.jsonl", "--output_dir", "out", "--report_to", log, *TRAINING.split()
    )
    losses = [entry["loss"] for entry in trainer["trainer"].state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    if log == "wandb":
        import wandb

        assert wandb.run.summary["train/global_step"] == 3
        wandb.finish()
        assert list(desk.glob("wandb/offline-run-*/*.wandb"))
    assert AutoProcessor.from_pretrained("out") and vamba.hub.describe("out")["layers"] == 3


@pytest.mark.parametrize("quantized", [[], ["--load_in_4bit"]], ids=["lora", "qlora"])
def test_adapters_from_training_to_the_hub(checkpoint, desk, quantized, monkeypatch, capsys):
    pytest.importorskip("trl")
    if quantized:
        pytest.importorskip("bitsandbytes")
    found = run("trl_lora", checkpoint, "talks.jsonl", "--output_dir", "adapter", *quantized, *TRAINING.split())
    losses = [entry["loss"] for entry in found["trainer"].state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert bool(quantized) == any(type(layer).__name__ == "Linear4bit" for layer in found["model"].modules())
    pushed = []
    monkeypatch.setattr(vamba.hub, "push_to_hub", lambda *what, **options: pushed.append(what[2:]) or "the commit")
    merged = run("merge_and_push", "adapter", "merged", "me/tiny")["model"]
    assert pushed == [("me/tiny",)] and capsys.readouterr().out.endswith("the commit\n")
    kept, before = (AutoModelForImageTextToText.from_pretrained(path) for path in ("merged", checkpoint))
    for name, weight in kept.state_dict().items():
        assert torch.equal(weight, merged.state_dict()[name])
        assert torch.equal(weight, before.state_dict()[name]) != bool(re.fullmatch(rf"{ADAPTED}\.weight", name))


@pytest.mark.parametrize("script", ["quickstart", "ask_many"])
def test_an_example_samples_as_the_checkpoint_was_trained(script, checkpoint, clip, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.video_processor.fps = 8
    processor.save_pretrained(tmp_path / "model")
    found = run(script, tmp_path / "model", shutil.copy(clip, tmp_path), "What happens?")
    grid = found["inputs"]["video_grid_thw"][0] if script == "quickstart" else found["memory"].media[0][0][1:]
    assert grid[0] == 8  # 16 frames, two a temporal patch


def test_quickstart(checkpoint, clip, tmp_path):
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), str(checkpoint), str(clip), "What happens?"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()
