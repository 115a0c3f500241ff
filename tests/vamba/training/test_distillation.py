"""Distillation is its formula, also of packs and beside weights that are shared out."""

import pytest
import torch
from transformers import AutoProcessor
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from vamba.data import Collator
from vamba.training import finetune
from vamba.training.distillation import Distillation
from vamba.training.model import load_teacher

from training_data import load


@pytest.fixture
def teacher(checkpoint):
    return load_teacher(str(checkpoint.parent / "qwen"), "float32")


def expected_loss(student, teacher, folder, examples, collator, weight, temperature):
    """The definition, sample by sample, with the teacher's own processor making its inputs."""
    processor = AutoProcessor.from_pretrained(folder)
    total, items = 0.0, 0
    for example in examples:
        batch = collator([example])
        labels = batch["labels"][0]
        targets = labels[1:][labels[1:] != -100]
        logits = student(**{key: value for key, value in batch.items() if key != "labels"}).logits[0]
        logits = logits[:-1][labels[1:] != -100]
        text = collator.tokenizer.decode(batch["input_ids"][0])
        grid = batch["video_grid_thw"][0]
        text = text.replace("<|vision_start|>", "<|vision_start|>" + "<|video_pad|>" * (int(grid.prod()) // 4))
        theirs = processor.tokenizer(text, return_tensors="pt")
        types = 2 * (theirs["input_ids"] == teacher.config.video_token_id).int()
        video = {name: batch[name] for name in ("pixel_values_videos", "video_grid_thw")}
        output = teacher(**theirs, **video, mm_token_type_ids=types).logits[0]
        shift = output.shape[0] - len(labels)  # all placeholders come before the first answer
        told = output[shift:][:-1][labels[1:] != -100]
        student_log, teacher_log = (torch.log_softmax(x / temperature, -1) for x in (logits, told))
        divergence = (teacher_log.exp() * (teacher_log - student_log)).sum()
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        total += weight * temperature**2 * divergence
        items += len(targets)
    return total / items


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.5, 2.0)])
def test_distillation_is_its_definition(checkpoint, teacher, examples, collator, weight, temperature):
    student = load(checkpoint).eval()
    expected = expected_loss(student, teacher, checkpoint.parent / "qwen", examples, collator, weight, temperature)
    distillation = Distillation(teacher, student.config, weight=weight, temperature=temperature)
    inputs = distillation.prepare(collator(examples))
    labels = inputs.pop("labels")
    loss = distillation.loss(student(**inputs), labels)
    assert torch.allclose(loss, expected, atol=1e-5)
    assert torch.allclose(distillation.loss(student(**inputs), labels, num_items_in_batch=7) * 7 / _items(labels), loss)


def _items(labels):
    return (labels[:, 1:] != -100).sum()


def test_the_teacher_hears_the_same_of_a_pack(teacher, checkpoint, examples, collator):
    distillation = Distillation(teacher, load(checkpoint).config, weight=1.0, temperature=1.0)
    distillation.prepare(collator(examples))
    padded = distillation._teacher_logits
    distillation.prepare(Collator(collator.encoder, packing=True)(examples))
    assert torch.allclose(distillation._teacher_logits, padded, atol=1e-5) and len(padded) > 20


class ZeRO3:
    """Of transformers' DeepSpeed configuration: what `from_pretrained` asks of it."""

    def is_zero3(self):
        return True


def test_the_teacher_is_not_shared_out(teacher, checkpoint):
    """Under ZeRO-3, where `from_pretrained` shares out the weights of any model (and needs DeepSpeed to do so)."""
    zero3 = ZeRO3()
    set_hf_deepspeed_config(zero3)
    try:
        whole = load_teacher(str(checkpoint.parent / "qwen"), "float32")
        assert is_deepspeed_zero3_enabled()
    finally:
        unset_hf_deepspeed_config()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), teacher.parameters()))


def test_a_run_with_a_teacher(values, checkpoint):
    told = {"teacher_model_name_or_path": str(checkpoint.parent / "qwen"), "teacher_dtype": "float32"}
    losses = finetune(values | told | {"global_batch_size": 8}).losses
    assert losses[6] < losses[1]
