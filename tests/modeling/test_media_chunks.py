"""Loading beside the model's work, and chunks that fit: same results."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoProcessor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

import vamba  # noqa: F401  registers the processor
from vamba.modeling import VambaConfig, VambaModel, VideoMemory
from vamba.modeling import media as streaming
from vamba.modeling.media import load_ahead, normalized

from tiny_vamba import media, prompt, tiny_config, tiny_model


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda", 0)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_items_are_loaded_one_at_a_time():
    loaded = []
    steps = load_ahead([1, 2, 3], lambda item: loaded.append(item) or [torch.tensor(item)], torch.device("cpu"))
    assert next(steps) == (1, [torch.tensor(1)]) and loaded == [1]
    assert [item for item, _ in steps] == [2, 3]


@pytest.fixture(scope="module")
def processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint)


def test_raw_patches_are_normalised_as_by_the_processor(processor):
    frames = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    for part, name in ((processor.video_processor, "pixel_values_videos"), (processor.image_processor, "pixel_values")):
        source = [frames] if "videos" in name else list(frames)
        expected, raw = (part(source, return_tensors="pt", **kw)[name] for kw in ({}, RAW))
        assert raw.dtype == torch.uint8 and expected.dtype == torch.float32
        assert torch.equal(normalized(raw, VambaConfig()), expected)
        assert normalized(expected, VambaConfig()) is expected
        other = VambaConfig(image_mean=(0.5, 0.4, 0.3), image_std=[0.1, 0.2, 0.3])
        expected = part(source, return_tensors="pt", image_mean=other.image_mean, image_std=other.image_std)[name]
        assert torch.equal(normalized(raw, other), expected)


RAW = {"do_rescale": False, "do_normalize": False}


@pytest.mark.parametrize("raw_kinds", [("videos",), ("images",), ("images", "videos")])
def test_raw_patches_give_the_same_answers(checkpoint, processor, clip, raw_kinds):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    content = [{"type": "video", "video": str(clip), "fps": 8.0}, {"type": "image", "image": image}]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "What happens?"}]}]
    expected, raw = (
        processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={f"{kind}_kwargs": RAW for kind in kinds},
        )
        for kinds in ((), raw_kinds)
    )  # fmt: skip
    assert (raw["pixel_values_videos"].dtype == torch.uint8) == ("videos" in raw_kinds)
    assert (raw["pixel_values"].dtype == torch.uint8) == ("images" in raw_kinds)
    with torch.no_grad():
        assert torch.equal(model(**raw).logits, model(**expected).logits)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**raw, **greedy), model.generate(**expected, **greedy))
    memories = [
        model.encode_video(inputs["pixel_values_videos"], inputs["video_grid_thw"], chunk_frames=4)
        for inputs in (raw, expected)
    ]
    assert torch.equal(*(memory.video_key_values(2)[0] for memory in memories))


# --- the size of a chunk ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("free_chunks, expected", [(1000, 128), (2, 128), (1, 64), (0.5, 32), (0.001, 2), (0, 2)])
def test_a_chunk_takes_at_most_half_of_the_free_memory(monkeypatch, free_chunks, expected):
    """`free_chunks`: how many chunks of 128 frames would fit."""
    config, patches = tiny_config(), 1196
    needed = 64 * patches * streaming.activation_bytes(config, torch.bfloat16)
    free = {"cuda:0": 2**60, "cuda:1": int(free_chunks * needed)}
    monkeypatch.setattr(streaming, "free_bytes", free.get)
    parameters = [SimpleNamespace(is_cuda=True, device=device) for device in free]
    model = SimpleNamespace(config=config, dtype=torch.bfloat16, parameters=lambda: parameters)
    assert streaming.default_chunk_frames(model, patches) == expected
    assert streaming.default_chunk_frames(model, 0) == 128 or not free_chunks


def test_on_a_cpu_a_chunk_has_128_frames(model):
    assert streaming.default_chunk_frames(model, 10**9) == 128


def test_the_published_model_needs_four_gigabytes_a_chunk():
    """128 frames of 640x360 beside Qwen2.5-VL's tower, whose configuration names its widths otherwise."""
    for vision in ({"hidden_size": 3584}, Qwen2_5_VLVisionConfig(hidden_size=1280, out_hidden_size=3584)):
        config = VambaConfig(vision_config=vision)
        half, full = (streaming.activation_bytes(config, dtype) for dtype in (torch.bfloat16, torch.float32))
        assert 2.0 < 64 * 1196 * half / 2**30 < 5.0 and 1.2 < full / half <= 2


# --- on a GPU --------------------------------------------------------------------------------------------------------


def encoded(memory: VideoMemory) -> list[torch.Tensor]:
    kv = [t for layer in range(3) for t in memory.video_key_values(layer)]
    return [t.cpu() for t in (*kv, *(part for state in memory.states for part in state))]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_same(actual: VideoMemory, expected: VideoMemory):
    """Convolutions of the vision tower run in TF32 by default, hence the tolerance."""
    assert actual.media == expected.media
    errors = [relative_error(a, b) for a, b in zip(encoded(actual), encoded(expected))]
    assert max(errors) < 5e-3, errors


class TestGpu:
    pytestmark = gpu

    def test_loading_and_computing_wait_for_each_other(self):
        """Slow copies must not be read early, nor slow computations have their input overwritten."""
        items = [torch.full((1 << 20,), float(i)) for i in range(12)]

        def load(item):
            torch.cuda._sleep(20_000_000)
            return [streaming.to_device(item, CUDA)]

        sums = []
        with torch.no_grad():
            for _, (loaded,) in load_ahead(items, load, CUDA):
                torch.cuda._sleep(40_000_000)
                sums.append(loaded.double().mean())
                del loaded
        assert torch.stack(sums).tolist() == list(range(12))

    def test_the_cpu_runs_one_chunk_ahead_and_no_further(self):
        computed = []
        items = [torch.zeros(4) for _ in range(6)]
        for index, _ in enumerate(load_ahead(items, lambda item: [item.to(CUDA)], CUDA)):
            assert all(event.query() for event in computed[: max(0, index - 1)])
            torch.cuda._sleep(50_000_000)
            computed.append(torch.cuda.current_stream().record_event())
        assert not computed[-1].query()

    @pytest.mark.parametrize("where", ["cpu", "pinned"])
    def test_patches_left_on_the_cpu_give_the_same(self, where):
        model = tiny_model().cuda()
        pixels, grid = media((24, 8, 12), (9, 8, 12), (3, 4, 8))
        expected = model.encode_video(pixels.cuda(), grid.cuda(), chunk_frames=4)
        given = pixels.pin_memory() if where == "pinned" else pixels
        for chunk_frames in (4, None):
            assert_same(model.encode_video(given, grid, chunk_frames=chunk_frames), expected)
        ids = prompt(7, items=3).cuda()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
        tokens = model.generate(**inputs, pixel_values_videos=given, video_grid_thw=grid)
        assert torch.equal(
            tokens, model.generate(**inputs, pixel_values_videos=pixels.cuda(), video_grid_thw=grid.cuda())
        )

    def test_raw_patches_are_normalised_on_the_gpu(self):
        model = tiny_model().cuda()
        raw = torch.randint(0, 256, (24 * 96, 96), dtype=torch.uint8)
        grid = torch.tensor([[24, 8, 12]])
        expected = model.encode_video(normalized(raw, model.config), grid, chunk_frames=8)
        for given in (raw, raw.cuda()):
            assert_same(model.encode_video(given, grid, chunk_frames=8), expected)

    def test_gradients_reach_patches_on_the_cpu(self):
        model, (pixels, grid) = tiny_model().cuda(), media((4, 4, 6))
        memory = model.model.encode_video(pixels.requires_grad_(), grid)
        memory.video_key_values(2)[0].square().sum().backward()
        assert pixels.grad.abs().sum() > 0

    def test_watching_equals_the_plain_path(self, checkpoint, clip):
        from vamba.chat import load_chat

        chat = load_chat(str(checkpoint), device="cuda")
        actual, expected = chat.watch(clip, fps=8, chunk_frames=4, progress=False), None
        for chunk in chat.processor.video_reader(clip, fps=8, chunk_frames=4):
            inputs = chat.processor.video_processor([chunk.frames], do_resize=False, return_tensors="pt").to("cuda")
            expected = chat.model.encode_video(**inputs, memory=expected)
        assert_same(actual, expected)

    def test_the_peak_does_not_grow_with_the_video(self):
        """Weights, video memory, a chunk's activations and two chunks of patches: nothing else is held."""
        model = tiny_model().cuda()
        peaks = []
        for chunks in (2, 4, 32):  # the first warms up
            pixels = torch.randn(chunks * 16 * 24 * 32, 96)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            memory = model.encode_video(pixels, torch.tensor([[chunks * 16, 24, 32]]), chunk_frames=32)
            peaks.append(torch.cuda.max_memory_allocated() - before - memory.video_nbytes)
            del memory
        assert peaks[2] < 1.3 * peaks[1], peaks

    @pytest.mark.parametrize("side", [(26, 46), (52, 60)])
    def test_the_estimate_of_a_chunk_is_above_what_it_takes(self, side):
        """The published model's widths, two layers of each kind."""
        text = {"num_hidden_layers": 3, "intermediate_size": 512, "vocab_size": 128, "bos_token_id": None,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
                "eos_token_id": None}  # fmt: skip
        config = VambaConfig(text_config=text, vision_config={"hidden_size": 3584, "depth": 2})
        with torch.device(CUDA):
            model = VambaModel(config).bfloat16()
        pixels, grid = torch.zeros(16 * side[0] * side[1], 1176), torch.tensor([[16, *side]])
        with torch.no_grad():
            model.encode_video(pixels, grid)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            memory = model.encode_video(pixels, grid)
        taken = torch.cuda.max_memory_allocated() - before - memory.video_nbytes
        estimate = len(pixels) * streaming.activation_bytes(config, torch.bfloat16)
        assert estimate / 4 < taken < estimate, f"{taken / 2**20:.0f} MiB taken, {estimate / 2**20:.0f} estimated"

    def test_two_million_tokens_at_once_equal_small_chunks(self):
        """in_proj alone writes more than 2^32 numbers: offsets of 32 bits, signed or not, cannot reach its end."""
        tokens, width = 2_000_000, 512
        if torch.cuda.mem_get_info()[0] < 100 * 2**30:
            pytest.skip("needs 100 GiB of GPU memory")
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
        text = {"hidden_size": width, "num_hidden_layers": 3, "intermediate_size": 512, "vocab_size": 128,
                "num_attention_heads": 8, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
                "rope_parameters": rope}  # fmt: skip
        vision = {"depth": 1, "embed_dim": 32, "hidden_size": width, "num_heads": 2}
        config = VambaConfig(text_config=text, vision_config=vision, mamba_config={"hidden_size": width})
        with torch.device(CUDA):
            model = VambaModel(config).bfloat16().eval()
            vision_BSD = torch.randn(1, tokens, width, dtype=torch.bfloat16)
        assert tokens * model.video_encoder.levels[0].block.mixer.in_proj.out_features > 2**32
        memories = []
        with torch.no_grad():
            for size in (tokens, 16_384):
                memory = VideoMemory(config)
                for chunk_BSD in vision_BSD.split(size, dim=1):
                    model.video_encoder(chunk_BSD, memory)
                memories.append(memory)
        once, expected = memories
        assert once.video_length == expected.video_length == tokens
        compared = {
            f"{name} {i}": (getattr(once.states[i], name), getattr(expected.states[i], name))
            for i in range(2)
            for name in ("conv_BTC", "ssm_BHPK")
        }
        for span in (slice(-4096, None), slice(tokens // 2, tokens // 2 + 4096)):
            for name, pair in zip(("keys", "values"), zip(once.video_key_values(2), expected.video_key_values(2))):
                compared[f"{name} {span}"] = [t[:, :, span] for t in pair]
        for name, (a, b) in compared.items():
            error = relative_error(a, b)
            assert error < 1e-2, f"{name}: {error:.1e}"
