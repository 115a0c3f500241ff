"""Frames that fit a budget, batches and packs, mixtures, and a stream that skips what is broken and can be resumed."""

import base64
import errno
import io
import json
import os
import resource

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from vamba.data import (
    ABOUT,
    Collator,
    ConversationEncoder,
    ExampleError,
    Mixture,
    Position,
    Source,
    TrainingStream,
    check_layout,
    fill_packs,
    sources,
)
from vamba.data import stream as stream_module
from vamba.errors import UserError

from training_data import write_dataset


@pytest.fixture(scope="module")
def processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"), 12)


def example(*media, question="What?"):
    content = [*media, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "This."}]}


def uniform(*media, question="What?"):
    """The same with a list of items for each turn: what `datasets` makes a table of."""
    messages = example(*media, question=question)["messages"]
    return {"messages": [messages[0], {"role": "assistant", "content": [{"type": "text", "text": "This."}]}]}


def video(path, **options):
    return {"type": "video", "video": str(path), **options}


def tokens(sample):
    return sum(int(sample[name].prod(1).sum()) // 4 for name in ("video_grid_thw", "image_grid_thw") if name in sample)


# --- budgets: the clip has 16 frames at 8 fps; a frame pair of 48 x 48 pixels is 9 tokens -----------------------------


@pytest.mark.parametrize(("budget", "frames"), [(None, 16), (72, 16), (71, 14), (63, 14), (62, 12), (20, 4), (9, 2)])
def test_frames_are_chosen_so_that_they_fit(budget, frames, processor, clip):
    encoder = ConversationEncoder(processor, fps=8, max_video_tokens=budget)
    plan = encoder.plan(example(video(clip)))
    sample = encoder.encode(plan)
    assert plan.frames == [frames] and sample["video_grid_thw"].tolist() == [[frames // 2, 6, 6]]
    assert plan.video_tokens == tokens(sample) and plan.text_tokens == len(sample["input_ids"])


def test_the_frames_that_remain_are_spread_over_the_video(processor, clip):
    few = ConversationEncoder(processor, max_video_tokens=18)(example(video(clip, fps=8)))
    spread = ConversationEncoder(processor)(example(video(clip, num_frames=4)))
    assert torch.equal(few["pixel_values_videos"], spread["pixel_values_videos"])


def test_videos_of_an_example_share_the_budget_and_images_come_first(processor, clip, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    media = [video(clip), {"type": "image", "image": str(tmp_path / "a.png")}, video(clip, fps=4)]
    encoder = ConversationEncoder(processor, fps=8, max_video_tokens=9 + 9 * 6)
    plan = encoder.plan(example(*media))
    sample = encoder.encode(plan)
    assert plan.frames == [8, 4] and plan.video_tokens == tokens(sample) == 9 + 9 * 6
    assert sample["mm_token_type_ids"][sample["mm_token_type_ids"] > 0].tolist() == [2, 1, 2]


def test_what_does_not_fit_in_two_frames_is_no_example(processor, clip):
    with pytest.raises(
        ExampleError, match="18 video tokens, with two frames of each video, are more than the budget of 17"
    ):
        ConversationEncoder(processor, max_video_tokens=17).plan(example(video(clip), video(clip)))
    with pytest.raises(ExampleError, match="data.max_length"):
        ConversationEncoder(processor, max_length=5).plan(example())


@pytest.mark.parametrize(("limit", "frames"), [(5, 4), (2, 2), (99, 16)])
def test_max_frames(limit, frames, processor, clip):
    assert ConversationEncoder(processor, fps=8, max_frames=limit).plan(example(video(clip))).frames == [frames]


def test_an_examples_own_options_come_first(processor, clip):
    encoder = ConversationEncoder(processor, fps=8, min_pixels=48 * 48, max_pixels=48 * 48)
    assert encoder.plan(example(video(clip, fps=4))).frames == [8]
    assert encoder.plan(
        example({"type": "video", "video": {"path": str(clip), "start": 1.0, "nframes": 2}})
    ).frames == [2]
    small = encoder(example(video(clip, min_pixels=256, max_pixels=32 * 32)))
    assert small["video_grid_thw"].tolist() == [[8, 4, 4]]


@pytest.mark.parametrize(
    ("bounds", "budget", "frames"),
    [
        ({"fps": 8, "max_frames": 4}, None, 4),
        ({"fps": 8, "max_frames": 4}, 60, 4),
        ({"fps": 8, "max_frames": 12}, 36, 8),
        ({"fps": 1, "min_frames": 12}, None, 12),
        ({"fps": 1, "min_frames": 12}, 36, 8),
        ({"fps": 1, "min_frames": 99}, None, 16),
        ({"num_frames": 6, "min_frames": 8, "max_frames": 2}, None, 6),
    ],
)
def test_an_examples_bounds_on_its_frames(bounds, budget, frames, processor, clip):
    encoder = ConversationEncoder(processor, max_video_tokens=budget)
    plan = encoder.plan(example(video(clip, **bounds)))
    sample = encoder.encode(plan)
    assert plan.frames == [frames] and sample["video_grid_thw"].tolist() == [[frames // 2, 6, 6]]
    assert plan.video_tokens == tokens(sample)
    assert encoder.plan(example(video(clip, **bounds))).messages == plan.messages
    limited = ConversationEncoder(processor, max_frames=4).plan(example(video(clip, **bounds)))
    assert limited.frames == [4]


@pytest.mark.parametrize(("options", "frames"), [({}, 8), ({"fps": 2}, 4), ({"max_frames": 6}, 6)])
def test_frames_with_a_rate_of_their_own(options, frames, processor, tmp_path):
    for index in range(8):
        Image.new("RGB", (64, 64), (30 * index, 0, 0)).save(tmp_path / f"{index}.png")
    files = [str(tmp_path / f"{index}.png") for index in range(8)]
    encoder = ConversationEncoder(processor)
    plan = encoder.plan(example(video(tmp_path) | {"video": files, "sample_fps": 4} | options))
    assert plan.frames == [frames] and plan.video_tokens == tokens(encoder.encode(plan))


def test_keys_that_mean_nothing_are_met_before_anything_is_decoded(processor, clip):
    encoder = ConversationEncoder(processor)
    for item in (video(clip, fpss=3), {"type": "image", "image": "a.png", "fps": 1}, {"text": "a", "id": "q"}):
        with pytest.raises(ExampleError, match="is unknown in an item of type"):
            encoder.plan(example(item))


def test_text_that_looks_like_media_is_no_fault(processor):
    with pytest.raises(ExampleError, match="the processor refuses it: The number of"):
        ConversationEncoder(processor)(example(question="<|video_pad|>"))


def test_a_header_that_lies_does_not_break_the_budget(processor, clip, monkeypatch):
    encoder = ConversationEncoder(processor, fps=8, max_video_tokens=45)
    honest = type(processor).video_reader

    def lying(self, *args, **options):
        reader = honest(self, *args, **options)
        reader.num_frames_expected = 4
        return reader

    monkeypatch.setattr(type(processor), "video_reader", lying)
    plan = encoder.plan(example(video(clip)))
    assert plan.video_tokens == 18 and tokens(encoder.encode(plan)) == 18


def test_a_video_that_says_nothing_of_its_length(processor, clip, monkeypatch):
    honest = type(processor).video_reader

    def silent(self, *args, **options):
        reader = honest(self, *args, **options)
        reader.num_frames_expected = None
        return reader

    monkeypatch.setattr(type(processor), "video_reader", silent)
    assert ConversationEncoder(processor, fps=4).plan(example(video(clip))).frames == [8]


def test_patches_in_half_precision(processor, clip):
    sample = ConversationEncoder(processor, pixel_dtype=torch.bfloat16)(example(video(clip)))
    whole = ConversationEncoder(processor)(example(video(clip)))
    assert torch.equal(sample["pixel_values_videos"], whole["pixel_values_videos"].bfloat16())


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture():
    return Image.fromarray(torch.randint(256, (40, 100, 3), generator=torch.manual_seed(0)).byte().numpy())


def as_png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["bytes", "stored", "data", "base64", "text", "picture", "array", "file", "path"])
def test_images_however_they_are_given(kind, processor, picture, tmp_path):
    (tmp_path / "a.png").write_bytes(png := as_png(picture))
    text = base64.b64encode(png).decode()
    source = {
        "bytes": png, "stored": {"bytes": png, "path": "gone.png"}, "data": f"data:image/png;base64,{text}",
        "base64": {"base64": text}, "text": text, "picture": picture, "array": np.asarray(picture),
        "file": f"file://{tmp_path}/a.png", "path": tmp_path / "a.png",
    }[kind]  # fmt: skip
    encoder = ConversationEncoder(processor, max_video_tokens=12, media_root="/elsewhere")
    plan = encoder.plan(example({"type": "image", "image": source}))
    found = encoder.encode(plan)
    expected = encoder(example({"type": "image", "image": str(tmp_path / "a.png")}))
    assert plan.video_tokens == tokens(found)
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


def test_an_image_at_a_url_counts_as_the_largest(processor):
    """Until the processor has fetched it."""
    encoder = ConversationEncoder(processor, max_pixels=64 * 64)
    item = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}
    plan = encoder.plan(example(item))
    assert plan.video_tokens == 16
    with pytest.raises(ExampleError, match="an image .http://127.0.0.1:9/a.png. cannot be read"):
        encoder.encode(plan)


def test_planning_decodes_no_image(processor, picture):
    """The header of this one is whole, and half of its pixels are gone."""
    png = as_png(picture)
    cut = png[: len(png) // 2]
    encoder = ConversationEncoder(processor)
    in_memory = Image.open(io.BytesIO(cut))
    for source in (cut, in_memory):
        plan = encoder.plan(example({"type": "image", "image": source}))
        assert plan.video_tokens == tokens(encoder(example({"type": "image", "image": png})))
        with pytest.raises(ExampleError, match="an image .* cannot be read: "):
            encoder.encode(plan)


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


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(processor, clip):
    encoder = ConversationEncoder(processor, fps=2)
    return [
        encoder(example(video(clip), question="What happens in the video?")),
        encoder(example()),
        encoder(example(video(clip, fps=4), video(clip))),
    ]


def test_padded_batch(processor, samples):
    batch = Collator(ConversationEncoder(processor))(samples)
    for row, sample in enumerate(samples):
        N = len(sample["input_ids"])
        for name in ("input_ids", "labels", "mm_token_type_ids"):
            assert torch.equal(batch[name][row, :N], sample[name])
        assert batch["attention_mask"][row].tolist() == [1] * N + [0] * (batch["input_ids"].shape[1] - N)
        assert (batch["labels"][row, N:] == -100).all() and (batch["mm_token_type_ids"][row, N:] == 0).all()
    assert batch["input_ids"][1, -1] == processor.tokenizer.pad_token_id
    assert batch["video_grid_thw"].tolist() == [[2, 6, 6], [4, 6, 6], [2, 6, 6]]
    patches = [sample["pixel_values_videos"] for sample in (samples[0], samples[2])]
    assert torch.equal(batch["pixel_values_videos"], torch.cat(patches))


def test_packed_batch(processor, samples):
    batch = Collator(ConversationEncoder(processor), packing=True)(samples)
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert batch["packed_lengths"] == lengths and "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[n for length in lengths for n in range(length)]]
    for name in ("input_ids", "labels", "mm_token_type_ids"):
        for part, sample in zip(batch[name][0].split(lengths), samples):
            assert torch.equal(part, sample[name])
    assert batch["video_grid_thw"].tolist() == [[2, 6, 6], [4, 6, 6], [2, 6, 6]]


def test_no_sample_predicts_the_first_token_of_the_next(processor, samples):
    loud = [sample | {"labels": sample["input_ids"].clone()} for sample in samples]
    labels = Collator(ConversationEncoder(processor), packing=True)(loud)["labels"][0]
    starts = torch.tensor([0, *[len(sample["input_ids"]) for sample in samples]]).cumsum(0)[:-1]
    assert (labels[starts] == -100).all() and (labels != -100).sum() == len(labels) - 3


def test_the_collator_takes_examples_as_they_are(processor, clip, samples):
    collator = Collator(ConversationEncoder(processor, fps=2))
    raw = [example(video(clip), question="What happens in the video?"), example()]
    for name, value in collator(raw).items():
        assert torch.equal(value, collator(samples[:2])[name])
    with pytest.raises(ValueError, match="missing.mp4"):
        collator([example(video("missing.mp4"))])


def test_packs_are_filled_first_fit_the_largest_first():
    sizes = [(30, 5), (80, 5), (50, 5), (20, 5), (70, 5)]
    assert fill_packs(sizes, (100, None), None) == [[1, 3], [4, 0], [2]]
    assert fill_packs(sizes, (100, 9), None) == [[1], [4], [2], [0], [3]]
    assert fill_packs(sizes, (None, None), 2) == [[1, 4], [2, 0], [3]]
    assert fill_packs([(500, 1), (1, 1)], (100, None), None) == [[0], [1]]
    assert fill_packs([], (100, None), None) == []


# --- sources ----------------------------------------------------------------------------------------------------------


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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


# --- the stream -------------------------------------------------------------------------------------------------------


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
