"""The state space duality scan of Mamba-2 (arXiv 2405.21060, section 6): one plain PyTorch reference, optional kernels.

What is unusual: the state goes in and comes out, differentiably, so a sequence may be cut anywhere and continued. A
token with dt = 0 leaves the state untouched, which is how padding is expressed. The reference computes in float32 (or
float64 where the input is), whatever the input's type. `ssd_scan` is the one place that picks a backend.

Shapes: B batch, S tokens, H heads, P head dim, G groups (H is a multiple), K state size, C chunks of Q tokens.
"""

import functools
import importlib.util
import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from .ssd_triton import ssd_scan_triton
from .triton_launch import are_preferred


def ssd_scan(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGK: Tensor,
    C_BSGK: Tensor,
    D_H: Tensor | None = None,
    state_BHPK: Tensor | None = None,
    chunk_size: int = 256,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Computes h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T and y_t = h_t C_t + D x_t for S tokens from a given state.

    Args:
        x_BSHP: inputs, (B, S, H, P); S may be anything from 1 and need not be a multiple of `chunk_size`.
        dt_BSH: step sizes after bias, softplus and clamp, (B, S, H), float32 or float64; 0 skips a token.
        A_H: negative decay rates, (H,).
        B_BSGK, C_BSGK: input and output projections of the state, shared by H / G heads each.
        D_H: skip connection, (H,), or None.
        state_BHPK: state before the first token, (B, H, P, K), or None for zeros.
        chunk_size: tokens handled by matrix products at a time; changes speed and memory, not the result.
        backend: "auto", or a name of `BACKENDS`.

    Returns:
        y_BSHP in x's dtype and the state after the last token, (B, H, P, K), in float32 (float64 for float64 inputs).

    Raises:
        ValueError: an unknown backend. ImportError: a backend whose package is not installed.
    """
    if backend == "auto":  # on an H200 our kernels take about half of mamba-ssm's time, both ways
        backend = "triton" if are_preferred(x_BSHP) else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"Unknown SSD backend {backend!r}; choose one of {['auto', *BACKENDS]}.")
    return BACKENDS[backend](x_BSHP, dt_BSH, A_H, B_BSGK, C_BSGK, D_H, state_BHPK, chunk_size)


def ssd_scan_torch(x_BSHP, dt_BSH, A_H, B_BSGK, C_BSGK, D_H=None, state_BHPK=None, chunk_size=256):
    """The reference: within a chunk attention with a decay mask, between chunks a recurrence over their states."""
    dtype, compute = x_BSHP.dtype, torch.float64 if x_BSHP.dtype == torch.float64 else torch.float32
    S, (H, G) = x_BSHP.shape[1], (x_BSHP.shape[2], B_BSGK.shape[2])
    Q = min(chunk_size, S)
    padding = -S % Q

    def chunks(t, trailing):  # (B, S, ...) -> (B, C, Q, *trailing), padded with zeros: dt = 0 changes nothing
        t = t.to(compute)
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding)) if padding else t
        return t.unflatten(1, (-1, Q)).unflatten(3, trailing)

    R = H // G  # heads that share one B and C
    x, dt = chunks(x_BSHP, (G, R)), chunks(dt_BSH, (G, R))
    B_BCQGK, C_BCQGK = (t.to(compute) for t in (chunks(B_BSGK, (G,)), chunks(C_BSGK, (G,))))
    log_decay = (dt * A_H.to(compute).view(G, R)).cumsum(2)  # (B, C, Q, G, R), from the chunk's start to each token
    x_dt = x * dt.unsqueeze(-1)

    # 1. Each token reads the earlier tokens of its own chunk.
    log_decay_rows = log_decay.permute(0, 1, 3, 4, 2)  # (B, C, G, R, Q)
    between = log_decay_rows.unsqueeze(-1) - log_decay_rows.unsqueeze(-2)
    causal = torch.ones(Q, Q, dtype=torch.bool, device=x.device).tril()
    between = between.masked_fill(~causal, float("-inf")).exp()  # masked before exp, so that no inf * 0 in backward
    scores = torch.einsum("bcigk,bcjgk->bcgij", C_BCQGK, B_BCQGK).unsqueeze(3) * between
    y = torch.einsum("bcgrij,bcjgrp->bcigrp", scores, x_dt)

    # 2. What each chunk adds to the state by its end, and 3. the recurrence over the chunks.
    to_end = (log_decay[:, :, -1:] - log_decay).exp()
    added = torch.einsum("bcjgk,bcjgrp->bcgrpk", B_BCQGK, x_dt * to_end.unsqueeze(-1))
    chunk_decay = log_decay[:, :, -1].exp()[..., None, None]  # (B, C, G, R, 1, 1)
    state = torch.zeros_like(added[:, 0]) if state_BHPK is None else state_BHPK.to(compute).unflatten(1, (G, R))
    entering = []
    for c in range(added.shape[1]):
        entering.append(state)
        state = state * chunk_decay[:, c] + added[:, c]

    # 4. Each token reads the state that entered its chunk.
    read = torch.einsum("bcigk,bcgrpk->bcigrp", C_BCQGK, torch.stack(entering, 1))
    y = y + read * log_decay.exp().unsqueeze(-1)
    if D_H is not None:
        y = y + x * D_H.to(compute).view(G, R, 1)
    return y.flatten(3, 4).flatten(1, 2)[:, :S].to(dtype), state.flatten(1, 2)


# mamba-ssm's kernels index with 32 bits; beyond this many elements of one tensor they go wrong silently.
_MAX_KERNEL_ELEMENTS = 2**31 - 1


def ssd_scan_mamba_ssm(x_BSHP, dt_BSH, A_H, B_BSGK, C_BSGK, D_H=None, state_BHPK=None, chunk_size=256):
    """mamba-ssm's Triton kernels, called on pieces short enough for their 32-bit offsets (state-spaces/mamba 1015)."""
    mamba_chunk_scan_combined = _mamba_ssm_kernel()
    if mamba_chunk_scan_combined is None:
        raise ImportError(
            "backend='mamba_ssm' needs mamba-ssm: pip install 'vamba[mamba-ssm]', or use backend='torch'."
        )
    row = max(t.stride(1) for t in (x_BSHP, dt_BSH, B_BSGK, C_BSGK)) * x_BSHP.shape[0]
    state_row = x_BSHP.shape[0] * x_BSHP.shape[2] * x_BSHP.shape[3] * B_BSGK.shape[3]  # per chunk
    piece = min(_MAX_KERNEL_ELEMENTS // row, _MAX_KERNEL_ELEMENTS // state_row * chunk_size)
    piece = max(chunk_size, piece // chunk_size * chunk_size)
    outputs = []
    for start in range(0, x_BSHP.shape[1], piece):
        x, dt, B, C = (t[:, start : start + piece] for t in (x_BSHP, dt_BSH, B_BSGK, C_BSGK))
        y, state_BHPK = mamba_chunk_scan_combined(
            x, dt, A_H, B, C, chunk_size, D=D_H, initial_states=state_BHPK, return_final_states=True
        )
        outputs.append(y)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), state_BHPK


@functools.cache
def _mamba_ssm_kernel():
    """The package's scan, or None; a package that is there but does not import is told of once."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return None
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except Exception as error:
        warnings.warn(f"mamba-ssm is installed but does not import ({error}); its scan is not used.", stacklevel=3)
        return None
    return mamba_chunk_scan_combined


BACKENDS = {"torch": ssd_scan_torch, "triton": ssd_scan_triton, "mamba_ssm": ssd_scan_mamba_ssm}
