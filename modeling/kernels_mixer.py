"""A Mamba-2 mixer between its two projections as one operation for autograd: convolution, scan and gated norm.

What is unusual: the kernels are those of the single operations, but their gradients are written straight into the
columns of in_proj's output, (B, S, [z, x, B, C, dt]). Autograd would join them by copying, twice, and would pad the
gradient of the convolution's last inputs, three rows, to the length of the sequence. The letters of shapes are
explained in kernels.py.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .configuration_vamba import VambaMamba2Config
from .kernels import rows_of
from .kernels_conv1d import convolution_gradients, convolve, last_inputs, last_places
from .kernels_norm import gated_norm, gated_norm_gradients
from .kernels_scan import scan, scan_gradients


def split_projected(projected_BSE: Tensor, config: VambaMamba2Config) -> tuple[Tensor, ...]:
    """Views of in_proj's columns: the gate z, [x, B, C], and dt before its bias."""
    return projected_BSE.split([config.intermediate_size, config.conv_dim, config.num_heads], -1)


def split_convolved(convolved_BSC: Tensor, config: VambaMamba2Config) -> tuple[Tensor, ...]:
    """Views of the convolution's channels: x (B, S, H, P), B and C (B, S, G, K)."""
    G, K = config.n_groups, config.state_size
    x, Bm, Cm = convolved_BSC.split([config.intermediate_size, G * K, G * K], -1)
    return x.unflatten(-1, (config.num_heads, config.head_dim)), Bm.unflatten(-1, (G, K)), Cm.unflatten(-1, (G, K))


def mix_triton(projected_BSE, conv, dt_BSH, dt_bias_H, A_H, D_H, ssm_BHPK, norm_weight, lengths_B, config):
    """The gated and normalised outputs, (B, S, H·P), and both states after each row's last token.

    `conv` holds weight (C, W), bias (C,) or None, and the last inputs (B, T, C). `dt_BSH` are the step sizes as the
    mixer makes them of projected_BSE and dt_bias_H, without a gradient: that is sent to those two from here. P and K
    are powers of two from 16.
    """
    return _Mix.apply(
        projected_BSE.contiguous(), *conv, dt_BSH, dt_bias_H, A_H, D_H, ssm_BHPK, norm_weight, lengths_B, config
    )


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected, weight, bias, conv_state, dt, dt_bias, A, D, state, norm_weight, lengths, config):
        weight, conv_state, state = weight.contiguous(), conv_state.to(projected.dtype).contiguous(), state.contiguous()
        gate, xBC, _ = split_projected(projected, config)
        convolved = convolve(xBC, weight, bias, conv_state)
        x, Bm, Cm = split_convolved(convolved, config)
        y, state, cumsums, entering = scan(x, dt, A, Bm, Cm, D, state, config.chunk_size)
        y = y.flatten(2)
        out = gated_norm(rows_of(y), rows_of(gate), norm_weight, config.n_groups, config.layer_norm_epsilon)
        ctx.config = config
        ctx.save_for_backward(
            projected, weight, bias, conv_state, dt_bias, A, D, norm_weight, lengths, convolved, y, cumsums, entering
        )
        return out.view(y.shape), last_inputs(xBC, conv_state, lengths), state

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, drecent, dstate):
        (
            projected, weight, bias, conv_state, dt_bias, A, D, norm_weight, lengths, convolved, y, cumsums, entering,
        ) = ctx.saved_tensors  # fmt: skip
        config, dprojected = ctx.config, torch.empty_like(projected)
        (gate, xBC, _), (dgate, dxBC, draw_dt) = split_projected(projected, config), split_projected(dprojected, config)
        norm = rows_of(y), rows_of(gate), norm_weight, config.n_groups, config.layer_norm_epsilon
        dy, dnorm_weight = gated_norm_gradients(*norm, rows_of(dout.to(y.dtype)), rows_of(dgate))
        dconvolved = torch.empty_like(convolved)
        (x, Bm, Cm), written = split_convolved(convolved, config), split_convolved(dconvolved, config)
        dy = dy.view(x.shape)
        ddt_BSH, dA, dD, dstate = scan_gradients(x, A, Bm, Cm, D, cumsums, entering, dy, dstate, *written)
        dconv = convolution_gradients(xBC, weight, bias, conv_state, dconvolved, dxBC)
        _add_to_last(dconv[2], dxBC, last_places(xBC, conv_state, lengths), drecent)
        # The derivative of the softplus is 1 - exp(-softplus); what is clamped, or padding, has none.
        dt = cumsums[0].flatten(2)[..., : ddt_BSH.shape[1]].transpose(1, 2)
        low, high = config.time_step_limit
        ddt_BSH *= torch.where((dt > low) & (dt < high), -torch.expm1(-dt), 0)
        draw_dt.copy_(ddt_BSH)
        ddt_bias = ddt_BSH.sum((0, 1)).to(dt_bias.dtype)
        return dprojected, *dconv, None, ddt_bias, dA, dD, dstate, dnorm_weight, None, None


def _add_to_last(dstate_BTC: Tensor, dxBC: Tensor, index_BT1: Tensor, drecent_BTC: Tensor) -> None:
    """Adds the gradient of the inputs kept to those of the state and of the inputs that they were."""
    T = dstate_BTC.shape[1]
    for target, index, mine in ((dstate_BTC, index_BT1, index_BT1 < T), (dxBC, index_BT1 - T, index_BT1 >= T)):
        index = index.clamp(0, target.shape[1] - 1).expand(-1, -1, target.shape[2])
        target.scatter_add_(1, index, torch.where(mine, drecent_BTC, 0).to(target.dtype))
