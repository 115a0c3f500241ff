"""Models that accelerate spreads over devices, or keeps on the CPU or on disk: they answer as on one device."""

import pytest
import torch

from vamba.modeling import VideoMemory

import tiny_vamba
import tiny_video_ma2mba


accelerate = pytest.importorskip("accelerate")
GREEDY = {"max_new_tokens": 4, "do_sample": False}
LAYERS = [f"model.language_model.layers.{index}" for index in range(3)]
PARTS = {
    "vamba": ["model.visual", "model.video_encoder", "model.language_model.rotary_emb", *LAYERS],
    "video-ma2mba": ["model.visual", "model.projector", *LAYERS],
}
REST = ["model.language_model.embed_tokens", "model.language_model.norm", "lm_head"]
models = pytest.mark.parametrize("kind", PARTS)


def make(kind):
    """A model, and a prompt with a video for it."""
    if kind == "video-ma2mba":
        given = {"input_ids": tiny_video_ma2mba.prompt(5, 1), **tiny_video_ma2mba.video(3)}
        return tiny_video_ma2mba.tiny_model(), given
    pixels, grid = tiny_vamba.media((3, 4, 6))
    given = {"input_ids": tiny_vamba.prompt(5, 1), "pixel_values_videos": pixels, "video_grid_thw": grid}
    return tiny_vamba.tiny_model(cross_attn_use_position_embeddings=True, cross_attn_use_layer_norm=True), given


def assert_answers_like(model, expected, given):
    ids, *video = given.values()
    answer = expected.generate(**given, **GREEDY)
    assert torch.equal(model.generate(**given, **GREEDY), answer)
    memory = model.encode_video(*video)
    again = model.encode_video(*video, memory=memory.fork())  # goes on after states and keys that lie somewhere
    assert torch.equal(model.generate(ids, past_key_values=memory, **GREEDY), answer)
    assert again.video_length == 2 * memory.video_length
    for either in (model, expected):
        either.generation_config.unrotate_video_keys = True
    assert torch.equal(model.generate(**given, **GREEDY), expected.generate(**given, **GREEDY))
    expected.generation_config.unrotate_video_keys = False  # as it is asked about other device maps
    torch.testing.assert_close(model(**given).logits.cpu(), expected(**given).logits.cpu(), rtol=1e-4, atol=1e-4)


@models
@pytest.mark.parametrize("offloaded", ["everything", "each part"])
def test_offloaded_to_disk(kind, offloaded, tmp_path):
    expected, given = make(kind)
    expected.save_pretrained(tmp_path / "model")
    for part in [None] if offloaded == "everything" else PARTS[kind]:
        device_map = {name: "disk" if part in (name, None) else "cpu" for name in PARTS[kind] + REST}
        folder = tmp_path / f"of {part}"
        model = type(expected).from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=folder)
        assert any(parameter.is_meta for parameter in model.parameters()) or part.endswith("rotary_emb")
        assert_answers_like(model, expected, given)


@models
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_module_by_module(kind, where, tmp_path):
    (expected, given), (model, _) = make(kind), make(kind)
    cpu = torch.device("cpu")
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=cpu)
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=cpu)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_answers_like(model, expected, given)


def test_a_memory_stays_where_it_was_asked_to_be(tmp_path):
    expected, (_, pixels, grid) = make("vamba")[0], make("vamba")[1].values()
    expected.save_pretrained(tmp_path / "model")
    device_map = {name: "disk" if "layers.1" in name else "cpu" for name in PARTS["vamba"] + REST}
    model = type(expected).from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "of")
    memory = model.encode_video(pixels, grid, memory=VideoMemory(model.config))
    assert memory.video_device is None  # accelerate would have called memory.to()


@models
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("offloaded", [None, "cpu", "disk"])
def test_spread_over_two_gpus(kind, offloaded, tmp_path):
    """Neighbouring layers on different GPUs; one of them on the CPU or on disk."""
    expected, given = make(kind)
    expected.save_pretrained(tmp_path / "model")
    names = PARTS[kind] + REST
    device_map = {name: index % 2 for index, name in enumerate(names)}
    device_map["lm_head"] = device_map["model.language_model.embed_tokens"]  # they share their weight
    if offloaded:
        device_map[LAYERS[1]] = offloaded
    model = type(expected).from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "of")
    given = {name: value.to("cuda:0") for name, value in given.items()}
    assert_answers_like(model, expected.to("cuda:0"), given)
