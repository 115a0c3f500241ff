"""The benchmark of evaluation runs from end to end on a tiny model, and both sides give the same answers."""


def test_both_sides_give_the_same_answers(run_script, checkpoint, clip, tmp_path):
    out = tmp_path / "report.md"
    arguments = ("--frames", 4, 8, "--questions", 2, "--new-tokens", 3, "--video", clip, "--out", out)
    run_script("evaluation.py", "--model", checkpoint, *arguments)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in out.read_text().splitlines() if line[:1] == "|"
    ]
    results = [dict(zip(rows[0], row)) for row in rows[2:]]
    assert [row["frames"] for row in results] == ["4", "8"] and all(row["same answers"] == "True" for row in results)
    assert all(float(row["one by one (s)"]) > 0 and float(row["times as fast"]) > 0 for row in results)
