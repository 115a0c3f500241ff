"""The convolution against torch's own conv1d, whole, cut in pieces, token by token, and with padded rows."""

import pytest
import torch
from torch.nn import functional as F

from vamba.modeling.causal_conv1d import BACKENDS, causal_conv1d


C, W = 10, 4


def judge(x_BSC, weight, bias, state_BTC):
    x_BCS = torch.cat([state_BTC, x_BSC], 1).transpose(1, 2)
    return F.silu(F.conv1d(x_BCS, weight.unsqueeze(1), bias, groups=x_BSC.shape[2])).transpose(1, 2)


def inputs(S, dtype=torch.float64, device="cpu", channels=C):
    shapes = [(2, S, channels), (channels, W), (channels,), (2, W - 1, channels)]
    return [torch.randn(*s, dtype=torch.float64).to(dtype).to(device).requires_grad_() for s in shapes]


@pytest.mark.parametrize("S", [1, 2, 3, 17])
def test_equals_torch_with_every_gradient(S):
    tensors = inputs(S)
    weights = torch.randn(2, S, C, dtype=torch.float64)
    y, state = causal_conv1d(*tensors)
    expected = judge(*tensors)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, torch.cat([tensors[3], tensors[0]], 1)[:, -3:])
    gradients, judged = (torch.autograd.grad((out * weights).sum(), tensors) for out in (y, expected))
    for a, b in zip(gradients, judged):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_state_carries_gradients():
    x, weight, bias, state = inputs(6)
    first, middle = causal_conv1d(x[:, :2], weight, bias, state)
    second, _ = causal_conv1d(x[:, 2:], weight, bias, middle)
    whole, _ = causal_conv1d(x, weight, bias, state)
    (a,) = torch.autograd.grad(torch.cat([first, second], 1).pow(2).sum(), x)
    (b,) = torch.autograd.grad(whole.pow(2).sum(), x)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cuts", [(1,) * 11, (2, 9), (10, 1), (3, 3, 5)])
def test_a_cut_sequence_gives_the_same(cuts):
    x, weight, bias, state = inputs(11)
    whole, final = causal_conv1d(x, weight, bias, state)
    pieces = []
    for piece in x.split(cuts, 1):
        y, state = causal_conv1d(piece, weight, bias, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("lengths", [(7, 2), (0, 7), (1, 3)])
def test_padded_rows_keep_the_state_of_their_own_end(lengths):
    x, weight, bias, state = inputs(7)
    _, actual = causal_conv1d(x, weight, bias, state, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        expected = torch.cat([state[row], x[row, :length]])[-3:]
        torch.testing.assert_close(actual[row], expected)


def test_without_state_and_bias():
    x, weight, _, state = inputs(5)
    y, _ = causal_conv1d(x, weight)
    torch.testing.assert_close(y, judge(x, weight, None, torch.zeros_like(state)), rtol=1e-12, atol=1e-12)


def test_unknown_and_missing_backends_say_what_to_do():
    with pytest.raises(ValueError, match=r"'nope'.*'auto', 'torch'"):
        causal_conv1d(*inputs(3)[:2], backend="nope")
    with pytest.raises(ValueError, match="runs on a GPU"):
        causal_conv1d(*(t.float() for t in inputs(3)[:2]), backend="triton")
    try:
        import causal_conv1d as _  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install"):
            causal_conv1d(*inputs(3)[:2], backend="causal_conv1d")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("S", [1, 100, 513])
def test_on_the_gpu(backend, dtype, tolerance, S):
    if backend == "causal_conv1d":
        pytest.importorskip("causal_conv1d")
    tensors = inputs(S, dtype, "cuda", channels=256)
    y, _ = causal_conv1d(*tensors, backend=backend)
    exact = [t.detach().double().cpu().requires_grad_() for t in tensors]
    expected = judge(*exact)
    gradients = torch.autograd.grad(y.float().pow(2).sum(), tensors)
    judged = torch.autograd.grad(expected.pow(2).sum(), exact)
    for a, b in zip((y, *gradients), (expected, *judged)):
        assert (a.double().cpu() - b).norm() / b.norm() < tolerance
