"""Depthwise causal convolution + SiLU that carries its last inputs: plain PyTorch reference, optional kernel.

What is unusual: tokens stay in (B, S, C) order, so nothing is transposed; the state is the last W - 1 inputs, goes in
and comes out; rows may be padded on the right, in which case each row's state is taken at its own end.

Shapes: B batch, S tokens, C channels, W width of the convolution, T = W - 1 remembered inputs.
"""

import functools
import importlib.util
import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from .causal_conv1d_triton import MAX_WIDTH, causal_conv1d_triton
from .triton_launch import are_preferred


def causal_conv1d(
    x_BSC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None = None,
    state_BTC: Tensor | None = None,
    lengths_B: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """y_t = silu(bias + sum_w weight_w x_{t - W + 1 + w}), with x_t for t < 0 taken from the state.

    Args:
        x_BSC: inputs, (B, S, C), S >= 1.
        weight_CW, bias_C: of the depthwise convolution; the last column multiplies the current token.
        state_BTC: the W - 1 inputs before the first token, (B, W - 1, C), oldest first; None for zeros.
        lengths_B: valid tokens of each row, (B,) int64, the rest being padding on the right; None for all.
        backend: "auto", or a name of `BACKENDS`.

    Returns:
        y_BSC in x's dtype, and the state after each row's last valid token.

    Raises:
        ValueError: an unknown backend. ImportError: a backend whose package is not installed.
    """
    if backend == "auto":
        backend = "triton" if are_preferred(x_BSC) and weight_CW.shape[1] <= MAX_WIDTH else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"Unknown convolution backend {backend!r}; choose one of {['auto', *BACKENDS]}.")
    T = weight_CW.shape[1] - 1
    if state_BTC is None:
        state_BTC = x_BSC.new_zeros(x_BSC.shape[0], T, x_BSC.shape[2])
    y_BSC = BACKENDS[backend](x_BSC, weight_CW, bias_C, state_BTC)
    return y_BSC, last_inputs(x_BSC, state_BTC, lengths_B)


def causal_conv1d_torch(x_BSC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, state_BTC: Tensor) -> Tensor:
    """The reference: a sum of shifted slices, which needs no copy of the input per tap and no transposition."""
    S, W = x_BSC.shape[1], weight_CW.shape[1]
    extended = torch.cat([state_BTC.to(x_BSC.dtype), x_BSC], 1)
    y_BSC = extended[:, :S] * weight_CW[:, 0]
    for w in range(1, W):
        y_BSC = torch.addcmul(y_BSC, extended[:, w : w + S], weight_CW[:, w])
    return F.silu(y_BSC if bias_C is None else y_BSC + bias_C)


def causal_conv1d_dao(x_BSC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, state_BTC: Tensor) -> Tensor:
    """Tri Dao's kernel, which wants (B, C, S) with channels contiguous: our layout seen through a transposed view."""
    causal_conv1d_fn = _causal_conv1d_kernel()
    if causal_conv1d_fn is None:
        raise ImportError(
            "backend='causal_conv1d' needs causal-conv1d: pip install 'vamba[mamba-ssm]', or use backend='torch'."
        )
    state = state_BTC.to(x_BSC.dtype).contiguous().transpose(1, 2)
    y_BCS = causal_conv1d_fn(x_BSC.transpose(1, 2), weight_CW, bias_C, initial_states=state, activation="silu")
    return y_BCS.transpose(1, 2)


def last_inputs(x_BSC: Tensor, state_BTC: Tensor, lengths_B: Tensor | None) -> Tensor:
    """The T inputs before each row's end, (B, T, C) in x's dtype: the next state."""
    S, T = x_BSC.shape[1], state_BTC.shape[1]
    if lengths_B is None:
        recent = x_BSC[:, max(S - T, 0) :]
        return torch.cat([state_BTC[:, state_BTC.shape[1] - (T - recent.shape[1]) :].to(x_BSC.dtype), recent], 1)
    index_BT1 = last_places(x_BSC, state_BTC, lengths_B)
    from_state, from_x = (
        t_BSC.gather(1, index.clamp(0, max(t_BSC.shape[1] - 1, 0)).expand(-1, -1, t_BSC.shape[2]))
        for t_BSC, index in ((state_BTC, index_BT1), (x_BSC, index_BT1 - T))
    )
    return torch.where(index_BT1 < T, from_state.to(x_BSC.dtype), from_x)


def last_places(x_BSC: Tensor, state_BTC: Tensor, lengths_B: Tensor | None) -> Tensor:
    """(B, T, 1) int64: where in `cat([state, x], 1)` each row's last T inputs stand."""
    (B, S, _), T = x_BSC.shape, state_BTC.shape[1]
    ends_B1 = torch.full((B, 1), S, device=x_BSC.device) if lengths_B is None else lengths_B.unsqueeze(1)
    return (ends_B1 + torch.arange(T, device=x_BSC.device)).unsqueeze(-1)


@functools.cache
def _causal_conv1d_kernel():
    """The package's convolution, or None; a package that is there but does not import is told of once."""
    if importlib.util.find_spec("causal_conv1d") is None:
        return None
    try:
        from causal_conv1d import causal_conv1d_fn
    except Exception as error:
        warnings.warn(f"causal-conv1d is installed but does not import ({error}); it is not used.", stacklevel=3)
        return None
    return causal_conv1d_fn


BACKENDS = {"torch": causal_conv1d_torch, "triton": causal_conv1d_triton, "causal_conv1d": causal_conv1d_dao}
