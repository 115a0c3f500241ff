"""Batches and packs, and the collator with others' trainers."""

import pytest
import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from vamba.data import (
    Collator,
    ConversationEncoder,
    fill_packs,
)
from vamba.modeling import video_model

from training_data import example, video


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


def arguments(folder, kind=TrainingArguments, **options):
    common = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 2e-3, "use_cpu": True}
    common |= {"remove_unused_columns": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    return kind(output_dir=str(folder), disable_tqdm=True, **common, **options)


def test_a_plain_trainer(checkpoint, dataset, tmp_path):
    rows = load_dataset("json", data_files=str(dataset), split="train")
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(checkpoint),
        AutoProcessor.from_pretrained(checkpoint),
    )
    collator = Collator(ConversationEncoder(processor, fps=8, media_root=str(dataset.parent)))
    options = arguments(tmp_path, dataloader_num_workers=1)
    trainer = Trainer(model, options, data_collator=collator, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[2] < losses[0]


def test_trls_trainer(checkpoint, dataset, tmp_path):
    trl = pytest.importorskip("trl")
    rows = load_dataset("json", data_files=str(dataset), split="train")
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(checkpoint),
        AutoProcessor.from_pretrained(checkpoint),
    )
    collator = Collator(ConversationEncoder(processor, fps=8, media_root=str(dataset.parent)))
    options = arguments(tmp_path, trl.SFTConfig, dataset_kwargs={"skip_prepare_dataset": True}, bf16=False)
    trainer = trl.SFTTrainer(model, options, data_collator=collator, train_dataset=rows, processing_class=processor)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[2] < losses[0]


def test_trls_own_collator_is_warned_of(checkpoint, tmp_path, monkeypatch):
    """It knows images only: the text keeps the marks of the videos, and the model is not given them."""
    trl = pytest.importorskip("trl")
    told = []
    monkeypatch.setattr(video_model.logger, "warning_once", told.append)
    turns = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    rows = Dataset.from_list([{"messages": turns}] * 4)
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(checkpoint),
        AutoProcessor.from_pretrained(checkpoint),
    )
    options = arguments(tmp_path, trl.SFTConfig, bf16=False, max_length=None)
    options.max_steps = 1
    trl.SFTTrainer(model, options, train_dataset=rows, processing_class=processor).train()
    assert told and "neither images, videos nor a memory were given" in told[0]
