"""The norms' kernels and the residual stream's against plain operations in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from triton_interpreter import DEVICE, PRECISIONS, compare, make, on_a_gpu, precisions, relative, run_interpreted

import vamba.modeling.kernels as kernels
import vamba.modeling.mamba2 as block_module
from vamba.modeling.kernels_norm import (
    FusedRMSNorm,
    add_to_residual_triton,
    gated_rms_norm_triton,
    layer_norm_triton,
    residual_norm_triton,
)
from vamba.modeling.mamba2 import Mamba2Block, VambaMamba2Config


def test_in_the_interpreter():
    run_interpreted(__file__, "-k", "not (residual_norm and 300 and float32)")


def gated_norm(y, gate, weight, groups):
    gated = (y * F.silu(gate)).unflatten(-1, (groups, -1))
    return (gated * (gated.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(-2) * weight


@on_a_gpu
@pytest.mark.parametrize(("S", "groups"), [(1, 1), (37, 2)])
@precisions
def test_gated_norm(S, groups, dtype, tolerance):
    tensors = make(2, S, 48, dtype=dtype), make(2, S, 112, dtype=dtype), make(48, dtype=dtype)
    compare(
        lambda y, wide, weight: gated_rms_norm_triton(y, wide[..., 16:64], weight, groups, 1e-5),
        lambda y, wide, weight: gated_norm(y, wide[..., 16:64], weight, groups),
        tensors,
        tolerance,
    )


@on_a_gpu
def test_gated_norm_with_more_rows_than_programs(monkeypatch):
    few_programs = kernels.tiles(torch.empty(0, device=DEVICE))._replace(norm_backward_programs=7)
    monkeypatch.setattr(kernels, "TILES", {9: few_programs})
    tensors = make(40, 1, 16), make(40, 1, 16), make(16)
    compare(lambda *t: gated_rms_norm_triton(*t, 1, 1e-5), lambda *t: gated_norm(*t, 1), tensors, PRECISIONS[0][1])


def norm_and_sum(hidden, weight, mixed, with_kernels: bool):
    if with_kernels:
        residual, normed = residual_norm_triton(hidden, weight, 1e-3)
        widens = residual.dtype == torch.float32 != mixed.dtype
        return normed, add_to_residual_triton(residual, mixed) if widens else residual + mixed
    return F.rms_norm(hidden, weight.shape, weight, 1e-3), hidden + mixed


def results(hidden, weight, mixed, with_kernels: bool) -> list[torch.Tensor]:
    """The norm, the sum, and the gradients of a weighted sum of both."""
    leaves = [t.detach().requires_grad_() for t in (hidden, mixed, weight)]
    outputs = norm_and_sum(leaves[0], leaves[2], leaves[1], with_kernels)
    torch.manual_seed(1)
    total = sum((out * torch.randn(out.shape).bfloat16().to(out)).sum() for out in outputs)
    gradients, again = (torch.autograd.grad(total, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(gradients, again))
    return [*outputs, *gradients]


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
def test_residual_norm(shape, stream, weights, tolerance):
    torch.manual_seed(0)
    hidden, mixed = torch.randn(*shape[:2], 2 * shape[2]).to(stream)[..., ::2], torch.randn(shape).to(weights)
    weight = torch.randn(shape[-1]).to(weights)
    actual = results(hidden.to(DEVICE), weight.to(DEVICE), mixed.to(DEVICE), with_kernels=True)
    rounded = hidden.double() if weights == torch.float32 else hidden.to(weights).double()
    expected = results(rounded, weight.double(), mixed.double(), with_kernels=False)
    expected[1] += hidden.double() - rounded  # what the norm rounds goes on unrounded
    dtypes = [weights, torch.promote_types(stream, weights), stream, weights, weights]
    for value, exact, dtype in zip(actual, expected, dtypes):
        assert value.dtype == dtype and value.shape == exact.shape
        assert (value.double().cpu() - exact).norm() <= tolerance * exact.norm().clamp(min=1e-30)


@on_a_gpu
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_wants_no_gradient_changes_none(frozen):
    torch.manual_seed(0)
    leaves = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((1, 7, 32), (32,), (1, 7, 32))]
    expected = torch.autograd.grad(sum(out.sum() for out in norm_and_sum(*leaves, with_kernels=True)), leaves)
    leaves[frozen].requires_grad_(False)
    sum(out.sum() for out in norm_and_sum(*leaves, with_kernels=True)).backward()
    for index, (leaf, gradient) in enumerate(zip(leaves, expected)):
        assert leaf.grad is None if index == frozen else torch.equal(leaf.grad, gradient)


@on_a_gpu
@pytest.mark.parametrize(("stream", "weights", "kept"), [("float32", "bfloat16", 2), ("bfloat16", "float32", 2)])
def test_the_narrower_of_both_is_kept_for_backward(stream, weights, kept):
    hidden, weight = torch.randn(1, 7, 32, dtype=getattr(torch, stream)), torch.ones(32, dtype=getattr(torch, weights))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append((t.shape, t.itemsize)), t)[1], lambda t: t):
        residual_norm_triton(hidden.to(DEVICE).requires_grad_(), weight.to(DEVICE), 1e-5)
    assert (hidden.shape, kept) in sizes and (hidden.shape, 4) not in sizes


@on_a_gpu
def test_the_norm_is_the_same_without_gradient():
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 7, 32, device=DEVICE), torch.ones(32, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        same, plain = residual_norm_triton(hidden, weight, 1e-5)
    assert same is hidden and torch.equal(plain, residual_norm_triton(hidden, weight, 1e-5)[1])


def block(backend: str = "triton") -> Mamba2Block:
    backends = dict.fromkeys(("ssd_backend", "conv_backend", "norm_backend"), backend)
    return Mamba2Block(VambaMamba2Config(hidden_size=32, state_size=16, head_dim=16, chunk_size=16, **backends))


@on_a_gpu
def test_a_block_goes_through_the_kernels(monkeypatch):
    calls = []
    for name in ("residual_norm_triton", "add_to_residual_triton"):
        function = getattr(block_module, name)
        monkeypatch.setattr(block_module, name, lambda *args, f=function, n=name: (calls.append(n), f(*args))[1])
    out, _ = block().to(DEVICE, torch.bfloat16)(torch.randn(1, 5, 32, device=DEVICE))
    assert calls == ["residual_norm_triton", "add_to_residual_triton"] and out.dtype == torch.float32


@on_a_gpu
def test_a_norm_that_is_watched_or_replaced_is_called(monkeypatch):
    monkeypatch.setattr(block_module, "residual_norm_triton", None)
    hooked, replaced = block().to(DEVICE), block().to(DEVICE)
    hidden, calls = torch.randn(1, 5, 32, device=DEVICE), []
    with pytest.raises(TypeError):
        hooked(hidden)
    hooked.norm.register_forward_hook(lambda module, args, output: calls.append("hooked"))
    replaced.norm = type("Adapted", (nn.RMSNorm,), {"forward": lambda self, x: (calls.append("replaced"), x)[1]})(32)
    hooked(hidden), replaced.to(DEVICE)(hidden)
    assert calls == ["hooked", "replaced"]


@on_a_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_fused_norm(dtype, tolerance):
    x = make(2, 3, 72, dtype=dtype).detach()
    norm = FusedRMSNorm(72, eps=1e-6).to(DEVICE, dtype)
    torch.nn.init.normal_(norm.weight)
    with torch.no_grad():
        actual = norm(x)
    assert actual.dtype == dtype
    assert relative(actual, F.rms_norm(x.double(), (72,), norm.weight.detach().double(), 1e-6)) <= tolerance
    assert norm(x).requires_grad  # plain


@on_a_gpu
@precisions
@pytest.mark.parametrize("shape", [(1, 16), (37, 96), (5, 1280)])
@pytest.mark.parametrize("add", [False, True])
@torch.no_grad()
def test_layer_norm(shape, add, dtype, tolerance):
    x, residual = make(*shape, dtype=dtype), make(*shape, dtype=dtype) + 3  # a mean that must not cancel badly
    weight, bias = make(shape[1], dtype=dtype), make(shape[1], dtype=dtype)
    if not add:
        x, residual = x + residual, None
    total, normed = layer_norm_triton(x, residual, weight, bias, 1e-6)
    assert torch.equal(total, x + residual if add else x) and normed.dtype == dtype
    expected = F.layer_norm(total.double(), shape[1:], weight.double(), bias.double(), 1e-6)
    assert relative(normed, expected) < tolerance
