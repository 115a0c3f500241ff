"""conversion/initialization.py: the distributions of the original, one generator per key."""

import math
import re

import pytest
import torch
from torch.nn import functional as F

from vamba.conversion.initialization import fresh_tensor
from vamba.conversion.vamba_family import FRESH
from vamba.modeling.configuration_vamba import VambaConfig
from vamba.modeling.mamba2 import Mamba2Block


CONFIG = VambaConfig(
    text_config={"hidden_size": 256, "num_hidden_layers": 9, "num_attention_heads": 4, "num_key_value_heads": 2},
    vision_config={"model_type": "qwen2_vl_vision", "hidden_size": 256},
    mamba_config={"hidden_size": 256, "head_dim": 1, "A_init_bounds": (2, 9), "initializer_range": 0.05},
)
LAYER = "model.video_encoder.levels.3.block."


SHAPES = {name: tuple(tensor.shape) for name, tensor in Mamba2Block(CONFIG.mamba_config).state_dict().items()}


def is_fresh(key):
    return re.fullmatch(FRESH, key) is not None


def fresh(name, seed=0, layer=LAYER):
    return fresh_tensor(layer + name, SHAPES[name], CONFIG, seed)


def test_every_tensor_of_a_block_has_a_rule():
    for name, shape in SHAPES.items():
        tensor = fresh(name)
        assert tensor.shape == shape and tensor.dtype == torch.float32 and tensor.isfinite().all(), name


def test_distributions():
    # 10 standard errors and more; each bound below fails if the scale is off by a few percent
    in_proj = fresh("mixer.in_proj.weight")
    assert in_proj.std().item() == pytest.approx(0.05, rel=0.02) and abs(in_proj.mean()) < 1e-3
    for name in ("mixer.conv1d.weight", "mixer.conv1d.bias"):
        assert 0.49 < fresh(name).abs().max() <= 0.5, name  # 1/sqrt(4)
        assert fresh(name).std().item() == pytest.approx(0.5 / math.sqrt(3), rel=0.1), name
    bound = 1 / math.sqrt(512) / math.sqrt(9)  # fan_in 512, nine layers
    out_proj = fresh("mixer.out_proj.weight")
    assert 0.99 * bound < out_proj.abs().max() <= bound
    assert out_proj.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    dt = F.softplus(fresh("mixer.dt_bias")).log()
    low, high = math.log(0.001), math.log(0.1)
    assert dt.min() > low - 1e-3 and dt.max() < high + 1e-3
    assert dt.mean().item() == pytest.approx((low + high) / 2, abs=0.3)
    A = fresh("mixer.A_log").exp()
    assert 2 <= A.min() < 2.2 and 8.8 < A.max() <= 9.0001
    for name in ("mixer.D", "mixer.norm.weight", "norm.weight"):
        assert (fresh(name) == 1).all()


def test_dt_is_clamped_from_below():
    config = VambaConfig(
        text_config=CONFIG.text_config,
        vision_config=CONFIG.vision_config,
        mamba_config={"hidden_size": 256, "head_dim": 1, "time_step_floor": 0.05},
    )
    dt = F.softplus(fresh_tensor(LAYER + "mixer.dt_bias", (512,), config, 0))
    assert dt.min().item() == pytest.approx(0.05, rel=1e-4)
    assert (dt - 0.05).abs().lt(1e-5).float().mean() > 0.5  # of U(log 0.001, log 0.1), 85% lie below


def test_alpha_is_one_half():
    key = "model.language_model.layers.0.alpha"
    assert is_fresh(key) and fresh_tensor(key, (1,), CONFIG, 0).tolist() == [0.5]


def test_values_depend_on_key_and_seed_only():
    name = "mixer.in_proj.weight"
    first = fresh(name)
    torch.manual_seed(99)
    assert torch.equal(first, fresh(name))
    assert not torch.equal(first, fresh(name, seed=1))
    assert not torch.equal(first, fresh(name, layer="model.video_encoder.levels.4.block."))


@pytest.mark.parametrize(
    "key", ["lm_head.weight", "model.language_model.layers.0.mlp.up_proj.weight", "model.visual.merger.ln_q.bias"]
)
def test_qwen2_vls_own_tensors_are_never_made_up(key):
    assert not is_fresh(key)
    with pytest.raises(KeyError, match=key):
        fresh_tensor(key, (1,), CONFIG, 0)


def test_a_tensor_without_a_rule_is_refused():
    with pytest.raises(KeyError, match="surprise"):
        fresh_tensor(LAYER + "mixer.surprise", (1,), CONFIG, 0)
