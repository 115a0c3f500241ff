"""The Triton kernels against float64, outputs and every gradient: on a GPU, and in Triton's interpreter without one.

`test_in_the_interpreter` runs this file once more in a process of its own, see `triton_interpreter`.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from test_state_space_duality import recurrence, relative
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from triton_interpreter import DEVICE, INTERPRETED, on_a_gpu, run_interpreted

import vamba.modeling
import vamba.modeling.gated_rms_norm_triton as gated_rms_norm_module
import vamba.modeling.ssd_triton as ssd_module
from vamba.modeling.causal_conv1d_triton import causal_conv1d_triton
from vamba.modeling.configuration_vamba import VambaMamba2Config
from vamba.modeling.gated_rms_norm_triton import gated_rms_norm_triton
from vamba.modeling.mamba2 import Mamba2Mixer, init_mamba2_mixer
from vamba.modeling.ssd_triton import ssd_scan_triton


LENGTHS = [1, 37, 64, 100]
PRECISIONS = [(torch.float32, 1e-5 if INTERPRETED else 1e-4), (torch.bfloat16, 2e-2)]  # exp is approximate on a GPU

precisions = pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)


def compare(function, judge, tensors, tolerance):
    """Values and gradients of random weighted sums, relative to the same in float64."""
    exact = [None if t is None else t.detach().double().cpu().requires_grad_() for t in tensors]
    results = []
    for call, leaves in ((function, tensors), (judge, exact)):
        outputs = call(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(1)  # weights that bf16 holds: what comes in from behind is the same for both
        loss = sum((out.double().cpu() * torch.randn(out.shape).bfloat16().double()).sum() for out in outputs)
        results.append((*outputs, *torch.autograd.grad(loss, [t for t in leaves if t is not None])))
    for index, (a, b) in enumerate(zip(*results)):
        assert a.shape == b.shape
        assert relative(a, b) < tolerance, f"result {index} of {len(results[0])}: {relative(a, b):.1e}"


def make(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).to(DEVICE).requires_grad_()


def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.parametrize(
    ("file", "name", "arguments"),
    [
        ("causal_conv1d_triton", "causal_conv1d_triton", 4),
        ("gated_rms_norm_triton", "gated_rms_norm_triton", 5),
        ("residual_norm_triton", "residual_norm_triton", 3),
        ("ssd_triton", "ssd_scan_triton", 5),
    ],
)
def test_without_triton_the_module_imports_and_says_what_is_missing(file, name, arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    path = Path(vamba.modeling.__file__).parent / f"{file}.py"
    spec = importlib.util.spec_from_file_location("vamba.modeling.without_triton", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ImportError, match="pip install triton"):
        getattr(module, name)(*[torch.zeros(1)] * arguments)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_what_the_kernels_cannot_do_is_said():
    x = torch.zeros(1, 2, 16)
    with pytest.raises(ValueError, match="5 taps"):
        causal_conv1d_triton(x, torch.zeros(16, 5), None, torch.zeros(1, 4, 16))
    with pytest.raises(ValueError, match="float64"):
        gated_rms_norm_triton(x.double(), x.double(), torch.ones(16), 1, 1e-5)
    with pytest.raises(ValueError, match="float64"):
        ssd_scan_triton(*(torch.zeros(1, 1, 1, 1, dtype=torch.float64) for _ in range(5)))


# --- convolution


def convolution(x, weight, bias, state):
    extended = torch.cat([state, x], 1).transpose(1, 2)
    return F.silu(F.conv1d(extended, weight.unsqueeze(1), bias, groups=x.shape[2])).transpose(1, 2)


@on_a_gpu
@precisions
@pytest.mark.parametrize(
    ("S", "width", "with_bias"), [*((S, 4, True) for S in LENGTHS), (2, 4, False), (37, 3, False), (37, 2, True)]
)
def test_convolution(S, width, with_bias, dtype, tolerance):
    """x is a view of wider rows, as in the model; 40 channels leave a block partly empty."""
    bias = make(40, dtype=dtype) if with_bias else None
    tensors = make(2, S, 96, dtype=dtype), make(40, width, dtype=dtype), bias, make(2, width - 1, 40, dtype=dtype)

    def of_a_view(function):
        return lambda x, *rest: function(x[..., 16:56], *rest)

    compare(of_a_view(causal_conv1d_triton), of_a_view(convolution), tensors, tolerance)


@on_a_gpu
def test_convolution_over_several_blocks_of_the_backward():
    tensors = make(1, 16 * 8 + 5, 16), make(16, 4), make(16), make(1, 3, 16)
    compare(causal_conv1d_triton, convolution, tensors, PRECISIONS[0][1])


# --- gated norm


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
    monkeypatch.setattr(gated_rms_norm_module, "_PROGRAMS_BACKWARD", 7)
    tensors = make(40, 1, 16), make(40, 1, 16), make(16)
    compare(lambda *t: gated_rms_norm_triton(*t, 1, 1e-5), lambda *t: gated_norm(*t, 1), tensors, PRECISIONS[0][1])


# --- scan


def scan_inputs(S, dtype=torch.float32, H=4, G=1, P=16, K=16, B=2):
    """x, B and C as one wide tensor, to be cut into views; dt, A, D and the state in float32."""
    # A's gradient is a sum of opposite signs where the decay is weak: its bf16 error would say little there.
    decay = (-torch.rand(H) * 4 - 0.5).to(DEVICE).requires_grad_()
    steps = torch.rand(B, S, H).to(DEVICE).requires_grad_()
    wide = make(B, S, 8 + H * P + 2 * G * K, dtype=dtype)
    return wide, steps, decay, make(H), make(B, H, P, K)


def on_views(function, H, G, P, K):
    def call(wide, dt, A, D, state):
        x, B, C = wide[..., 8:].split([H * P, G * K, G * K], -1)
        return function(x.unflatten(-1, (H, P)), dt, A, B.unflatten(-1, (G, K)), C.unflatten(-1, (G, K)), D, state)

    return call


@on_a_gpu
@precisions
@pytest.mark.parametrize(
    ("S", "H", "G", "P", "K"),
    [*((S, 4, 2, 16, 32) for S in LENGTHS), (100, 2, 1, 32, 16), (37, 17, 1, 16, 16), (37, 2, 1, 4, 24)],
    ids=str,
)
def test_scan(S, H, G, P, K, dtype, tolerance):
    """17 heads take two programs per group; 4 and 24 are no sizes of a tile."""
    sizes = (H, G, P, K)
    tensors = scan_inputs(S, dtype, *sizes, B=2 if H == 4 else 1)
    compare(
        on_views(lambda *t: ssd_scan_triton(*t, chunk_size=32), *sizes),
        on_views(recurrence, *sizes),
        tensors,
        tolerance,
    )


@on_a_gpu
@precisions
@pytest.mark.parametrize(("S", "group"), [(64, 8192), (100, 8192), (64, 32), (100, 70), (170, 100)])
def test_scan_over_several_segments(S, group, dtype, tolerance, monkeypatch):
    """A last segment that is whole, or is not, nor its last tile; one group in backward, or several."""
    monkeypatch.setattr(ssd_module, "_SEGMENT_TILES", 2)
    monkeypatch.setattr(ssd_module, "GROUP_TOKENS", group)
    sizes = (2, 1, 16, 16)
    compare(
        on_views(lambda *t: ssd_scan_triton(*t, chunk_size=16), *sizes),
        on_views(recurrence, *sizes),
        scan_inputs(S, dtype, *sizes, B=2),
        tolerance,
    )


@on_a_gpu
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_operations_within_a_checkpoint(use_reentrant):
    """Each apart, as where hooks keep the mixer from being one operation."""
    backends = dict.fromkeys(("ssd_backend", "conv_backend", "norm_backend"), "triton")
    mixer = Mamba2Mixer(VambaMamba2Config(hidden_size=32, state_size=16, head_dim=16, chunk_size=16, **backends))
    init_mamba2_mixer(mixer.to(DEVICE), 2)
    mixer.norm.register_forward_hook(lambda module, args, output: output)
    hidden = torch.randn(1, 20, 32, device=DEVICE, requires_grad=True)
    leaves = [hidden, *mixer.parameters()]
    plain = torch.autograd.grad(mixer(hidden)[0].square().sum(), leaves)
    checkpoint(lambda t: mixer(t)[0], hidden, use_reentrant=use_reentrant).square().sum().backward()
    for leaf, expected in zip(leaves, plain):
        assert torch.equal(leaf.grad, expected)


@on_a_gpu
def test_scan_with_the_chunks_of_the_model():
    sizes = (1, 1, 64, 128)
    tensors = scan_inputs(300, torch.bfloat16, *sizes, B=1)
    compare(on_views(ssd_scan_triton, *sizes), on_views(recurrence, *sizes), tensors, 2e-2)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scan_returns_the_types_of_the_reference(dtype):
    wide, dt, A, D, state = scan_inputs(5, dtype)
    y, final = on_views(ssd_scan_triton, 4, 1, 16, 16)(wide, dt, A, D, state)
    assert y.dtype == dtype and final.dtype == torch.float32


@on_a_gpu
def test_scan_without_state_and_skip():
    sizes = (4, 1, 16, 16)
    wide, dt, A, D, state = scan_inputs(40)
    compare(
        on_views(lambda *t: ssd_scan_triton(*t[:5]), *sizes),
        on_views(lambda *t: recurrence(*t[:5], torch.zeros_like(D).cpu(), torch.zeros_like(state).cpu()), *sizes),
        (wide, dt, A, None, None),
        PRECISIONS[0][1],
    )


@on_a_gpu
def test_a_cut_scan_gives_the_same():
    wide, dt, A, D, state = scan_inputs(70)
    scan = on_views(lambda *t: ssd_scan_triton(*t, chunk_size=16), 4, 1, 16, 16)
    whole, final = scan(wide, dt, A, D, state)
    pieces = []
    for part, steps in zip(wide.split([33, 1, 36], 1), dt.split([33, 1, 36], 1)):
        y, state = scan(part, steps, A, D, state)
        pieces.append(y)
    assert relative(torch.cat(pieces, 1), whole) < 1e-6 and relative(state, final) < 1e-6


@on_a_gpu
def test_steps_of_zero_leave_the_state_alone():
    wide, dt, A, D, state = scan_inputs(40)
    scan = on_views(lambda *t: ssd_scan_triton(*t, chunk_size=16), 4, 1, 16, 16)
    with torch.no_grad():
        dt[:, 20:] = 0
    _, final = scan(wide, dt, A, D, state)
    _, expected = scan(wide[:, :20], dt[:, :20], A, D, state)
    assert relative(final, expected) < 1e-6


@on_a_gpu
def test_strong_decay_gives_finite_gradients():
    """exp of a large positive difference of tokens in the wrong order must not turn into inf * 0."""
    tensors = scan_inputs(64)
    with torch.no_grad():
        tensors[1].fill_(50.0)
    y, final = on_views(ssd_scan_triton, 4, 1, 16, 16)(*tensors)
    gradients = torch.autograd.grad(y.sum() + final.sum(), tensors)
    assert all(t.isfinite().all() for t in (y, final, *gradients))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_beyond_32_bit_offsets():
    """150,000 rows of 14,704 are 2.2e9 numbers; the last outputs must be those of a short copy of the end."""
    pytest.importorskip("triton")
    S, tail, H, P, K = 150_000, 500, 2, 64, 128
    wide = torch.empty(1, S, 14_704, dtype=torch.bfloat16, device="cuda").normal_()
    dt = torch.full((1, S, H), 0.5, device="cuda")
    weight, A = torch.randn(384, 4, device="cuda").bfloat16(), torch.tensor([-1.0, -2.0], device="cuda")

    def outputs(rows, steps):
        conv = causal_conv1d_triton(rows[..., -384:], weight, None, rows.new_zeros(1, 3, 384))
        x, B, C = rows[..., -384:].split([H * P, K, K], -1)
        y, _ = ssd_scan_triton(x.unflatten(-1, (H, P)), steps, A, B.unsqueeze(2), C.unsqueeze(2))
        norm = gated_rms_norm_triton(y.flatten(2), rows[..., -H * P :], weight[: H * P, 0], 1, 1e-5)
        return [t.flatten(2)[:, -100:] for t in (conv, y, norm)]

    with torch.no_grad():
        for a, b in zip(outputs(wide, dt), outputs(wide[:, -tail:].clone(), dt[:, -tail:])):
            assert relative(a, b) < 1e-2
