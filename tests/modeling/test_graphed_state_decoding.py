"""Decoding with a `StateMemory` from a recording: the same tokens, and a memory that is what it would have been.

On the CPU a recording is a closure that is run again and leaves its outputs where those of the first run are.
"""

import copy

import pytest
import torch
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache

from vamba.modeling.graphed_decoding import GraphedDecoding, GraphedStateDecoding

from tiny_video_ma2mba import prompt, tiny_model, video


GREEDY = {"max_new_tokens": 8, "do_sample": False}
on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=on_a_gpu)]


class Rerun:
    """What a CUDA graph does: a replay writes into the same outputs; capturing computes nothing of use."""

    def __init__(self, step, owner):
        self.step, self.outputs, self.replays = step, step(), 0
        owner._outputs = self.outputs
        for t in self._tensors(self.outputs):
            t.fill_(float("nan"))

    def replay(self):
        self.replays += 1
        for old, new in zip(self._tensors(self.outputs), self._tensors(self.step())):
            old.copy_(new)

    @staticmethod
    def _tensors(outputs):
        values = [value for value in outputs.values() if not isinstance(value, Cache)]  # exporters register caches
        return [leaf for leaf in pytree.tree_leaves(values) if torch.is_tensor(leaf)]


class Simulated(GraphedStateDecoding):
    def _can_be_recorded(self, cache, tensors):
        return True

    def _capture(self, step, device):
        before = [type(state)(*map(torch.clone, state)) for state in self._states]
        graph = Rerun(step, self)
        for state, old in zip(self._states, before):  # capturing does not run the kernels
            for t, values in zip(state, old):
                t.copy_(values)
        return graph


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def made(device, monkeypatch):
    """The steps that `generate` made; on the CPU it is told that it is on a GPU."""
    steps = []

    def make(forward):
        steps.append((Simulated if device == "cpu" else GraphedStateDecoding)(forward))
        return steps[-1]

    monkeypatch.setattr("vamba.modeling.generation.GraphedStateDecoding", make)
    if device == "cpu":
        monkeypatch.setattr(GraphedDecoding, "suits", staticmethod(lambda model: not model.training))
    return steps


@pytest.fixture(scope="module")
def base():
    return tiny_model()


@pytest.fixture
def model(base, device):
    return copy.deepcopy(base).to(device)


def on(device, given):
    return {name: t.to(device) for name, t in given.items()}


def test_tokens_and_memory_are_those_of_plain_decoding(model, device, made):
    given, ids = on(device, video(3)), prompt(5, 1).to(device)
    memories, answers = [], []
    for disabled in (True, False):
        memories.append(model.encode_video(**given))
        kept = memories[-1].fork()
        answers.append(model.generate(ids, past_key_values=memories[-1], disable_compile=disabled, **GREEDY))
        for ours, theirs in zip(kept.states, model.encode_video(**given).states):
            torch.testing.assert_close(ours, theirs)  # a fork from before is as it was
    assert len(made) == 1 and made[0]._graph is not None
    assert torch.equal(*answers)
    plain, graphed = memories
    for name in ("media", "is_open", "text_length", "is_ragged"):
        assert getattr(plain, name) == getattr(graphed, name), name
    assert torch.equal(plain.text_tokens_B, graphed.text_tokens_B)
    for ours, theirs in zip(graphed.states, plain.states):
        torch.testing.assert_close(ours, theirs)


def test_a_fork_of_what_is_decoded_with_is_not_written_into(model, device, made):
    memory = model.encode_video(**on(device, video(3)))
    ids = prompt(5, 1).to(device)
    forks = []

    def fork_on_the_way(input_ids, scores, **kwargs):
        forks.append((memory.fork(), [t.clone() for state in memory.states for t in state]))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    said = model.generate(ids, past_key_values=memory, stopping_criteria=[fork_on_the_way], **GREEDY)
    assert made[0]._graph is not None and len(forks) == 8
    for fork, states in forks:
        assert all(map(torch.equal, (t for state in fork.states for t in state), states))
    # a conversation goes on from any of them
    more = torch.cat([said[:, : ids.shape[1] + 4], prompt(3, seed=3).to(device)], 1)
    expected = model.generate(more, **on(device, video(3)), disable_compile=True, **GREEDY)
    assert torch.equal(model.generate(more, past_key_values=forks[3][0], **GREEDY), expected)


def test_padded_rows_samples_and_hidden_states(model, device, made):
    ids = torch.cat([prompt(6, 1, seed=1), torch.nn.functional.pad(prompt(3, 1, seed=2), (3, 0), value=77)]).to(device)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "return_dict_in_generate": True, "output_hidden_states": True, **GREEDY}
    given = on(device, video(2, 4))
    plain, graphed = (model.generate(ids, **given, disable_compile=d, **options) for d in (True, False))
    assert torch.equal(plain.sequences, graphed.sequences) and made[0]._graph is not None
    for ours, theirs in zip(graphed.hidden_states[1:], plain.hidden_states[1:]):
        torch.testing.assert_close(ours, theirs)
    sampled = []
    for disabled in (True, False):
        torch.manual_seed(0)
        options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 6, "disable_compile": disabled}
        sampled.append(model.generate(ids, attention_mask=mask, **given, **options))
    assert torch.equal(*sampled) and made[-1]._graph is not None


def test_where_a_recording_does_not_fit(model, device, made):
    ids = prompt(5).to(device)
    for options in ({"num_beams": 2}, {"disable_compile": True}, {"max_new_tokens": 1}):
        model.generate(ids, **GREEDY | options)
    assert all(step._graph is None for step in made)
    seen = []
    hook = model.model.language_model.layers[0].register_forward_hook(lambda *args: seen.append(1))
    model.generate(ids, **GREEDY)
    hook.remove()
    assert len(seen) == 8 and all(step._graph is None for step in made)
    model.generate(ids, prefill_chunk_size=2, **GREEDY)
    decoding, prefill = made[-2:]
    assert decoding._graph is not None and prefill._graph is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bfloat16_with_the_fused_kernels_on_a_gpu():
    model = tiny_model(head_dim=32, state_size=32).bfloat16().cuda()
    ids = prompt(5, 1).cuda()
    given = on("cuda", video(6))
    given["pixel_values_videos"] = given["pixel_values_videos"].bfloat16()
    plain, graphed = (model.generate(ids, **given, disable_compile=d, **GREEDY) for d in (True, False))
    assert torch.equal(plain, graphed)
