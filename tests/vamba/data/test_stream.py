"""A stream that skips what is broken, shares out the data and can be resumed."""

import errno
import json
import os
import random
import resource

import pytest
import torch

from vamba.data import (
    ABOUT,
    Collator,
    ConversationEncoder,
    Mixture,
    Position,
    Source,
    TrainingStream,
    check_layout,
)
from vamba.data import stream as stream_module
from vamba.errors import UserError

from training_data import as_png, example, uniform, write_rows


def test_broken_images_are_skipped(processor, picture, tmp_path):
    png = as_png(picture)
    (tmp_path / "whole.png").write_bytes(png)
    (tmp_path / "cut.png").write_bytes(png[:200])
    (tmp_path / "crc.png").write_bytes(png[:40] + bytes([png[40] ^ 1]) + png[41:60] + bytes(40) + png[100:])
    (tmp_path / "none.png").write_bytes(b"")
    (tmp_path / "header.png").write_bytes(png[:29] + bytes(4) + png[33:])
    picture.save(tmp_path / "bomb.png", "BMP")
    with open(tmp_path / "bomb.png", "r+b") as file:
        file.seek(18)
        file.write(2 * (60000).to_bytes(4, "little"))  # its sides: PIL refuses so many pixels with an error of its own
    kinds = ("whole", "cut", "crc", "none", "header", "gone", "bomb")
    rows = [example({"type": "image", "image": f"{kind}.png"}) | {"id": kind} for kind in kinds]
    stream = make_stream(processor, write_rows(tmp_path / "rows.jsonl", rows), rows=1)
    batches = take(stream.loader(), 2)
    assert names(batches) == [["rows.jsonl#whole"]] * 2
    told = {message.split(":")[0] for message in batches[0][ABOUT].skipped + batches[1][ABOUT].skipped}
    assert told == {f"rows.jsonl#{kind}" for kind in kinds[1:]}


def make_stream(processor, path, packing=False, rows=3, streaming=False, **options):
    encoder = ConversationEncoder(processor, fps=4)
    collator = Collator(encoder, packing=packing)
    return TrainingStream(
        Mixture([Source(path, streaming=streaming)]), collator, rows=None if packing else rows, **options
    )


def names(batches):
    return [batch[ABOUT].samples for batch in batches]


def take(loader, count):
    batches = iter(loader)
    return [next(batches) for _ in range(count)]


def test_a_stream_sees_every_example(processor, dataset):
    stream = make_stream(processor, dataset)
    seen = [name for batch in names(take(stream.loader(), 10)) for name in batch]  # 30 draws
    assert {seen.count(f"train.jsonl#v{n}") for n in range(12)} == {2, 3}


@pytest.mark.parametrize(("packing", "workers", "streaming"), [(False, 0, False), (True, 2, False), (False, 0, True)])
def test_it_goes_on_where_it_was(processor, dataset, packing, workers, streaming):
    options = {"packing": packing, "streaming": streaming, "max_video_tokens": 150 if packing else None}
    stream = make_stream(processor, dataset, **options)
    expected = take(stream.loader(workers), 7)
    position = Position(stream, max(1, workers))
    for stop in range(1, 7):
        position.advance(expected[stop - 1][ABOUT])
        if stop not in (1, 4):
            continue
        resumed = make_stream(processor, dataset, position=json.loads(json.dumps(position.state())), **options)
        found = take(resumed.loader(workers), 7 - stop)
        assert names(found) == names(expected[stop:])
        for one, two in zip(found, expected[stop:]):
            assert torch.equal(one["pixel_values_videos"], two["pixel_values_videos"])
            assert torch.equal(one["labels"], two["labels"])


def test_the_place_is_kept_across_windows(processor, dataset, monkeypatch):
    monkeypatch.setattr(stream_module, "WINDOW", 6)
    stream = make_stream(processor, dataset)
    expected = take(stream.loader(), 9)
    for stop in (2, 4, 5):
        position = Position(stream, 1)
        position.advance(expected[stop - 1][ABOUT])
        resumed = make_stream(processor, dataset, position=position.state())
        assert names(take(resumed.loader(), 9 - stop)) == names(expected[stop:])


def test_processes_and_workers_share_the_data_out(processor, dataset, monkeypatch):
    monkeypatch.setattr(stream_module, "WINDOW", 6)
    shards = [make_stream(processor, dataset, rank=rank, world_size=2).loader(2) for rank in range(2)]
    batches = [batch for shard in shards for batch in take(shard, 4)]
    assert {batch[ABOUT].shard for batch in batches} == {0, 1, 2, 3}
    seen = [name for batch in names(batches) for name in batch]  # two windows of each of four shards
    assert {seen.count(f"train.jsonl#v{n}") for n in range(12)} == {2}


def test_packs_keep_their_budget(processor, dataset):
    stream = make_stream(processor, dataset, packing=True, max_video_tokens=270, max_text_tokens=260)
    batches = take(stream.loader(), 12)
    assert sum(len(batch["packed_lengths"]) for batch in batches) > 2 * len(batches)
    for batch in batches:
        video = int(batch["video_grid_thw"].prod(1).sum()) // 4
        assert video <= 270 and batch["input_ids"].numel() <= 260
        assert len(batch["packed_lengths"]) == len(batch[ABOUT].samples)
    plain = make_stream(processor, dataset, rows=5)
    assert stream.epoch == 12 and 12 / 5 < stream.batches_per_epoch() <= 6 and plain.batches_per_epoch() == 3


def broken(dataset, tmp_path):
    """The dataset with three bad examples among its twelve."""
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    rows[2]["messages"][0]["content"][0]["video"] = "gone.mp4"
    rows[5]["messages"] = rows[5]["messages"][:1]
    (tmp_path / "cut.mp4").write_bytes((dataset.parent / "7.mp4").read_bytes()[:300])
    rows[7]["messages"][0]["content"][0]["video"] = str(tmp_path / "cut.mp4")
    path = write_rows(tmp_path / "broken.jsonl", rows)
    return {"path": path, "root": dataset.parent}


def broken_stream(processor, data, **options):
    mixture = Mixture([Source(data["path"], media_root=data["root"])])
    return TrainingStream(mixture, Collator(ConversationEncoder(processor, fps=4)), rows=3, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_examples_are_left_out_and_told_of(processor, dataset, tmp_path, workers):
    stream = broken_stream(processor, broken(dataset, tmp_path))
    batches = take(stream.loader(workers), 16)
    position = Position(stream, max(1, workers))
    for batch in batches:
        position.advance(batch[ABOUT])
    told = [message for batch in batches for message in batch[ABOUT].skipped]
    assert {message.split(":")[0] for message in told} == {f"broken.jsonl#v{n}" for n in (2, 5, 7)}
    assert all("\n" not in message for message in told) and any("gone.mp4" in message for message in told)
    assert position.state()["skipped"] == len(told) > 5
    seen = {name for batch in names(batches) for name in batch}
    assert seen == {f"broken.jsonl#v{n}" for n in range(12) if n not in (2, 5, 7)}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_example_stops_the_run_if_asked(processor, dataset, tmp_path, workers):
    stream = broken_stream(processor, broken(dataset, tmp_path), on_error="raise")
    batch = next(iter(stream.loader(workers)))
    assert batch[ABOUT].error.startswith("broken.jsonl#v") and "\n" not in batch[ABOUT].error


@pytest.mark.parametrize("kind", ["video", "image"])
def test_a_machine_out_of_files_is_no_broken_example(kind, processor, clip, picture, tmp_path):
    """Whichever layer meets it first."""
    picture.save(tmp_path / "a.png")
    item = {"type": kind, kind: str({"video": clip, "image": tmp_path / "a.png"}[kind])}
    stream = make_stream(processor, write_rows(tmp_path / "rows.jsonl", [uniform(item)]), rows=1)
    batches = iter(stream.loader())
    assert next(batches)[ABOUT].error is None
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, limits[1]))
        with pytest.raises(OSError) as raised:
            while True:
                used.append(os.open(os.devnull, os.O_RDONLY))
        assert raised.value.errno == errno.EMFILE
        with pytest.raises(OSError, match="Too many open files") as raised:
            for _ in range(2 * stream.window):
                assert next(batches)[ABOUT].error is None
    finally:
        for descriptor in used:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert raised.value.errno == errno.EMFILE


HOSTILE = [
    None,
    True,
    -1,
    1e308,
    10**400,
    float("nan"),
    "",
    "\0",
    "\ud800",
    "/dev/zero",
    [],
    [[]],
    [None],
    {},
    {"a": 1},
]


def places(value, at=()):
    """Where something is in nested lists and dicts, as keys."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*at, key)
        yield from places(value[key], (*at, key))


def replaced(value, place, by):
    value = json.loads(json.dumps(value))
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = by
    return value


@pytest.mark.parametrize("workers", [0, 1])
def test_whatever_one_example_says_the_others_are_trained_on(processor, dataset, workers):
    """Every field of an example, replaced by values of every wrong type."""
    options = {"fps": 2, "min_pixels": 2304, "max_frames": 4, "start": 0.1}
    good = example({"type": "video", "video": "0.mp4", **options})
    llava = {"video": "0.mp4", "conversations": [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "!"}]}
    hostile = [replaced(row, place, by) for row in (good, llava) for place in places(row) for by in HOSTILE]
    hostile = random.Random(workers).sample(hostile, 200)
    rows = [row for n in range(50) for row in (good | {"id": f"good{n}"}, *hostile[4 * n : 4 * n + 4])]
    path = write_rows(dataset.parent / f"hostile{workers}.jsonl", rows)
    seen, skipped = [], []
    for batch in make_stream(processor, path, rows=1).loader(workers):
        assert batch[ABOUT].error is None
        seen += batch[ABOUT].samples
        skipped += batch[ABOUT].skipped
        if len(seen) + len(skipped) >= len(rows):
            break
    assert sorted(name for name in seen if "#good" in name) == sorted(f"{path.name}#good{n}" for n in range(50))
    assert len(skipped) > 100 and all(message.startswith(path.name) for message in skipped)
    assert all("\n" not in message and len(message) < 1200 for message in skipped)


def test_an_error_that_does_not_tell_of_the_example_is_told_with_its_type(processor, dataset, monkeypatch):
    monkeypatch.setattr(stream_module, "BROKEN_IN_A_ROW", 24)

    class Faulty(ConversationEncoder):
        def encode(self, plan):
            raise MemoryError

    stream = TrainingStream(Mixture([Source(dataset)]), Collator(Faulty(processor, fps=4)), rows=2)
    error = next(iter(stream.loader()))[ABOUT].error
    assert "examples in a row were broken, the last: train.jsonl#v" in error and error.endswith(": MemoryError: ")


def test_a_fault_of_the_collator_is_no_broken_example(processor, dataset):
    class Faulty(Collator):
        def __call__(self, examples):
            raise ValueError("shapes (3, 4) and (5,) not aligned")

    stream = TrainingStream(Mixture([Source(dataset)]), Faulty(ConversationEncoder(processor)), rows=2)
    with pytest.raises(ValueError, match="not aligned"):
        next(iter(stream.loader()))


def test_data_with_nothing_but_broken_examples_end(processor, tmp_path):
    path = write_rows(tmp_path / "all.jsonl", [{"messages": [{"role": "user", "content": "?"}]}])
    batch = next(iter(broken_stream(processor, {"path": path, "root": tmp_path}).loader()))
    assert "in a row were broken" in batch[ABOUT].error and "no assistant turn" in batch[ABOUT].error


def test_a_place_of_another_layout_is_refused(processor, dataset, tmp_path):
    place = Position(make_stream(processor, dataset, world_size=4), 2).state()
    check_layout(place, 2, make_stream(processor, dataset, world_size=4))
    with pytest.raises(ValueError, match="4 processes with 2 data workers.*now 8 and 2"):
        check_layout(place, 2, make_stream(processor, dataset, world_size=8))
    earlier = {key: value for key, value in place.items() if key != "data"}
    with pytest.raises(UserError, match="made by an earlier version"):
        check_layout(earlier, 2, make_stream(processor, dataset, world_size=4))
    cut = write_rows(tmp_path / "train.jsonl", [json.loads(line) for line in dataset.read_text().splitlines()[:4]])
    with pytest.raises(ValueError, match="other data: then train.jsonl with 12 rows.*now train.jsonl with 4 rows"):
        check_layout(place, 2, make_stream(processor, cut, world_size=4))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_every_example_once(processor, dataset, packing, workers, monkeypatch):
    """Also if a window would hold several, and no batch holds an example twice."""
    monkeypatch.setattr(stream_module, "WINDOW", 64)
    stream = make_stream(processor, dataset, packing, max_video_tokens=2000 if packing else None)
    batches = take(stream.loader(workers), 3 * round(stream.batches_per_epoch(max(1, workers))))
    seen = [name for batch in names(batches) for name in batch]
    assert {seen.count(f"train.jsonl#v{n}") for n in range(12)} == {3}
    assert all(len(set(batch)) == len(batch) for batch in names(batches))
    position = Position(stream, max(1, workers))
    for batch in batches:
        position.advance(batch[ABOUT])
    assert position.state()["rows"] == 36 and (not packing or len(batches) <= 6)


@pytest.mark.parametrize(("workers", "ranks", "window"), [(0, 1, 3), (2, 3, 64), (0, 14, 3)])
def test_one_pass_is_every_example_once(processor, dataset, tmp_path, workers, ranks, window, monkeypatch):
    """And again the next time; however many are broken, or more processes than examples."""
    monkeypatch.setattr(stream_module, "WINDOW", window)
    data = broken(dataset, tmp_path)
    streams = [broken_stream(processor, data, rank=rank, world_size=ranks, once=True) for rank in range(ranks)]
    for _ in range(2):
        abouts = [batch[ABOUT] for stream in streams for batch in stream.loader(workers)]
        seen = [name for about in abouts for name in about.samples]
        told = [message.split(":")[0] for about in abouts for message in about.skipped]
        assert sorted(told) == [f"broken.jsonl#v{n}" for n in (2, 5, 7)]
        assert sorted(seen + told) == sorted(f"broken.jsonl#v{n}" for n in range(12))


@pytest.mark.parametrize(("files", "workers", "ranks"), [(1, 2, 1), (4, 4, 1), (3, 2, 2), (1, 0, 3)])
def test_streamed_rows_are_shared_out(processor, tmp_path, files, workers, ranks, monkeypatch):
    """Whatever files they lie in."""
    monkeypatch.setattr(stream_module, "WINDOW", 24 // (ranks * max(1, workers)))  # the batches of one may be shuffled
    for index in range(files):
        rows = [example(question=f"{n}?") | {"id": n} for n in range(24) if n % files == index]
        write_rows(tmp_path / f"{index}.jsonl", rows)
    shards = ranks * max(1, workers)
    seen = []
    for rank in range(ranks):
        stream = make_stream(processor, tmp_path, rows=1, streaming=True, rank=rank, world_size=ranks)
        batches = take(stream.loader(workers), 24 // shards * max(1, workers))
        assert not any(batch[ABOUT].error for batch in batches)
        seen += [name for batch in names(batches) for name in batch]
    assert sorted(int(name.split("#")[1]) for name in seen) == list(range(24))
