"""vamba/files.py: complete or not at all."""

import errno
import os
import stat
import threading

import pytest

import vamba.files
from vamba.errors import OccupiedPathError, UserError
from vamba.files import check_apart, check_destination, check_replaceable, check_space, publish, staged_folder

import kill_points


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_appears_only_at_the_end(tmp_path):
    with staged_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
        assert folder.parent == tmp_path / "a" / "b.partial"
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


def without_exchange(monkeypatch):
    """As on a filesystem where two folders cannot change places."""
    monkeypatch.setattr(vamba.files, "_exchange", lambda one, other: False)


def test_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("x")
    rename, calls = os.rename, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise PermissionError("no")
        rename(source, target)

    without_exchange(monkeypatch)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(UserError, match="no"), staged_folder(tmp_path / "a"):
        pass
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["old"]


def write(folder, content, exchange=True):
    if not exchange:
        vamba.files._exchange = lambda one, other: False
    with staged_folder(folder / "a") as staging:
        for index in range(3):
            (staging / str(index)).write_text(content)


def assert_whole(folder, contents):
    assert names(folder) == ["0", "1", "2"]
    assert len({path.read_text() for path in folder.iterdir()} & contents) == 1


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_before_any_file_operation(tmp_path, exchange):
    """At every kill the destination is the old or the new one, and the next run leaves nothing else."""
    for number in kill_points.steps(kill_points.run_to_the_end(write, tmp_path, "0", exchange)[1] + 9):
        write(tmp_path, "old")
        kill_points.kill_at(write, tmp_path, f"{number}", exchange, step=number)
        if exchange or (tmp_path / "a").exists():
            assert_whole(tmp_path / "a", {"old", f"{number}"})
        with staged_folder(tmp_path / "a"):  # puts back what lay between two renames
            assert_whole(tmp_path / "a", {"old", f"{number}"})
            (tmp_path / "a").rename(tmp_path / "b")
        (tmp_path / "b").rename(tmp_path / "a")
        write(tmp_path, "next")
        assert names(tmp_path) == ["a"]


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path):
    with staged_folder(tmp_path / "a") as folder:
        with pytest.raises(UserError, match=r"a.partial is being written by another process"):
            with staged_folder(tmp_path / "a"):
                pass
        assert folder.is_dir()
        pid = os.fork()  # as a worker that loads data and outlives its parent by some seconds
        if pid == 0:
            threading.Event().wait(30)
            os._exit(0)
    try:
        with staged_folder(tmp_path / "a"):
            pass
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_the_destination_is_looked_at_again_at_the_end(tmp_path):
    def check():
        check_destination(tmp_path / "a", overwrite=False)

    with pytest.raises(OccupiedPathError, match="not empty"), staged_folder(tmp_path / "a", check):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "photo").touch()
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["photo"]


def test_what_no_run_left_there_is_kept(tmp_path):
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "thesis").touch()
    with pytest.raises(OccupiedPathError, match="holds thesis"), staged_folder(tmp_path / "a"):
        pass
    (tmp_path / "b.partial").symlink_to(tmp_path / "a.partial")
    with pytest.raises(UserError, match="b.partial"), staged_folder(tmp_path / "b"):
        pass
    assert names(tmp_path / "a.partial") == ["thesis"]


@pytest.mark.parametrize("umask, modes", [(0o022, (0o755, 0o644)), (0o077, (0o700, 0o600)), (0o002, (0o775, 0o664))])
def test_files_get_the_mode_of_the_umask(tmp_path, umask, modes):
    before = os.umask(umask)
    try:
        with staged_folder(tmp_path / "a") as folder:
            os.close(os.open(folder / "file", os.O_CREAT, 0o600))  # as safetensors makes its own
    finally:
        os.umask(before)
    assert tuple(stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a", tmp_path / "a" / "file")) == modes


@pytest.mark.parametrize("name", ["x" * 300, "with \0", "file/below"])
def test_a_destination_that_cannot_be_is_one_sentence(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError) as caught, staged_folder(tmp_path / name):
        pass
    assert "\n" not in str(caught.value) and names(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["a b", "line\nbreak", "видео", "x" * 240])
def test_odd_names(tmp_path, name):
    for content in "12":
        with staged_folder(tmp_path / name) as folder:
            (folder / "file").write_text(content)
    assert names(tmp_path) == [name] and (tmp_path / name / "file").read_text() == "2"


def test_full_disk_says_so(tmp_path):
    with pytest.raises(OSError, match="disk of .*out is full"), staged_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_full_disk_is_seen_beforehand(tmp_path):
    check_space(tmp_path / "x" / "y", 1)
    with pytest.raises(OSError, match="needs 1000000000.0 GB"):
        check_space(tmp_path / "x" / "y", 10**18)


def test_destinations_in_the_way(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    check_destination(tmp_path / "empty", overwrite=False)
    check_destination(tmp_path / "new", overwrite=False)
    for name in ("file", "loop"):
        with pytest.raises(FileExistsError, match="is no folder"):
            check_destination(tmp_path / name, overwrite=True)
    with pytest.raises(FileExistsError, match="not empty"):
        check_destination(tmp_path / "photos", overwrite=False)
    with pytest.raises(FileExistsError, match="no checkpoint"):
        check_destination(tmp_path / "photos", overwrite=True)
    with pytest.raises(FileExistsError, match="is mounted"):
        check_replaceable(type(tmp_path)("/proc"), "process", "stat", ["*"])
    with pytest.raises(UserError, match="choose a folder in it"), staged_folder(type(tmp_path)("/")):
        pass


@pytest.mark.parametrize("foreign", ["cat.png", "talk.safetensors", "adapter/notes.txt", "train.py", "LICENSE/x"])
def test_foreign_files_are_named_and_kept(tmp_path, foreign):
    own = ["config.json", "model-00001-of-00002.safetensors", "LICENSE.txt", "adapter/adapter_model.safetensors"]
    own += ["modeling_vamba.py", "additional_chat_templates/tools.jinja", "README.md", "recipe.yaml"]
    for name in own:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    check_destination(tmp_path, overwrite=True)
    (tmp_path / foreign).parent.mkdir(exist_ok=True)
    (tmp_path / foreign).touch()
    with pytest.raises(FileExistsError, match=f"holds {foreign}, which is not of a checkpoint"):
        check_destination(tmp_path, overwrite=True)


@pytest.mark.parametrize("destination", [".", "inner", ".."])
def test_source_and_destination_in_each_other(tmp_path, destination):
    source = tmp_path / "source"
    with pytest.raises(ValueError, match="must not lie in each other"):
        check_apart((source / destination).resolve(), tmp_path / "elsewhere", source)


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
