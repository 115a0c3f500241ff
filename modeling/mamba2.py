"""The Mamba-2 block (arXiv 2405.21060), written as a function from (tokens, state) to (tokens, state).

What is unusual: there is no cache object and no "decoding mode". A block takes the state left by whatever came before
and returns the state after its last token, differentiably; one token or a million go the same way. Rows of a batch
may be padded on the right: padding changes neither the outputs before it nor the state. In order: the convolution, the
scan (state space duality, section 6) and the gated norm, each with its plain PyTorch reference and a table of backends,
then mixer, block and initialisation. The kernels are in kernels_*.py; kernels.py says when they are used, and what the
letters of shapes mean.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_vamba import VambaMamba2Config
from .kernels import can_use_kernel, choose_backend, is_plain, require_optional, wants_kernel
from .kernels_conv1d import MAX_WIDTH, causal_conv1d_triton, last_inputs
from .kernels_mixer import mix_triton, split_convolved, split_projected
from .kernels_norm import MAX_GROUP, add_to_residual_triton, gated_rms_norm_triton, residual_norm_triton
from .kernels_scan import ssd_scan_triton


def rebuildable(named_tuple: type) -> type:
    """The same class, which may also be called with one iterable, as transformers' exporters rebuild any tuple."""
    new = named_tuple.__new__

    def __new__(cls, *fields, **named):
        return new(cls, *(fields[0] if len(fields) == 1 and not named else fields), **named)

    named_tuple.__new__ = __new__
    return named_tuple


@rebuildable
class Mamba2State(NamedTuple):
    """All that a Mamba-2 block remembers of a sequence, however long: (H·P·K + T·C) numbers per row."""

    conv_BTC: Tensor
    ssm_BHPK: Tensor


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
        backend: "auto", or a name of `CONV_BACKENDS`.

    Returns:
        y_BSC in x's dtype, and the state after each row's last valid token.

    Raises:
        ValueError: an unknown backend. ImportError: a backend whose package is not installed.
    """
    convolve = choose_backend("convolution", backend, CONV_BACKENDS, x_BSC, fits=weight_CW.shape[1] <= MAX_WIDTH)
    if state_BTC is None:
        state_BTC = x_BSC.new_zeros(x_BSC.shape[0], weight_CW.shape[1] - 1, x_BSC.shape[2])
    return convolve(x_BSC, weight_CW, bias_C, state_BTC), last_inputs(x_BSC, state_BTC, lengths_B)


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
    causal_conv1d_fn = require_optional("causal_conv1d", "causal_conv1d_fn")
    state = state_BTC.to(x_BSC.dtype).contiguous().transpose(1, 2)
    y_BCS = causal_conv1d_fn(x_BSC.transpose(1, 2), weight_CW, bias_C, initial_states=state, activation="silu")
    return y_BCS.transpose(1, 2)


CONV_BACKENDS = {"torch": causal_conv1d_torch, "triton": causal_conv1d_triton, "causal_conv1d": causal_conv1d_dao}


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
        backend: "auto", or a name of `SSD_BACKENDS`.

    Returns:
        y_BSHP in x's dtype and the state after the last token, (B, H, P, K), in float32 (float64 for float64 inputs).

    Raises:
        ValueError: an unknown backend. ImportError: a backend whose package is not installed.
    """
    scan = choose_backend("SSD", backend, SSD_BACKENDS, x_BSHP)  # ours take about half of mamba-ssm's time on an H200
    return scan(x_BSHP, dt_BSH, A_H, B_BSGK, C_BSGK, D_H, state_BHPK, chunk_size)


def ssd_scan_torch(x_BSHP, dt_BSH, A_H, B_BSGK, C_BSGK, D_H=None, state_BHPK=None, chunk_size=256):
    """The reference: within a chunk attention with a decay mask, between chunks a recurrence over their states."""
    dtype, compute = x_BSHP.dtype, torch.float64 if x_BSHP.dtype == torch.float64 else torch.float32
    S, (H, G) = x_BSHP.shape[1], (x_BSHP.shape[2], B_BSGK.shape[2])
    Q = min(chunk_size, S)
    padding = -S % Q

    def chunked(t, trailing):  # (B, S, ...) -> (B, Z, Q, *trailing), padded with zeros: dt = 0 changes nothing
        t = t.to(compute)
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding)) if padding else t
        return t.unflatten(1, (-1, Q)).unflatten(3, trailing)

    R = H // G  # heads that share one B and C
    x, dt = chunked(x_BSHP, (G, R)), chunked(dt_BSH, (G, R))
    B_BZQGK, C_BZQGK = (chunked(t, (G,)) for t in (B_BSGK, C_BSGK))
    dA_cumsum = (dt * A_H.to(compute).view(G, R)).cumsum(2)  # (B, Z, Q, G, R): log of the decay from the chunk's start
    x_dt = x * dt.unsqueeze(-1)

    # 1. Each token reads the earlier tokens of its own chunk.
    rows = dA_cumsum.permute(0, 1, 3, 4, 2)  # (B, Z, G, R, Q)
    later = torch.ones(Q, Q, dtype=torch.bool, device=x.device).triu(1)  # masked before exp: no inf * 0 in backward
    between = (rows.unsqueeze(-1) - rows.unsqueeze(-2)).masked_fill(later, float("-inf")).exp()
    scores = torch.einsum("bzigk,bzjgk->bzgij", C_BZQGK, B_BZQGK).unsqueeze(3) * between
    y = torch.einsum("bzgrij,bzjgrp->bzigrp", scores, x_dt)

    # 2. What each chunk adds to the state by its end (chunk_state), and 3. the recurrence over them (state_passing).
    to_end = (dA_cumsum[:, :, -1:] - dA_cumsum).exp()
    chunk_state = torch.einsum("bzjgk,bzjgrp->bzgrpk", B_BZQGK, x_dt * to_end.unsqueeze(-1))
    chunk_decay = dA_cumsum[:, :, -1].exp()[..., None, None]  # (B, Z, G, R, 1, 1)
    state = torch.zeros_like(chunk_state[:, 0]) if state_BHPK is None else state_BHPK.to(compute).unflatten(1, (G, R))
    entering = []
    for z in range(chunk_state.shape[1]):
        entering.append(state)
        state = state * chunk_decay[:, z] + chunk_state[:, z]

    # 4. Each token reads the state that entered its chunk (chunk_scan).
    read = torch.einsum("bzigk,bzgrpk->bzigrp", C_BZQGK, torch.stack(entering, 1))
    y = y + read * dA_cumsum.exp().unsqueeze(-1)
    if D_H is not None:
        y = y + x * D_H.to(compute).view(G, R, 1)
    return y.flatten(3, 4).flatten(1, 2)[:, :S].to(dtype), state.flatten(1, 2)


def ssd_scan_mamba_ssm(x_BSHP, dt_BSH, A_H, B_BSGK, C_BSGK, D_H=None, state_BHPK=None, chunk_size=256):
    """mamba-ssm's Triton kernels, called on pieces short enough for their 32-bit offsets (state-spaces/mamba 1015)."""
    mamba_chunk_scan_combined = require_optional("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    row = max(t.stride(1) for t in (x_BSHP, dt_BSH, B_BSGK, C_BSGK)) * x_BSHP.shape[0]
    state_row = x_BSHP.shape[0] * x_BSHP.shape[2] * x_BSHP.shape[3] * B_BSGK.shape[3]  # per chunk
    most = 2**31 - 1  # elements of one tensor, with more of which they go wrong silently
    piece = min(most // row, most // state_row * chunk_size)
    piece = max(chunk_size, piece // chunk_size * chunk_size)
    outputs = []
    for start in range(0, x_BSHP.shape[1], piece):
        x, dt, B, C = (t[:, start : start + piece] for t in (x_BSHP, dt_BSH, B_BSGK, C_BSGK))
        y, state_BHPK = mamba_chunk_scan_combined(
            x, dt, A_H, B, C, chunk_size, D=D_H, initial_states=state_BHPK, return_final_states=True
        )
        outputs.append(y)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), state_BHPK


SSD_BACKENDS = {"torch": ssd_scan_torch, "triton": ssd_scan_triton, "mamba_ssm": ssd_scan_mamba_ssm}


def gated_rms_norm_torch(y_BSD: Tensor, gate_BSD: Tensor, weight_D: Tensor, n_groups: int, eps: float) -> Tensor:
    """The reference of `gated_rms_norm_triton`."""
    compute = torch.promote_types(y_BSD.dtype, torch.float32)
    gated = y_BSD.to(compute) * F.silu(gate_BSD.to(compute))
    gated = F.rms_norm(gated.unflatten(-1, (n_groups, -1)), (gated.shape[-1] // n_groups,), eps=eps)
    return (gated.flatten(-2) * weight_D.to(compute)).to(y_BSD.dtype)


NORM_BACKENDS = {"torch": gated_rms_norm_torch, "triton": gated_rms_norm_triton}


class GatedRMSNorm(nn.Module):
    """RMSNorm(y * silu(z)): the gate comes before the normalisation, and each group is normalised by itself."""

    def __init__(self, size: int, n_groups: int = 1, eps: float = 1e-5, backend: str = "auto"):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.n_groups, self.eps, self.backend = n_groups, eps, backend
        choose_backend("gated norm", backend, NORM_BACKENDS, self.weight)  # raises early

    def forward(self, y_BSD: Tensor, gate_BSD: Tensor) -> Tensor:
        fits = y_BSD.shape[-1] // self.n_groups <= MAX_GROUP
        norm = choose_backend("gated norm", self.backend, NORM_BACKENDS, y_BSD, fits)
        return norm(y_BSD, gate_BSD, self.weight, self.n_groups, self.eps)


class CausalConv1d(nn.Conv1d):
    """`causal_conv1d` as a module, whose weight lies as checkpoints have it, (C, 1, W)."""

    def forward(
        self, x_BSC: Tensor, state_BTC: Tensor | None, lengths_B: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        return causal_conv1d(x_BSC, self.weight.squeeze(1), self.bias, state_BTC, lengths_B, backend)


class Mamba2Mixer(nn.Module):
    """in_proj -> causal convolution -> state space duality -> gated norm -> out_proj.

    in_proj's rows are [z, x, B, C, dt]. A_log, D and dt_bias stay in float32 (state-spaces/mamba issue 6).
    """

    def __init__(self, config: VambaMamba2Config):
        super().__init__()
        self.config = config
        inner, H = config.intermediate_size, config.num_heads
        self.in_proj = nn.Linear(config.hidden_size, inner + config.conv_dim + H, bias=config.use_bias)
        self.conv1d = CausalConv1d(
            config.conv_dim, config.conv_dim, config.conv_kernel, groups=config.conv_dim, bias=config.use_conv_bias
        )
        self.dt_bias = nn.Parameter(torch.ones(H))
        self.A_log = nn.Parameter(torch.zeros(H))
        self.D = nn.Parameter(torch.ones(H))
        self.norm = GatedRMSNorm(inner, config.n_groups, config.layer_norm_epsilon, config.norm_backend)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.use_bias)

    def forward(
        self, hidden_BSD: Tensor, state: Mamba2State | None = None, lengths_B: Tensor | None = None
    ) -> tuple[Tensor, Mamba2State]:
        """Maps (B, S, D) tokens and the state before them to (B, S, D) and the state after each row's last token.

        `lengths_B` (B,) int64 counts each row's valid tokens, the rest being padding on the right; None means all.
        """
        config, projected = self.config, self.in_proj(hidden_BSD)
        gate, xBC, dt = split_projected(projected, config)
        A = -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()
        rows = projected.shape[0]
        conv_state, ssm_state = state or (
            projected.new_zeros(rows, config.conv_kernel - 1, config.conv_dim),
            A.new_zeros(rows, config.num_heads, config.head_dim, config.state_size),
        )
        if torch.is_grad_enabled() and self._is_one_operation(projected):
            conv = self.conv1d.weight.squeeze(1), self.conv1d.bias, conv_state
            scan = A, self.D.float(), ssm_state.float()
            with torch.no_grad():
                dt = self._step_sizes(dt, lengths_B)
            y, *states = mix_triton(projected, conv, dt, self.dt_bias, *scan, self.norm.weight, lengths_B, config)
        else:
            xBC, conv_state = self.conv1d(xBC, conv_state, lengths_B, config.conv_backend)
            (x, B, C), dt = split_convolved(xBC, config), self._step_sizes(dt, lengths_B)
            y, ssm_state = ssd_scan(x, dt, A, B, C, self.D, ssm_state, config.chunk_size, config.ssd_backend)
            y, states = self.norm(y.flatten(-2), gate), (conv_state, ssm_state)
        return self.out_proj(y), Mamba2State(*states)

    def _is_one_operation(self, projected: Tensor) -> bool:
        """Whether our kernels take all between the projections, and nobody watches or replaces what is there."""
        config = self.config
        backends = config.ssd_backend, config.conv_backend, config.norm_backend
        fits = config.intermediate_size // config.n_groups <= MAX_GROUP and config.conv_kernel <= MAX_WIDTH
        fits = fits and all(size >= 16 and size & (size - 1) == 0 for size in (config.head_dim, config.state_size))
        fits = fits and all(wants_kernel(backend, projected) for backend in backends) and can_use_kernel(projected)
        return fits and is_plain(self.conv1d, CausalConv1d) and is_plain(self.norm, GatedRMSNorm)

    def _step_sizes(self, dt_BSH: Tensor, lengths_B: Tensor | None) -> Tensor:
        compute = torch.promote_types(dt_BSH.dtype, torch.float32)
        dt_BSH = F.softplus(dt_BSH.to(compute) + self.dt_bias.to(compute))
        low, high = self.config.time_step_limit
        if low > 0 or high < math.inf:
            dt_BSH = dt_BSH.clamp(low, high)
        if lengths_B is not None:
            valid_BS = torch.arange(dt_BSH.shape[1], device=dt_BSH.device) < lengths_B.unsqueeze(1)
            dt_BSH = dt_BSH * valid_BS.unsqueeze(-1)
        return dt_BSH


class Mamba2Block(GradientCheckpointingLayer):
    """V + Mixer(RMSNorm(V)), the pre-norm residual block; V may be wider than the weights, and stays so."""

    def __init__(self, config: VambaMamba2Config):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = Mamba2Mixer(config)

    def forward(
        self, hidden_BSD: Tensor, state: Mamba2State | None = None, lengths_B: Tensor | None = None
    ) -> tuple[Tensor, Mamba2State]:
        fits, backend = hidden_BSD.shape[-1] <= MAX_GROUP, self.mixer.config.norm_backend
        with_kernels, weight_D = wants_kernel(backend, hidden_BSD, fits), self.norm.weight
        if with_kernels and is_plain(self.norm, nn.RMSNorm):  # what goes on is the norm's, for it adds the gradients
            hidden_BSD, normed_BSD = residual_norm_triton(hidden_BSD, weight_D, self.norm.eps)
        else:
            normed_BSD = self.norm(hidden_BSD.to(weight_D.dtype))
        mixed_BSD, state = self.mixer(normed_BSD, state, lengths_B)
        if with_kernels and mixed_BSD.dtype != hidden_BSD.dtype == torch.float32:
            return add_to_residual_triton(hidden_BSD, mixed_BSD), state
        return hidden_BSD + mixed_BSD, state


@torch.no_grad()
def init_mamba2_parameter(
    name: str, tensor: Tensor, config: VambaMamba2Config, num_layers: int, generator: torch.Generator | None = None
) -> None:
    """Fills one parameter of a mixer, by its name in it, as the original Vamba does (mamba-ssm's scheme).

    dt log-uniform, A uniform, D one, and the output projection scaled down by the square root of the number of
    layers, as in GPT-2. kaiming_uniform(a=sqrt(5)) is U(+-1/sqrt(fan_in)).
    """

    def uniform(low, high):
        return tensor.uniform_(low, high, generator=generator)

    if name in ("norm.weight", "D"):
        tensor.fill_(1.0)
    elif name in ("in_proj.bias", "out_proj.bias"):
        tensor.zero_()
    elif name == "in_proj.weight":
        tensor.normal_(0.0, config.initializer_range, generator=generator)
    elif name in ("conv1d.weight", "conv1d.bias"):  # the fan-in of a depthwise convolution is its kernel
        uniform(-(config.conv_kernel**-0.5), config.conv_kernel**-0.5)
    elif name == "out_proj.weight":
        bound = (config.intermediate_size * num_layers) ** -0.5
        uniform(-bound, bound)
    elif name == "A_log":
        uniform(*config.A_init_bounds).log_()
    elif name == "dt_bias":
        uniform(math.log(config.time_step_min), math.log(config.time_step_max)).exp_()
        tensor.clamp_(min=config.time_step_floor)
        tensor.add_(torch.log(-torch.expm1(-tensor)))  # the inverse of the softplus
    else:
        raise KeyError(f"no rule initialises {name!r} of a Mamba-2 mixer")


def init_mamba2_mixer(mixer: Mamba2Mixer, num_layers: int) -> None:
    """Initialises a mixer, but for parameters that were loaded from a checkpoint."""
    for name, parameter in mixer.named_parameters():
        if not getattr(parameter, "_is_hf_initialized", False):
            init_mamba2_parameter(name, parameter, mixer.config, num_layers)
