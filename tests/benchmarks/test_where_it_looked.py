"""The benchmark of where the model looks runs from end to end on a tiny model; its shares are shares."""


def test_events_are_counted_for_each_reduction(run_script, checkpoint, tmp_path):
    out = tmp_path / "report.md"
    run_script("where_it_looked.py", "events", "--model", checkpoint, "--videos", 1, "--seeds", 1, 2, "--out", out)
    text = out.read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    tables = [row for row in rows if row[0] == "contribution, all layers"]
    assert len(tables) == 3 and "seed 1 (chosen on)" in text and "seed 2 (reported on)" in text
    for *of_kinds, all_of_them, near in (map(float, row[1:]) for row in tables):
        assert abs(sum(of_kinds) / 3 - all_of_them) < 1e-3 and all_of_them <= near <= 1
