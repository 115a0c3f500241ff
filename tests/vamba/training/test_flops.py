"""FLOPs are those that PyTorch counts, and what is frozen costs less."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vamba.training.flops import FlopsModel

import tiny_video_ma2mba
from training_data import load


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
