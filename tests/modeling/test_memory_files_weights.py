"""A memory is asked by the weights that made it, in whatever dtype and place, and by no others."""

import copy
import functools

import pytest
import torch
from torch import nn

from vamba.modeling import StateMemory, VideoMemory
from vamba.modeling.memory_files import WeightsFingerprint, are_same_weights

import tiny_vamba
import tiny_video_ma2mba


kinds = pytest.mark.parametrize("kind", ["vamba", "video-ma2mba"])
OTHERS = "made with other weights"


def make(kind):
    """A model, a video for it, a prompt about it, and the kind of its memory."""
    if kind == "video-ma2mba":
        given = tiny_video_ma2mba.video(3)
        return tiny_video_ma2mba.tiny_model(), [*given.values()], tiny_video_ma2mba.prompt(5, 1), StateMemory
    return tiny_vamba.tiny_model(), [*tiny_vamba.media((3, 4, 6))], tiny_vamba.prompt(5), VideoMemory


def ask(model, ids, memory):
    return model.generate(ids, past_key_values=memory.fork(), max_new_tokens=2, do_sample=False)


class ThroughData(torch.optim.SGD):
    """Writes past the counters of versions, as DeepSpeed and bitsandbytes do."""

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad.sign(), alpha=-group["lr"])


def train_a_step(model, ids, video, optimizer=torch.optim.AdamW):
    model.train()
    names = "pixel_values_videos", "video_grid_thw"
    model(ids, labels=ids, **dict(zip(names, video))).loss.backward()
    optimizer(model.parameters(), lr=1e-5).step()
    model.eval()


def fingerprint(model):
    return WeightsFingerprint().of([model])


@kinds
@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.AdamW, functools.partial(torch.optim.AdamW, fused=True), ThroughData],
    ids=["plain", "fused", "data"],
)
def test_a_step_of_training_makes_a_memory_stale(kind, optimizer, tmp_path):
    model, video, ids, memories = make(kind)
    memory = model.encode_video(*video)
    memory.save(tmp_path / "talk")
    answer = ask(model, ids, memory)
    train_a_step(model, ids if kind == "video-ma2mba" else tiny_vamba.prompt(5, 1), video, optimizer)
    for stale in (memory, memory.fork(), memories.load(tmp_path / "talk"), copy.deepcopy(memory)):
        with pytest.raises(ValueError, match=OTHERS):
            ask(model, ids, stale)
        before = repr(stale)
        with pytest.raises(ValueError, match=OTHERS):
            model.encode_video(*video, memory=stale)
        assert repr(stale) == before
    ask(model, ids, model.encode_video(*video))
    ask(copy.deepcopy(model), ids, model.encode_video(*video))  # as another process would load the weights
    ask(model, ids, model.encode_video(*video, memory=(memory.reset(), memory)[1]))
    assert torch.equal(ask(make(kind)[0], ids, memories.load(tmp_path / "talk")), answer)  # the same weights elsewhere


def test_what_a_memory_does_not_depend_on_may_change():
    model, video, ids, _ = make("vamba")
    memory = model.encode_video(*video)
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight.add_(1)
        model.model.language_model.layers[0].cross_attn.q_proj.weight.add_(1)
    ask(model, ids, memory)
    with torch.no_grad():
        model.model.video_encoder.levels[0].k_proj.weight.add_(1)
    with pytest.raises(ValueError, match=OTHERS):
        ask(model, ids, memory)


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("second", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_same_weights_in_another_dtype(first, second):
    model = tiny_vamba.tiny_model()
    one, other = (fingerprint(copy.deepcopy(model).to(dtype)) for dtype in (first, second))
    assert are_same_weights(one, other) and are_same_weights(other, one)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    changed = fingerprint(model.to(second))
    assert not are_same_weights(one, changed) and not are_same_weights(changed, one)


@kinds
def test_a_memory_of_another_dtype_of_states_or_in_fp8_is_known_again(kind, tmp_path):
    model, video, ids, memories = make(kind)
    memory = model.encode_video(*video).to("cpu")
    if kind == "vamba":
        memory.to(dtype=torch.float8_e4m3fn)
    memory.save(tmp_path / "small")
    ask(copy.deepcopy(model), ids, memories.load(tmp_path / "small"))


class Quantised(nn.Parameter):
    """As bitsandbytes and torchao have them: a subclass, whatever its numbers mean."""


def test_weights_that_cannot_be_read_are_not_compared():
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    known, buffers = fingerprint(plain), copy.deepcopy(plain)
    quantised = copy.deepcopy(plain)
    quantised[1].weight = Quantised(torch.zeros(8, 8))
    del buffers[1].weight
    buffers[1].register_buffer("qweight", torch.zeros(8, 1, dtype=torch.int32))
    for module in (quantised, buffers, plain.to("meta")):
        assert are_same_weights(known, fingerprint(module)) and are_same_weights(fingerprint(module), known)
    with torch.no_grad():
        quantised[0].weight.add_(1)
    assert not are_same_weights(known, fingerprint(quantised))


def test_adapters_count_where_they_act():
    peft = pytest.importorskip("peft")
    model, video, ids, _ = make("vamba")
    memory = model.encode_video(*video)
    lora = peft.LoraConfig(target_modules=r".*video_encoder.*in_proj", init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), lora)
    with pytest.raises(ValueError, match=OTHERS):
        ask(adapted, ids, memory)
    with adapted.disable_adapter():
        ask(adapted, ids, memory)
    own = adapted.base_model.model.encode_video(*video)
    ask(adapted, ids, own)
    adapted.add_adapter("second", lora)
    adapted.set_adapter("second")
    with pytest.raises(ValueError, match=OTHERS):
        ask(adapted, ids, own)
    adapted.set_adapter("default")
    ask(adapted, ids, own)  # whatever other adapters wait beside the one that acts
    of_text = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=r".*self_attn.q_proj"))
    ask(of_text, ids, memory)  # reads what the encoder made


def test_copies_of_modules_count_where_they_stand_in():
    peft = pytest.importorskip("peft")
    model, video, ids, _ = make("vamba")
    memory = model.encode_video(*video)
    lora = peft.LoraConfig(target_modules=r".*self_attn.q_proj", modules_to_save=["merger"])
    adapted = peft.get_peft_model(copy.deepcopy(model), lora)
    ask(adapted, ids, memory)  # the copy is still equal
    with torch.no_grad():
        adapted.base_model.model.model.visual.merger.modules_to_save["default"].mlp[0].weight.add_(1)
    with pytest.raises(ValueError, match=OTHERS):
        ask(adapted, ids, memory)
    with adapted.disable_adapter():
        ask(adapted, ids, memory)


def test_in_training_weights_are_not_read():
    model, video, _, _ = make("vamba")
    given = {"pixel_values_videos": video[0], "video_grid_thw": video[1]}
    assert model.train()(tiny_vamba.prompt(5, 1), **given, use_cache=True).past_key_values.made_by is None
    with torch.no_grad():
        assert model.eval()(tiny_vamba.prompt(5, 1), **given, use_cache=True).past_key_values.made_by


@kinds
def test_what_a_memory_holds_is_said(kind):
    model, video, ids, memories = make(kind)
    assert repr(memories(model.config)) == f"{memories.__name__}(0 frames, 0 video tokens, 0 text tokens, 0 bytes)"
    memory = model.encode_video(*video)
    frames, tokens, text = (6, 18, 0) if kind == "vamba" else (3, 12, 1)
    holds = f"{tokens} video tokens, {text} text tokens, {memory.video_nbytes} bytes, cpu, torch.float32)"
    assert repr(memory) == f"{memories.__name__}({frames} frames, {holds}"
    memory.seconds = 12.5
    assert repr(memory.fork()) == f"{memories.__name__}({frames} frames (12.5 s), {holds}"
    assert model.encode_video(*video, memory=memory).seconds is None
