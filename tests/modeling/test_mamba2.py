"""The Mamba-2 mixer against transformers' own, and against itself cut, stepped, padded and in bfloat16."""

import importlib.util

import pytest
import torch
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as TransformersMixer

from vamba.modeling import VambaMamba2Config
from vamba.modeling.mamba2 import Mamba2Block, Mamba2Mixer, init_mamba2_mixer


SIZES = {"hidden_size": 32, "state_size": 8, "head_dim": 16, "n_groups": 2, "expand": 2, "chunk_size": 8}


def mixer(dtype=torch.float64, **changes) -> Mamba2Mixer:
    made = Mamba2Mixer(VambaMamba2Config(**{**SIZES, **changes})).to(dtype)
    init_mamba2_mixer(made, num_layers=4)
    with torch.no_grad():
        made.norm.weight.add_(torch.randn_like(made.norm.weight) * 0.2)
        made.D.add_(torch.randn_like(made.D) * 0.2)
        made.in_proj.weight.mul_(20)
    return made


@pytest.mark.skipif(
    importlib.util.find_spec("mamba_ssm") is not None, reason="transformers takes CPU tensors to CUDA kernels"
)
def test_equals_transformers_mixer():
    """One group, as transformers' gated norm knows no groups; transformers computes the scan in float32."""
    ours = mixer(torch.float32, n_groups=1)
    config = Mamba2Config(
        **{**SIZES, "n_groups": 1}, num_heads=4, conv_kernel=4, use_bias=False, use_conv_bias=True,
        time_step_limit=(0.0, float("inf")), layer_norm_epsilon=1e-5, rms_norm=True,
    )  # fmt: skip
    theirs = TransformersMixer(config, layer_idx=0)
    missing = theirs.load_state_dict(ours.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    x = torch.randn(2, 19, 32)
    torch.testing.assert_close(ours(x)[0], theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [(1,) * 21, (8, 13), (20, 1), (3, 9, 9)])
def test_a_cut_sequence_gives_the_same(cuts):
    layer, x = mixer(), torch.randn(2, 21, 32, dtype=torch.float64)
    whole, final = layer(x)
    pieces, state = [], None
    for piece in x.split(cuts, 1):
        y, state = layer(piece, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-12)
    for a, b in zip(state, final):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradients_pass_through_the_state():
    layer, x = mixer(), torch.randn(1, 13, 32, dtype=torch.float64, requires_grad=True)
    first, state = layer(x[:, :5])
    second, _ = layer(x[:, 5:], state)
    parameters = [x, *layer.parameters()]
    cut = torch.autograd.grad(torch.cat([first, second], 1).pow(2).sum(), parameters)
    whole = torch.autograd.grad(layer(x)[0].pow(2).sum(), parameters)
    for a, b in zip(cut, whole):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_padded_rows_equal_each_row_alone():
    layer, lengths = mixer(), [13, 1, 0, 6]
    x = torch.randn(4, 13, 32, dtype=torch.float64)
    start = layer(torch.randn(4, 5, 32, dtype=torch.float64))[1]
    y, state = layer(x, start, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        alone = type(start)(*(t[row : row + 1] for t in start))
        if length:
            y_row, alone = layer(x[row : row + 1, :length], alone)
            torch.testing.assert_close(y[row : row + 1, :length], y_row, rtol=1e-10, atol=1e-12)
        for a, b in zip(state, alone):
            torch.testing.assert_close(a[row : row + 1], b, rtol=1e-10, atol=1e-12)


def test_bfloat16_stays_close_to_float32():
    exact = mixer(torch.float32)
    rounded = mixer(torch.float32)
    rounded.load_state_dict(exact.state_dict())
    for name, parameter in rounded.named_parameters():
        if name not in ("A_log", "D", "dt_bias"):
            parameter.data = parameter.data.bfloat16()
    x = torch.randn(1, 40, 32)
    y, state = rounded(x.bfloat16())
    expected, _ = exact(x)
    assert y.dtype == torch.bfloat16 and state.ssm_BHPK.dtype == torch.float32
    assert (y.float() - expected).norm() / expected.norm() < 2e-2


def test_time_step_limit_clamps():
    layer, x = mixer(time_step_limit=(0.0, 1e-3)), torch.randn(1, 9, 32, dtype=torch.float64)
    free = Mamba2Mixer(VambaMamba2Config(**SIZES)).double()
    free.load_state_dict(layer.state_dict())
    assert not torch.allclose(layer(x)[0], free(x)[0])
    assert layer._step_sizes(torch.full((1, 2, 4), 9.0, dtype=torch.float64), None).max() == 1e-3


def test_block_is_a_pre_norm_residual():
    block = Mamba2Block(VambaMamba2Config(**SIZES)).double()
    x = torch.randn(1, 7, 32, dtype=torch.float64)
    y, _ = block(x)
    torch.testing.assert_close(y - x, block.mixer(block.norm(x))[0], rtol=1e-9, atol=1e-12)


def test_initialisation_follows_the_original():
    config = VambaMamba2Config(hidden_size=512, head_dim=8, state_size=64)
    layer = Mamba2Mixer(config)
    init_mamba2_mixer(layer, num_layers=16)
    dt = torch.nn.functional.softplus(layer.dt_bias)
    assert 0.001 <= dt.min() and dt.max() <= 0.1001 and dt.log().std() > 1.0
    A = layer.A_log.exp()
    assert 1 <= A.min() and A.max() <= 16 and 7 < A.mean() < 10
    assert abs(layer.in_proj.weight.std() - 0.02) < 1e-3
    bound = 1 / 1024**0.5 / 16**0.5  # kaiming_uniform(a=sqrt 5) is U(+-1/sqrt(fan_in)), over sqrt(layers)
    assert 0.99 * bound < layer.out_proj.weight.abs().max() <= bound
    assert 0.49 < layer.conv1d.weight.abs().max() <= 0.5
    assert (layer.D == 1).all() and (layer.norm.weight == 1).all()
