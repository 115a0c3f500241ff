"""Memories as files: whole or not at all, of the kind that is asked for, and never over anything else."""

import contextlib
import copy
import json
import os
import resource
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vamba.modeling import StateMemory, VideoMemory
from vamba.modeling.memory_files import check_memory_path, read_memory, write_memory

import kill_points
import tiny_vamba
import tiny_video_ma2mba


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.int8]


def times(t):
    """Spans of temporal patches, half a second each."""
    return torch.arange(t, dtype=torch.float64)[:, None] / 2 + torch.tensor([0, 0.5])


@pytest.fixture(scope="module", params=["vamba", "fp8", "video-ma2mba"])
def saved(request, tmp_path_factory):
    """The file of a small memory with padding and text, and its class."""
    path = tmp_path_factory.mktemp("saved") / "talk"
    if request.param == "video-ma2mba":
        videos = tiny_video_ma2mba.video(2, 3)
        memory = tiny_video_ma2mba.tiny_model().encode_video(**videos, rows=[0, 1], video_times=times(5))
    else:
        model = tiny_vamba.tiny_model()
        memory = model.encode_video(*tiny_vamba.media((2, 4, 4), (1, 4, 4)), rows=[0, 1], video_times=times(3))
        model.generate(tiny_vamba.prompt(3).repeat(2, 1), past_key_values=memory, max_new_tokens=2, do_sample=False)
        if request.param == "fp8":
            memory.to(dtype=torch.float8_e4m3fn)
    memory.save(path)
    return path, StateMemory if request.param == "video-ma2mba" else VideoMemory


def contents(path):
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["vamba"])
    return header.pop("format"), load_file(path), header


def test_tensors_and_header_come_back(tmp_path):
    whole = torch.arange(6.0, requires_grad=True).reshape(2, 3)
    tensors = {"a": whole[:, 1:], "b": whole.T, "c": torch.tensor(True), "empty": torch.ones(0, 3)}
    tensors |= {f"{dtype}": torch.arange(5).to(dtype) for dtype in DTYPES}  # slices of one storage, a graph
    write_memory(tmp_path / "m", "kind.1", tensors, {"media": [["video", 3]], "none": None})
    read, header = read_memory(tmp_path / "m", "kind.1")
    assert header == {"media": [["video", 3]], "none": None} and read.keys() == tensors.keys()
    for key, t in read.items():
        assert t.dtype == tensors[key].dtype and torch.equal(t.double(), tensors[key].double())


def test_other_files_are_refused_by_name(tmp_path):
    write_memory(tmp_path / "m", "kind.1", {}, {})
    save_file({"a": torch.ones(1)}, tmp_path / "weights")
    save_file({}, tmp_path / "earlier", metadata={"vamba": json.dumps({"format": "kind.2"})})
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").touch()
    (tmp_path / "long").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    expected = {"m": r"another kind of model \(kind.1\)", "weights": "no memory", "earlier": "no checksum"}
    expected |= dict.fromkeys(("text", "empty", "long"), "damaged") | dict.fromkeys(("folder", "fifo"), "is no file")
    for name, match in expected.items():
        with pytest.raises(ValueError, match=f"{name}.*{match}"):
            read_memory(tmp_path / name, "kind.2")
    with pytest.raises(FileNotFoundError, match="no memory at .*nowhere"):
        read_memory(tmp_path / "nowhere", "kind.1")
    with pytest.raises(ValueError, match="device='tpu' cannot be used"):
        read_memory(tmp_path / "m", "kind.1", "tpu")


@pytest.mark.parametrize("header", ["[]", "1", "{", "[" * 100_000, "null"])
def test_headers_that_are_no_object(tmp_path, monkeypatch, header):
    dumps = json.JSONEncoder(separators=(",", ":")).encode
    monkeypatch.setattr(json, "dumps", lambda value, **options: header if "format" in value else dumps(value))
    write_memory(tmp_path / "m", "kind.1", {}, {})
    with pytest.raises(ValueError, match="no JSON object"):
        read_memory(tmp_path / "m", "kind.1")


def test_a_change_of_any_byte_is_found(tmp_path):
    write_memory(tmp_path / "m", "kind.1", {"a": torch.ones(3), "b": torch.ones(5, dtype=torch.bool)}, {"age": 1})
    whole = (tmp_path / "m").read_bytes()
    damaged = [whole[:end] for end in range(len(whole))] + [whole + b"\0"]
    for place, byte in enumerate(whole):
        damaged += [whole[:place] + bytes([byte ^ flip]) + whole[place + 1 :] for flip in (1, 32, 128)]
    for content in damaged:
        (tmp_path / "damaged").write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            read_memory(tmp_path / "damaged", "kind.1")


def test_damage_in_any_part_of_a_large_memory_is_found(saved, tmp_path):
    whole = saved[0].read_bytes()
    for place in range(0, len(whole), len(whole) // 50):
        (tmp_path / "talk").write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=f"{tmp_path}"):
            saved[1].load(tmp_path / "talk")


def edits(value):
    """The same JSON with something else in one place, again and again."""
    for other in (None, True, -1, 10**30, float("nan"), "x", [], {}, [[]]):
        if type(other) is not type(value) or other != value:
            yield other
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        for edited in edits(inner):
            changed = copy.copy(value)
            changed[key] = edited
            yield changed
    if isinstance(value, dict):
        yield from ({name: inner for name, inner in value.items() if name != key} for key in value)


def test_a_header_with_a_right_checksum_and_wrong_values(saved, tmp_path):
    """All that loads has values that a memory may have; whatever else there is is a ValueError with the path."""
    path, kind = saved
    form, tensors, header = contents(path)
    loaded = []
    for edited in filter(lambda edited: isinstance(edited, dict), edits(header)):
        write_memory(tmp_path / "talk", form, tensors, edited)
        try:
            memory = kind.load(tmp_path / "talk")
        except ValueError as error:
            assert f"{tmp_path}" in str(error)
        else:
            loaded += [(name, edited[name]) for name in header if edited[name] != header[name]]
            repr(memory), memory.fork()
    # that nothing is known of the weights, that there are no media, other flags, other counts
    possible = {"made_by", "seconds", "media", "is_ragged", "is_open", "keys_are_rotated"}
    assert ("made_by", None) in loaded and {name for name, _ in loaded} <= possible, loaded


def test_tensors_that_make_no_memory(saved, tmp_path):
    path, kind = saved
    form, tensors, header = contents(path)
    for name, t in tensors.items():
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        changed = [rest, {**tensors, f"{name}x": t}, {**rest, f"{name}x": t}, {**tensors, name: t[..., :0]}]
        changed += [{**tensors, name: t.to(torch.uint8)}, {**tensors, name: t.unsqueeze(0)}, {**tensors, name: t[:1]}]
        for other in changed[name in ("video.mask", "video.times") :]:  # without them, nothing is padding, or known
            write_memory(tmp_path / "talk", form, other, header)
            with pytest.raises(ValueError, match=f"{tmp_path}"):
                kind.load(tmp_path / "talk")


def test_what_was_read_is_not_the_file(tmp_path):
    write_memory(tmp_path / "m", "kind.1", {"a": torch.ones(9999)}, {})
    read, _ = read_memory(tmp_path / "m", "kind.1")
    os.truncate(tmp_path / "m", 100)
    assert torch.equal(read["a"], torch.ones(9999))


def test_an_interrupted_write_leaves_the_older_file(tmp_path, monkeypatch):
    write_memory(tmp_path / "m", "kind.1", {}, {"age": 1})

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_memory(tmp_path / "m", "kind.1", {}, {"age": 2})
    assert read_memory(tmp_path / "m", "kind.1")[1]["age"] == 1 and os.listdir(tmp_path) == ["m"]


@contextlib.contextmanager
def largest_file(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 10_000, 39_000])
def test_without_room_the_older_file_stays(tmp_path, size):
    write_memory(tmp_path / "m", "kind.1", {}, {"age": 1})
    with pytest.raises(OSError, match="cannot be written: File too large.*m'"), largest_file(size):
        write_memory(tmp_path / "m", "kind.1", {"a": torch.ones(10_000)}, {})
    assert read_memory(tmp_path / "m", "kind.1")[1]["age"] == 1 and os.listdir(tmp_path) == ["m"]


def test_names_that_no_file_can_have(tmp_path):
    for path in (tmp_path / "no" / "m", tmp_path / ("x" * 300), tmp_path, tmp_path / os.fsdecode(b"\xff")):
        with pytest.raises((OSError, ValueError)) as caught:
            write_memory(path, "kind.1", {}, {})
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("path", [None, 5, ["m"], "m\0"])
def test_what_is_no_path(path):
    for function in (lambda: write_memory(path, "kind.1", {}, {}), lambda: read_memory(path, "kind.1")):
        with pytest.raises((ValueError, FileNotFoundError)):
            function()


def test_what_is_no_memory_is_never_replaced(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "weights", metadata={"format": "pt"})
    (tmp_path / "video.mp4").write_bytes(b"frames")
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("video.mp4")
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    before = {path.name: path.lstat() for path in tmp_path.iterdir()}
    for name in before:
        with pytest.raises(FileExistsError, match="is no memory"):
            write_memory(tmp_path / name, "kind.1", {}, {})
    (tmp_path / "m.partial").write_text("thesis")
    with pytest.raises(FileExistsError, match="m.partial is in the way"):
        write_memory(tmp_path / "m", "kind.1", {}, {})
    assert (tmp_path / "m.partial").read_text() == "thesis"
    after = {path.name: path.lstat() for path in tmp_path.iterdir() if path.name != "m.partial"}
    assert all(os.path.samestat(before[name], after[name]) for name in before) and before.keys() == after.keys()


def test_links_are_followed_and_older_memories_replaced(tmp_path):
    (tmp_path / "link").symlink_to("m")
    save_file({}, tmp_path / "m", metadata={"vamba": json.dumps({"format": "kind.1"}), "format": "pt"})  # of before
    for age in range(2):
        write_memory(tmp_path / "link", "kind.1", {}, {"age": age})
        assert (tmp_path / "link").is_symlink() and read_memory(tmp_path / "m", "kind.1")[1]["age"] == age
    (tmp_path / "m").write_bytes((tmp_path / "m").read_bytes()[:-9])  # a damaged one as well
    assert check_memory_path(tmp_path / "link") == str(tmp_path / "m")


@pytest.mark.parametrize("name", ["a b", "line\nbreak", "видео", "x" * 240])
def test_odd_names(tmp_path, name):
    write_memory(tmp_path / name, "kind.1", {"a": torch.ones(2)}, {})
    assert read_memory(tmp_path / name, "kind.1")[0]["a"].sum() == 2


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_gets_the_mode_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_memory(tmp_path / "m", "kind.1", {}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o666 & ~umask


def write(path, number):
    write_memory(path, "kind.1", {f"{index}": torch.full((20_000,), number) for index in range(20)}, {"of": number})


def number_of(path):
    """Which process wrote the file, all of it."""
    tensors, header = read_memory(path, "kind.1")
    assert all((t == header["of"]).all() for t in tensors.values())
    return header["of"]


def test_killed_at_any_moment(tmp_path):
    path = tmp_path / "m"
    seconds, operations = kill_points.run_to_the_end(write, path, 0)
    kills = [{"seconds": moment} for moment in kill_points.moments(seconds)]
    for kill in kills + [{"step": step} for step in kill_points.steps(operations)]:
        kill_points.kill_at(write, path, 1, **kill)
        assert number_of(path) in (0, 1)
        assert {file.name for file in tmp_path.iterdir()} <= {"m", "m.partial"}
        write(path, 0)
        assert number_of(path) == 0 and os.listdir(tmp_path) == ["m"]


def test_several_that_write_one_file(tmp_path):
    at_once = [kill_points.start(write, tmp_path / "m", number) for number in range(4)]
    for process in at_once:
        process.join()
    whole = [number for number, process in enumerate(at_once) if process.exitcode == 0]
    assert number_of(tmp_path / "m") in whole and os.listdir(tmp_path) == ["m"]
