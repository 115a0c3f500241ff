"""One decoding step as a CUDA graph: what may be recorded, where it is recorded, and what is said if it cannot be."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from vamba.modeling import graphed_decoding
from vamba.modeling import media as media_module
from vamba.modeling.graphed_decoding import GraphedDecoding

import tiny_vamba
import tiny_video_ma2mba
from tiny_vamba import media, prompt, tiny_model


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def cuda(monkeypatch):
    """A stand-in for `torch.cuda` that writes down what happens."""
    events = []

    class Graph:
        def capture_begin(self, **options):
            events.append("begin")

        def capture_end(self):
            events.append("end")

    def stream(device):
        events.append(device)
        return SimpleNamespace(wait_stream=lambda other: None)

    fake = SimpleNamespace(
        CUDAGraph=Graph, Stream=stream, current_stream=stream, stream=lambda stream: contextlib.nullcontext()
    )
    monkeypatch.setattr(graphed_decoding, "torch", SimpleNamespace(cuda=fake))
    monkeypatch.setattr(media_module, "torch", SimpleNamespace(cuda=fake))
    media_module.side_stream.cache_clear()
    yield events
    media_module.side_stream.cache_clear()


def record(step: GraphedDecoding):
    leaves, structure = graphed_decoding.pytree.tree_flatten({"input_ids": torch.ones(1, 1)})
    step._record(leaves, structure, None)


def test_it_is_recorded_on_the_device_of_its_inputs_on_one_stream(cuda):
    """Whatever device is the current one; each new stream would get a workspace of cuBLAS for good."""
    for _ in range(2):
        record(GraphedDecoding(lambda **inputs: inputs["input_ids"]))
    cpu = torch.device("cpu")  # of the inputs here
    assert cuda == [cpu, cpu, "begin", "end", cpu, cpu, "begin", "end", cpu]


def test_what_cannot_be_recorded_says_what_to_do(cuda):
    def waits_for_the_gpu(**inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    step = GraphedDecoding(waits_for_the_gpu)
    with pytest.raises(RuntimeError, match="not permitted.*disable_compile=True"):
        record(step)
    assert cuda[-1] == "end" and step._graph is None


def test_a_memory_that_is_not_read_where_it_lies_is_not_recorded(model):
    assert not GraphedDecoding.suits(model)
    step, memory = GraphedDecoding(model), model.encode_video(*media((2, 4, 6), (2, 4, 6)), rows=[0, 1])
    for level in memory._levels:  # as on a GPU
        level.parts = [SimpleNamespace(keys_BHMP=SimpleNamespace(is_cuda=True, shape=(2, 2, 12, 16)))]
    for rows, may in ((None, True), ([0, 0, 1, 1], True), ([1, 0], False), ([1], False)):
        memory.video_rows = rows
        assert step._can_be_recorded(memory, []) == may
    memory.video_rows, memory.text.offloading = None, True  # of the text
    assert not step._can_be_recorded(memory, [])
    assert not step._can_be_recorded(model.encode_video(*media((2, 4, 6))), [])  # on the CPU


def test_hooks_keep_a_model_from_being_recorded_but_not_those_of_transformers():
    model = tiny_model()
    with torch.no_grad():
        model(prompt(3), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules()) and not GraphedDecoding.is_watched(model)
    handle = model.lm_head.register_forward_pre_hook(lambda *_: None)
    assert GraphedDecoding.is_watched(model)
    config, fork = model.generation_config, model.encode_video(*media((2, 4, 6))).fork(max_cache_len=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "device", torch.device("cuda"))
        assert not model._valid_auto_compile_criteria({"past_key_values": fork}, config)
        handle.remove()
        assert model._valid_auto_compile_criteria({"past_key_values": fork}, config)


@pytest.mark.parametrize("tiny", [tiny_vamba, tiny_video_ma2mba], ids=["vamba", "video-ma2mba"])
def test_both_models_decode_with_a_graph(tiny, monkeypatch):
    """On a GPU, unless a configuration for `torch.compile` is given."""
    monkeypatch.setattr(GraphedDecoding, "suits", staticmethod(lambda model: True))
    assert isinstance(tiny.tiny_model().get_compiled_call(None), GraphedDecoding)


class TestGpu:
    pytestmark = gpu

    def test_other_rows_and_padding_from_a_file_give_the_same(self, tmp_path):
        model = tiny_model().cuda()
        pixels, grid = media((5, 4, 6), (2, 4, 6))
        memory = model.encode_video(pixels.cuda(), grid, rows=[0, 1])
        memory.save(tmp_path / "m.safetensors")
        loaded = type(memory).load(tmp_path / "m.safetensors").to("cuda")  # its mask is still on the CPU
        more = media((2, 4, 6), seed=3)
        for kind in (memory, loaded):
            model.encode_video(*more, memory=kind, rows=[1])
        ids = torch.cat([prompt(6), prompt(6, seed=1)]).cuda()
        for rows in (None, [1, 0], [1, 1]):
            outputs = []
            for kind in (memory, loaded):
                for max_cache_len in (None, 32):
                    fork = kind.fork(max_cache_len)
                    fork.video_rows = rows
                    outputs.append(model.generate(ids, past_key_values=fork, **GREEDY).tolist())
            assert outputs == outputs[:1] * 4

    def test_a_hook_sees_every_token(self):
        model, seen = tiny_model().cuda(), []
        model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.sum().item()))
        fork = model.encode_video(*media((2, 4, 6))).fork(max_cache_len=32)
        model.generate(prompt(5).cuda(), past_key_values=fork, **GREEDY)
        assert len(set(seen)) == GREEDY["max_new_tokens"]

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_on_a_gpu_that_is_not_the_current_one(self):
        tokens = []
        for device in ("cuda:0", "cuda:1"):
            model = tiny_model().to(device)
            fork = model.encode_video(*media((5, 4, 6))).fork(max_cache_len=32)
            tokens.append(model.generate(prompt(5).to(device), past_key_values=fork, **GREEDY).tolist())
        assert tokens[0] == tokens[1]
