"""The goldens: what the original code computed, through our converter and `from_pretrained`."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from vamba.conversion import convert


VARIANTS = ("default", "position_and_norm", "no_alpha")
CASES = ("video", "image", "two_videos_one_sample")
INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@pytest.fixture(scope="module", params=VARIANTS)
def golden(request, shared, tmp_path_factory):
    """(model, a function that reads a case, original key of each of our parameters)."""
    source = shared / "golden" / "vamba_original_tiny" / request.param
    folder = tmp_path_factory.mktemp("golden") / request.param
    convert(source, folder, progress=False)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return model, lambda case: load_file(source / f"{case}.safetensors")


def inputs(case: dict, *more: str) -> dict:
    return {name: case[name] for name in (*INPUTS, *more) if name in case}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits(golden, name, attention):
    model, read = golden
    case = read(name)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for positions in ((), ("position_ids",)):
            logits = model(**inputs(case, *positions)).logits
            assert (logits - case["logits"]).abs().max() < 1e-5


def test_loss_and_every_gradient(golden):
    model, read = golden
    case = read("video")
    model.zero_grad()
    loss = model(**inputs(case, "labels")).loss
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"].item(), abs=1e-5)
    expected = {name.removeprefix("grad."): g for name, g in case.items() if name.startswith("grad.")}
    largest = max(g.abs().max() for g in expected.values())
    for name, parameter in model.named_parameters():
        gradient = expected.pop(original_name(name))
        # some are zero but for rounding: a key's bias shifts all of a query's scores alike
        error, scale = (parameter.grad - gradient).norm(), gradient.norm()
        assert error < 1e-4 * scale or gradient.abs().max() < 1e-6 * largest, name
    assert not expected, f"no parameter of ours for {sorted(expected)}"


def original_name(name: str) -> str:
    name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
    if name.startswith("model.video_encoder.levels."):
        level, rest = name.removeprefix("model.video_encoder.levels.").split(".", 1)
        where = rest.replace("block.", "vision_mixer.", 1) if rest.startswith("block.") else f"cross_attn.{rest}"
        name = f"model.layers.{level}.{where}"
    return name


@pytest.mark.parametrize("name", ["video", "image"])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
def test_greedy_generation(golden, name, options):
    model, read = golden
    case = read(name)
    length = case["generated_ids"].shape[1] - case["input_ids"].shape[1]
    output = model.generate(**inputs(case), max_new_tokens=length, do_sample=False, **options)
    assert torch.equal(output, case["generated_ids"])


@pytest.mark.parametrize("name", ["video", "image"])
def test_greedy_generation_from_a_memory_encoded_in_pieces(golden, name):
    model, read = golden
    case = read(name)
    kind = "pixel_values_videos" if name == "video" else "pixel_values"
    grid = case["video_grid_thw" if name == "video" else "image_grid_thw"]
    memory = model.encode_video(case[kind], grid, chunk_frames=2)
    length = case["generated_ids"].shape[1] - case["input_ids"].shape[1]
    text = {key: case[key] for key in ("input_ids", "attention_mask")}
    for _ in range(2):
        output = model.generate(**text, past_key_values=memory.fork(), max_new_tokens=length, do_sample=False)
        assert torch.equal(output, case["generated_ids"])
