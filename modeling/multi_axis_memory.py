"""How much memory multi-axis checkpointing takes, and which cells fit (appendix C of arXiv 2411.19460).

What is unusual: the paper's memory model (equation 12) and ours are one formula with two sets of constants, both made
from a Mamba-2 configuration: the paper's count the numbers its fused layer keeps, ours the bytes autograd saves with
this package's kernels on a GPU. Both are made for one row of a batch.
"""

import functools
import math
import os
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch

from .configuration_vamba import VambaMamba2Config
from .frame_streaming import free_bytes
from .kernels_scan import GROUP_TOKENS


# What a step takes besides, relative to itself (H200). The GPU computes 10^14 bytes of weights times tokens a second,
# there and back; for each layer of each block it stands still 0.94 ms between kernels, and the CPU takes 3.3 ms to
# launch them, for which short blocks of small models wait. Recomputing a cell of l layers stops before the last one's
# output projection and saves 0.05 / l; what waits in CPU memory costs half its share of all that autograd would save. A
# tenth less memory is worth two percent of the time where it is about 16 GB, as much as a 7B's weights, and less where
# there is little of it.
BYTES_PER_S, IDLE, LAUNCHES = 1e14, 0.94e-3, 3.3e-3
STOPPED, MOVED, TRADE, BESIDE = 0.05, 0.5, 0.36, 16e9
WEIGHTS_7B = 1.57e8  # bytes of a layer, where nobody says (the paper's constants)
SLACK = 1.05  # over the least memory there is, where that is too much already


class MemoryCosts(NamedTuple):
    """Bytes of a stack of Mamba-2 layers in training, for one row of a batch, or for several (`of_rows`).

    Attributes:
        border: per token, hidden states that enter a group of layers (the paper's C_L-ckpt).
        state: per layer, the Mamba state that enters a block of tokens (C_S-ckpt).
        layer: per token and layer, what autograd saves inside the cell that backward is at (C_grid).
        work: per token of that cell, what backward through one layer needs besides (C_state).
        scan: the same, but per token of those whose states our scan holds at once (`kernels_scan.GROUP_TOKENS`).
        emitted: per token and layer, what the layers give away (Vamba: keys and values); its gradient is as large.
        spared: per token, by how much what enters the first group is narrower than a border.
        weights: per layer of a group, gradients of weights, which autograd sums over blocks before it passes them on.
    """

    border: int
    state: int
    layer: int
    work: int = 0
    scan: int = 0
    emitted: int = 0
    spared: int = 0
    weights: int = 0

    def of_rows(self, rows: int) -> "MemoryCosts":
        return MemoryCosts(*(rows * value for value in self[:-1]), self.weights)

    def total(self, num_layers: int, tokens: int, layer_interval: int, sequence_interval: int, offload: bool = False):
        """Bytes at the peak of backward. With `offload` borders, states and what is emitted wait in CPU memory.

        Of the last layer's hidden states few are read or none. The gradient of a border, and that of what a layer
        emitted, takes the place of the thing itself, but while it is made.
        """
        groups, blocks = ceil(num_layers / layer_interval), ceil(tokens / sequence_interval)
        layers = min(layer_interval, num_layers)
        length = min(sequence_interval, tokens)
        cell = length * (layers * self.layer + self.work) + min(length, GROUP_TOKENS) * self.scan
        cell += layers * self.weights if blocks > 1 else 0
        if offload:  # on the GPU are the first border, another, what two cells need and what two layers emitted
            kept = tokens * (2 * self.border - self.spared)
            kept += 2 * (length * self.border + layers * self.state)
            emitted = tokens * (layers + 2) * self.emitted
        else:
            kept = tokens * (max(groups, 2) * self.border - self.spared) + num_layers * blocks * self.state
            emitted = tokens * (num_layers + 1) * self.emitted
        return kept + emitted + cell

    def offloaded(self, num_layers: int, tokens: int, layer_interval: int, sequence_interval: int) -> int:
        """Bytes that `offload` puts into CPU memory, where a pinned allocation is rounded up to a power of two."""
        groups, blocks = ceil(num_layers / layer_interval), ceil(tokens / sequence_interval)
        state = 1 << (self.state - 1).bit_length()  # what is larger comes in pieces
        borders = groups * self.border - self.spared
        return tokens * (borders + num_layers * self.emitted) + num_layers * blocks * state


def choose_intervals(
    costs: MemoryCosts,
    num_layers: int,
    tokens: int,
    budget: int | None = None,
    *,
    rows: int = 1,
    offload: bool = False,
    cpu_budget: int | None = None,
    layer_interval: int | None = None,
    sequence_interval: int | None = None,
    multiple: int = 256,
    longest: int = 32768,
) -> tuple[int, int]:
    """(layers, tokens) of a cell: of those within `budget` bytes (None: of all) the best trade of time for memory.

    `costs` are those of one row, budgets are for all `rows` of the batch, which a cell takes together.
    `layer_interval` and `sequence_interval` are fixed where given. A cell's tokens are a multiple of `multiple`, the
    chunk of the scan, so that no chunk is cut, and not more than `longest`, which fill a GPU. With `offload` what waits
    in CPU memory takes `cpu_budget` bytes at most, or as few as can be; and where nothing fits `budget`, cells take
    near the least memory there is.
    """
    costs = costs.of_rows(rows)
    layers = range(1, num_layers + 1) if layer_interval is None else [layer_interval]
    lengths = [sequence_interval]
    if sequence_interval is None:  # blocks of about one length, as a short one takes the time of a long one's launches
        lengths = {
            multiple * ceil(tokens / (blocks * multiple))
            for blocks in range(ceil(tokens / longest), ceil(tokens / multiple) + 1)
        }
    cells = [(l, s) for s in lengths for l in layers]
    if offload and cpu_budget is not None:
        waiting = {cell: costs.offloaded(num_layers, tokens, *cell) for cell in cells}
        most = max(cpu_budget, min(waiting.values()))
        cells = [cell for cell in cells if waiting[cell] <= most]
    needed = {cell: costs.total(num_layers, tokens, *cell, offload) for cell in cells}
    allowed = math.inf if budget is None else max(budget, SLACK * min(needed.values()))

    def price(cell: tuple[int, int]) -> float:
        l, work = cell[0], rows * cell[1]
        moved = costs.offloaded(num_layers, tokens, *cell) / (num_layers * tokens * costs.layer) if offload else 0.0
        blocks_per_s = BYTES_PER_S / (work * (costs.weights or WEIGHTS_7B))
        short = IDLE * blocks_per_s + max(LAUNCHES * blocks_per_s - 1, 0)
        return short - STOPPED / l + MOVED * moved + TRADE * math.log(needed[cell] + BESIDE)

    return min((cell for cell in cells if needed[cell] <= allowed), key=price)


def memory_budget(device: torch.device, share: float = 0.5) -> int | None:
    """Bytes that cells may take on a GPU: a share of what is free now; None where that cannot be known.

    The rest is for what comes later in the step: the text, gradients of the weights, and the optimizer's first step.
    """
    if device.type != "cuda":
        return None
    return int(share * free_bytes(device))


def cpu_memory_budget(share: float = 0.7) -> int | None:
    """Bytes of CPU memory that each process of this machine may take; None where that cannot be known.

    The rest is for data. It is a share of what was available when this was first asked: afterwards PyTorch holds what
    it has pinned, used or not.
    """
    available = _available_cpu_bytes()
    return None if available is None else int(share * available) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@functools.cache
def _available_cpu_bytes() -> int | None:
    """Linux says what is available, and a container (cgroup v2) may allow less."""
    try:
        available = 1024 * next(
            int(line.split()[1]) for line in Path("/proc/meminfo").open() if line.startswith("MemAvailable:")
        )
    except (OSError, StopIteration):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        allowed, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        available = min(available, allowed - used + int(counts["inactive_file"]))  # what was read from files may go
    except (OSError, ValueError, KeyError):  # no container, or one without a limit: "max"
        pass
    return max(available, 0)


def mamba2_costs(
    config: VambaMamba2Config, dtype: torch.dtype, emitted: int = 0, residual_dtype: torch.dtype | None = None
) -> MemoryCosts:
    """The costs of `Mamba2Block`s computed in `dtype` with this package's Triton kernels.

    `layer` is what autograd saves (tests compare it with what is measured); `work` and `scan` are estimates: the
    gradients of the layer's intermediate tensors, and the states between the scan's tiles, there and back.

    Args:
        emitted: numbers per token and layer that go elsewhere, such as keys and values.
        residual_dtype: of the hidden states between layers, where it is another; the first layer widens them.
    """
    size, inner, heads = dtype.itemsize, config.intermediate_size, config.num_heads
    rows = inner + config.conv_dim + heads  # of in_proj
    exact = max(size, 4)  # dt and the states are computed in float32
    state = exact * inner * config.state_size + size * (config.conv_kernel - 1) * config.conv_dim
    layer = 2 * size * config.hidden_size  # before and after the norm
    layer += size * rows + exact * 3 * heads  # in_proj's gate, inputs and dt; three numbers of each step and its decay
    layer += size * (config.conv_dim + 2 * inner)  # after the convolution, the scan, and the gated norm
    tile = 64 if size < 4 else 16
    layer += exact * inner * config.state_size // (8 * tile)  # the states before the scan's segments of 8 tiles or more
    work = size * (rows + config.conv_dim + 2 * inner)
    scan = 2 * size * inner * config.state_size // tile
    border = (residual_dtype or dtype).itemsize * config.hidden_size
    spared = border - size * config.hidden_size
    weights = size * config.hidden_size * (rows + inner)  # of the two projections
    return MemoryCosts(border, state, layer, work, scan, emitted * size, max(spared, 0), weights)


def paper_costs(config: VambaMamba2Config, dtype: torch.dtype = torch.bfloat16) -> MemoryCosts:
    """The constants of the paper's table 7, which hold for mamba-ssm's fused layer, in bytes.

    Its C_state is per token (equation 16), though the states that backward recomputes are one per chunk; with it the
    model comes close to the paper's measurements (table 3), which are 1.0 to 1.9 times what it says.
    """
    inner, conv_dim = config.intermediate_size, config.conv_dim
    state = inner * config.state_size
    numbers = MemoryCosts(
        border=config.hidden_size,
        state=state + (config.conv_kernel - 1) * conv_dim,
        layer=inner + conv_dim + config.num_heads + inner,
        work=state + conv_dim,
    )
    return MemoryCosts(*(dtype.itemsize * number for number in numbers))


__all__ = ["MemoryCosts", "choose_intervals", "cpu_memory_budget", "mamba2_costs", "memory_budget", "paper_costs"]
