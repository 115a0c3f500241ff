"""Gradient checkpointing over layers and sequence at once (multi-axis checkpointing, section 3.2 of arXiv 2411.19460).

What is unusual: layers x sequence are cut into cells of `layer_interval` layers by `sequence_interval` tokens, and one
cell is one `torch.utils.checkpoint` call, so that autograd chains them and DDP, FSDP2 and autocast know nothing of it.
Forward keeps what crosses the borders of cells, backward recomputes cell by cell, but for the last, which is kept.
Groups of layers are run on demand (`LazyLevels`): autograd runs backward what ran last, so what a consumer of the
levels (Vamba's text layers) sends back exists for one group at a time. Hidden states stay a list of blocks, which no
`cat` doubles, unless all of the last layer's are asked for. The paper's memory model (equation 12) and ours are one
formula with two sets of constants (`MemoryCosts`); what crosses borders can wait in CPU memory (`offload_saved`).

Shapes: B batch, S tokens of one block, D hidden.
"""

import contextlib
import functools
import math
import os
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from .configuration_vamba import VambaMamba2Config
from .kernels_scan import GROUP_TOKENS
from .mamba2 import Mamba2Block, Mamba2State
from .media import free_bytes, side_stream
from .ranks import largest_of_ranks, weights_are_sharded


# --- cells ------------------------------------------------------------------------------------------------------------


@dataclass
class CutSequence:
    """One sequence on its way through the layers; `LazyLevels` moves it on in place.

    Attributes:
        blocks: the hidden states of each block, (B, S, D).
        states: for each layer the `Mamba2State` before its next block, None for an empty one.
        context: what `step` gets besides for each block.
    """

    blocks: list[Tensor]
    states: list[Mamba2State | None]
    context: list[tuple]

    @classmethod
    def cut(
        cls,
        hidden_BSD: Tensor,
        states: Iterable[Mamba2State | None],
        sequence_interval: int | list[int],
        lengths_B: Tensor | None = None,
        *along: Tensor,
    ) -> "CutSequence":
        """Cuts after every `sequence_interval` tokens, or into blocks of the given sizes, which are views of one row.

        Sizes that add up to more than S tokens have padding at the end.

        Args:
            lengths_B: valid tokens of each row, (B,) int64, the rest being padding on the right; None for all.
            along: tensors whose dimension 1 runs along the sequence, (B, S, ...), cut alike.

        The context of a block is its own lengths (or None), then its slice of each tensor of `along`.
        """
        B, S = hidden_BSD.shape[:2]
        if not isinstance(sequence_interval, int) and (missing := sum(sequence_interval) - S):
            lengths_B = torch.full((B,), S, device=hidden_BSD.device) if lengths_B is None else lengths_B
            hidden_BSD, *along = (
                nn.functional.pad(t.movedim(1, -1), (0, missing)).movedim(-1, 1) for t in (hidden_BSD, *along)
            )
        # Dense, as what is brought back from the CPU is: operations choose their way by strides, in backward the same.
        blocks = [block.contiguous() for block in hidden_BSD.split(sequence_interval, dim=1)]
        sizes = [block.shape[1] for block in blocks]
        lengths = [
            None if lengths_B is None else (lengths_B - start).clamp(0, size)
            for start, size in zip(accumulate(sizes, initial=0), sizes)
        ]
        return cls(blocks, list(states), list(zip(lengths, *(t.split(sequence_interval, dim=1) for t in along))))


class LazyLevels:
    """Runs sequences through layers, a group of layers when it is asked for, each group block by block.

    Args:
        step: one layer on one block, `step(index, hidden_BSD, state, *context) -> (hidden_BSD, state, emitted)`, with
            `emitted` a tuple of tensors. It is called a second time in backward, but for the last cell.
        sequences: the sequences, independent of each other, with one state per layer.
        layer_interval: layers of a group.
        offload: keep in (pinned) CPU memory what crosses the borders of cells that are called again.

    Attributes:
        keeps_last: whether the last cell is kept, as backward begins with it. To be set before anything is taken.
    """

    def __init__(
        self, step: Callable[..., tuple], sequences: list[CutSequence], layer_interval: int, offload: bool = False
    ):
        self.step, self.sequences = step, sequences
        self.layer_interval, self.offload = layer_interval, offload
        self.num_levels, self.keeps_last = len(sequences[0].states), True
        self._reached = 0
        self._emitted: dict[int, list[tuple[Tensor, ...]]] = {}

    def take(self, index: int) -> list[tuple[Tensor, ...]]:
        """What layer `index` emits for each block of each sequence, in order; it is forgotten here.

        Raises:
            KeyError: it was taken before.
        """
        while self._reached <= index:
            self._run_group()
        if index not in self._emitted:
            raise KeyError(f"What level {index} emitted was taken before; keep it if it is needed twice.")
        return self._emitted.pop(index)

    def _run_group(self) -> None:
        levels = range(self._reached, min(self._reached + self.layer_interval, self.num_levels))
        self._emitted.update({index: [] for index in levels})
        for sequence in self.sequences:
            for position in range(len(sequence.blocks)):
                self._run_cell(sequence, position, levels)
        self._reached = levels.stop

    def _run_cell(self, sequence: CutSequence, position: int, levels: range) -> None:
        states = [state or (None, None) for state in sequence.states[levels.start : levels.stop]]
        # Tensors are arguments of their own: only those does `checkpoint` save where hooks on saved tensors see them.
        inputs = [sequence.blocks[position], *(tensor for state in states for tensor in state)]
        cell = functools.partial(_run_layers, self.step, levels, sequence.context[position])
        last = levels.stop == self.num_levels and sequence is self.sequences[-1]
        if last and position == len(sequence.blocks) - 1 and self.keeps_last:
            hidden_BSD, states, emitted = cell(*inputs)  # nothing is gained by forgetting it
        else:
            with offload_saved(*inputs) if self.offload else contextlib.nullcontext():
                hidden_BSD, states, emitted = checkpoint(cell, *inputs, use_reentrant=False)
        sequence.blocks[position] = hidden_BSD
        sequence.states[levels.start : levels.stop] = states
        for index, tensors in zip(levels, emitted):
            self._emitted[index].append(tensors)


def _run_layers(step, levels: range, context: tuple, hidden_BSD: Tensor, *states: Tensor | None):
    left, emitted = [], []
    for index, conv_BTC, ssm_BHPK in zip(levels, states[::2], states[1::2]):
        state = None if conv_BTC is None else Mamba2State(conv_BTC, ssm_BHPK)
        hidden_BSD, state, tensors = step(index, hidden_BSD, state, *context)
        left.append(state)
        emitted.append(tensors)
    return hidden_BSD, left, emitted


def run_cells(
    layers: nn.ModuleList,
    hidden_BSD: Tensor,
    states: Iterable[Mamba2State | None] | None = None,
    lengths_B: Tensor | None = None,
    read_at: tuple[Tensor, Tensor] | None = None,
    *,
    layer_interval: int,
    sequence_interval: int | list[int],
    offload: bool = False,
) -> tuple[Tensor, list[Mamba2State]]:
    """A stack of Mamba-2 blocks, `layer(hidden_BSD, state, lengths_B) -> (hidden_BSD, state)`, in checkpointed cells.

    Returns:
        The last layer's hidden states, (B, S, D), and each layer's state after the last token. With `read_at`, rows
        and places of n tokens (int64, not negative), the hidden states are those of the tokens, (n, D): they are taken
        inside the cells, so that of all others neither the last layer's hidden states nor their gradients are held.
    """

    def step(index, hidden_BSD, state, lengths_B, *read_here):
        hidden_BSD, state = layers[index](hidden_BSD, state, lengths_B)
        if index < len(layers) - 1 or not read_here:
            return hidden_BSD, state, ()
        rows_places = tuple(where.to(hidden_BSD.device) for where in read_here)
        return hidden_BSD.new_empty(0), state, (hidden_BSD[rows_places],)

    sequence = CutSequence.cut(hidden_BSD, states or [None] * len(layers), sequence_interval, lengths_B)
    levels = LazyLevels(step, [sequence], layer_interval, offload)
    if read_at is None:
        levels.take(len(layers) - 1)
        return torch.cat(sequence.blocks, 1)[:, : hidden_BSD.shape[1]], sequence.states
    (rows, places), order, start = read_at, [], 0
    for index, block in enumerate(sequence.blocks):
        here = ((places >= start) & (places < start + block.shape[1])).nonzero().flatten()
        sequence.context[index] += rows[here], places[here] - start
        order.append(here)
        start += block.shape[1]
    read = torch.cat([read for (read,) in levels.take(len(layers) - 1)])
    return read[torch.cat(order).argsort().to(read.device)], sequence.states


# --- how much memory they take ----------------------------------------------------------------------------------------


class MemoryCosts(NamedTuple):
    """Bytes of a stack of Mamba-2 layers in training, for one row of a batch, or for several (`of_rows`)."""

    border: int  # per token, hidden states that enter a group of layers (the paper's C_L-ckpt)
    state: int  # per layer, the Mamba state that enters a block of tokens (C_S-ckpt)
    layer: int  # per token and layer, what autograd saves inside the cell that backward is at (C_grid)
    work: int = 0  # per token of that cell, what backward through one layer needs besides (C_state)
    scan: int = 0  # the same per token of those whose states our scan holds at once (`kernels_scan.GROUP_TOKENS`)
    emitted: int = 0  # per token and layer, what layers give away (Vamba: keys and values), as large as its gradient
    spared: int = 0  # per token, by how much what enters the first group is narrower than a border
    weights: int = 0  # per layer of a group, gradients of weights: autograd sums them over blocks, then passes them on

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


# --- which cells ------------------------------------------------------------------------------------------------------

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
MULTIPLE, LONGEST = 256, 32768  # tokens of a cell: the scan's chunk, so that none is cut; as many as fill a GPU


class MultiAxisSettings(NamedTuple):
    """What `enable_multi_axis_checkpointing` was asked for."""

    layer_interval: int | str = "auto"
    sequence_interval: int | str = "auto"
    offload: bool = False

    def intervals(
        self, costs: MemoryCosts, num_layers: int, hidden_BSD: Tensor, module: nn.Module
    ) -> tuple[int, list[int]]:
        """Layers of a cell, and the tokens of each block of this input; "auto" is filled in from what memory is free.

        `costs` are those of one row, `module` holds the layers. Where its weights are sharded (FSDP2, ZeRO-3) every
        call of a layer gathers them from all ranks, so ranks must run the same cells: they agree on the number of
        blocks that the longest sequence and the largest batch need, and each cuts its own evenly. A sequence of fewer
        tokens than blocks gets blocks of one token, of which the last are padding (see `CutSequence.cut`).
        """
        B, S, _ = hidden_BSD.shape
        budget, waiting = memory_budget(hidden_BSD.device), cpu_memory_budget() if self.offload else None
        longest, rows, sharded = S, B, weights_are_sharded(module)
        if sharded:
            least = [-(budget or 0), -(waiting or 0)]
            *least, longest, rows = largest_of_ranks([*least, longest, rows], hidden_BSD.device)
            budget, waiting = (None if mine is None else -all_of for mine, all_of in zip((budget, waiting), least))
        layer, sequence = (None if value == "auto" else value for value in self[:2])
        layer, sequence = choose_intervals(
            costs, num_layers, longest, budget,
            rows=rows, offload=self.offload, cpu_budget=waiting, layer_interval=layer, sequence_interval=sequence,
        )  # fmt: skip
        blocks = ceil(longest / sequence)
        if sharded:
            return layer, [max(1, S // blocks + (index < S % blocks)) for index in range(blocks)]
        return layer, [sequence] * (blocks - 1) + [S - sequence * (blocks - 1)]


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
) -> tuple[int, int]:
    """(layers, tokens) of a cell: of those within `budget` bytes (None: of all) the best trade of time for memory.

    `costs` are those of one row, budgets are for all `rows` of the batch, which a cell takes together.
    `layer_interval` and `sequence_interval` are fixed where given. With `offload` what waits in CPU memory takes
    `cpu_budget` bytes at most, or as few as can be; and where nothing fits `budget`, cells take near the least memory
    there is.
    """
    costs = costs.of_rows(rows)
    layers = range(1, num_layers + 1) if layer_interval is None else [layer_interval]
    lengths = [sequence_interval]
    if sequence_interval is None:  # blocks of about one length, as a short one takes the time of a long one's launches
        numbers = range(ceil(tokens / LONGEST), ceil(tokens / MULTIPLE) + 1)
        lengths = {MULTIPLE * ceil(tokens / (blocks * MULTIPLE)) for blocks in numbers}
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


# --- what waits in CPU memory between forward and backward ------------------------------------------------------------


def offload_saved(*tensors: Tensor | None) -> saved_tensors_hooks:
    """Within, autograd keeps the given tensors (and their views) in CPU memory between forward and backward.

    Of all that is saved only these are moved, so that weights stay where they are. A tensor whose values are copied
    before they are saved, as keys that a kernel wants repeated or in another layout, is not recognised and stays.
    They must not be changed in place, as a copy may still be under way. What was brought along and is not asked for, as
    by a backward through a part of the graph, stays on the GPU until the graph is gone.
    """
    storages = {t.untyped_storage().data_ptr() for t in tensors if t is not None}
    return saved_tensors_hooks(
        lambda tensor: _OnCPU(tensor) if tensor.untyped_storage().data_ptr() in storages else tensor,
        lambda saved: saved.load() if isinstance(saved, _OnCPU) else saved,
    )


class _OnCPU:
    """A copy of a tensor in pinned memory, in pieces: PyTorch rounds a pinned allocation up to a power of two."""

    piece_bytes = 64 * 2**20
    ahead_bytes = 512 * 2**20  # of what was saved before, to be brought along
    _newest: dict[torch.device, weakref.ref] = {}

    @torch.no_grad()
    def __init__(self, tensor: Tensor):
        # Strides are kept, for in backward an operation goes the way that it went in forward; gaps are not.
        self.like = torch.empty_like(tensor, device="meta")
        self.device, self.pieces = tensor.device, []
        self._loaded, self._arriving = False, None
        dense = tensor if tensor.stride() == self.like.stride() else tensor.clone()  # as empty_like lays it out
        stream = self.stream = side_stream(self.device, "copy") if tensor.is_cuda else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for part in self._flat(dense):
                piece = torch.empty_like(part, device="cpu", pin_memory=tensor.is_cuda)
                self.pieces.append(piece.copy_(part, non_blocking=True))
        if stream is not None:
            dense.record_stream(stream)
        self._before = self._newest.get(self.device, lambda: None)
        self._newest[self.device] = weakref.ref(self)

    def load(self) -> Tensor:
        """The tensor on its device, for the current stream."""
        tensor, arrived = self._arriving or self._fetch()
        self._loaded, self._arriving = True, None
        before, room = self._before(), self.ahead_bytes
        while before is not None and room > 0:  # bring along what backward will ask for next
            if not before._loaded:
                before._arriving = before._arriving or before._fetch()
                room -= before.like.nbytes
            before = before._before()
        if arrived is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(arrived)
            tensor.record_stream(stream)
        return tensor

    @torch.no_grad()
    def _fetch(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy under way, in memory of the copying stream, and the event that it has arrived."""
        with torch.cuda.stream(self.stream):
            tensor = torch.empty_like(self.like, device=self.device)
            for part, piece in zip(self._flat(tensor), self.pieces):
                part.copy_(piece, non_blocking=True)
            return tensor, None if self.stream is None else self.stream.record_event()

    def _flat(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The tensor's numbers as they lie in memory, in pieces."""
        return tensor.as_strided((tensor.numel(),), (1,)).split(self.piece_bytes // tensor.itemsize)


# --- switching it on --------------------------------------------------------------------------------------------------


class MultiAxisCheckpointingMixin:
    """For a `PreTrainedModel`: switches the cells of its modules that have an attribute `multi_axis_checkpointing`.

    Such a module keeps `MultiAxisSettings` or None there. Its Mamba-2 blocks leave ordinary gradient checkpointing to
    the cells, all other layers follow `gradient_checkpointing_enable` as ever.
    """

    def enable_multi_axis_checkpointing(
        self, layer_interval: int | str = "auto", sequence_interval: int | str = "auto", *, offload: bool = False
    ) -> None:
        """Trains with multi-axis gradient checkpointing (arXiv 2411.19460): memory for seconds, gradients unchanged.

        Args:
            layer_interval, sequence_interval: layers and tokens of a cell; "auto" chooses them for each input, so that
                they take half of the free memory at most, and no more for little gain in time.
            offload: keep what crosses the borders of cells in pinned CPU memory until backward.

        Raises:
            ValueError: an interval that is neither "auto" nor a positive integer, or a model without such layers.
        """
        for name, value in (("layer_interval", layer_interval), ("sequence_interval", sequence_interval)):
            if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r} must be a positive number or 'auto'.")
        self._set_multi_axis_checkpointing(MultiAxisSettings(layer_interval, sequence_interval, offload))

    def disable_multi_axis_checkpointing(self) -> None:
        """Back to plain autograd, or to ordinary gradient checkpointing where that is enabled."""
        self._set_multi_axis_checkpointing(None)

    def _set_multi_axis_checkpointing(self, settings: MultiAxisSettings | None) -> None:
        modules = [module for module in self.modules() if hasattr(module, "multi_axis_checkpointing")]
        if not modules:
            raise ValueError(f"{type(self).__name__} has no layers for multi-axis checkpointing.")
        for module in modules:
            module.multi_axis_checkpointing = settings
            _checkpoint_blocks(module, settings is None and module.gradient_checkpointing)

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs) -> None:
        super()._set_gradient_checkpointing(enable, **kwargs)
        for module in self.modules():
            if getattr(module, "multi_axis_checkpointing", None) is not None:
                _checkpoint_blocks(module, False)  # a cell recomputes its layers already


def _checkpoint_blocks(module: nn.Module, enable: bool) -> None:
    for block in module.modules():
        if isinstance(block, Mamba2Block):
            block.gradient_checkpointing = enable
