"""The residual stream's kernels against plain operations in float64; on a GPU, or in Triton's interpreter."""

import pytest
import torch
from torch import nn
from triton_interpreter import DEVICE, on_a_gpu, run_interpreted

import vamba.modeling.residual_norm_triton as room
from vamba.modeling.mamba2 import Mamba2Block, VambaMamba2Config
from vamba.modeling.residual_norm_triton import add_to_residual, residual_norm


def test_in_the_interpreter():
    run_interpreted(__file__)


def results(hidden, weight, mixed, backend) -> list[torch.Tensor]:
    """The sum, the norm, and the gradients of a weighted sum of both."""
    norm = nn.RMSNorm(len(weight), eps=1e-3).to(weight)
    norm.weight.data = weight.clone()
    leaves = [t.clone().requires_grad_() for t in (hidden, mixed)]
    residual, normed = residual_norm(leaves[0], norm, backend)
    outputs = [add_to_residual(residual, leaves[1], backend), normed]
    torch.manual_seed(1)
    total = sum((out * torch.randn(out.shape).bfloat16().to(out)).sum() for out in outputs)
    total.backward(retain_graph=True)
    first = leaves[0].grad.clone()
    leaves[0].grad = leaves[1].grad = norm.weight.grad = None
    total.backward()
    assert torch.equal(leaves[0].grad, first)
    return [*outputs, *(leaf.grad for leaf in leaves), norm.weight.grad]


@on_a_gpu
@pytest.mark.parametrize(
    ("stream", "weights", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-6),
        (torch.float32, torch.bfloat16, 1e-2),
        (torch.bfloat16, torch.bfloat16, 1e-2),
        (torch.bfloat16, torch.float32, 1e-2),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(2, 5, 48), (1, 300, 32), (1, 1, 64), (2, 0, 16)], ids=str)
def test_values_and_gradients(shape, stream, weights, tolerance):
    torch.manual_seed(0)
    hidden, mixed = torch.randn(shape).to(stream), torch.randn(shape).to(weights)
    weight = torch.randn(shape[-1]).to(weights)
    actual = results(hidden.to(DEVICE), weight.to(DEVICE), mixed.to(DEVICE), "triton")
    rounded = hidden.to(weights).double() if weights != torch.float32 else hidden.double()
    expected = results(rounded, weight.double(), mixed.double(), "torch")
    expected[0] += hidden.double() - rounded  # what the norm rounds goes on unrounded
    dtypes = [torch.promote_types(stream, weights), weights, stream, weights, weights]
    for value, exact, dtype in zip(actual, expected, dtypes):
        assert value.dtype == dtype and value.shape == exact.shape
        assert (value.double().cpu() - exact).norm() <= tolerance * exact.norm().clamp(min=1e-30)


@on_a_gpu
def test_the_norm_is_the_same_without_gradient():
    torch.manual_seed(0)
    hidden, norm = torch.randn(3, 7, 32, device=DEVICE), nn.RMSNorm(32, eps=1e-5).to(DEVICE, torch.bfloat16)
    with torch.no_grad():
        same, plain = residual_norm(hidden, norm, "triton")
    assert same is hidden and torch.equal(plain, residual_norm(hidden, norm, "triton")[1])


@on_a_gpu
def test_a_hook_an_adapter_or_float64_takes_the_plain_way(monkeypatch):
    norm, hidden = nn.RMSNorm(16, eps=1e-5).to(DEVICE), torch.randn(1, 3, 16, device=DEVICE)
    expected = norm(hidden)
    monkeypatch.setattr(room, "_norm", None)
    with pytest.raises(TypeError):
        residual_norm(hidden, norm, "triton")
    assert torch.equal(residual_norm(hidden, norm, "torch")[1], expected)
    assert residual_norm(hidden.double(), norm.double(), "triton")[1].dtype == torch.float64
    norm.float().register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.equal(residual_norm(hidden, norm, "triton")[1], 2 * expected)


@on_a_gpu
def test_a_block_goes_through_the_kernels(monkeypatch):
    calls = []
    norm, add = room._norm, room._AddToResidual.apply
    monkeypatch.setattr(room, "_norm", lambda *args, **options: (calls.append("norm"), norm(*args, **options))[1])
    monkeypatch.setattr(room._AddToResidual, "apply", lambda *args: (calls.append("add"), add(*args))[1])
    backends = dict.fromkeys(("ssd_backend", "conv_backend", "norm_backend"), "triton")
    config = VambaMamba2Config(hidden_size=32, state_size=16, head_dim=16, chunk_size=16, **backends)
    block = Mamba2Block(config).to(DEVICE, torch.bfloat16)
    out, _ = block(torch.randn(1, 5, 32, device=DEVICE))
    assert calls == ["norm", "add"] and out.dtype == torch.float32
