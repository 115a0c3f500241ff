"""The examples run as they stand: one in a process of its own, the others, to save its imports, in this one."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoProcessor


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize(
    ("script", "questions", "lines"),
    [("ask_many", ["What happens?", "Where?"], 4), ("streaming", ["What?"], 1)],
)
def test_example(script, questions, lines, checkpoint, clip, tmp_path, monkeypatch, capsys):
    video = tmp_path / clip.name
    video.write_bytes(clip.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", str(checkpoint), str(video), *questions])
    runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= lines
    assert script != "ask_many" or (tmp_path / "clip.memory.safetensors").is_file()


@pytest.mark.parametrize("script", ["quickstart", "ask_many"])
def test_an_example_samples_as_the_checkpoint_was_trained(script, checkpoint, clip, tmp_path, monkeypatch):
    shutil.copytree(checkpoint, tmp_path / "model")
    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.video_processor.fps = 8
    processor.save_pretrained(tmp_path / "model")
    video = shutil.copy(clip, tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", str(tmp_path / "model"), str(video), "What happens?"])
    found = runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    grid = found["inputs"]["video_grid_thw"][0] if script == "quickstart" else found["memory"].media[0][0][1:]
    assert grid[0] == 8  # 16 frames, two a temporal patch


def test_quickstart(checkpoint, clip, tmp_path):
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), str(checkpoint), str(clip), "What happens?"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()
