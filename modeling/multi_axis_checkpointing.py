"""Gradient checkpointing over layers and sequence at once (multi-axis checkpointing, section 3.2 of arXiv 2411.19460).

What is unusual: layers x sequence are cut into cells of `layer_interval` layers by `sequence_interval` tokens, and one
cell is one `torch.utils.checkpoint` call, so that autograd chains them and DDP, FSDP2 and autocast know nothing of it.
Forward keeps what crosses the borders of cells, backward recomputes cell by cell, but for the last, which is kept.
Groups of layers are run on demand (`LazyLevels`): autograd runs backward what ran last, so what a consumer of the
levels (Vamba's text layers) sends back exists for one group at a time. Hidden states stay a list of blocks, which no
`cat` doubles, unless all of the last layer's are asked for.

Shapes: B batch, S tokens of one block, D hidden.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .cpu_offloading import offload_saved
from .mamba2 import Mamba2State
from .multi_axis_memory import MemoryCosts, choose_intervals, cpu_memory_budget, memory_budget
from .ranks import largest_of_ranks, weights_are_sharded


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
        missing = 0 if isinstance(sequence_interval, int) else sum(sequence_interval) - hidden_BSD.shape[1]
        if missing:
            lengths_B = (
                hidden_BSD.new_full(hidden_BSD.shape[:1], hidden_BSD.shape[1], dtype=torch.long)
                if lengths_B is None
                else lengths_B
            )
            hidden_BSD, *along = (
                nn.functional.pad(t.movedim(1, -1), (0, missing)).movedim(-1, 1) for t in (hidden_BSD, *along)
            )
        # Dense, as what is brought back from the CPU is: operations choose their way by strides, in backward the same.
        blocks = [block.contiguous() for block in hidden_BSD.split(sequence_interval, dim=1)]
        lengths, start = [], 0
        for block in blocks:
            lengths.append(None if lengths_B is None else (lengths_B - start).clamp(0, block.shape[1]))
            start += block.shape[1]
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

    def finish(self) -> None:
        """Runs the layers that are left."""
        while self._reached < self.num_levels:
            self._run_group()

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
        levels.finish()
        return torch.cat(sequence.blocks, 1)[:, : hidden_BSD.shape[1]], sequence.states
    order, inside = _places_in_blocks(*read_at, [block.shape[1] for block in sequence.blocks])
    sequence.context = [(lengths, *taken) for (lengths,), taken in zip(sequence.context, inside)]
    read = torch.cat([read for (read,) in levels.take(len(layers) - 1)])
    return read[order.to(read.device)], sequence.states


def _places_in_blocks(rows: Tensor, places: Tensor, sizes: list[int]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Rows and places within each block of the tokens that lie there, and what brings all of them into order again."""
    order, inside, start = [], [], 0
    for size in sizes:
        here = ((places >= start) & (places < start + size)).nonzero().flatten()
        inside.append((rows[here], places[here] - start))
        order.append(here)
        start += size
    return torch.cat(order).argsort(), inside


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
        longest, rows = S, B
        sharded = weights_are_sharded(module)
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


class MultiAxisCheckpointingMixin:
    """For a `PreTrainedModel`: switches the cells of its modules that have an attribute `multi_axis_checkpointing`.

    Such a module keeps `MultiAxisSettings` or None there and its recurrent layers in `layers`. Those leave ordinary
    gradient checkpointing to the cells, all other layers follow `gradient_checkpointing_enable` as ever.
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
            for layer in module.layers:
                layer.gradient_checkpointing = settings is None and module.gradient_checkpointing

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs) -> None:
        super()._set_gradient_checkpointing(enable, **kwargs)
        for module in self.modules():
            if getattr(module, "multi_axis_checkpointing", None) is not None:
                for layer in module.layers:  # a cell recomputes its layers already
                    layer.gradient_checkpointing = False


__all__ = [
    "CutSequence",
    "LazyLevels",
    "MultiAxisCheckpointingMixin",
    "MultiAxisSettings",
    "run_cells",
]
