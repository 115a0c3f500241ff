"""The mixer's one operation against the plain operations in float64; on a GPU, or in Triton's interpreter."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from triton_interpreter import DEVICE, on_a_gpu, run_interpreted

import vamba.modeling.mamba2 as room
from vamba.modeling.configuration_vamba import VambaMamba2Config
from vamba.modeling.mamba2 import Mamba2Mixer, Mamba2State, init_mamba2_mixer


def test_in_the_interpreter():
    run_interpreted(__file__, "-k", "not (values_and_gradients and False and (40 or 33 or 64))")


def mixers(dtype=torch.float32, **options):
    """One with the kernels, and its copy in float64 without."""
    made = []
    for backend in ("triton", "torch"):
        backends = dict.fromkeys(("ssd_backend", "conv_backend", "norm_backend"), backend)
        config = VambaMamba2Config(hidden_size=32, state_size=16, head_dim=16, chunk_size=32, **backends, **options)
        torch.manual_seed(0)
        mixer = Mamba2Mixer(config)
        init_mamba2_mixer(mixer, 2)
        made.append(mixer.to(dtype))  # the judge's numbers are rounded alike
    return made[0].to(DEVICE), made[1].double()


def inputs(config: VambaMamba2Config, S: int, with_state: bool):
    hidden = torch.randn(2, S, config.hidden_size)
    if not with_state:
        return [hidden]
    ssm = torch.randn(2, config.num_heads, config.head_dim, config.state_size)
    return [hidden, torch.randn(2, config.conv_kernel - 1, config.conv_dim), ssm]


def results(mixer, tensors, lengths) -> dict[str, torch.Tensor]:
    """Outputs, states, and all gradients of a weighted sum of them; what is read of padding is nothing."""
    weight = mixer.in_proj.weight
    leaves = [t.detach().to(weight).requires_grad_() for t in tensors]
    state = Mamba2State(*leaves[1:]) if len(leaves) > 1 else None
    y, state = mixer(leaves[0], state, None if lengths is None else lengths.to(weight.device))
    if lengths is not None:
        y = y * (torch.arange(y.shape[1]) < lengths.unsqueeze(1)).unsqueeze(-1).to(y)
    outputs = [y, *state]
    torch.manual_seed(1)
    total = sum((out * torch.randn(out.shape).bfloat16().to(out)).sum() for out in outputs)
    total.backward(retain_graph=True)
    first = [p.grad.clone() for p in mixer.parameters()]
    mixer.zero_grad()
    for leaf in leaves:
        leaf.grad = None
    total.backward()
    assert all(torch.equal(p.grad, expected) for p, expected in zip(mixer.parameters(), first))
    named = dict(zip(("y", "conv", "ssm"), outputs)) | {f"d{i}": leaf.grad for i, leaf in enumerate(leaves)}
    return named | {name: p.grad for name, p in mixer.named_parameters()}


@on_a_gpu
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    ("S", "lengths", "options"),
    [
        (37, None, {}),
        (1, None, {"n_groups": 2}),
        (2, None, {"use_conv_bias": False}),
        (40, [40, 1], {}),
        (33, [2, 33], {"time_step_limit": (0.01, 0.05)}),
        (64, None, {"conv_kernel": 3}),
    ],
    ids=str,
)
def test_values_and_gradients(S, lengths, options, with_state, monkeypatch):
    calls = []
    mix = room.mix_triton
    monkeypatch.setattr(room, "mix_triton", lambda *args: (calls.append(1), mix(*args))[1])
    fast, exact = mixers(**options)
    tensors = inputs(fast.config, S, with_state)
    lengths = None if lengths is None else torch.tensor(lengths)
    actual, expected = (results(mixer, tensors, lengths) for mixer in (fast, exact))
    assert len(calls) == 1
    for name, value in expected.items():
        error = (actual[name].double().cpu() - value).norm() / value.norm().clamp(min=1e-4)  # a gradient may be zero
        assert error < 1e-4, f"{name}: {error:.1e}"


@on_a_gpu
def test_half_precision():
    """A_log, D and dt_bias in float32, as they are loaded."""
    fast, exact = mixers(torch.bfloat16)
    for name in ("A_log", "D", "dt_bias"):
        fast.get_parameter(name).data = fast.get_parameter(name).data.float()
    tensors = [t.bfloat16() for t in inputs(fast.config, 37, True)]
    actual, expected = (results(mixer, tensors, None) for mixer in (fast, exact))
    for name, value in expected.items():
        error = (actual[name].double().cpu() - value).norm() / value.norm()
        assert error < 3e-2, f"{name}: {error:.1e}"


@on_a_gpu
def test_an_adapter_a_hook_or_no_gradient_takes_the_plain_way(monkeypatch):
    monkeypatch.setattr(room, "mix_triton", None)
    mixer, _ = mixers()
    hidden = torch.randn(1, 5, 32, device=DEVICE)
    with torch.no_grad():
        expected, _ = mixer(hidden)
    with pytest.raises(TypeError):
        mixer(hidden)
    handle = mixer.norm.register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(mixer(hidden)[0], 2 * expected)
    handle.remove()
    mixer.norm = torch.nn.Sequential()
    mixer.norm.forward = lambda y, gate: torch.zeros_like(y)
    assert not mixer(hidden)[0].any()


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
