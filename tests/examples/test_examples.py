"""The examples run as they stand."""

import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize(
    ("script", "questions", "lines"),
    [("quickstart", ["What happens?"], 1), ("ask_many", ["What happens?", "Where?"], 4), ("streaming", ["What?"], 1)],
)
def test_example(script, questions, lines, checkpoint, clip, tmp_path):
    video = tmp_path / clip.name
    video.write_bytes(clip.read_bytes())
    command = [sys.executable, str(EXAMPLES / f"{script}.py"), str(checkpoint), str(video), *questions]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(result.stdout.splitlines()) >= lines
    assert script != "ask_many" or (tmp_path / "clip.memory.safetensors").is_file()
