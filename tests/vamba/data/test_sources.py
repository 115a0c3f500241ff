"""Files of every format, mixtures of them, and fingerprints that tell them apart."""

import json
import os
import random

import datasets
import pytest
import torch

from vamba.data import (
    ConversationEncoder,
    Mixture,
    Source,
    sources,
)
from vamba.errors import UserError

from training_data import example, uniform, write_rows


@pytest.mark.parametrize(
    ("saved", "streaming"), [("dataset", False), ("dataset", True), ("splits", False), ("parquet", False)]
)
def test_columns_of_images_and_videos(saved, streaming, processor, picture, clip, tmp_path):
    """Written by `datasets`, which is not to decode them: for a video it would need torchcodec."""
    turns = uniform({"type": "image"}, {"type": "image"}, {"type": "video"})["messages"]
    rows = {"messages": [turns] * 2, "images": [[picture, picture]] * 2, "video": [str(clip)] * 2}
    data = datasets.Dataset.from_dict(rows)
    data = data.cast_column("images", datasets.List(datasets.Image())).cast_column("video", datasets.Video())
    path = tmp_path / "data"
    if saved == "parquet":
        path = path.with_suffix(".parquet")
        data.to_parquet(path)
    else:
        (datasets.DatasetDict(train=data) if saved == "splits" else data).save_to_disk(path)
    source = Source(path, streaming=streaming)
    sample = ConversationEncoder(processor, fps=4)(source[1][1])
    assert sample["mm_token_type_ids"][sample["mm_token_type_ids"] > 0].tolist() == [1, 1, 2]
    expected = ConversationEncoder(processor)(example({"type": "image", "image": picture}))["pixel_values"]
    assert torch.equal(sample["pixel_values"], expected.repeat(2, 1))
    if saved == "splits":
        with pytest.raises(ValueError, match="no split 'test'; it has train"):
            Source(path, split="test")


def test_a_dataset_on_the_hub(monkeypatch, tmp_path):
    asked = {}

    def load_dataset(path, **options):
        asked.update(path=path, **options)
        return datasets.Dataset.from_list([uniform(question="1?"), uniform(question="2?")])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source("org/name", split="test", name="en", revision="v2", data_files="a/*.parquet")
    hub = {"name": "en", "revision": "v2", "data_files": "a/*.parquet"}
    assert asked == {"path": "org/name", "split": "test", "streaming": False, **hub}
    assert len(source) == 2 and source.media_root is None and "2 rows" in source.fingerprint
    with pytest.raises(ValueError, match="no dataset on the Hub, which alone has name, revision"):
        Source(write_rows(tmp_path / "rows.jsonl", [example()]), name="en", revision="v2")


def test_every_example_once_an_epoch_in_a_new_order(dataset):
    source = Source(dataset, seed=3)
    assert len(source) == 12 and source.media_root == str(dataset.parent)
    epochs = [[source[epoch * 12 + place][0] for place in range(12)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(f"train.jsonl#v{n}" for n in range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [Source(dataset, seed=3)[n][0] for n in (20, 7)] == [epochs[1][8], epochs[0][7]]
    assert [Source(dataset, shuffle=False)[n][0] for n in (0, 13)] == ["train.jsonl#v0", "train.jsonl#v1"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder"])
def test_formats(kind, streaming, tmp_path):
    rows = [{"conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": "!"}]} for n in range(5)]
    path = tmp_path / f"data.{'jsonl' if kind == 'folder' else kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        write_rows(path, rows)
    source = Source(tmp_path if kind == "folder" else path, streaming=streaming, shuffle=False)
    found = [source[n][1]["conversations"][0]["value"] for n in (0, 3, 6)]
    assert found == ["0?", "3?", "1?"] and source.media_root == str(tmp_path)


def test_a_streamed_source_is_shuffled_and_starts_over(dataset):
    source = Source(dataset, streaming=True, seed=1)
    names = [source[n][0] for n in range(24)]
    assert sorted(names[:12]) == sorted(names[12:]) == sorted(f"train.jsonl#v{n}" for n in range(12))
    assert names[:12] != names[12:] and [source[n][0] for n in (5, 9)] == [names[5], names[9]]


def test_mixtures_keep_their_shares(tmp_path):
    row = {"messages": []}
    sources = [Source(write_rows(tmp_path / f"{n}.jsonl", [row] * size)) for n, size in enumerate((10, 30, 60))]

    def shares(mixture, count):
        draws = mixture.draws()
        drawn = [next(draws) for _ in range(count)]
        for source in range(3):
            assert [n for s, n in drawn if s == source] == list(range(sum(s == source for s, _ in drawn)))
        return [sum(s == source for s, _ in drawn) for source in range(3)]

    assert shares(Mixture(sources), 100) == [10, 30, 60]  # each example once
    assert shares(Mixture(sources, [2, 1, 1]), 400) == [200, 100, 100]
    assert shares(Mixture(sources, [2, 1, 1]), 8) == [4, 2, 2]


@pytest.mark.parametrize("path", ["missing.jsonl", "data.csv", "no/such/thing/here"])
def test_sources_that_are_not_there(path, tmp_path):
    (tmp_path / "data.csv").write_text("a,b\n")
    with pytest.raises((ValueError, OSError), match=path):
        Source(tmp_path / path)


def test_a_fingerprint_is_that_of_the_contents(dataset, tmp_path):
    same = tmp_path / "elsewhere" / dataset.name
    same.parent.mkdir()
    same.write_bytes(dataset.read_bytes())
    assert Source(same).fingerprint == Source(dataset).fingerprint != Source(dataset, streaming=True).fingerprint
    same.write_text(dataset.read_text().replace("flashed", "blinked", 1))
    assert Source(same).fingerprint != Source(dataset).fingerprint


@pytest.mark.parametrize("whole", [True, False])
def test_a_change_inside_a_file_is_seen(whole, tmp_path, monkeypatch):
    """Of a large file, of which parts are read, by the time of the change."""
    monkeypatch.setattr(sources, "WHOLE", 2**30 if whole else 2**16)
    rows = [uniform(question="x" * 300) | {"id": index} for index in range(1000)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    before = Source(path).fingerprint
    assert Source(path).fingerprint == before
    os.utime(path, ns=(1, 1))
    assert (Source(path).fingerprint == before) == whole
    before = Source(path).fingerprint
    rows[500]["messages"][0]["content"][0]["text"] = "y" * 300
    assert Source(write_rows(path, rows)).fingerprint != before


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
def test_a_damaged_file_of_datasets_is_refused_with_its_path(kind, streaming, tmp_path):
    """Or read, where the damage is in a text; never is memory read that is not its own."""
    data = datasets.Dataset.from_list([uniform(question="?" * n) for n in range(50)])
    draw, refused = random.Random(0), 0
    for attempt in range(12):
        path = tmp_path / f"{attempt}.parquet" if kind == "parquet" else tmp_path / f"{attempt}"
        data.to_parquet(path) if kind == "parquet" else data.save_to_disk(path)
        file = path if kind == "parquet" else path / kind
        content = bytearray(file.read_bytes())
        for _ in range(10):
            content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
        file.write_bytes(content[: len(content) // 2] if attempt % 3 == 0 else content)
        try:
            assert len(list(Source(path, streaming=streaming).examples())) == 50
        except UserError as error:
            assert str(path) in str(error) and "cannot be read" in str(error)
            refused += 1
    assert refused >= 4
