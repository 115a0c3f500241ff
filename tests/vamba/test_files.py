"""vamba/files.py: complete or not at all."""

import errno
import os

import pytest

from vamba.files import check_destination, check_space, publish, staged_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_appears_only_at_the_end(tmp_path):
    with staged_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
        assert folder.parent == tmp_path / "a" and folder.name.startswith("b.partial-")
    assert names(tmp_path / "a") == ["b"] and names(tmp_path / "a" / "b") == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_interruption_leaves_nothing(tmp_path, error):
    with pytest.raises(error), staged_folder(tmp_path / "a" / "b" / "c") as folder:
        (folder / "file").write_text("x")
        raise error
    assert names(tmp_path) == []


def test_interruption_keeps_what_was_there(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old").write_text("x")
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "kept"):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["kept"] and names(tmp_path / "kept") == ["old"]


def test_replaces_the_whole_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("x")
    with staged_folder(tmp_path / "a") as folder:
        (folder / "new").write_text("x")
        assert names(tmp_path / "a") == ["old"]
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["new"]


def test_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("x")
    rename, calls = os.rename, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise PermissionError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(PermissionError), staged_folder(tmp_path / "a"):
        pass
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["old"]


def test_full_disk_says_so(tmp_path):
    with pytest.raises(OSError, match="disk of .*out is full"), staged_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_full_disk_is_seen_beforehand(tmp_path):
    check_space(tmp_path / "x" / "y", 1)
    with pytest.raises(OSError, match="needs 1000000000.0 GB"):
        check_space(tmp_path / "x" / "y", 10**18)


def test_destinations_in_the_way(tmp_path):
    source = tmp_path / "source"
    (tmp_path / "file").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("x")
    (tmp_path / "empty").mkdir()
    check_destination(tmp_path / "empty", source, overwrite=False)
    check_destination(tmp_path / "new", source, overwrite=False)
    with pytest.raises(FileExistsError, match="is no folder"):
        check_destination(tmp_path / "file", source, overwrite=True)
    with pytest.raises(FileExistsError, match="not empty"):
        check_destination(tmp_path / "photos", source, overwrite=False)
    with pytest.raises(FileExistsError, match="no checkpoint"):
        check_destination(tmp_path / "photos", source, overwrite=True)
    (tmp_path / "photos" / "config.json").write_text("{}")
    check_destination(tmp_path / "photos", source, overwrite=True)


@pytest.mark.parametrize("destination", [".", "inner", ".."])
def test_source_and_destination_in_each_other(tmp_path, destination):
    source = tmp_path / "source"
    with pytest.raises(ValueError, match="must not lie in each other"):
        check_destination((source / destination).resolve(), source, overwrite=True)


def test_what_is_published_replaces_or_leaves_all_as_it_was(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    publish(tmp_path / "old", tmp_path / "final")
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "gone", tmp_path / "final")
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["old"]
    publish(tmp_path / "new", tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["new"]
