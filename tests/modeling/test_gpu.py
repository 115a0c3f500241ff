"""What only a GPU can show: compiled decoding, offloading, and that all of it gives the CPU's results."""

import pytest
import torch

import vamba
from vamba.modeling import VideoMemory

from tiny_vamba import media, prompt, tiny_model


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def gpu_model():
    return tiny_model().cuda()


def inputs(*grids, items=1, length=7):
    pixels, grid = media(*(grids or [(5, 4, 6)]))
    ids = prompt(length, items=items).cuda()
    return {"input_ids": ids, "pixel_values_videos": pixels.cuda(), "video_grid_thw": grid.cuda()}


def test_logits_are_those_of_the_cpu(gpu_model, model):
    """Convolutions of the vision tower run in TF32 by default, hence the tolerance."""
    on_gpu = inputs()
    with torch.no_grad():
        expected = model(**{name: value.cpu() for name, value in on_gpu.items()}).logits
        actual = gpu_model(**on_gpu).logits.cpu()
    assert (actual - expected).norm() / expected.norm() < 2e-3


def test_static_cache_compiled_gives_the_same_tokens(gpu_model):
    """On a GPU `generate` compiles the forward pass for a static cache."""
    expected = gpu_model.generate(**inputs(), **GREEDY)
    assert torch.equal(gpu_model.generate(**inputs(), **GREEDY, cache_implementation="static"), expected)
    memory = gpu_model.encode_video(*(inputs()[k] for k in ("pixel_values_videos", "video_grid_thw")))
    ids = inputs()["input_ids"]
    mask = torch.ones_like(ids)
    for _ in range(2):
        fork = memory.fork(max_cache_len=64)
        assert torch.equal(gpu_model.generate(ids, attention_mask=mask, past_key_values=fork, **GREEDY), expected)


def test_an_offloaded_text_cache_gives_the_same_tokens(gpu_model):
    expected = gpu_model.generate(**inputs(), **GREEDY)
    assert torch.equal(gpu_model.generate(**inputs(), **GREEDY, cache_implementation="offloaded"), expected)


def test_a_memory_on_the_cpu_gives_the_same_tokens(gpu_model, tmp_path):
    kwargs = inputs()
    expected = gpu_model.generate(**kwargs, **GREEDY)
    memory = gpu_model.encode_video(kwargs["pixel_values_videos"], kwargs["video_grid_thw"])
    memory.save(tmp_path / "m.safetensors")
    for device in ("cpu", "cuda"):
        loaded = VideoMemory.load(tmp_path / "m.safetensors", device=device)
        assert loaded.video_key_values(0)[0].device.type == device
        output = gpu_model.generate(kwargs["input_ids"], past_key_values=loaded.fork(), **GREEDY)
        assert torch.equal(output, expected)
    assert torch.equal(gpu_model.generate(kwargs["input_ids"], past_key_values=memory.to("cpu"), **GREEDY), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_batch_equals_its_rows_in_bfloat16(attention):
    model = tiny_model().bfloat16().cuda()
    model.set_attn_implementation(attention)
    together = inputs((5, 4, 6), (2, 4, 4))
    together["input_ids"] = torch.cat([prompt(7, items=1), prompt(7, items=1, seed=1)]).cuda()
    with torch.no_grad():
        logits = model(**together).logits
        pixels, grid = together["pixel_values_videos"], together["video_grid_thw"]
        for row, part in enumerate((pixels[:120], pixels[120:])):
            alone = model(
                together["input_ids"][row : row + 1], pixel_values_videos=part, video_grid_thw=grid[row : row + 1]
            )
            assert (logits[row] - alone.logits[0]).norm() / alone.logits.norm() < 2e-2


def test_chat_on_the_gpu(checkpoint, clip):
    from vamba.chat import load_chat

    on_gpu, on_cpu = (load_chat(str(checkpoint), device=device) for device in ("cuda", "cpu"))
    assert isinstance(on_gpu, vamba.VideoChat) and on_gpu.model.device.type == "cuda"
    for chat in (on_gpu, on_cpu):
        chat.watch(clip, fps=8, progress=False)
    for a, b in zip(on_gpu.memory.video_key_values(2), on_cpu.memory.video_key_values(2)):
        assert (a.cpu() - b).norm() / b.norm() < 5e-3
    assert isinstance(on_gpu.ask("What happens?", max_new_tokens=4), str)


def test_gradients_on_the_gpu_are_those_of_the_cpu():
    on_gpu = inputs()
    gradients = []
    for device in ("cpu", "cuda"):
        model = tiny_model().to(device).double()
        kwargs = {k: v.to(device) for k, v in on_gpu.items()}
        kwargs["pixel_values_videos"] = kwargs["pixel_values_videos"].double()
        model(**kwargs, labels=kwargs["input_ids"]).loss.backward()
        gradients.append([p.grad.cpu() for p in model.parameters()])
    for a, b in zip(*gradients):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9  # the norms compute in float32 whatever the dtype
