"""The examples run as they stand: one in a process of its own, the others, to save its imports, in this one."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest


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


def test_quickstart(checkpoint, clip, tmp_path):
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), str(checkpoint), str(clip), "What happens?"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()
