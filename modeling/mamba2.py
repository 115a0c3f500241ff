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
from transformers.modeling_layers import GradientCheckpointingLayer

from .causal_conv1d import MAX_WIDTH, causal_conv1d
from .configuration_vamba import VambaMamba2Config
from .gated_rms_norm_triton import MAX_GROUP, gated_rms_norm_triton
from .mamba2_triton import mix_triton
from .residual_norm_triton import add_to_residual_triton, residual_norm_triton
from .state_space_duality import ssd_scan
from .triton_launch import are_preferred, is_unhooked, takes


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


class GatedRMSNorm(nn.Module):
    """RMSNorm(y * silu(z)): the gate comes before the normalisation, and each group is normalised by itself."""

    def __init__(self, size: int, n_groups: int = 1, eps: float = 1e-5, backend: str = "auto"):
        super().__init__()
        if backend not in ("auto", "torch", "triton"):
            raise ValueError(f"Unknown gated norm backend {backend!r}; choose one of ['auto', 'torch', 'triton'].")
        self.weight = nn.Parameter(torch.ones(size))
        self.n_groups, self.eps, self.backend = n_groups, eps, backend

    def forward(self, y_BSD: Tensor, gate_BSD: Tensor) -> Tensor:
        fused = are_preferred(y_BSD) and y_BSD.shape[-1] // self.n_groups <= MAX_GROUP
        if self.backend == "triton" or (self.backend == "auto" and fused):
            return gated_rms_norm_triton(y_BSD, gate_BSD, self.weight, self.n_groups, self.eps)
        compute = torch.promote_types(y_BSD.dtype, torch.float32)
        gated = y_BSD.to(compute) * F.silu(gate_BSD.to(compute))
        gated = F.rms_norm(gated.unflatten(-1, (self.n_groups, -1)), (gated.shape[-1] // self.n_groups,), eps=self.eps)
        return (gated.flatten(-2) * self.weight.to(compute)).to(y_BSD.dtype)


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
        config, (H, P, G, K) = self.config, self._sizes()
        projected = self.in_proj(hidden_BSD)
        if torch.is_grad_enabled() and self._is_one_operation(projected):
            y_BSD, *state = self._mix(projected, state, lengths_B)
            return self.out_proj(y_BSD), Mamba2State(*state)
        gate, xBC, dt = projected.split([H * P, config.conv_dim, H], dim=-1)
        conv_state, ssm_state = (None, None) if state is None else state
        xBC, conv_state = self.conv1d(xBC, conv_state, lengths_B, config.conv_backend)
        x, B_BSGK, C_BSGK = xBC.split([H * P, G * K, G * K], dim=-1)
        y_BSHP, ssm_state = ssd_scan(
            x.unflatten(-1, (H, P)),
            self._step_sizes(dt, lengths_B),
            self._decay_rates(),
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

    def _decay_rates(self) -> Tensor:
        return -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()

    def _is_one_operation(self, projected: Tensor) -> bool:
        """Whether our kernels take all between the projections, and nobody watches or replaces what is there."""
        _, P, G, K = self._sizes()
        backends = {self.config.ssd_backend, self.config.conv_backend, self.config.norm_backend}
        chosen = backends == {"triton"} or (are_preferred(projected) and backends <= {"auto", "triton"})
        fits = self.config.intermediate_size // G <= MAX_GROUP and self.config.conv_kernel <= MAX_WIDTH
        fits = fits and all(size >= 16 and size & (size - 1) == 0 for size in (P, K))
        return chosen and fits and takes(projected) and self._is_unchanged()

    def _is_unchanged(self) -> bool:
        """Whether no adapter, hook or wrapper stands in the place of convolution and norm."""
        kinds = ((self.conv1d, CausalConv1d), (self.norm, GatedRMSNorm))
        return all(type(module) is kind and is_unhooked(module) for module, kind in kinds)

    def _mix(self, projected: Tensor, state: Mamba2State | None, lengths_B: Tensor | None) -> tuple[Tensor, ...]:
        (H, P, _, K), (B, _, _), T = self._sizes(), projected.shape, self.config.conv_kernel - 1
        conv_state, ssm_state = state or (
            projected.new_zeros(B, T, self.config.conv_dim),
            projected.new_zeros(B, H, P, K, dtype=torch.float32),
        )
        conv = self.conv1d.weight.squeeze(1), self.conv1d.bias, conv_state
        with torch.no_grad():
            dt_BSH = self._step_sizes(projected[..., -H:], lengths_B)
        rates, D, ssm_state = self._decay_rates(), self.D.float(), ssm_state.float()
        return mix_triton(
            projected, conv, dt_BSH, self.dt_bias, rates, D, ssm_state, self.norm.weight, lengths_B, self.config
        )

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
        hidden_BSD, normed_BSD = self._norm(hidden_BSD)
        mixed_BSD, state = self.mixer(normed_BSD, state, lengths_B)
        widens = mixed_BSD.dtype != hidden_BSD.dtype == torch.float32
        if widens and self._takes_kernels(hidden_BSD):
            return add_to_residual_triton(hidden_BSD, mixed_BSD), state
        return hidden_BSD + mixed_BSD, state

    def _norm(self, hidden_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream, to be used from here on, and its norm in the dtype of the norm's weight."""
        weight_D = self.norm.weight
        plain = type(self.norm) is nn.RMSNorm and type(weight_D) in (nn.Parameter, Tensor) and is_unhooked(self.norm)
        if plain and self._takes_kernels(hidden_BSD):
            return residual_norm_triton(hidden_BSD, weight_D, self.norm.eps)
        return hidden_BSD, self.norm(hidden_BSD.to(weight_D.dtype))

    def _takes_kernels(self, hidden_BSD: Tensor) -> bool:
        backend = self.mixer.config.norm_backend
        return backend == "triton" or (
            backend == "auto" and are_preferred(hidden_BSD) and hidden_BSD.shape[-1] <= MAX_GROUP
        )


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
