"""The benchmark of training runs from end to end on a tiny model, and its report joins runs."""

import json


def test_steps_adapters_and_a_report_of_two_runs(run_script, checkpoint, tmp_path):
    common = ("--model", checkpoint, "--frames", 4, "--out")
    run_script("training.py", "--modes", "plain", "layer", "multi_axis", "--lora", 4, *common, tmp_path / "a.json")
    run_script("training.py", "--modes", "offload", "--stages", "stage2", *common, tmp_path / "b.json")
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert [row["checkpointing"] for row in first["steps"]] == ["plain", "layer", "multi_axis", "multi_axis"]
    assert all(row["seconds"] > 0 for run in (first, second) for row in run["steps"])
    assert all(row["video_tokens_per_s"] > 0 for row in first["steps"][:3])
    assert {"date", "command", "device", "PyTorch", "transformers"} <= first.keys()
    run_script("training.py", "--report", tmp_path / "a.json", tmp_path / "b.json", "--out", tmp_path / "training")
    text = (tmp_path / "training.md").read_text()
    assert "offload" in text and "LoRA" in text and first["device"] in text
    assert (tmp_path / "training.png").stat().st_size > 5000
