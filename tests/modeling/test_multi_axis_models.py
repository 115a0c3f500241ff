"""Both models trained in cells: loss, logits and every gradient equal plain autograd's, with all that may be beside."""

import pytest
import torch

from vamba.modeling import VideoMemory
from vamba.modeling.multi_axis import _OnCPU

import tiny_vamba
import tiny_video_ma2mba


CELLS = [(1, 10, False), (2, 7, True), ("auto", "auto", False)]


def vamba_inputs(batch: bool) -> dict[str, torch.Tensor]:
    if batch:
        patches, grid = tiny_vamba.media((3, 4, 4), (2, 4, 8))
        ids = torch.cat([tiny_vamba.prompt(6, 1), tiny_vamba.prompt(6, 1, seed=1)])
    else:
        patches, grid = tiny_vamba.media((5, 4, 8))
        ids = tiny_vamba.prompt(9, 1)
    return {"input_ids": ids, "labels": ids, "pixel_values_videos": patches.double(), "video_grid_thw": grid}


def blocks(model) -> list[torch.nn.Module]:
    """Vamba's Mamba-2 blocks."""
    return [level.block for level in model.model.video_encoder.levels[:-1]]


def ma2mba_inputs(batch: bool) -> dict[str, torch.Tensor]:
    start, end = tiny_video_ma2mba.START, tiny_video_ma2mba.END
    video = tiny_video_ma2mba.video(*((5, 2) if batch else (7,)))
    ids = torch.randint(8, 80, (2 if batch else 1, 9))
    ids[:, :2] = torch.tensor([start, end])
    return {"input_ids": ids, "labels": ids, **video, "pixel_values_videos": video["pixel_values_videos"].double()}


def results(model, inputs) -> list[torch.Tensor | None]:
    model.zero_grad()
    output = model(**inputs, use_cache=False)
    output.loss.backward()
    return [output.loss, output.logits, *(parameter.grad for parameter in model.parameters())]


def compare(actual, expected) -> None:
    for a, b in zip(actual, expected):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("ordinary", [False, True])
@pytest.mark.parametrize("cells", CELLS)
@pytest.mark.parametrize("kind", ["vamba", "vamba with positions", "video-ma2mba"])
def test_training_in_cells_is_plain_training(kind, cells, ordinary, batch):
    if kind == "video-ma2mba":
        model, inputs = tiny_video_ma2mba.tiny_model().double().train(), ma2mba_inputs(batch)
        layers = model.model.language_model.layers
    else:
        model = tiny_vamba.tiny_model(cross_attn_use_position_embeddings="positions" in kind).double().train()
        layers, inputs = blocks(model), vamba_inputs(batch)
    plain = results(model, inputs)
    if ordinary:
        model.gradient_checkpointing_enable()
    model.enable_multi_axis_checkpointing(*cells[:2], offload=cells[2])
    runs = []
    hooks = [layer.register_forward_pre_hook(lambda module, _: runs.append(module)) for layer in layers]
    compare(results(model, inputs), plain)
    # Every block of every layer runs twice, but for those of the last cell, which is kept.
    counts = [runs.count(layer) for layer in layers]
    assert counts == sorted(counts, reverse=True) and counts[0] - counts[-1] <= 1
    assert counts[0] in (1, 2) if cells[1] == "auto" else counts[0] > 2
    for hook in hooks:
        hook.remove()
    model.disable_multi_axis_checkpointing()
    compare(results(model, inputs), plain)


def test_of_packed_samples_no_cell_is_kept():
    """Backward begins with the last cell of one of them only."""
    model = tiny_vamba.tiny_model().double().train()
    model.enable_multi_axis_checkpointing(8, 4096)
    pixels, grid = tiny_vamba.media((2, 4, 4), (3, 4, 4))
    ids = torch.cat([tiny_vamba.prompt(9, items=1), tiny_vamba.prompt(7, items=1)], 1)
    runs = []
    for layer in blocks(model):
        layer.register_forward_pre_hook(lambda module, _: runs.append(module))
    inputs = {"input_ids": ids, "labels": ids, "pixel_values_videos": pixels.double(), "video_grid_thw": grid}
    model(**inputs, packed_lengths=[11, 9], use_cache=False).loss.backward()
    assert [runs.count(layer) for layer in blocks(model)] == [4] * (len(set(runs)))


@pytest.mark.parametrize("ordinary", [False, True])
def test_keys_and_values_are_offloaded(monkeypatch, ordinary):
    """Those of all three layers, however attention saves them."""
    moved = []
    initialise = _OnCPU.__init__
    monkeypatch.setattr(_OnCPU, "__init__", lambda self, t: (moved.append(tuple(t.shape)), initialise(self, t))[0])
    model = tiny_vamba.tiny_model().double().train()
    if ordinary:
        model.gradient_checkpointing_enable()
    model.enable_multi_axis_checkpointing(2, 16, offload=True)
    results(model, vamba_inputs(batch=False))
    assert moved.count((1, 2, 40, 16)) == 2 * 3


def test_a_video_encoded_with_gradient_may_be_read_often():
    patches, grid = tiny_vamba.media((5, 4, 8))
    memories = []
    for cells in (True, False):
        model = tiny_vamba.tiny_model().double().train().model
        if cells:
            model.enable_multi_axis_checkpointing(2, 7)
        memory = model.encode_video(patches.double(), grid)
        memories.append(model.encode_video(patches.double(), grid, memory))
    for index in [0, 1, 2, 0]:
        compare(*(memory.video_key_values(index) for memory in memories))
    for states in zip(*(memory.states for memory in memories)):
        compare(*states)


def test_a_memory_that_is_returned_can_be_read_again():
    model = tiny_vamba.tiny_model().train()
    pixels, grid = tiny_vamba.media((3, 4, 6))
    given, ids = {"pixel_values_videos": pixels, "video_grid_thw": grid}, tiny_vamba.prompt(6, 1)
    expected = model(torch.cat([ids, tiny_vamba.prompt(3)], 1), **given).logits[:, -3:]
    model.enable_multi_axis_checkpointing(1, 4)
    assert model(ids, **given).past_key_values is None  # as it was read, and was not asked for
    asked = model(ids, **given, use_cache=True).past_key_values
    own = VideoMemory(model.config)
    model(ids, **given, past_key_values=own, use_cache=True)
    for memory in (asked, own):
        torch.testing.assert_close(model(tiny_vamba.prompt(3), past_key_values=memory).logits, expected)
    own.reset()
    model(ids, **given, past_key_values=own, use_cache=False)
    assert own.video_key_values(0)[0].shape[2] == own.video_length == 18
