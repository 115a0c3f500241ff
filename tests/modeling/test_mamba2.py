"""Mamba-2's parts against plain judges, and the mixer against transformers' own and itself cut, stepped and padded.

The convolution is set against torch's conv1d, the scan against a float64 recurrence, token by token: outputs, states
and every gradient.
"""

import importlib.util

import pytest
import torch
from torch.nn import functional as F
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as TransformersMixer
from triton_interpreter import relative

from vamba.modeling import VambaMamba2Config, causal_conv1d, ssd_scan
from vamba.modeling.mamba2 import CONV_BACKENDS, SSD_BACKENDS, Mamba2Block, Mamba2Mixer, init_mamba2_mixer


SIZES = {"hidden_size": 32, "state_size": 8, "head_dim": 16, "n_groups": 2, "expand": 2, "chunk_size": 8}


def convolution(x, weight, bias, state):
    """The convolution's judge, torch's own."""
    x_BCS = torch.cat([state, x], 1).transpose(1, 2)
    return F.silu(F.conv1d(x_BCS, weight.unsqueeze(1), bias, groups=x.shape[2])).transpose(1, 2)


def convolution_inputs(S, dtype=torch.float64, device="cpu", channels=10):
    shapes = [(2, S, channels), (channels, 4), (channels,), (2, 3, channels)]
    return [torch.randn(*s, dtype=torch.float64).to(dtype).to(device).requires_grad_() for s in shapes]


@pytest.mark.parametrize("S", [1, 2, 3, 17])
def test_convolution_equals_torch_with_every_gradient(S):
    tensors = convolution_inputs(S)
    weights = torch.randn(2, S, 10, dtype=torch.float64)
    y, state = causal_conv1d(*tensors)
    expected = convolution(*tensors)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, torch.cat([tensors[3], tensors[0]], 1)[:, -3:])
    gradients, judged = (torch.autograd.grad((out * weights).sum(), tensors) for out in (y, expected))
    for a, b in zip(gradients, judged):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_state_of_a_convolution_carries_gradients():
    x, weight, bias, state = convolution_inputs(6)
    first, middle = causal_conv1d(x[:, :2], weight, bias, state)
    second, _ = causal_conv1d(x[:, 2:], weight, bias, middle)
    whole, _ = causal_conv1d(x, weight, bias, state)
    (a,) = torch.autograd.grad(torch.cat([first, second], 1).pow(2).sum(), x)
    (b,) = torch.autograd.grad(whole.pow(2).sum(), x)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cuts", [(1,) * 11, (2, 9), (10, 1), (3, 3, 5)])
def test_a_cut_convolution_gives_the_same(cuts):
    x, weight, bias, state = convolution_inputs(11)
    whole, final = causal_conv1d(x, weight, bias, state)
    pieces = []
    for piece in x.split(cuts, 1):
        y, state = causal_conv1d(piece, weight, bias, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("lengths", [(7, 2), (0, 7), (1, 3)])
def test_padded_rows_keep_the_state_of_their_own_end(lengths):
    x, weight, bias, state = convolution_inputs(7)
    _, actual = causal_conv1d(x, weight, bias, state, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        expected = torch.cat([state[row], x[row, :length]])[-3:]
        torch.testing.assert_close(actual[row], expected)


def test_convolution_without_state_and_bias():
    x, weight, _, state = convolution_inputs(5)
    y, _ = causal_conv1d(x, weight)
    torch.testing.assert_close(y, convolution(x, weight, None, torch.zeros_like(state)), rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", list(CONV_BACKENDS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("S", [1, 100, 513])
def test_convolution_on_the_gpu(backend, dtype, tolerance, S):
    if backend == "causal_conv1d":
        pytest.importorskip("causal_conv1d")
    tensors = convolution_inputs(S, dtype, "cuda", channels=256)
    y, _ = causal_conv1d(*tensors, backend=backend)
    exact = [t.detach().double().cpu().requires_grad_() for t in tensors]
    expected = convolution(*exact)
    gradients = torch.autograd.grad(y.float().pow(2).sum(), tensors)
    judged = torch.autograd.grad(expected.pow(2).sum(), exact)
    for a, b in zip((y, *gradients), (expected, *judged)):
        assert (a.double().cpu() - b).norm() / b.norm() < tolerance


def recurrence(x, dt, A, Bm, C, D, state):
    """The judge: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t, in the inputs' dtype."""
    ys = []
    for t in range(x.shape[1]):
        B_t, C_t = (m[:, t].repeat_interleave(x.shape[2] // m.shape[2], 1) for m in (Bm, C))
        decay = (dt[:, t] * A).exp()[..., None, None]
        state = state * decay + (dt[:, t, :, None] * x[:, t])[..., None] * B_t[:, :, None]
        ys.append((state * C_t[:, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(ys, 1), state


def scan_inputs(S, dtype=torch.float64, device="cpu", heads=6, groups=2, head_dim=4, state=8):
    def make(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    tensors = (
        make(2, S, heads, head_dim),
        torch.rand(2, S, heads, dtype=torch.float64),
        -torch.rand(heads, dtype=torch.float64) * 4,
        make(2, S, groups, state),
        make(2, S, groups, state),
        make(heads),
        make(2, heads, head_dim, state),
    )
    return [t.to(dtype).to(device).requires_grad_() for t in tensors]


def with_gradients(function, tensors):
    y, state = function(*tensors)
    torch.manual_seed(1)
    weights = torch.randn(y.shape, dtype=torch.float64), torch.randn(state.shape, dtype=torch.float64)
    loss = sum((out.double().cpu() * w).sum() for out, w in zip((y, state), weights))
    return y, state, torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("S", [1, 2, 7, 16, 37])
@pytest.mark.parametrize("chunk_size", [1, 8, 16, 64])
def test_scan_equals_the_recurrence_with_every_gradient(S, chunk_size):
    tensors = scan_inputs(S)
    expected = with_gradients(recurrence, tensors)
    actual = with_gradients(lambda *t: ssd_scan(*t, chunk_size=chunk_size), tensors)
    for a, b in zip((*actual[:2], *actual[2]), (*expected[:2], *expected[2])):
        assert relative(a, b) < 1e-12


@pytest.mark.parametrize("cuts", [(1, 36), (16, 21), (5, 5, 27), (37,)])
def test_a_cut_scan_gives_the_same(cuts):
    x, dt, A, Bm, C, D, state = scan_inputs(37)
    whole, final = ssd_scan(x, dt, A, Bm, C, D, state, chunk_size=8)
    pieces = []
    for part in zip(*(t.split(cuts, 1) for t in (x, dt, Bm, C))):
        y, state = ssd_scan(part[0], part[1], A, part[2], part[3], D, state, chunk_size=8)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def test_tokens_with_dt_zero_leave_the_state_alone():
    x, dt, A, Bm, C, D, state = scan_inputs(20)
    with torch.no_grad():
        dt[:, 12:] = 0
    _, final = ssd_scan(x, dt, A, Bm, C, D, state, chunk_size=8)
    _, expected = ssd_scan(x[:, :12], dt[:, :12], A, Bm[:, :12], C[:, :12], D, state, chunk_size=8)
    torch.testing.assert_close(final, expected, rtol=0, atol=1e-14)


def test_strong_decay_gives_finite_gradients():
    """exp of a large positive difference above the diagonal must not turn into inf * 0."""
    tensors = scan_inputs(64, torch.float32)
    with torch.no_grad():
        tensors[1].fill_(50.0)
    _, _, gradients = with_gradients(lambda *t: ssd_scan(*t, chunk_size=32), tensors)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_scan_in_lower_precision(dtype, tolerance):
    """The inputs are rounded, the scan itself computes in float32."""
    tensors = scan_inputs(37, dtype)
    tensors[1], tensors[2] = (t.detach().float() for t in tensors[1:3])
    y, state = ssd_scan(*tensors, chunk_size=16)
    expected, final = recurrence(*(t.detach().double() for t in tensors))
    assert y.dtype == dtype and state.dtype == torch.float32
    assert relative(y, expected) < tolerance and relative(state, final) < 1e-5


def test_no_state_means_zeros_and_no_skip_means_none():
    x, dt, A, Bm, C, D, state = scan_inputs(9)
    y, _ = ssd_scan(x, dt, A, Bm, C)
    expected, _ = recurrence(x, dt, A, Bm, C, torch.zeros_like(D), torch.zeros_like(state))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", list(SSD_BACKENDS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("S", [1, 100, 513])
def test_scan_on_the_gpu(backend, dtype, tolerance, S):
    """mamba-ssm multiplies float32 in TF32, hence the tolerance."""
    if backend == "mamba_ssm":
        pytest.importorskip("mamba_ssm")
    tensors = scan_inputs(S, dtype, "cuda", heads=8, groups=1, head_dim=64, state=128)
    for i in (1, 2, 5, 6):
        tensors[i] = tensors[i].detach().float().requires_grad_()
    expected = with_gradients(recurrence, [t.detach().double().cpu().requires_grad_() for t in tensors])
    actual = with_gradients(lambda *t: ssd_scan(*t, chunk_size=256, backend=backend), tensors)
    for a, b in zip((*actual[:2], *actual[2]), (*expected[:2], *expected[2])):
        assert relative(a, b) < tolerance


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
def test_a_cut_mixer_gives_the_same(cuts):
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
