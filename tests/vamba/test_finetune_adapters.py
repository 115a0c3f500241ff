"""Adapters act alike in training, in inference and once merged; distillation is its formula; FLOPs are counted."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from vamba.data import Collator, ConversationEncoder, Source
from vamba.training import parse_recipe
from vamba.training.distillation import Distillation, load_teacher
from vamba.training.finetune import finetune, make_trainer
from vamba.training.flops import FlopsModel
from vamba.training.preparation import prepare

import tiny_video_ma2mba
from training_data import write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"), 6)


@pytest.fixture(scope="module")
def collator(checkpoint, dataset):
    encoder = ConversationEncoder(AutoProcessor.from_pretrained(checkpoint), fps=8, media_root=str(dataset.parent))
    return Collator(encoder)


@pytest.fixture(scope="module")
def examples(dataset):
    source = Source(dataset, shuffle=False)
    return [source[n][1] for n in range(3)]


@pytest.fixture
def batch(collator, examples):
    return collator(examples)


def load(folder, dtype=torch.float32):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_an_adapter_on_out_proj_acts_in_training_and_inference_alike(checkpoint, batch):
    plain = load(checkpoint).eval()
    adapted = get_peft_model(load(checkpoint), LoraConfig(r=4, lora_alpha=16, target_modules=["out_proj"]))
    loss_before, logits_before = plain(**batch).loss, plain(**batch).logits
    assert torch.allclose(adapted(**batch).loss, loss_before)  # B is zero: nothing is changed yet
    adapted.train()
    adapted(**batch).loss.backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    for block in range(2):  # of two Mamba blocks
        assert any(
            f"layers.{block}.mixer.out_proj.lora_B" in name and g.abs().max() > 0 for name, g in gradients.items()
        )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    trained, inferred = adapted.train()(**batch), adapted.eval()(**batch)
    assert torch.allclose(trained.loss, inferred.loss) and torch.allclose(trained.logits, inferred.logits, atol=1e-5)
    assert (inferred.logits - logits_before).abs().max() > 1e-3  # and it does change them
    check_merged(adapted, batch)


def check_merged(adapted, batch):
    """The merged model gives the same logits and writes the same words."""
    prompt = {key: value[:1, :20] for key, value in batch.items() if key in ("input_ids", "attention_mask")}
    prompt["mm_token_type_ids"] = batch["mm_token_type_ids"][:1, :20]
    video = {"video_grid_thw": batch["video_grid_thw"][:1]}
    video["pixel_values_videos"] = batch["pixel_values_videos"][: int(video["video_grid_thw"].prod())]
    with torch.no_grad():
        logits = adapted(**batch).logits
        words = adapted.generate(**prompt, **video, max_new_tokens=6, do_sample=False)
        merged = adapted.merge_and_unload()
        assert torch.allclose(merged(**batch).logits, logits, atol=1e-4)
        assert torch.equal(merged.generate(**prompt, **video, max_new_tokens=6, do_sample=False), words)


def test_default_adapters_are_on_every_linear_layer_but_the_vision_tower(values):
    trainer = make_trainer(prepare(parse_recipe(values | {"trainable": "lora", "lora": {"r": 2}})))
    adapted = {name.split(".lora_")[0] for name, p in trainer.model.named_parameters() if p.requires_grad}
    linear = {
        name
        for name, module in trainer.model.named_modules()
        if name.endswith("_proj") and "visual" not in name and hasattr(module, "base_layer")
    }
    assert adapted == linear and not any("visual" in name for name in adapted)
    kinds = {name.split(".")[-1] for name in adapted}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj", "out_proj"}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("merge", [True, False])
def test_a_run_with_adapters_leaves_them_and_the_merged_model(values, checkpoint, merge, batch):
    lora = {"r": 4, "merge": merge, "extra_modules": ["merger"]}
    result = finetune(parse_recipe(values | {"trainable": "lora", "lora": lora}))
    adapter = result.folder / "adapter" if merge else result.folder
    adapted = PeftModel.from_pretrained(load(checkpoint), adapter).eval()
    logits = adapted(**batch).logits
    assert (logits - load(checkpoint).eval()(**batch).logits).abs().max() > 1e-4
    assert (result.folder / "config.json").is_file() == merge
    if merge:
        assert torch.allclose(load(result.folder).eval()(**batch).logits, logits, atol=1e-4)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_adapters_of_a_quantized_model(values, quantization, batch):
    pytest.importorskip("bitsandbytes")
    values["model"] |= {"dtype": "bfloat16", "quantization": quantization}
    values["train"] |= {"bf16": True}
    result = finetune(parse_recipe(values | {"trainable": "lora", "lora": {"r": 8}}))
    assert result.losses[6] < result.losses[1]
    assert load(result.folder).eval()(**batch).loss < load(values["model"]["path"]).eval()(**batch).loss


# --- distillation -----------------------------------------------------------------------------------------------------


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
    told = {"teacher": str(checkpoint.parent / "qwen"), "weight": 1.0, "dtype": "float32"}
    losses = finetune(parse_recipe(values | {"distillation": told, "global_batch_size": 8})).losses
    assert losses[6] < losses[1]


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def test_flops_are_those_that_pytorch_counts(checkpoint, collator, examples):
    """Of a forward pass over one video and its questions, part by part."""
    model = load(checkpoint).eval()
    batch = collator(examples[:1])
    text, grids = batch["input_ids"].shape[1], [tuple(batch["video_grid_thw"][0].tolist())]
    with FlopCounterMode(display=False, depth=4) as counter, torch.no_grad():
        model(**batch)
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    flops = FlopsModel(model.config).forward(text, text, grids)  # without the chunked loss every token has logits
    counted = {name.removeprefix("VambaForConditionalGeneration."): count for name, count in counts.items()}
    assert flops["vision"] + flops["merger"] == pytest.approx(counted["model.visual"], rel=0.01)
    assert flops["head"] == pytest.approx(counted["lm_head"], rel=0.01)
    total = counted.get("VambaForConditionalGeneration", counts["Global"])
    assert sum(flops.values()) == pytest.approx(total, rel=0.02)


def test_flops_of_the_other_model():
    model = tiny_video_ma2mba.tiny_model()
    video, ids = tiny_video_ma2mba.video(6), tiny_video_ma2mba.prompt(20, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, **video)
    flops = FlopsModel(model.config)
    parts = flops.forward(22, 22, [tuple(video["video_grid_thw"][0].tolist())])
    # PyTorch counts CLIP's class token too, one in seventeen of the tiny model's
    assert sum(parts.values()) + parts["vision"] / 16 == pytest.approx(counter.get_total_flops(), rel=0.03)
    flops.trains(model)
    assert flops.step([(22, 22, [(6, 4, 4)])]) == pytest.approx(3 * sum(parts.values()))


def test_what_is_frozen_costs_less(checkpoint):
    model = load(checkpoint)
    flops, sample = FlopsModel(model.config), (50, 10, [(12, 6, 6)])
    forward = sum(flops.forward(*sample).values())
    assert flops.step([sample, sample]) == pytest.approx(2 * forward)  # nothing trains
    flops.trains(model)
    assert flops.step([sample]) == pytest.approx(3 * forward)
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    flops.trains(model)
    assert flops.step([sample]) == pytest.approx(forward + 2 * flops.forward(*sample)["head"])
    model.requires_grad_(False)
    model.model.video_encoder.requires_grad_(True)
    flops.trains(model)
    parts = flops.forward(*sample)
    assert flops.step([sample]) == pytest.approx(2 * forward - parts["vision"] - parts["merger"] + parts["mamba"])
