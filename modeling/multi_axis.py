"""Gradient checkpointing over layers and sequence at once (multi-axis checkpointing, section 3.2 of arXiv 2411.19460).

What is unusual: layers x sequence are cut into cells of `layer_interval` layers by `sequence_interval` tokens. Each
cell is one call of `torch.utils.checkpoint`, so autograd chains them, and DDP, FSDP2 and autocast need not know.
Forward keeps what crosses the borders of cells, and backward recomputes cell by cell; only the last cell is kept whole.
A group of layers runs when its levels are asked for (`LazyLevels`). As autograd goes back in the opposite order, the
gradients that Vamba's text layers send to the levels exist for one group at a time. Hidden states stay a list of
blocks, as joining them would double their memory. How much memory cells take is the paper's equation 12 with costs of
our own (`MemoryCosts`). What crosses borders can wait in CPU memory (`offload_saved`).

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
from .kernels import TILES
from .kernels_scan import GROUP_TOKENS
from .mamba2 import Mamba2Block, Mamba2State
from .media import free_bytes, side_stream
from .ranks import largest_of_ranks, weights_are_sharded


@dataclass
class CutSequence:
    """A sequence, cut into blocks, on its way through the layers; `LazyLevels` updates it in place."""

    blocks: list[Tensor]  # the hidden states of each block, (B, S, D)
    states: list[Mamba2State | None]  # for each layer the state before its next block, None for an empty one
    context: list[tuple]  # the further arguments of `LazyLevels.step` for each block

    @classmethod
    def cut(
        cls,
        hidden_BSD: Tensor,
        states: Iterable[Mamba2State | None],
        sequence_interval: int | list[int],
        lengths_B: Tensor | None = None,
        *along: Tensor,
    ) -> "CutSequence":
        """Cuts after every `sequence_interval` tokens, or into blocks of the given sizes, padded if these are too long.

        `lengths_B` (int64) counts each row's tokens before padding on the right; None means that there is none. The
        tensors of `along`, (B, S, ...), are cut alike. A block's context is its own lengths (or None) and its slices.
        """
        B, S = hidden_BSD.shape[:2]
        if not isinstance(sequence_interval, int) and (missing := sum(sequence_interval) - S):
            lengths_B = torch.full((B,), S, device=hidden_BSD.device) if lengths_B is None else lengths_B
            hidden_BSD, *along = (
                nn.functional.pad(t.movedim(1, -1), (0, missing)).movedim(-1, 1) for t in (hidden_BSD, *along)
            )
        # Offloaded tensors come back contiguous. Forward must see the same strides, as kernels are chosen by them.
        blocks = [block.contiguous() for block in hidden_BSD.split(sequence_interval, dim=1)]
        sizes = [block.shape[1] for block in blocks]
        lengths = [
            None if lengths_B is None else (lengths_B - start).clamp(0, size)
            for start, size in zip(accumulate(sizes, initial=0), sizes)
        ]
        return cls(blocks, list(states), list(zip(lengths, *(t.split(sequence_interval, dim=1) for t in along))))


class LazyLevels:
    """Runs sequences through layers, one group of layers at a time and only on demand, block by block.

    Args:
        step: runs one layer on one block, `step(index, hidden_BSD, state, *context) -> (hidden_BSD, state, emitted)`,
            where `emitted` is a tuple of tensors. Backward calls it again, except for the last cell.
        sequences: independent sequences, each with one state per layer.
        layer_interval: the number of layers in a group.
        offload: whether what crosses the borders of recomputed cells waits in (pinned) CPU memory.
    """

    def __init__(
        self, step: Callable[..., tuple], sequences: list[CutSequence], layer_interval: int, offload: bool = False
    ):
        self.step, self.sequences = step, sequences
        self.layer_interval, self.offload = layer_interval, offload
        self.num_levels = len(sequences[0].states)
        self.keeps_last = True  # whether the last cell is kept, as backward begins with it; set before taking anything
        self._reached = 0
        self._emitted: dict[int, list[tuple[Tensor, ...]]] = {}

    def take(self, index: int) -> list[tuple[Tensor, ...]]:
        """Hands over what layer `index` emits for each block of each sequence, in order; KeyError the second time."""
        while self._reached <= index:
            levels = range(self._reached, min(self._reached + self.layer_interval, self.num_levels))
            self._emitted.update({index: [] for index in levels})
            for sequence in self.sequences:
                for position in range(len(sequence.blocks)):
                    self._run_cell(sequence, position, levels)
            self._reached = levels.stop
        if index not in self._emitted:
            raise KeyError(f"What level {index} emitted was taken before. Keep it if it is needed twice.")
        return self._emitted.pop(index)

    def _run_cell(self, sequence: CutSequence, position: int, levels: range) -> None:
        states = [state or (None, None) for state in sequence.states[levels.start : levels.stop]]
        # Every tensor is an argument of its own, as hooks on saved tensors see only those that `checkpoint` is given.
        inputs = [sequence.blocks[position], *(tensor for state in states for tensor in state)]
        cell = functools.partial(_run_layers, self.step, levels, sequence.context[position])
        last = levels.stop == self.num_levels and sequence is self.sequences[-1]
        if last and position == len(sequence.blocks) - 1 and self.keeps_last:
            hidden_BSD, states, emitted = cell(*inputs)
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
    """Runs a stack of Mamba-2 blocks, `layer(hidden_BSD, state, lengths_B) -> (hidden_BSD, state)`, in cells.

    Returns:
        The last layer's hidden states, (B, S, D), and each layer's state after the last token. With `read_at`, the
        rows and positions of n tokens (int64, not negative), only the hidden states of these, (n, D). They are read
        inside the cells, so that neither hidden states nor gradients of all tokens are ever held for the last layer.
    """

    def step(index, hidden_BSD, state, lengths_B, *read_here):
        hidden_BSD, state = layers[index](hidden_BSD, state, lengths_B)
        if index < len(layers) - 1 or not read_here:
            return hidden_BSD, state, ()
        rows, places = (indices.to(hidden_BSD.device) for indices in read_here)
        return hidden_BSD.new_empty(0), state, (hidden_BSD[rows, places],)

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


class MemoryCosts(NamedTuple):
    """The bytes that a stack of Mamba-2 layers takes in training, for one row of a batch or for several (`of_rows`)."""

    border: int  # per token: the hidden states that enter a group of layers (the paper's C_L-ckpt)
    state: int  # per layer: the Mamba-2 state that enters a block of tokens (C_S-ckpt)
    layer: int  # per token and layer: what autograd saves inside the cell that backward has reached (C_grid)
    work: int = 0  # per token of that cell: what backward through one layer needs besides (C_state)
    scan: int = 0  # the same for each of the tokens whose states our scan holds at once (`kernels_scan.GROUP_TOKENS`)
    emitted: int = 0  # per token and layer: what a layer emits (in Vamba keys and values); its gradient is as large
    spared: int = 0  # per token: the bytes by which the input of the first group is narrower than a border
    weights: int = 0  # per layer of a group: the gradients of its weights, which autograd sums over blocks

    def of_rows(self, rows: int) -> "MemoryCosts":
        return MemoryCosts(*(rows * value for value in self[:-1]), self.weights)

    def total(self, num_layers: int, tokens: int, layer_interval: int, sequence_interval: int, offload: bool = False):
        """Returns the bytes on the GPU at the peak of backward; `offload` keeps borders and emitted tensors elsewhere.

        The last layer's hidden states count as unread. The gradient of a border replaces the border, and that of what
        a layer emitted replaces that, so each adds to the total only while it is being computed.
        """
        groups, blocks = ceil(num_layers / layer_interval), ceil(tokens / sequence_interval)
        layers, length = min(layer_interval, num_layers), min(sequence_interval, tokens)
        cell = length * (layers * self.layer + self.work) + min(length, GROUP_TOKENS) * self.scan
        cell += layers * self.weights if blocks > 1 else 0
        if offload:  # The GPU holds the first border and one more, what two cells need, and what two layers emitted.
            kept = tokens * (2 * self.border - self.spared) + 2 * (length * self.border + layers * self.state)
            emitted = tokens * (layers + 2) * self.emitted
        else:
            kept = tokens * (max(groups, 2) * self.border - self.spared) + num_layers * blocks * self.state
            emitted = tokens * (num_layers + 1) * self.emitted
        return kept + emitted + cell

    def offloaded(self, num_layers: int, tokens: int, layer_interval: int, sequence_interval: int) -> int:
        """Returns the bytes that `offload` puts into CPU memory, where PyTorch rounds states up to a power of two."""
        groups, blocks = ceil(num_layers / layer_interval), ceil(tokens / sequence_interval)
        per_token = groups * self.border - self.spared + num_layers * self.emitted
        return tokens * per_token + num_layers * blocks * (1 << (self.state - 1).bit_length())


def mamba2_costs(
    config: VambaMamba2Config, dtype: torch.dtype, emitted: int = 0, residual_dtype: torch.dtype | None = None
) -> MemoryCosts:
    """Returns the costs of `Mamba2Block`s that this package's Triton kernels compute in `dtype`.

    `layer` is what autograd saves, which tests compare with measurements. `work` and `scan` are estimates: the
    gradients of the layer's intermediate tensors, and the states between the scan's tiles with their gradients.
    `emitted` counts the numbers that a layer emits per token, such as keys and values. `residual_dtype` is that of the
    hidden states between layers, if it is not `dtype`; the first layer widens them.
    """
    size, inner, heads = dtype.itemsize, config.intermediate_size, config.num_heads
    rows = inner + config.conv_dim + heads  # of in_proj
    exact = max(size, 4)  # dt and the states are computed in float32
    state = exact * inner * config.state_size + size * (config.conv_kernel - 1) * config.conv_dim
    work = size * (rows + config.conv_dim + 2 * inner)  # after in_proj, the convolution, the scan, and the gated norm
    layer = work + 2 * size * config.hidden_size + exact * 3 * heads  # around the norm; three numbers for each dt
    tile = TILES[9].scan_chunk if size < 4 else TILES[9].scan_chunk_float32
    layer += exact * inner * config.state_size // (8 * tile)  # the states before the scan's segments of 8 tiles or more
    scan = 2 * size * inner * config.state_size // tile
    border = (residual_dtype or dtype).itemsize * config.hidden_size
    spared = max(border - size * config.hidden_size, 0)
    weights = size * config.hidden_size * (rows + inner)  # of the two projections
    return MemoryCosts(border, state, layer, work, scan, emitted * size, spared, weights)


# The price of a cell (see `choose_intervals`), as measured on an H200, is relative to the time of a training step.
BYTES_PER_S = 1e14  # bytes of weights times tokens that forward and backward compute in a second
IDLE = 0.94e-3  # seconds that the GPU idles between kernels, for each layer of each block
LAUNCHES = 3.3e-3  # seconds that the CPU takes to launch them, which is longer than short blocks of small models run
STOPPED = 0.05  # saved in a cell of one layer, as recomputing stops before the last output projection
MOVED = 0.5  # cost of moving to CPU memory all that autograd would save
TRADE, BESIDE = 0.36, 16e9  # a tenth less memory is worth 2 % of the time around 16 GB (a 7B's weights), less below
WEIGHTS_7B = 1.57e8  # bytes of a layer, where the costs do not say (the paper's constants)
SLACK = 1.05  # how far cells may exceed the least memory that is possible if even that is over the budget
MULTIPLE, LONGEST = 256, 32768  # tokens of a cell: a multiple of the scan's chunk, and at most as many as fill a GPU


class MultiAxisSettings(NamedTuple):
    """The arguments of `enable_multi_axis_checkpointing`."""

    layer_interval: int | str = "auto"
    sequence_interval: int | str = "auto"
    offload: bool = False

    def intervals(
        self, costs: MemoryCosts, num_layers: int, hidden_BSD: Tensor, module: nn.Module
    ) -> tuple[int, list[int]]:
        """Returns the layers of a cell and the tokens of each block of this input, chosen by free memory if "auto".

        `costs` are those of one row, `module` holds the layers. If its weights are shared out (FSDP2, ZeRO-3), every
        call of a layer gathers them from all ranks, so all ranks must run equally many cells: they agree on the blocks
        that the longest sequence and the largest batch need, and each cuts its own sequence evenly. A sequence with
        fewer tokens than blocks gets blocks of one token, of which the last are padding (see `CutSequence.cut`).
        """
        rows, S, _ = hidden_BSD.shape
        budget, waiting = memory_budget(hidden_BSD.device), cpu_memory_budget() if self.offload else None
        longest, sharded = S, weights_are_sharded(module)
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
    """Returns the (layers, tokens) of a cell that trade time for memory best, within a budget of bytes if there is one.

    `costs` are those of one row, the budgets are for all `rows` of the batch together. `layer_interval` and
    `sequence_interval` are kept where given. With `offload`, CPU memory takes at most `cpu_budget` bytes, or the least
    possible. If nothing fits into `budget`, the cells take close to the least memory that is possible.
    """
    costs = costs.of_rows(rows)
    layers = range(1, num_layers + 1) if layer_interval is None else [layer_interval]
    lengths = [sequence_interval]
    if sequence_interval is None:  # Blocks are about equally long, as launching a short one's kernels takes as long.
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
    """Returns the bytes that cells may take on a GPU, a share of what is free now; None on other devices.

    The rest is for what comes later in the step: the text, the gradients of the weights, and the optimizer's state.
    """
    return int(share * free_bytes(device)) if device.type == "cuda" else None


def cpu_memory_budget(share: float = 0.7) -> int | None:
    """Returns the bytes of CPU memory that each process on this machine may take; None if the system does not say.

    It is a share of what was available at the first call, as PyTorch never gives back what it pins afterwards; the
    rest is for data.
    """
    available = _available_cpu_bytes()
    return None if available is None else int(share * available) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@functools.cache
def _available_cpu_bytes() -> int | None:
    """Returns what Linux says is available, or what a container (cgroup v2) allows if that is less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        allowed, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        available = min(available, allowed - used + int(counts["inactive_file"]))  # Linux can drop cached files.
    except (OSError, ValueError, KeyError):  # There is no container, or its limit is "max".
        pass
    return max(available, 0)


def offload_saved(*tensors: Tensor | None) -> saved_tensors_hooks:
    """Returns a context in which autograd keeps the given tensors and their views in CPU memory until backward.

    Nothing else that autograd saves is moved, neither weights nor copies of these tensors (such as keys that a kernel
    wants in another layout). The tensors must not be changed in place, as they may still be on their way. Backward
    through a part of the graph may bring back more than it needs, which stays on the GPU as long as the graph.
    """
    storages = {t.untyped_storage().data_ptr() for t in tensors if t is not None}
    return saved_tensors_hooks(
        lambda tensor: _OnCPU(tensor) if tensor.untyped_storage().data_ptr() in storages else tensor,
        lambda saved: saved.load() if isinstance(saved, _OnCPU) else saved,
    )


class _OnCPU:
    """A copy of a tensor in pinned memory, in pieces, as PyTorch rounds a pinned allocation up to a power of two."""

    piece_bytes = 64 * 2**20
    ahead_bytes = 512 * 2**20  # bytes that loading one tensor fetches of those saved before it
    _newest: dict[torch.device, weakref.ref] = {}

    @torch.no_grad()
    def __init__(self, tensor: Tensor):
        # The order of dimensions in memory is kept, as backward must choose the same kernels as forward; gaps are not.
        self.like = torch.empty_like(tensor, device="meta")
        self.device, self.pieces = tensor.device, []
        self._loaded, self._arriving = False, None
        dense = tensor if tensor.stride() == self.like.stride() else tensor.clone()
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
        """Returns the tensor on its device, ready for the current stream."""
        tensor, arrived = self._arriving or self._fetch()
        self._loaded, self._arriving = True, None
        before, room = self._before(), self.ahead_bytes
        while before is not None and room > 0:  # Fetch what backward will ask for next.
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
        """Starts a copy on the copying stream, and returns it with the event of its arrival."""
        with torch.cuda.stream(self.stream):
            tensor = torch.empty_like(self.like, device=self.device)
            for part, piece in zip(self._flat(tensor), self.pieces):
                part.copy_(piece, non_blocking=True)
            return tensor, None if self.stream is None else self.stream.record_event()

    def _flat(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Returns pieces of the tensor's numbers, in the order in which they lie in memory."""
        return tensor.as_strided((tensor.numel(),), (1,)).split(self.piece_bytes // tensor.itemsize)


class MultiAxisCheckpointingMixin:
    """Lets a `PreTrainedModel` set the `multi_axis_checkpointing` of its modules: `MultiAxisSettings`, or None for off.

    While it is on, the modules' Mamba-2 blocks are not checkpointed one by one, as cells recompute them already; all
    other layers follow `gradient_checkpointing_enable` as usual.
    """

    def enable_multi_axis_checkpointing(
        self, layer_interval: int | str = "auto", sequence_interval: int | str = "auto", *, offload: bool = False
    ) -> None:
        """Switches on multi-axis checkpointing (arXiv 2411.19460): less memory for more time, the same gradients.

        Args:
            layer_interval, sequence_interval: layers and tokens of a cell. "auto" chooses them for each input, within
                half of the free memory, and with less where more would save little time.
            offload: whether what crosses the borders of cells waits in pinned CPU memory until backward.

        Raises:
            ValueError: an interval is neither "auto" nor a positive integer, or the model has no such layers.
        """
        for name, value in (("layer_interval", layer_interval), ("sequence_interval", sequence_interval)):
            if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r} must be a positive number or 'auto'.")
        self._set_multi_axis_checkpointing(MultiAxisSettings(layer_interval, sequence_interval, offload))

    def disable_multi_axis_checkpointing(self) -> None:
        """Returns to plain autograd, or to ordinary gradient checkpointing if that is enabled."""
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
                _checkpoint_blocks(module, False)


def _checkpoint_blocks(module: nn.Module, enable: bool) -> None:
    for block in module.modules():
        if isinstance(block, Mamba2Block):
            block.gradient_checkpointing = enable
