"""The benchmark of Video-Ma2mba runs from end to end on a tiny model, and its tables hold what it measured."""

import csv
import sys
from pathlib import Path

import pytest


@pytest.fixture
def run(run_script):
    return lambda *arguments: run_script("video_ma2mba.py", *arguments)


def table(path: Path) -> list[dict]:
    return list(csv.DictReader(path.open(newline="")))


def test_training_and_inference_become_a_report(run, tmp_path):
    modes = ("none", "layer", "sqrt", "multi_axis", "offload")
    run("training", "--sizes", "tiny", "--modes", *modes, "--exponents", 8, 9, "--limit", 0.3, "--out", tmp_path / "a")
    rows = table(tmp_path / "a" / "training.csv")
    assert {row["mode"] for row in rows} == set(modes)
    for row in rows:
        cells = (int(row["layer_interval"]), int(row["sequence_interval"]))
        assert row["status"].startswith(("ok", "not tried")) and float(row["ours_GB"]) >= 0
        if row["mode"] in ("none", "layer", "sqrt"):
            assert cells == ({"none": 4, "layer": 1, "sqrt": 2}[row["mode"]], int(row["tokens"]))
    first = [row for row in rows if row["tokens"] == "256"]
    assert len(first) == 5 and all(float(row["tokens_per_s"]) > 0 for row in first)
    run(
        "inference", "--sizes", "tiny", "--hours", 0.05, "--chunk-frames", 8, "--new-tokens", 6, "--out", tmp_path / "b"
    )
    minute, whole = table(tmp_path / "b" / "inference.csv")
    assert (minute["frames"], whole["frames"], whole["tokens"]) == ("60", "180", "720")
    assert minute["state_MB"] == whole["state_MB"] and float(whole["last_to_first"]) > 0
    run("report", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "r")
    (text,) = (tmp_path / "r").glob("*.md")
    assert "## Training" in text.read_text() and "## Inference" in text.read_text()
    assert len(list((tmp_path / "r").glob("*.csv"))) == 2 and len(list((tmp_path / "r").glob("*.png"))) == 1


def test_what_is_offloaded_must_fit_the_cpu(run, tmp_path):
    common = ("--sizes", "tiny", "--modes", "offload", "--exponents", 9, 9, "--cells", 1, 256)
    run("training", *common, "--cpu-gb", 1e-6, "--out", tmp_path)
    (row,) = table(tmp_path / "training.csv")
    assert row["status"] == "not tried: more than the CPU memory" and row["layer_interval"] == "1"


def test_a_report_of_nothing_is_refused(run, tmp_path):
    with pytest.raises(SystemExit, match=r"no training.csv or inference.csv"):
        run("report", tmp_path, "--out", tmp_path / "r")


def test_without_matplotlib_the_tables_are_written(run, tmp_path, monkeypatch):
    row = {"size": "tiny", "residual": "float32", "mode": "layer", "tokens": 256, "status": "ok", "ours_GB": 1.5}
    (tmp_path / "training.csv").write_text(
        ",".join([*row, "paper_GB", "over_GB"]) + "\n" + ",".join(map(str, row.values())) + ",2,\n"
    )
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        run("report", tmp_path, "--out", tmp_path / "r")
    assert len(list((tmp_path / "r").glob("*_training.csv"))) == 1
