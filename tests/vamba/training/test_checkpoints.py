"""Which checkpoint a run goes on from: the last that is whole, whatever has happened to the others."""

import json
import os

import pytest

from vamba.training import RecipeError, checkpoints
from vamba.training.checkpoints import find_checkpoint, last_checkpoint, remove_leftovers, rotate, write_manifest


FILES = ("trainer_state.json", "data_position_0.json", "data_position_1.json", "optimizer.pt", "state/0.distcp")


def make_checkpoints(output, *steps):
    for step in steps:
        for name in FILES:
            file = output / f"checkpoint-{step}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(f"{name} of {step}".encode() * 1000)
        write_manifest(output / f"checkpoint-{step}")
    return output


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "delete": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "flip": flip,
    "fifo": lambda file: (file.unlink(), os.mkfifo(file)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, "files.json"])
def test_a_checkpoint_that_is_not_whole_is_passed_over_and_named(name, damage, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(checkpoints.logger, "warning", told.append)
    make_checkpoints(tmp_path, 3, 10)
    (tmp_path / ".saving" / "checkpoint-12").mkdir(parents=True)
    (tmp_path / "checkpoint-x").mkdir()
    assert last_checkpoint(tmp_path).name == "checkpoint-10" and not told
    DAMAGES[damage](tmp_path / "checkpoint-10" / name)
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    reason = "missing" if damage in ("delete", "fifo") else "damaged"
    assert told[0].startswith("Going on from checkpoint-3, as checkpoint-10 is not whole: ") and reason in told[0]
    assert name in told[0] or name == "files.json"
    DAMAGES[damage](tmp_path / "checkpoint-3" / name)
    with pytest.raises(RecipeError, match="checkpoint-10 is not whole.*checkpoint-3 is not whole.*a whole checkpoint"):
        last_checkpoint(tmp_path)
    assert last_checkpoint(tmp_path / "checkpoint-3") is None  # which holds none


@pytest.mark.parametrize("content", ["[]", "{}", "null", "7", '{"../a": 1}', '{"\\u0000": []}', "[" * 100_000, "\xff"])
def test_a_manifest_may_say_anything(content, tmp_path):
    make_checkpoints(tmp_path, 3)
    (tmp_path / "checkpoint-3" / "files.json").write_text(content, encoding="latin-1")
    with pytest.raises(RecipeError, match="checkpoint-3 is not whole"):
        find_checkpoint(str(tmp_path), resume=True)
    with pytest.raises(RecipeError, match="which holds checkpoint-3; accepted: another folder, or --resume"):
        find_checkpoint(str(tmp_path), resume=False)


def test_rotation_keeps_the_checkpoint_that_was_just_written(tmp_path):
    """One of a later step is not whole, or the run would have gone on from it."""
    make_checkpoints(tmp_path, 2, 4, 6, 8)
    (tmp_path / "checkpoint-8" / "optimizer.pt").unlink()
    rotate(tmp_path, None, 6)
    assert len(list(tmp_path.iterdir())) == 4
    rotate(tmp_path, 2, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    rotate(tmp_path, 1, 4)
    assert last_checkpoint(tmp_path).name == "checkpoint-4"


def test_rotation_keeps_the_best_checkpoint(tmp_path):
    """Beside the last one, and in place of another where there is room for more."""
    make_checkpoints(tmp_path, 2, 4, 6, 8)
    rotate(tmp_path, 2, 8, best=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-8"]
    rotate(tmp_path, 1, 8, best=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-8"]
    rotate(tmp_path, 1, 8, best=8)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]


def test_what_a_killed_run_leaves_is_removed_and_nothing_else(tmp_path):
    make_checkpoints(tmp_path, 2)
    for name in (".saving/checkpoint-4", "checkpoint-2.replaced", "final.replaced", "notes.replaced", "notes"):
        (tmp_path / name).mkdir(parents=True)
    remove_leftovers(str(tmp_path))
    names = ["checkpoint-2", "final.replaced", "notes", "notes.replaced"]  # nothing has taken the place of `final` yet
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert json.loads((tmp_path / "checkpoint-2" / "files.json").read_text()).keys() == {*FILES}
