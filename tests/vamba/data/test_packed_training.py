"""Packs through the collator, as trainers get them: what the samples would lose apart, and the gradients of that."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from vamba.data import Collator, ConversationEncoder
from vamba.training.model import ADAPTED


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return ConversationEncoder(AutoProcessor.from_pretrained(checkpoint), fps=4)


@pytest.fixture(scope="module")
def examples(clip, tmp_path_factory):
    """With a video, an image, neither, and an image between two videos."""
    picture = tmp_path_factory.mktemp("picture") / "a.png"
    Image.new("RGB", (64, 48), "red").save(picture)
    image = {"type": "image", "image": str(picture)}
    videos = [{"type": "video", "video": str(clip), "num_frames": frames} for frames in (8, 2, 6)]

    def example(question, answer, *media):
        user = {"role": "user", "content": [*media, {"type": "text", "text": question}]}
        return {"messages": [user, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]}

    return [
        example("What happens in the video?", "It moves to the right.", videos[0]),
        example("Which colour?", "Red.", image),
        example("What?", "Nothing that could be seen here."),
        example("And these?", "A square.", videos[1], image, videos[2]),
    ]


def load(checkpoint, kind: str):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float64).train()
    if "cells" in kind:
        model.gradient_checkpointing_enable()
        model.enable_multi_axis_checkpointing(2, 7)
    if "adapters" in kind:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=ADAPTED, init_lora_weights=False)).double()
    return model


def gradients(model, batches, **options):
    model.zero_grad()
    losses = [model(**batch, use_cache=False, **options).loss for batch in batches]
    sum(losses).backward()
    return sum(losses).detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["plain", "chunked loss", "chunked loss, cells, adapters"])
def test_a_packed_row_loses_what_its_samples_lose(kind, checkpoint, encoder, examples):
    torch.manual_seed(0)
    model = load(checkpoint, kind)
    samples = [encoder(example) for example in examples]
    options = {"num_items_in_batch": sum(int((sample["labels"] != -100).sum()) for sample in samples)}
    options["skip_logits"] = "chunked" in kind
    tolerance = 1e-9 if options["skip_logits"] else 1e-6  # transformers' own loss is float32 whatever the model is
    alone, expected = gradients(model, [Collator(encoder)([sample]) for sample in samples], **options)
    (pack,) = packs = [Collator(encoder, packing=True)(samples)]
    assert {"pixel_values", "pixel_values_videos"} <= pack.keys() and len(pack["packed_lengths"]) == 4
    packed, found = gradients(model, packs, **options)
    torch.testing.assert_close(packed, alone, rtol=tolerance, atol=0)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_packs_through_a_trainer(kind, checkpoint, encoder, examples, tmp_path):
    """Losses and weights after two steps of two batches each are those of padded batches."""
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True}
    options |= {"learning_rate": 1e-3, "optim": "sgd", "remove_unused_columns": False, "logging_steps": 1, "seed": 1}
    options |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "output_dir": str(tmp_path)}
    results = []
    for packing in (False, True):
        model, collator = load(checkpoint, "plain"), Collator(encoder, packing=packing)
        if kind == "trl":
            trl = pytest.importorskip("trl")
            arguments = trl.SFTConfig(**options, bf16=False, dataset_kwargs={"skip_prepare_dataset": True})
            data = {"processing_class": encoder.processor, "train_dataset": Dataset.from_list(examples)}
            trainer = trl.SFTTrainer(model, arguments, data_collator=collator, **data)
        else:
            trainer = Trainer(model, TrainingArguments(**options), data_collator=collator, train_dataset=examples)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((losses, dict(trainer.model.named_parameters())))
    (padded, expected), (packed, found) = results
    assert packed == pytest.approx(padded, rel=1e-6) and padded[1] < padded[0]
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-6, atol=1e-8, msg=name)
