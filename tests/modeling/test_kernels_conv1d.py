"""The convolution's kernels against float64, outputs and every gradient."""

import pytest
from test_mamba2 import convolution
from triton_interpreter import PRECISIONS, compare, make, on_a_gpu, precisions, run_interpreted

from vamba.modeling.kernels_conv1d import causal_conv1d_triton


def test_in_the_interpreter():
    run_interpreted(__file__)


@on_a_gpu
@precisions
@pytest.mark.parametrize(
    ("S", "width", "with_bias"),
    [*((S, 4, True) for S in (1, 37, 64, 100)), (2, 4, False), (37, 3, False), (37, 2, True)],
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
