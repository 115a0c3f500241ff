"""Which tensors kernels take, who is asked to compute, and what is said where that is not possible."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from triton_interpreter import DEVICE, INTERPRETED, on_a_gpu, run_interpreted

from vamba.modeling.kernels import can_use_forward_kernel, can_use_inference_kernel, can_use_kernel, has_hooks, is_plain
from vamba.modeling.kernels_conv1d import causal_conv1d_triton
from vamba.modeling.kernels_norm import gated_rms_norm_triton, residual_norm_triton
from vamba.modeling.kernels_scan import ssd_scan_triton
from vamba.modeling.mamba2 import GatedRMSNorm, causal_conv1d, ssd_scan


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from vamba.modeling.kernels_conv1d import causal_conv1d_triton
from vamba.modeling.kernels_norm import gated_rms_norm_triton, residual_norm_triton
from vamba.modeling.mamba2 import Mamba2Block, VambaMamba2Config, ssd_scan_triton
import vamba.modeling.kernels_attention, vamba.modeling.kernels_elementwise
t = torch.zeros(1, 1)
for kernel, arguments in (
    (causal_conv1d_triton, [t, t, t, t]), (gated_rms_norm_triton, [t, t, t, 1, 1e-5]),
    (residual_norm_triton, [t, t, 1e-5]), (ssd_scan_triton, [t, t, t, t, t]),
):
    try:
        kernel(*arguments)
    except ImportError as error:
        assert "pip install triton" in str(error), error
        print(kernel.__name__)
Mamba2Block(VambaMamba2Config(hidden_size=32, head_dim=16))(torch.zeros(1, 3, 32))[0].sum().backward()
"""


def test_in_the_interpreter():
    run_interpreted(__file__)


def test_without_triton_the_modules_import_and_say_what_is_missing():
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [
        "causal_conv1d_triton", "gated_rms_norm_triton", "residual_norm_triton", "ssd_scan_triton"
    ]  # fmt: skip


@needs_triton
def test_what_the_kernels_cannot_do_is_said():
    x = torch.zeros(1, 2, 16)
    with pytest.raises(ValueError, match="5 taps"):
        causal_conv1d_triton(x, torch.zeros(16, 5), None, torch.zeros(1, 4, 16))
    with pytest.raises(ValueError, match="float64"):
        gated_rms_norm_triton(x.double(), x.double(), torch.ones(16), 1, 1e-5)
    with pytest.raises(ValueError, match="float64"):
        ssd_scan_triton(*(torch.zeros(1, 1, 1, 1, dtype=torch.float64) for _ in range(5)))


@needs_triton
@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 32), (torch.float32, 20_000)])
def test_what_the_residual_norm_cannot_do_is_said(dtype, width):
    with pytest.raises(ValueError, match=f"got {width} numbers and {dtype}; use norm_backend='torch'"):
        residual_norm_triton(torch.zeros(1, 2, width, dtype=dtype), torch.ones(width, dtype=dtype), 1e-5)


def scan_of(x, backend):
    return ssd_scan(x.unsqueeze(-1), x, x[0, 0], x.unsqueeze(-1), x.unsqueeze(-1), backend=backend)


def convolution_of(x, backend):
    return causal_conv1d(x, x.new_zeros(x.shape[2], 4), backend=backend)


def gated_norm_of(x, backend):
    return GatedRMSNorm(x.shape[2], backend=backend)(x, x)


@pytest.mark.parametrize("part", [scan_of, convolution_of, gated_norm_of])
def test_unknown_backends_and_those_for_a_gpu_say_what_to_do(part):
    with pytest.raises(ValueError, match=r"'nope'.*'auto', 'torch'"):
        part(torch.zeros(1, 3, 2), "nope")
    if not INTERPRETED and importlib.util.find_spec("triton") is not None:
        with pytest.raises(ValueError, match="runs on a GPU"):
            part(torch.zeros(1, 3, 2), "triton")


@pytest.mark.parametrize(("part", "package"), [(scan_of, "mamba_ssm"), (convolution_of, "causal_conv1d")])
def test_missing_backends_say_what_to_do(part, package):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is there")
    with pytest.raises(ImportError, match="pip install"):
        part(torch.zeros(1, 3, 2), package)


@on_a_gpu
def test_gradients_and_mixed_dtypes_take_the_plain_path():
    x = torch.randn(3, device=DEVICE)
    assert not can_use_inference_kernel(x) and can_use_kernel(x) and can_use_forward_kernel(x)
    assert not can_use_forward_kernel(x, x.clone().requires_grad_()) and not can_use_forward_kernel(x[::2])
    with torch.no_grad():
        assert can_use_inference_kernel(x, x) and not can_use_inference_kernel(x, x.bfloat16())
        assert not can_use_inference_kernel(x.double())


def test_what_a_kernel_may_stand_in_for():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4))
    assert not has_hooks(module) and is_plain(module[0], torch.nn.Linear) and not is_plain(module, torch.nn.Linear)
    handle = module[0].register_forward_pre_hook(lambda *_: None)
    assert has_hooks(module) and not is_plain(module[0], torch.nn.Linear)
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert has_hooks(module)
    handle.remove()
    module[0].forward = module[0].forward  # as accelerate's hooks do
    assert has_hooks(module)
