"""The vision tower against transformers' own, which loops over the frames, and with kernels against float64.

The kernels run on a GPU, and without one in Triton's interpreter, which is chosen by an environment variable when
Triton is first imported: `test_in_the_interpreter` runs this file once more in a process of its own.
"""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from triton_interpreter import DEVICE, INTERPRETED, on_a_gpu, precisions, relative, run_interpreted

import vamba.modeling.vision_tower as vision_tower_module
from vamba.modeling.vision_tower import VambaVisionTower, frame_runs, vision_tower

from tiny_vamba import media, tiny_config, tiny_model


MIXED = [(1, 4, 6), (3, 6, 4), (2, 8, 4), (1, 2, 2)]
GRIDS = [[(5, 4, 6)], MIXED, [(2, 4, 4), (1, 2, 2), (2, 4, 4)]]


def judge(tower, dtype=None) -> Qwen2VisionTransformerPretrainedModel:
    """transformers' tower with the same weights; its keys are ours."""
    plain = Qwen2VisionTransformerPretrainedModel(tower.config).to(tower.device, dtype or tower.dtype).eval()
    plain.load_state_dict(tower.state_dict())
    return plain


def uneven_tower(**vision) -> VambaVisionTower:
    """A tower whose heads and width are no powers of two, with weights that leave their mark."""
    config = tiny_config().vision_config
    for name, value in {"embed_dim": 96, "num_heads": 2, "head_dim": None, **vision}.items():
        setattr(config, name, value)
    tower = vision_tower(config).eval()
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            parameter.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.2)
    return tower


@pytest.mark.parametrize("grids", GRIDS, ids=len)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_transformers_with_every_gradient(grids, attention):
    tower = tiny_model().model.visual.double()
    tower.set_attn_implementation(attention)
    pixels, grid = media(*grids)
    results = []
    for candidate in (tower, judge(tower)):
        candidate.zero_grad()
        output = candidate(pixels.double(), grid_thw=grid)
        output.pooler_output.pow(2).sum().backward()
        results.append([*output.to_tuple(), *(p.grad.clone() for p in candidate.parameters())])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # angles are float32


def test_frames_of_one_size_are_one_call(monkeypatch):
    model = tiny_model()
    calls, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *a, **k: calls.append(q.shape) or attend(q, *a, **k)
    )
    pixels, grid = media((6, 4, 6), (3, 6, 4), (2, 4, 4))
    model.get_video_features(pixels, grid)
    assert calls == [(9, 2, 24, 16), (2, 2, 16, 16)] * 2  # two blocks; 4 x 6 and 6 x 4 patches are equally many


def test_runs_join_neighbours_of_equal_size():
    assert frame_runs([[2, 4, 6], [3, 6, 4], [1, 2, 2], [1, 4, 6]]) == [(5, 24), (1, 4), (1, 24)]
    assert frame_runs([]) == []


def test_hidden_states_and_gradient_checkpointing_work_as_in_transformers():
    tower = tiny_model().model.visual
    pixels, grid = media(*MIXED)
    ours, theirs = (t(pixels, grid_thw=grid, output_hidden_states=True) for t in (tower, judge(tower)))
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    gradients = []
    for checkpointing in (False, True):
        tower = tiny_model().model.visual.train()
        if checkpointing:
            tower.activation_checkpointing_enable()
        tower(pixels, grid_thw=grid).pooler_output.pow(2).sum().backward()
        gradients.append([p.grad for p in tower.parameters()])
    torch.testing.assert_close(*gradients)


def test_a_block_is_not_split_over_devices():
    assert "VambaVisionBlock" in tiny_model()._no_split_modules


def test_another_activation_stays_as_it_is():
    tower = uneven_tower(hidden_act="gelu")
    assert type(tower.blocks[0].mlp.act).__name__ == "GELUActivation"
    pixels, grid = media(*MIXED)
    with torch.no_grad():
        ours, theirs = (t(pixels, grid_thw=grid).pooler_output for t in (tower, judge(tower)))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_disabled_attention_backends_stay_disabled():
    from torch.backends.cuda import cudnn_sdp_enabled, enable_cudnn_sdp, flash_sdp_enabled

    enable_cudnn_sdp(False)
    try:
        with vision_tower_module.cudnn_first():
            assert not cudnn_sdp_enabled() and flash_sdp_enabled()
    finally:
        enable_cudnn_sdp(True)
    assert cudnn_sdp_enabled()


def test_in_the_interpreter():
    run_interpreted(__file__, "-m", "gpu")


# --- kernels


@on_a_gpu
@precisions
@pytest.mark.parametrize("grids", GRIDS[:2], ids=len)
def test_fused_tower(grids, dtype, tolerance, monkeypatch):
    """Every kernel runs in every block, and the tower is as near to float64 as transformers' own."""
    tower = uneven_tower().to(DEVICE, dtype)
    pixels, grid = media(*grids)
    pixels, used = pixels.to(DEVICE, dtype), []
    for name in ("layer_norm_triton", "rotate_in_place_triton", "quick_gelu_triton"):
        kernel = getattr(vision_tower_module, name)
        monkeypatch.setattr(
            vision_tower_module, name, lambda *a, kernel=kernel: used.append(kernel.__name__) or kernel(*a)
        )
    with torch.no_grad():
        expected = judge(tower, torch.float64)(pixels.double(), grid_thw=grid.to(DEVICE)).pooler_output
        plain = judge(tower)(pixels, grid_thw=grid.to(DEVICE)).pooler_output
        fused = tower(pixels, grid_thw=grid).pooler_output
    assert len(used) == 8 and len(set(used)) == 3
    assert relative(fused, expected) < max(tolerance, 1.2 * relative(plain, expected))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("frames", [16, 17])
def test_attention_of_many_frames(frames, monkeypatch):
    """Whole chunks prefer cuDNN, which a number of frames that will not come again is not worth."""
    tower = uneven_tower(depth=1, embed_dim=160, num_heads=2).cuda().bfloat16()
    pixels, grid = media((frames, 32, 34))
    preferred, cudnn_first = [], vision_tower_module.cudnn_first
    monkeypatch.setattr(vision_tower_module, "cudnn_first", lambda: preferred.append(1) or cudnn_first())
    pixels = pixels.cuda().bfloat16()
    with torch.no_grad():
        expected = judge(tower, torch.float64)(pixels.double(), grid_thw=grid.cuda()).pooler_output
        assert relative(tower(pixels, grid_thw=grid).pooler_output, expected) < 2e-2
    assert len(preferred) == (frames == 16)


@on_a_gpu
@pytest.mark.parametrize("frozen", [False, True])
def test_with_gradients_only_what_records_none_is_fused(frozen, monkeypatch):
    tower = uneven_tower().to(DEVICE)
    tower.requires_grad_(not frozen)
    used, kernel = [], vision_tower_module.quick_gelu_triton
    monkeypatch.setattr(vision_tower_module, "quick_gelu_triton", lambda *a: used.append(1) or kernel(*a))
    pixels, grid = media(*MIXED)
    output = tower(pixels.to(DEVICE), grid_thw=grid).pooler_output
    assert output.requires_grad != frozen and len(used) == (2 if frozen else 0)
