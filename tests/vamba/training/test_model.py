"""What of a model trains, in which precision, with which adapters; and what checkpointing changes."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText

from vamba.modeling.mamba2 import Mamba2Mixer
from vamba.modeling.modeling_vamba import VambaMLP
from vamba.training import finetune, load_recipe, make_trainer, prepare
from vamba.training.model import PRESETS

from training_data import load, run, weights


def test_presets_are_what_the_stages_train(checkpoint):
    import re

    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint)

    def chosen(preset):
        return {n for n, _ in model.named_parameters() if any(re.search(pattern, n) for pattern in PRESETS[preset])}

    kinds = {"cross_attn", "video_encoder", "alpha"}
    assert chosen("stage1") == {n for n, _ in model.named_parameters() if kinds & set(n.split("."))}
    frozen = {n for n, _ in model.named_parameters()} - chosen("stage2")
    assert frozen and all(n.startswith("model.visual.") and ".merger." not in n for n in frozen)


def test_only_the_stage_trains(values, checkpoint):
    folder = run(values | {"trainable": "stage1"}, max_steps=2).folder
    before, after = weights(checkpoint), weights(folder)
    for name in before:
        trained = any(part in name for part in ("cross_attn", "video_encoder", "alpha"))
        assert trained or torch.equal(before[name], after[name]), name
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("levels.0.k_proj" in name for name in moved) and any("A_log" in name for name in moved)


def test_half_precision_trains_float32_weights(values, checkpoint):
    values |= {"trainable": "stage1", "dtype": "bfloat16"}
    trainer = make_trainer(prepare(load_recipe(values | {"bf16": True})))
    for parameter in trainer.model.parameters():
        kept = parameter.requires_grad
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16)
    result = run(values, bf16=True, max_steps=8, lr_scheduler_type="constant")
    exact = run(values | {"dtype": "float32"},
                max_steps=8, lr_scheduler_type="constant", output_dir=f"{values['output_dir']}2")  # fmt: skip
    assert result.losses[8] < result.losses[1] - 0.1
    assert all(abs(result.losses[step] - exact.losses[step]) < 0.1 for step in (1, 4, 8))
    saved = AutoModelForImageTextToText.from_pretrained(result.folder, dtype="auto").state_dict()
    assert {value.dtype for name, value in saved.items() if "A_log" not in name} >= {torch.bfloat16}
    assert saved["model.video_encoder.levels.0.k_proj.weight"].dtype == torch.bfloat16


def test_checkpointing_changes_nothing_but_memory(values, tmp_path, monkeypatch):
    """With either, text layers run again in the backward pass; the Mamba blocks in cells, or as the others do."""
    plain = run(values, max_steps=3).losses
    runs = []
    for kind in (VambaMLP, Mamba2Mixer):
        monkeypatch.setattr(kind, "forward", lambda *a, f=kind.forward, kind=kind: (runs.append(kind), f(*a))[1])
    for checkpointing in ("activation_checkpointing", "multi_axis_checkpointing"):
        runs.clear()
        saving = run(values | {checkpointing: True}, max_steps=3, output_dir=str(tmp_path / checkpointing)).losses
        assert all(abs(plain[step] - saving[step]) < 1e-4 for step in plain)
        assert (runs.count(VambaMLP), runs.count(Mamba2Mixer)) == (3 * 2 * 3, 3 * 2 * 2)  # steps, twice, layers


@pytest.fixture
def batch(collator, examples):
    return collator(examples)


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
            f"levels.{block}.block.mixer.out_proj.lora_B" in name and g.abs().max() > 0 for name, g in gradients.items()
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
    trainer = make_trainer(prepare(load_recipe(values | {"trainable": "lora", "lora_r": 2})))
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
    lora = {"trainable": "lora", "lora_r": 4, "lora_merge": merge, "lora_modules_to_save": ["merger"]}
    result = finetune(values | lora)
    adapter = result.folder / "adapter" if merge else result.folder
    adapted = PeftModel.from_pretrained(load(checkpoint), adapter).eval()
    logits = adapted(**batch).logits
    assert (logits - load(checkpoint).eval()(**batch).logits).abs().max() > 1e-4
    assert (result.folder / "config.json").is_file() == merge
    if merge:
        assert torch.allclose(load(result.folder).eval()(**batch).logits, logits, atol=1e-4)


@pytest.mark.parametrize("quantization", ["load_in_4bit", "load_in_8bit"])
def test_adapters_of_a_quantized_model(values, quantization, batch):
    pytest.importorskip("bitsandbytes")
    values |= {"dtype": "bfloat16", "bf16": True, quantization: True, "max_steps": 3, "per_device_train_batch_size": 2}
    result = finetune(values | {"trainable": "lora", "lora_r": 8, "learning_rate": 5e-3})
    assert result.losses[3] < result.losses[1]
    assert load(result.folder).eval()(**batch).loss < load(values["model_name_or_path"]).eval()(**batch).loss
