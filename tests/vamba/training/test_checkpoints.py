"""Which checkpoint a run goes on from."""

from vamba.training.checkpoints import last_checkpoint


def test_incomplete_checkpoints_are_passed_over(tmp_path):
    for name, files in {"checkpoint-3": 2, "checkpoint-10": 1, "checkpoint-x": 2, ".saving/checkpoint-12": 2}.items():
        (tmp_path / name).mkdir(parents=True)
        for file in ("trainer_state.json", "data_position_0.json")[:files]:
            (tmp_path / name / file).write_text("{}")
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    assert last_checkpoint(tmp_path / "checkpoint-3") is None
