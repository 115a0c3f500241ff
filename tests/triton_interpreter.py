"""Triton kernels in tests: on a GPU, or on the CPU in Triton's interpreter, chosen when Triton is first imported.

A test file marks its kernel tests with `on_a_gpu`, makes its tensors on `DEVICE`, and has one test that calls
`run_interpreted(__file__)`, which runs the file once more in a process of its own, where those tests do not skip.
`compare` sets a kernel's values and gradients against a plain judge's in float64.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
PRECISIONS = [(torch.float32, 1e-5 if INTERPRETED else 1e-4), (torch.bfloat16, 2e-2)]  # exp is approximate on a GPU

precisions = pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)


def on_a_gpu(test):
    usable = INTERPRETED or (torch.cuda.is_available() and importlib.util.find_spec("triton") is not None)
    return pytest.mark.gpu(pytest.mark.skipif(not usable, reason="needs a CUDA device, or the interpreter")(test))


def run_interpreted(file: str, *options: str) -> None:
    if INTERPRETED:
        pytest.skip("runs this file in the interpreter")
    if torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU itself")
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", file, *options]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTEST_ADDOPTS", None)
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if "only 0-dimensional arrays can be converted to Python scalars" in run.stdout:
        pytest.skip("this Triton's interpreter does not work with this NumPy")
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]


def relative(a, b):
    return ((a.double().cpu() - b.double().cpu()).norm() / b.double().norm().clamp(min=1e-12)).item()


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
    """A leaf."""
    return torch.randn(*shape).to(dtype).to(DEVICE).requires_grad_()


if INTERPRETED:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    torch.set_num_threads(1)
    interpreted_dot, interpreted_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        """The interpreter keeps bfloat16 as uint16 and multiplies those; float32 holds the products exactly."""
        return interpreted_dot(self, widened(a), widened(b), *rest)

    def cast_impl(self, source, target):
        """The interpreter truncates to bfloat16, a bias that a GPU's rounding to nearest has not."""
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return interpreted_cast(self, source, target)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        return TensorHandle(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16), tl.bfloat16)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
