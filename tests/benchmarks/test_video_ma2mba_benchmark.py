"""The benchmark of Video-Ma2mba runs from end to end on a tiny model, and its tables hold what it measured."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "video_ma2mba.py"


@pytest.fixture
def run(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_of_video_ma2mba", SCRIPT)
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)
    spec.loader.exec_module(benchmark)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["video_ma2mba.py", *map(str, arguments)])
        benchmark.main()

    return run


def table(path: Path) -> list[dict]:
    return list(csv.DictReader(path.open(newline="")))


def test_training_and_inference_become_a_report(run, tmp_path):
    modes = ("none", "layer", "sqrt", "multi_axis", "offload")
    run("training", "--sizes", "tiny", "--modes", *modes, "--exponents", 8, 9, "--limit", 1, "--out", tmp_path / "a")
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
