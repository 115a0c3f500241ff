"""Cells against plain autograd: values, gradients, layers run, the order of backward, and the bytes that are alive."""

import itertools
import os

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from vamba.modeling import VambaMamba2Config
from vamba.modeling.mamba2 import Mamba2Block, Mamba2State, init_mamba2_mixer
from vamba.modeling.multi_axis import (
    CutSequence,
    LazyLevels,
    MemoryCosts,
    MultiAxisCheckpointingMixin,
    MultiAxisSettings,
    _OnCPU,
    offload_saved,
    run_cells,
)


L, D = 5, 16
CONFIG = VambaMamba2Config(hidden_size=D, state_size=4, head_dim=8, chunk_size=4)


class Toy(nn.Module):
    """Vamba in small: Mamba-2 blocks between levels, and text that reads every level's keys and values."""

    def __init__(self, levels: int = L):
        super().__init__()
        self.blocks = nn.ModuleList([Mamba2Block(CONFIG) for _ in range(levels - 1)])
        self.key_values = nn.ModuleList([nn.Linear(D, 2 * D) for _ in range(levels)])
        self.queries = nn.ModuleList([nn.Linear(D, D) for _ in range(levels)])
        for block in self.blocks:
            init_mamba2_mixer(block.mixer, levels)
            nn.init.normal_(block.mixer.in_proj.weight, std=0.5)

    def step(self, index, hidden_BSD, state, lengths_B, shift_BSD):
        key_value = self.key_values[index](hidden_BSD) + shift_BSD
        if index < len(self.blocks):
            hidden_BSD, state = self.blocks[index](hidden_BSD, state, lengths_B)
        return hidden_BSD, state, key_value.chunk(2, dim=-1)

    def read(self, index, text_BND, keys_BMD, values_BMD, mask_BM=None):
        queries = self.queries[index](text_BND)
        bias = None if mask_BM is None else mask_BM[:, None]
        return text_BND + F.scaled_dot_product_attention(queries, keys_BMD, values_BMD, bias)

    def forward(self, vision_BMD, text_BND, states, lengths_B=None, shift_BMD=None, cells=None, offload=False):
        """Text after all levels, and the states; plainly, or in cells of (layers, tokens)."""
        shift_BMD = vision_BMD.new_zeros(*vision_BMD.shape[:2], 2 * D) if shift_BMD is None else shift_BMD
        mask_BM = None
        if lengths_B is not None:
            mask_BM = torch.arange(vision_BMD.shape[1]) < lengths_B.unsqueeze(1)
        if cells is None:
            sequence = CutSequence([vision_BMD], list(states), [(lengths_B, shift_BMD)])
        else:
            sequence = CutSequence.cut(vision_BMD, states, cells[1], lengths_B, shift_BMD)
            levels = LazyLevels(self.step, [sequence], cells[0], offload)
        for index in range(len(self.queries)):
            if cells is None:
                hidden, state, emitted = self.step(
                    index, sequence.blocks[0], sequence.states[index], *sequence.context[0]
                )
                sequence.blocks, sequence.states[index], emitted = [hidden], state, [emitted]
            else:
                emitted = levels.take(index)
            key_value = [torch.cat(parts, 1) for parts in zip(*emitted)]
            del emitted
            with offload_saved(*(key_value if offload else ())):
                text_BND = self.read(index, text_BND, *key_value, mask_BM)
            del key_value
        return text_BND, sequence.states


def initial_states(B, dtype=torch.float64, num=L - 1):
    C, H = CONFIG.conv_dim, CONFIG.num_heads
    return [
        Mamba2State(
            torch.randn(B, CONFIG.conv_kernel - 1, C, dtype=dtype, requires_grad=True),
            torch.randn(B, H, CONFIG.head_dim, CONFIG.state_size, dtype=dtype, requires_grad=True),
        )
        for _ in range(num)
    ]


def results(toy, vision_BMD, states, lengths_B, text_BND, shift_BMD, cells, offload=False):
    """Outputs, final states, and the gradients of all inputs and parameters."""
    text, left = toy(vision_BMD, text_BND, states, lengths_B, shift_BMD, cells, offload)
    loss = text.square().sum() + sum(t.square().sum() for state in left if state for t in state)
    inputs = [vision_BMD, text_BND, shift_BMD, *(t for state in states if state for t in state), *toy.parameters()]
    return [text, *(t for state in left if state for t in state), *torch.autograd.grad(loss, inputs)]


def compare(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("cells", [(1, 4), (2, 8), (3, 5), (5, 1), (2, 64), (9, 64)])
@pytest.mark.parametrize("length", [1, 13])
@pytest.mark.parametrize("initial", [True, False])
def test_gradients_equal_plain_autograd(cells, length, initial):
    """l that does and does not divide L, s that does and does not divide S, one block, one group, one token."""
    toy = Toy().double()
    vision, text = (torch.randn(2, n, D, dtype=torch.float64, requires_grad=True) for n in (length, 3))
    shift = torch.randn(2, length, 2 * D, dtype=torch.float64, requires_grad=True)
    states = [*(initial_states(2) if initial else [None] * (L - 1)), None]
    arguments = (toy, vision, states, None, text, shift)
    compare(results(*arguments, cells), results(*arguments, None))


@pytest.mark.parametrize("cells", [(2, 4), (1, 5)])
def test_rows_of_different_lengths(cells):
    """A row may end in the middle of a block, at a border, or blocks before the others."""
    toy = Toy().double()
    vision, text = (torch.randn(3, n, D, dtype=torch.float64, requires_grad=True) for n in (14, 3))
    shift = torch.randn(3, 14, 2 * D, dtype=torch.float64, requires_grad=True)
    arguments = (toy, vision, [*initial_states(3), None], torch.tensor([14, 8, 2]), text, shift)
    compare(results(*arguments, cells), results(*arguments, None))


def test_offloading_changes_nothing_and_moves_what_it_should(monkeypatch):
    moved = []
    initialise = _OnCPU.__init__
    monkeypatch.setattr(_OnCPU, "__init__", lambda self, t: (moved.append(t.nbytes), initialise(self, t))[0])
    monkeypatch.setattr(_OnCPU, "piece_bytes", 64)  # in many pieces
    toy = Toy().double()
    vision, text = (torch.randn(2, n, D, dtype=torch.float64, requires_grad=True) for n in (12, 3))
    shift = torch.randn(2, 12, 2 * D, dtype=torch.float64, requires_grad=True)
    arguments = (toy, vision, [*initial_states(2), None], None, text, shift)
    offloaded = results(*arguments, (2, 5), offload=True)
    borders = 3 * vision.nbytes - vision[:, 10:].nbytes  # but for the last cell's, which is not run again
    states = 3 * sum(t.nbytes for state in arguments[2][:-1] for t in state)  # before each of three blocks
    keys_values = L * shift.nbytes
    assert sum(moved) == borders + states + keys_values
    compare(offloaded, results(*arguments, None))


def test_a_packed_row_equals_its_sequences_apart():
    toy = Toy().double()
    videos = [torch.randn(1, n, D, dtype=torch.float64, requires_grad=True) for n in (7, 1, 10)]
    none = [None] * L
    shifts = [torch.zeros(1, video.shape[1], 2 * D, dtype=torch.float64) for video in videos]
    sequences = [CutSequence.cut(video, none, 4, None, shift) for video, shift in zip(videos, shifts)]
    levels = LazyLevels(toy.step, sequences, 2)
    packed = [torch.cat(parts, 1) for index in range(L) for parts in zip(*levels.take(index))]
    apart = [CutSequence([video], list(none), [(None, shift)]) for video, shift in zip(videos, shifts)]
    expected = []
    for index in range(L):
        parts = []
        for sequence in apart:
            hidden, sequence.states[index], emitted = toy.step(
                index, sequence.blocks[0], sequence.states[index], *sequence.context[0]
            )
            sequence.blocks = [hidden]
            parts.append(emitted)
        expected += [torch.cat(part, 1) for part in zip(*parts)]
    leaves = [*videos, *toy.blocks.parameters(), *toy.key_values.parameters()]
    grads = [torch.autograd.grad(sum(t.square().sum() for t in out), leaves) for out in (packed, expected)]
    compare([*packed, *grads[0]], [*expected, *grads[1]])


@pytest.mark.parametrize("cells", [(1, 4), (2, 5), (3, 64)])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("read", [None, ([1, 0, 0, 1, 0], [5, 0, 7, 2, 4]), ([0, 1], [0, 1]), ([], [])], ids=str)
def test_a_stack_of_layers_equals_plain_autograd(cells, read, offload):
    """All hidden states, or those of some tokens: in any order, with blocks of which none is read, even the last."""
    layers = Toy().double().blocks
    hidden = torch.randn(2, 13, D, dtype=torch.float64, requires_grad=True)
    states = initial_states(2)
    lengths = torch.tensor([13, 6])
    read_at = None if read is None else tuple(torch.tensor(index, dtype=torch.long) for index in read)
    settings = {"layer_interval": cells[0], "sequence_interval": cells[1], "offload": offload}
    cut, left = run_cells(layers, hidden, states, lengths, read_at, **settings)
    plain, expected = hidden, []
    for layer, state in zip(layers, states):
        plain, state = layer(plain, state, lengths)
        expected.append(state)
    if read_at is None:  # what stands on padding means nothing
        cut, plain = (out[torch.arange(13) < lengths.unsqueeze(1)] for out in (cut, plain))
    else:
        plain = plain[read_at]
    outputs = [(cut, *itertools.chain(*left)), (plain, *itertools.chain(*expected))]
    leaves = [hidden, *itertools.chain(*states), *layers.parameters()]
    grads = [torch.autograd.grad(sum(t.square().sum() for t in out), leaves) for out in outputs]
    compare([*outputs[0], *grads[0]], [*outputs[1], *grads[1]])


def test_every_cell_goes_backward_though_one_token_is_read():
    """Where weights are sharded, ranks must make the same calls, whatever they read."""
    layers, runs = Toy().blocks, []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, _: runs.append(module))
    read, _ = run_cells(
        layers, torch.randn(1, 12, D), read_at=(torch.tensor([0]),) * 2, layer_interval=2, sequence_interval=4
    )
    assert [runs.count(layer) for layer in layers] == [3] * (L - 1)
    read.sum().backward()
    assert [runs.count(layer) for layer in layers] == [6, 6, 5, 5]  # but for the last cell, which is kept


def test_each_layer_runs_twice_per_block_and_not_without_gradient():
    toy, vision, text = Toy(), torch.randn(1, 12, D), torch.randn(1, 3, D)
    runs = []
    for block in toy.blocks:
        block.register_forward_pre_hook(lambda module, _: runs.append(module))  # recomputation stops before the end
    toy(vision, text, [None] * L, cells=(2, 5))[0].sum().backward()
    assert [runs.count(block) for block in toy.blocks] == [6] * (L - 1)  # three blocks, forward and backward
    runs.clear()
    with torch.no_grad():
        toy(vision, text, [None] * L, cells=(2, 5))
    assert [runs.count(block) for block in toy.blocks] == [3] * (L - 1)


def test_dropout_is_repeated_in_backward():
    toy = Toy()
    toy.blocks[1] = nn.Module()
    seen = []

    def forward(hidden, state, lengths):
        kept = F.dropout(torch.ones_like(hidden), 0.5)
        seen.append(kept.detach())
        return hidden * kept, state

    toy.blocks[1].forward = forward
    toy(torch.randn(1, 12, D), torch.randn(1, 3, D), [None] * L, cells=(2, 6))[0].sum().backward()
    first, second, *again = seen
    assert torch.equal(again[0], second) and torch.equal(again[1], first) and not torch.equal(first, second)


def test_autocast_is_repeated_in_backward():
    toy, vision, text = Toy(), torch.randn(1, 12, D), torch.randn(1, 3, D)
    gradients = []
    for cells in ((2, 12), None):
        toy.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out, _ = toy(vision, text, [None] * L, cells=cells)
        out.sum().backward()
        gradients.append([parameter.grad for parameter in toy.parameters()])
    for ours, plain in zip(*gradients):
        assert torch.equal(ours, plain)


def test_backward_finishes_a_group_before_the_one_below_gets_gradients():
    toy, log = Toy(), []
    step, read = toy.step, toy.read

    def logged_step(index, hidden, *rest):
        log.append(("cell", index, hidden.shape[1]))
        return step(index, hidden, *rest)

    def logged_read(index, text, keys, *rest):
        log.append(("text", index))
        keys.register_hook(lambda _: log.append(("gradient", index)))
        return read(index, text, keys, *rest)

    toy.step, toy.read = logged_step, logged_read
    out, _ = toy(torch.randn(1, 7, D), torch.randn(1, 3, D), [None] * L, cells=(2, 5))
    groups = [[0, 1], [2, 3], [4]]
    expected = []
    for group in groups:
        expected += [("cell", index, size) for size in (5, 2) for index in group] + [("text", i) for i in group]
    assert log == expected
    log.clear()
    out.sum().backward()
    expected = []
    for group in reversed(groups):
        expected += [("gradient", i) for i in reversed(group)] + [("cell", i, size) for size in (2, 5) for i in group]
    expected.remove(("cell", 4, 2))  # the last one, with which backward begins, has been kept
    assert log == expected


def test_what_a_level_emitted_is_taken_once():
    toy = Toy()
    sequence = CutSequence.cut(torch.randn(1, 4, D), [None] * L, 2, None, torch.zeros(1, 4, 2 * D))
    levels = LazyLevels(toy.step, [sequence], 2)
    levels.take(1)
    with pytest.raises(KeyError, match="level 1"):
        levels.take(1)


class Peak:
    """Bytes allocated by PyTorch on the CPU inside: `after`, still alive at the end, and `peak`."""

    def __enter__(self):
        activities = [torch.profiler.ProfilerActivity.CPU]
        self.profile = torch.profiler.profile(activities=activities, profile_memory=True).__enter__()
        return self

    def __exit__(self, *args):
        self.profile.__exit__(*args)
        events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        alive = list(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
        self.peak, self.after = max(alive), alive[-1]


class Wide(nn.Module):
    """Layers whose memory is easy to count: nine tensors of the hidden states' size saved, and one emitted."""

    def step(self, index, hidden_BSD, state, lengths_B):
        emitted = hidden_BSD * 1.5
        state = Mamba2State(hidden_BSD[:, -1:].clone(), hidden_BSD[:, -1:].clone())
        for _ in range(9):
            hidden_BSD = hidden_BSD.sin()
        return hidden_BSD, state, (emitted,)


def wide_peaks(num_layers, tokens, layer_interval, sequence_interval, read, lazy=True):
    """(alive after forward, peak) in units of the hidden states of one token; `read` is the use of what is emitted.

    The last layer's hidden states are not read.
    """
    width = 4096
    vision = torch.randn(1, tokens, width, requires_grad=True)
    sequence = CutSequence.cut(vision, [None] * num_layers, sequence_interval)
    with Peak() as forward:
        levels = LazyLevels(Wide().step, [sequence], layer_interval)
        last = [] if lazy else [levels.take(num_layers - 1)]  # which runs all of them
        total = torch.zeros(())
        for index in range(num_layers):
            for (emitted,) in last.pop() if last and index == num_layers - 1 else levels.take(index):
                total = total + read(emitted)
            del emitted
        del levels, sequence
    with Peak() as backward:
        total.backward()
    peak = max(forward.peak, forward.after + backward.peak)
    return forward.after / (4 * width), peak / (4 * width)


def saving(emitted):
    return emitted.square().mean()


def saving_nothing(emitted):
    """As if what it saves were on the CPU."""
    return (emitted * 2).mean()


@pytest.mark.parametrize("cells", [(1, 128), (4, 16), (2, 64), (8, 128)])
def test_the_peak_is_what_the_memory_model_says(cells):
    costs = MemoryCosts(border=1, state=2, layer=9, work=3, emitted=1)
    after, peak = wide_peaks(8, 128, *cells, saving)
    predicted = costs.total(8, 128, *cells) - 128  # the first border was there before
    assert predicted * 0.75 <= peak <= predicted * 1.05
    groups, blocks = -(-8 // cells[0]), 128 // cells[1]
    kept = (groups - 1) * 128 + 8 * 128 + (blocks - 1) * 2 * 8
    # And the cell with which backward begins, but what went into it only if something is made of it.
    assert kept - cells[1] <= after <= kept + cells[0] * cells[1] * 9 + 10


def test_gradients_of_what_is_emitted_live_a_group_at_a_time():
    """Where what was emitted is not on the GPU itself, its gradients count: those of two layers, not of eight."""
    lazy, eager = (wide_peaks(8, 128, 2, 16, saving_nothing, lazy)[1] for lazy in (True, False))
    assert eager - lazy > 5 * 128


class Transformerslike(nn.Module):
    """What `PreTrainedModel` does: sets the flag on every module that has one."""

    def _set_gradient_checkpointing(self, enable=True):
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = enable


class Encoder(nn.Module):
    multi_axis_checkpointing = None

    def __init__(self):
        super().__init__()
        self.gradient_checkpointing = False
        self.layers = nn.ModuleList([Mamba2Block(CONFIG)])


class Switched(MultiAxisCheckpointingMixin, Transformerslike):
    def __init__(self):
        super().__init__()
        self.encoder, self.other = Encoder(), Mamba2Block(CONFIG)


def test_the_two_kinds_of_checkpointing_share_the_layers():
    model = Switched()
    block = model.encoder.layers[0]
    model.enable_multi_axis_checkpointing(2, "auto", offload=True)
    assert model.encoder.multi_axis_checkpointing == MultiAxisSettings(2, "auto", True)
    model._set_gradient_checkpointing(True)
    assert model.other.gradient_checkpointing and not block.gradient_checkpointing
    model.disable_multi_axis_checkpointing()
    assert block.gradient_checkpointing and model.encoder.multi_axis_checkpointing is None
    model.enable_multi_axis_checkpointing()
    assert not block.gradient_checkpointing
    model._set_gradient_checkpointing(False)
    model.disable_multi_axis_checkpointing()
    assert not block.gradient_checkpointing


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "all", None])
def test_wrong_intervals_are_refused(wrong):
    with pytest.raises(ValueError, match="layer_interval"):
        Switched().enable_multi_axis_checkpointing(layer_interval=wrong)


def test_a_model_without_such_layers_is_refused():
    class Plain(MultiAxisCheckpointingMixin, Transformerslike):
        pass

    with pytest.raises(ValueError, match="Plain has no layers"):
        Plain().enable_multi_axis_checkpointing()


def test_settings_give_intervals():
    costs, hidden, module = MemoryCosts(border=10, state=1000, layer=20), torch.zeros(2, 5000, 4), Toy()
    assert MultiAxisSettings(3, 2048).intervals(costs, 8, hidden, module) == (3, [2048, 2048, 904])
    assert MultiAxisSettings("auto", 2500).intervals(costs, 8, hidden, module)[1] == [2500, 2500]
    assert MultiAxisSettings(3, "auto").intervals(costs, 8, hidden, module)[0] == 3
    l, sizes = MultiAxisSettings().intervals(costs, 8, hidden, module)
    assert 1 <= l <= 8 and sum(sizes) == 5000 and (len(sizes) == 1 or sizes[0] % 256 == 0)
    assert MultiAxisSettings(9, 9000).intervals(costs, 8, hidden, module) == (9, [5000])


LENGTHS = [11, 5]  # of the videos of two ranks


def _gradients_on_two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    vision, text = _inputs()[rank]
    parallel = DistributedDataParallel(_toy())
    parallel(vision, text, [None] * L, cells=(2, 4))[0].square().sum().backward()
    gradients = [[parameter.grad for parameter in parallel.parameters()]]
    for reshard in (True, False):
        toy = _toy()
        for part in (*toy.blocks, *toy.key_values, toy):
            fully_shard(part, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=reshard)
        cells = MultiAxisSettings(2, 4).intervals(MemoryCosts(1, 1, 1), L, vision, toy)
        assert cells == (2, [[4, 4, 3], [2, 2, 1]][rank])
        toy(vision, text, [None] * L, cells=cells)[0].square().sum().backward()
        gradients.append([parameter.grad.full_tensor() for parameter in toy.parameters()])
    _, sizes = MultiAxisSettings(2, 4).intervals(MemoryCosts(1, 1, 1), L, vision[:, : [11, 1][rank]], toy)
    assert sizes == [[4, 4, 3], [1, 1, 1]][rank]  # padding fills the blocks of the one that has fewer tokens
    if rank == 0:
        torch.save(gradients, f"{folder}/gradients")
    torch.distributed.barrier()  # so that neither leaves while the other still talks to it
    os._exit(0)  # gloo's threads may outlive the interpreter's end, which then aborts


def _toy() -> Toy:
    torch.manual_seed(0)
    return Toy().double()


def _inputs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randn(1, n, D, dtype=torch.float64, generator=generator) for n in (length, 3)) for length in LENGTHS
    ]


def test_two_ranks_with_videos_of_different_lengths(tmp_path):
    """DDP, and FSDP2 with weights that are freed between cells or kept: the mean of the gradients."""
    torch.multiprocessing.spawn(_gradients_on_two_ranks, (str(tmp_path),), nprocs=2)
    toy = _toy()
    loss = sum(toy(vision, text, [None] * L)[0].square().sum() for vision, text in _inputs()) / 2
    expected = torch.autograd.grad(loss, list(toy.parameters()))
    for gradients in torch.load(tmp_path / "gradients"):
        compare(gradients, expected)
