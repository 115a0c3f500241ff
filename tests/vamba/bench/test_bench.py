"""`vamba bench` from end to end on the tiny checkpoint, and its mistakes."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from vamba.bench import subjects
from vamba.bench.clock import last_to_first
from vamba.bench.models import linear_weights
from vamba.bench.parts import make_clip
from vamba.bench.report import markdown, plot
from vamba.cli import main


@pytest.fixture(scope="module")
def tiny(checkpoint, clip):
    sizes = ["--patches", "4", "6", "--prompt-tokens", "5", "--new-tokens", "3", "--chunk-frames", "4"]
    return ["bench", "--model", str(checkpoint), "--device", "cpu", "--video", str(clip), *sizes]


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_tables_plots_and_report(tiny, tmp_path, capsys, monkeypatch):
    arguments = [*tiny, "--frames", "8", "4", "--peer", "qwen2-vl", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["/home/me/bin/vamba", *arguments])
    assert main(arguments) == 0
    (report,), (table,) = tmp_path.glob("*.md"), tmp_path.glob("*_video_length.csv")
    assert f"`vamba bench --model {Path(tiny[2]).name} --device cpu --video clip.mp4" in report.read_text()
    for file in tmp_path.iterdir():  # nothing tells of the machine
        assert b"/tmp" not in file.read_bytes() and b"/home" not in file.read_bytes()
    rows = read(table)
    assert [(r["model"], r["frames"], r["video_tokens"], r["status"]) for r in rows] == [
        (model, frames, tokens, "ok")
        for model in ("vamba", "qwen2-vl")
        for frames, tokens in (("4", "12"), ("8", "24"))
    ]
    for row in rows:
        for name in ("prefill_s", "prefill_floor_s", "decode_ms", "decode_floor_ms", "tokens_per_s", "frames_per_s"):
            assert float(row[name]) > 0
        assert float(row["prefill_floor_s"]) < float(row["prefill_s"])
    parts = {row["part"]: row for row in read(next(tmp_path.glob("*_parts.csv")))}
    assert {"vision tower", "vision tower: merger", "video keys and values", "prompt"} <= set(parts)
    names = ("in_proj", "convolution and scan", "gated norm", "out_proj")
    inside = sum(float(parts[f"Mamba-2 blocks: {name}"]["ms"]) for name in names)
    assert 0 < inside < float(parts["Mamba-2 blocks"]["ms"])
    assert all(float(part["ms"]) > 0 for part in parts.values())
    assert read(next(tmp_path.glob("*_kernels.csv")))
    videos = read(next(tmp_path.glob("*_videos.csv")))
    assert [int(row["frames"]) for row in videos] == [2, 16]  # two seconds at 8 frames per second
    assert len(list(tmp_path.glob("*.png"))) == 2  # there is no memory to draw on a CPU
    text = report.read_text()
    assert "times as fast" in text and "floor" in text and text.splitlines()[0] in capsys.readouterr().out
    assert all(path.stat().st_size > 5000 for path in plot(table))


def test_what_does_not_fit_is_said_and_the_rest_runs(tiny, tmp_path, monkeypatch, capsys):
    encode = subjects.Ours.encode

    def small(self, frames, *mark):
        if frames > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, frames, *mark)

    monkeypatch.setattr(subjects.Ours, "encode", small)
    assert main([*tiny, "--frames", "4", "8", "12", "--out", str(tmp_path)]) == 0
    rows = read(next(tmp_path.glob("*_video_length.csv")))
    assert [row["status"] for row in rows] == ["ok", "out of memory", "not tried: a shorter one ran out of memory"]
    assert len(plot(next(tmp_path.glob("*_video_length.csv")))) == 2


def test_what_would_take_too_long_is_left_out(tiny, tmp_path):
    assert main([*tiny, "--frames", "4", "400000", "--max-seconds", "30", "--out", str(tmp_path)]) == 0
    rows = read(next(tmp_path.glob("*_video_length.csv")))
    assert rows[0]["status"] == "ok" and rows[1]["status"].startswith("not tried: about ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--frames", "4"], "--model is missing"),
        (["--model", "7b", "--device", "cpu"], "21 GiB"),
        (["--model", "CHECKPOINT", "--device", "cpu", "--patches", "3", "4"], "multiples of 2"),
        (["--plot", "missing.csv"], "missing.csv"),
        (["--plot", __file__], "no table of lengths"),
    ],
)
def test_a_mistake_is_one_line(arguments, says, checkpoint, capsys):
    arguments = [str(checkpoint) if argument == "CHECKPOINT" else argument for argument in arguments]
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error.splitlines()[-1] and "Traceback" not in error


def test_without_matplotlib_tables_are_written_and_plots_say_what_is_missing(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*tiny, "--frames", "4", "--out", str(tmp_path)]) == 0
    assert "pip install matplotlib" in capsys.readouterr().out and len(list(tmp_path.iterdir())) == 5
    assert main(["bench", "--plot", str(next(tmp_path.glob("*_video_length.csv")))]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_floors_count_what_the_parts_do(model):
    core = model.model
    parameters = sum(p.numel() for name, p in core.visual.blocks.named_parameters() if p.dim() == 2)
    assert linear_weights(core.visual.blocks) == parameters
    assert last_to_first([9.0, *[1.0] * 10, *[2.0] * 10, 9.0]) == 2.0 and last_to_first([1.0] * 9) is None


def test_the_synthetic_clip_is_a_video(tmp_path):
    from vamba import read_video

    with read_video(make_clip(tmp_path / "clip.mp4", 2, 10, 320, 176)) as reader:
        assert sum(len(chunk) for chunk in reader) == 2 and reader.metadata.fps == 10


def test_the_report_leaves_out_columns_that_nothing_filled():
    row = {"model": "vamba", "frames": 4, "status": "out of memory"}
    machine = {"date": "2026-01-01", "command": "vamba bench", "device": "CPU"}
    text = markdown({"machine": machine, "lengths": [row], "parts": [], "kernels": [], "videos": []})
    assert "out of memory" in text and "prefill s" not in text
