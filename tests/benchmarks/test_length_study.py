"""The study from end to end with tiny models: what is measured when, that it is done once, and the report."""

import json

import pytest


pytest.importorskip("matplotlib")


def test_arms_are_compared_after_equal_steps_and_equal_flops(run_script, tmp_path, capsys):
    arms = ("vamba_key_norm", "vamba_no_mamba", "qwen2_vl", "video_ma2mba")
    small = ("--size", "tiny", "--out", tmp_path, "--tested", 24)
    for _ in range(2):
        run_script("length_study.py", "train", *arms, "--steps", 2, "--videos", 2, *small)
    assert capsys.readouterr().out.count("done already") == len(arms)
    runs = {arm: json.loads((tmp_path / f"{arm}.json").read_text()) for arm in arms}
    qwen = runs["qwen2_vl"]
    assert [point["step"] for point in qwen["points"]] == [1, 2]
    for run in runs.values():
        assert run["complete"] and run["points"][-1]["step"] == run["last"] >= 2
        equal = qwen["flops_per_step"] * 2 / run["flops_per_step"]
        assert run["equal_flops_steps"] == round(equal) and run["points"][0]["accuracy"].keys() == {"24"}
    assert runs["vamba_no_mamba"]["last"] > 2 > runs["video_ma2mba"]["equal_flops_steps"]
    run_script("length_study.py", "train", "qwen2_vl", "--steps", 1, "--videos", 1, "--seed", 3, *small)
    assert json.loads((tmp_path / "qwen2_vl-3.json").read_text())["points"][0]["loss"] != qwen["points"][0]["loss"]
    run_script("length_study.py", "prefill", *small)
    report = tmp_path / "report.md"
    report.write_text("# What we found\n\nMuch.\n")
    for _ in range(2):
        run_script("length_study.py", "report", "--out", tmp_path, "--report", tmp_path / "report")
    text = report.read_text()
    assert text.startswith("# What we found\n\nMuch.\n") and text.count("## After equal FLOPs") == 1
    assert all(arm in text for arm in arms) and "## Prefill" in text
    for name in ("length", "ablations", "flops", "prefill"):
        assert (tmp_path / f"report_{name}.png").stat().st_size > 5000
