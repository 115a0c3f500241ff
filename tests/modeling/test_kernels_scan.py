"""The scan's kernels against a float64 recurrence, outputs and every gradient."""

import pytest
import torch
from test_mamba2 import recurrence
from triton_interpreter import (
    DEVICE,
    INTERPRETED,
    PRECISIONS,
    compare,
    make,
    on_a_gpu,
    precisions,
    relative,
    run_interpreted,
)

import vamba.modeling.kernels as kernels
import vamba.modeling.kernels_scan as kernels_scan
from vamba.modeling.kernels_conv1d import causal_conv1d_triton
from vamba.modeling.kernels_norm import gated_rms_norm_triton
from vamba.modeling.kernels_scan import ssd_scan_triton


LENGTHS = [1, 37, 64, 100]


def test_in_the_interpreter():
    run_interpreted(__file__)


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
    small_segments = kernels.tiles(torch.empty(0, device=DEVICE))._replace(scan_segment_chunks=2)
    monkeypatch.setattr(kernels, "TILES", {9: small_segments})
    monkeypatch.setattr(kernels_scan, "GROUP_TOKENS", group)
    sizes = (2, 1, 16, 16)
    compare(
        on_views(lambda *t: ssd_scan_triton(*t, chunk_size=16), *sizes),
        on_views(recurrence, *sizes),
        scan_inputs(S, dtype, *sizes, B=2),
        tolerance,
    )


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
