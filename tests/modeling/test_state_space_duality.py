"""The scan against a float64 recurrence, token by token: outputs, states and every gradient."""

import pytest
import torch

from vamba.modeling.state_space_duality import BACKENDS, ssd_scan


B, H, P, G, K = 2, 6, 4, 2, 8


def recurrence(x, dt, A, Bm, C, D, state):
    """The judge: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t, in the inputs' dtype."""
    ys = []
    for t in range(x.shape[1]):
        B_t, C_t = (m[:, t].repeat_interleave(x.shape[2] // m.shape[2], 1) for m in (Bm, C))
        decay = (dt[:, t] * A).exp()[..., None, None]
        state = state * decay + (dt[:, t, :, None] * x[:, t])[..., None] * B_t[:, :, None]
        ys.append((state * C_t[:, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(ys, 1), state


def inputs(S, dtype=torch.float64, device="cpu", heads=H, groups=G, head_dim=P, state=K):
    def make(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    tensors = (
        make(B, S, heads, head_dim),
        torch.rand(B, S, heads, dtype=torch.float64),
        -torch.rand(heads, dtype=torch.float64) * 4,
        make(B, S, groups, state),
        make(B, S, groups, state),
        make(heads),
        make(B, heads, head_dim, state),
    )
    return [t.to(dtype).to(device).requires_grad_() for t in tensors]


def with_gradients(function, tensors):
    y, state = function(*tensors)
    torch.manual_seed(1)
    weights = torch.randn(y.shape, dtype=torch.float64), torch.randn(state.shape, dtype=torch.float64)
    loss = sum((out.double().cpu() * w).sum() for out, w in zip((y, state), weights))
    return y, state, torch.autograd.grad(loss, tensors)


def relative(a, b):
    return ((a.double().cpu() - b.double().cpu()).norm() / b.double().norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("S", [1, 2, 7, 16, 37])
@pytest.mark.parametrize("chunk_size", [1, 8, 16, 64])
def test_equals_the_recurrence_with_every_gradient(S, chunk_size):
    tensors = inputs(S)
    expected = with_gradients(recurrence, tensors)
    actual = with_gradients(lambda *t: ssd_scan(*t, chunk_size=chunk_size), tensors)
    for a, b in zip((*actual[:2], *actual[2]), (*expected[:2], *expected[2])):
        assert relative(a, b) < 1e-12


@pytest.mark.parametrize("cuts", [(1, 36), (16, 21), (5, 5, 27), (37,)])
def test_a_cut_sequence_gives_the_same(cuts):
    x, dt, A, Bm, C, D, state = inputs(37)
    whole, final = ssd_scan(x, dt, A, Bm, C, D, state, chunk_size=8)
    pieces = []
    for part in zip(*(t.split(cuts, 1) for t in (x, dt, Bm, C))):
        y, state = ssd_scan(part[0], part[1], A, part[2], part[3], D, state, chunk_size=8)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def test_tokens_with_dt_zero_leave_the_state_alone():
    x, dt, A, Bm, C, D, state = inputs(20)
    with torch.no_grad():
        dt[:, 12:] = 0
    _, final = ssd_scan(x, dt, A, Bm, C, D, state, chunk_size=8)
    _, expected = ssd_scan(x[:, :12], dt[:, :12], A, Bm[:, :12], C[:, :12], D, state, chunk_size=8)
    torch.testing.assert_close(final, expected, rtol=0, atol=1e-14)


def test_strong_decay_gives_finite_gradients():
    """exp of a large positive difference above the diagonal must not turn into inf * 0."""
    tensors = inputs(64, torch.float32)
    with torch.no_grad():
        tensors[1].fill_(50.0)
    _, _, gradients = with_gradients(lambda *t: ssd_scan(*t, chunk_size=32), tensors)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_lower_precision(dtype, tolerance):
    """The inputs are rounded, the scan itself computes in float32."""
    tensors = inputs(37, dtype)
    tensors[1], tensors[2] = (t.detach().float() for t in tensors[1:3])
    y, state = ssd_scan(*tensors, chunk_size=16)
    expected, final = recurrence(*(t.detach().double() for t in tensors))
    assert y.dtype == dtype and state.dtype == torch.float32
    assert relative(y, expected) < tolerance and relative(state, final) < 1e-5


def test_no_state_means_zeros_and_no_skip_means_none():
    x, dt, A, Bm, C, D, state = inputs(9)
    y, _ = ssd_scan(x, dt, A, Bm, C)
    expected, _ = recurrence(x, dt, A, Bm, C, torch.zeros_like(D), torch.zeros_like(state))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_unknown_and_missing_backends_say_what_to_do():
    tensors = inputs(3)
    with pytest.raises(ValueError, match=r"'nope'.*'auto', 'torch'"):
        ssd_scan(*tensors, backend="nope")
    with pytest.raises(ValueError, match="runs on a GPU"):
        ssd_scan(*(t.float() for t in tensors), backend="triton")
    try:
        import mamba_ssm  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install"):
            ssd_scan(*tensors, backend="mamba_ssm")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("S", [1, 100, 513])
def test_on_the_gpu(backend, dtype, tolerance, S):
    """mamba-ssm multiplies float32 in TF32, hence the tolerance."""
    if backend == "mamba_ssm":
        pytest.importorskip("mamba_ssm")
    tensors = inputs(S, dtype, "cuda", heads=8, groups=1, head_dim=64, state=128)
    for i in (1, 2, 5, 6):
        tensors[i] = tensors[i].detach().float().requires_grad_()
    expected = with_gradients(recurrence, [t.detach().double().cpu().requires_grad_() for t in tensors])
    actual = with_gradients(lambda *t: ssd_scan(*t, chunk_size=256, backend=backend), tensors)
    for a, b in zip((*actual[:2], *actual[2]), (*expected[:2], *expected[2])):
        assert relative(a, b) < tolerance
