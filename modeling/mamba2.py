"""The Mamba-2 block (arXiv 2405.21060), written as a function from (tokens, state) to (tokens, state).

What is unusual: there is no cache object and no "decoding mode". A block takes the state left by whatever came before
and returns the state after its last token, differentiably; one token or a million go the same way. Rows of a batch
may be padded on the right: padding changes neither the outputs before it nor the state.

Shapes: B batch, S tokens, D hidden, H heads, P head dim, G groups, K state size, C conv channels, T conv taps kept.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

from .causal_conv1d import causal_conv1d
from .configuration_vamba import VambaMamba2Config
from .state_space_duality import ssd_scan


class Mamba2State(NamedTuple):
    """All that a Mamba-2 block remembers of a sequence, however long: (H·P·K + T·C) numbers per row."""

    conv_BTC: Tensor
    ssm_BHPK: Tensor


class GatedRMSNorm(nn.Module):
    """RMSNorm(y * silu(z)): the gate comes before the normalisation, and each group is normalised by itself."""

    def __init__(self, size: int, n_groups: int = 1, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.n_groups, self.eps = n_groups, eps

    def forward(self, y_BSD: Tensor, gate_BSD: Tensor) -> Tensor:
        compute = torch.promote_types(y_BSD.dtype, torch.float32)
        gated = y_BSD.to(compute) * F.silu(gate_BSD.to(compute))
        gated = F.rms_norm(gated.unflatten(-1, (self.n_groups, -1)), (gated.shape[-1] // self.n_groups,), eps=self.eps)
        return (gated.flatten(-2) * self.weight.to(compute)).to(y_BSD.dtype)


class Mamba2Mixer(nn.Module):
    """in_proj -> causal convolution -> state space duality -> gated norm -> out_proj.

    in_proj's rows are [z, x, B, C, dt]. A_log, D and dt_bias stay in float32 (state-spaces/mamba issue 6).
    """

    def __init__(self, config: VambaMamba2Config):
        super().__init__()
        self.config = config
        inner, H = config.intermediate_size, config.num_heads
        self.in_proj = nn.Linear(config.hidden_size, inner + config.conv_dim + H, bias=config.use_bias)
        # A module for the sake of its weight's place and shape in checkpoints, (C, 1, W); it is never called.
        self.conv1d = nn.Conv1d(
            config.conv_dim, config.conv_dim, config.conv_kernel, groups=config.conv_dim, bias=config.use_conv_bias
        )
        self.dt_bias = nn.Parameter(torch.ones(H))
        self.A_log = nn.Parameter(torch.zeros(H))
        self.D = nn.Parameter(torch.ones(H))
        self.norm = GatedRMSNorm(inner, config.n_groups, config.layer_norm_epsilon)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.use_bias)

    def forward(
        self, hidden_BSD: Tensor, state: Mamba2State | None = None, lengths_B: Tensor | None = None
    ) -> tuple[Tensor, Mamba2State]:
        """Maps (B, S, D) tokens and the state before them to (B, S, D) and the state after each row's last token.

        `lengths_B` (B,) int64 counts each row's valid tokens, the rest being padding on the right; None means all.
        """
        config, (H, P, G, K) = self.config, self._sizes()
        projected = self.in_proj(hidden_BSD)
        gate, xBC, dt = projected.split([H * P, config.conv_dim, H], dim=-1)
        conv_state, ssm_state = (None, None) if state is None else state
        xBC, conv_state = causal_conv1d(
            xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, conv_state, lengths_B, config.conv_backend
        )
        x, B_BSGK, C_BSGK = xBC.split([H * P, G * K, G * K], dim=-1)
        y_BSHP, ssm_state = ssd_scan(
            x.unflatten(-1, (H, P)),
            self._step_sizes(dt, lengths_B),
            -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp(),
            B_BSGK.unflatten(-1, (G, K)),
            C_BSGK.unflatten(-1, (G, K)),
            self.D,
            ssm_state,
            config.chunk_size,
            config.ssd_backend,
        )
        return self.out_proj(self.norm(y_BSHP.flatten(-2), gate)), Mamba2State(conv_state, ssm_state)

    def _sizes(self):
        return self.config.num_heads, self.config.head_dim, self.config.n_groups, self.config.state_size

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
    """V + Mixer(RMSNorm(V)), the pre-norm residual block."""

    def __init__(self, config: VambaMamba2Config):
        super().__init__()
        self.norm = Qwen2VLRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = Mamba2Mixer(config)

    def forward(
        self, hidden_BSD: Tensor, state: Mamba2State | None = None, lengths_B: Tensor | None = None
    ) -> tuple[Tensor, Mamba2State]:
        mixed_BSD, state = self.mixer(self.norm(hidden_BSD), state, lengths_B)
        return hidden_BSD + mixed_BSD, state


@torch.no_grad()
def init_mamba2_mixer(mixer: Mamba2Mixer, num_layers: int) -> None:
    """Initialises a mixer as the original Vamba does (mamba-ssm's scheme): dt log-uniform, A uniform, D one, and the
    output projection scaled down by the square root of the number of layers, as in GPT-2."""
    config = mixer.config
    init.normal_(mixer.in_proj.weight, std=config.initializer_range)
    init.kaiming_uniform_(mixer.conv1d.weight, a=math.sqrt(5))
    if mixer.conv1d.bias is not None:
        bound = 1 / math.sqrt(config.conv_kernel)
        init.uniform_(mixer.conv1d.bias, -bound, bound)
    for linear in (mixer.in_proj, mixer.out_proj):
        if linear.bias is not None:
            init.zeros_(linear.bias)
    out = torch.empty_like(mixer.out_proj.weight)
    init.kaiming_uniform_(out, a=math.sqrt(5))
    init.copy_(mixer.out_proj.weight, out / math.sqrt(num_layers))
    log_min, log_max = math.log(config.time_step_min), math.log(config.time_step_max)
    dt = (torch.rand_like(mixer.dt_bias) * (log_max - log_min) + log_min).exp().clamp(min=config.time_step_floor)
    init.copy_(mixer.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of the softplus
    init.copy_(mixer.A_log, torch.empty_like(mixer.A_log).uniform_(*config.A_init_bounds).log())
    init.ones_(mixer.D)
    init.ones_(mixer.norm.weight)
