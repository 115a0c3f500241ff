"""The memory model: the paper's constants and measurements, autograd's own bytes, and the choice of cells."""

import pytest
import torch
from triton_interpreter import DEVICE, on_a_gpu, run_interpreted

from vamba.bench.models import paper_costs
from vamba.modeling import VambaMamba2Config
from vamba.modeling.mamba2 import Mamba2Block
from vamba.modeling.multi_axis import MemoryCosts, choose_intervals, cpu_memory_budget, mamba2_costs, memory_budget


GB = 10**9
LAYERS = {"370m": 48, "1.3b": 48, "2.7b": 64}
CONFIGS = {
    name: VambaMamba2Config(hidden_size=width) for name, width in (("370m", 1024), ("1.3b", 2048), ("2.7b", 2560))
}
VAMBA_7B = VambaMamba2Config()
KEYS_VALUES = 2 * 4 * 128  # per token and layer


def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("370m", (1024, 269056, 6432, 264448)),
        ("1.3b", (2048, 537344, 12608, 528640)),
        ("2.7b", (2560, 671488, 15696, 660736)),
    ],
)
def test_the_papers_constants(name, constants):
    """Table 7 of arXiv 2411.19460, in numbers of bfloat16."""
    assert paper_costs(CONFIGS[name])[:4] == tuple(2 * constant for constant in constants)


@pytest.mark.parametrize(
    ("name", "measured"),
    [
        ("370m", [0.3, 0.5, 0.6, 1.1, 1.6, 2.4, 3.8, 5.5, 8.8, 15.4, 23.1, 40.2]),
        ("1.3b", [0.5, 0.9, 1.2, 2.1, 3.7, 4.8, 7.4, 11.3, 17.7, 30.8, 45.8]),
        ("2.7b", [0.7, 1.1, 1.8, 2.7, 4.2, 6.9, 10.5, 17.2, 25.9, 42.2]),
    ],
)
def test_the_papers_model_beside_its_measurements(name, measured):
    """Table 3, GB at 2^10, 2^11, ... tokens: the model leaves out gradients and what one layer is at."""
    costs = paper_costs(CONFIGS[name])
    for exponent, gigabytes in enumerate(measured, start=10):
        cells = choose_intervals(costs, LAYERS[name], 2**exponent, budget=0)
        ratio = gigabytes * GB / costs.total(LAYERS[name], 2**exponent, *cells)
        assert 0.85 < ratio < 1.9, (exponent, cells, ratio)


def test_near_the_least_memory_where_that_is_too_much():
    costs, tokens = mamba2_costs(CONFIGS["1.3b"], torch.bfloat16), 100_000
    memory = costs.total(48, tokens, *choose_intervals(costs, 48, tokens, budget=1))
    least = min(costs.total(48, tokens, l, s) for l in range(1, 49) for s in range(256, 32769, 256))
    assert least <= memory <= 1.05 * least
    assert choose_intervals(costs, 48, tokens, budget=1) == choose_intervals(costs, 48, tokens, budget=int(least))


def test_time_and_memory_are_traded():
    """More memory buys longer cells of fewer layers; where memory is the same the fastest are chosen."""
    costs, tokens = mamba2_costs(CONFIGS["1.3b"], torch.bfloat16), 2**18
    least = min(costs.total(48, tokens, l, s) for l in range(1, 49) for s in range(256, 32769, 256))
    chosen = choose_intervals(costs, 48, tokens)
    leanest = min((costs.total(48, tokens, l, s), l, s) for l in range(1, 49) for s in range(256, 32769, 256))[1:]
    assert chosen[1] > leanest[1] and least < costs.total(48, tokens, *chosen) < 1.5 * least
    assert choose_intervals(costs, 48, tokens, budget=int(1.05 * least))[1] <= chosen[1]
    flat = MemoryCosts(border=0, state=0, layer=0, emitted=1)
    assert choose_intervals(flat, 48, tokens) == (1, 32768)


def test_cells_of_small_models_are_long_enough_for_the_gpu_to_be_busy():
    small, large = (mamba2_costs(CONFIGS[name], torch.bfloat16) for name in ("370m", "2.7b"))
    assert choose_intervals(small, 48, 2**17)[1] > 20_000 > choose_intervals(large, 64, 2**17)[1]
    assert choose_intervals(small, 48, 2**17, budget=0)[1] < 10_000  # where memory decides


COSTS_7B = mamba2_costs(VAMBA_7B, torch.bfloat16, KEYS_VALUES)


@pytest.mark.parametrize(
    ("tokens", "budget", "offload", "expected"),
    [
        (1, None, False, (1, 256)),
        (76_544, None, False, (4, 11008)),
        (153_088, None, False, (4, 12800)),
        (153_088, 25 * GB, False, (4, 11776)),
        (153_088, 1 * GB, False, (7, 7680)),  # nothing fits: near the least
        (612_352, None, False, (7, 16128)),
        (1_048_576, None, False, (14, 14592)),
        (76_544, None, True, (1, 12800)),
        (1_048_576, None, True, (1, 20224)),
        (1_048_576, 23 * GB, True, (1, 5632)),
    ],
)
def test_chosen_cells_of_vambas_7b(tokens, budget, offload, expected):
    cells = choose_intervals(COSTS_7B, 28, tokens, budget, offload=offload)
    assert cells == expected
    if budget is not None and budget > 10 * GB:
        assert COSTS_7B.total(28, tokens, *cells, offload) <= budget


def test_cpu_memory_bounds_what_is_offloaded():
    """Little memory on the GPU wants many groups of layers, and more of their borders on the CPU than there is."""
    costs = mamba2_costs(CONFIGS["2.7b"], torch.bfloat16)
    tokens, budget = 2**20, 90 * GB
    free = choose_intervals(costs, 64, tokens, 0, offload=True)
    bound = choose_intervals(costs, 64, tokens, 0, offload=True, cpu_budget=budget)
    assert free[0] < bound[0] and costs.offloaded(64, tokens, *free) > 150 * GB
    assert costs.offloaded(64, tokens, *bound) <= budget
    assert choose_intervals(costs, 64, tokens, cpu_budget=1) == choose_intervals(costs, 64, tokens)
    least = choose_intervals(costs, 64, tokens, offload=True, cpu_budget=1)  # does not fit: as little as can be
    assert costs.offloaded(64, tokens, *least) == min(
        costs.offloaded(64, tokens, l, s) for l in range(1, 65) for s in (256, 32768)
    )


def test_cpu_budget_is_a_share_of_what_is_available(monkeypatch):
    whole = cpu_memory_budget(1.0)
    assert 2**28 < whole < 2**45 and 0.3 * whole < cpu_memory_budget(0.5) < 0.7 * whole
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cpu_memory_budget(1.0) < 0.3 * whole


def test_cpu_budget_stays_when_the_step_before_has_pinned_memory(monkeypatch):
    before = cpu_memory_budget()
    monkeypatch.setattr("pathlib.Path.open", lambda self: ["MemAvailable: 1 kB"])
    assert cpu_memory_budget() == before


def test_rows_share_the_budget_but_not_the_weights():
    """Eight rows take eight times the memory, but for gradients of weights, and fill a GPU with shorter cells."""
    costs = COSTS_7B.of_rows(8)
    one, eight = (c.total(28, 50_000, 4, 5120) - 4 * c.weights for c in (COSTS_7B, costs))
    assert eight == 8 * one and costs.weights == COSTS_7B.weights
    cells = choose_intervals(COSTS_7B, 28, 50_000, 100 * GB, rows=8)
    assert costs.total(28, 50_000, *cells) <= 100 * GB < costs.total(28, 50_000, 1, 32768)
    small = mamba2_costs(CONFIGS["370m"], torch.bfloat16)
    assert choose_intervals(small, 48, 2**15, rows=8)[1] < choose_intervals(small, 48, 2**15)[1]


def test_what_is_given_stays():
    assert choose_intervals(COSTS_7B, 28, 153_088, layer_interval=4)[0] == 4
    assert choose_intervals(COSTS_7B, 28, 153_088, sequence_interval=1000)[1] == 1000
    assert choose_intervals(COSTS_7B, 28, 153_088, layer_interval=4, sequence_interval=1000) == (4, 1000)


def test_a_million_tokens_of_vambas_7b():
    """Per token: borders of 7 KB, keys and values of 57 KB, cells of 96 KB per layer."""
    assert COSTS_7B.border == 7168 and COSTS_7B.emitted == 2048
    assert 95_000 < COSTS_7B.layer < 96_000
    tokens = 2**20
    assert 105 * GB < COSTS_7B.total(28, tokens, *choose_intervals(COSTS_7B, 28, tokens)) < 125 * GB
    assert COSTS_7B.total(28, tokens, 1, 32768, offload=True) < 35 * GB


def test_a_wide_residual_stream_widens_the_borders():
    costs = mamba2_costs(CONFIGS["2.7b"], torch.bfloat16, residual_dtype=torch.float32)
    plain = mamba2_costs(CONFIGS["2.7b"], torch.bfloat16)
    assert costs == plain._replace(border=4 * 2560, spared=2 * 2560)
    wider = costs.total(64, 1000, 8, 1000) - plain.total(64, 1000, 8, 1000)
    assert wider == 1000 * 2 * 2560 * 7  # seven borders: the embeddings are as narrow as before


def test_video_ma2mbas_targets():
    """2.7B: 2^19 tokens within the paper's 42.2 GB, 2^20 within 80 GB, with the residual stream in float32 as well.

    2^22 within 139 GB, with weights and gradients, takes one in bfloat16, and borders in CPU memory.
    """
    for residual in (torch.bfloat16, torch.float32):
        costs = mamba2_costs(CONFIGS["2.7b"], torch.bfloat16, residual_dtype=residual)
        memory = {n: costs.total(64, 2**n, *choose_intervals(costs, 64, 2**n, budget=0)) for n in (19, 20, 22)}
        assert memory[19] < 42.2 * GB and memory[20] < 80 * GB and 127 * GB < memory[22]
    costs = mamba2_costs(CONFIGS["2.7b"], torch.bfloat16)
    cells = choose_intervals(costs, 64, 2**22, offload=True, cpu_budget=100 * GB)
    assert costs.total(64, 2**22, *cells, offload=True) < 100 * GB


def test_more_of_anything_takes_more():
    costs = MemoryCosts(border=1, state=2, layer=3, work=4, emitted=5, weights=6)
    assert costs.total(8, 1000, 2, 100) < costs.total(8, 1001, 2, 100) < costs.total(9, 1001, 2, 100)
    for name in set(costs._fields) - {"spared"}:
        more = costs._replace(**{name: getattr(costs, name) + 1})
        assert more.total(8, 1000, 2, 100) > costs.total(8, 1000, 2, 100)
    assert costs.total(8, 1000, 2, 100, offload=True) < costs.total(8, 1000, 2, 100)
    assert costs.total(8, 100, 99, 5000) == costs.total(8, 100, 8, 100)


def test_no_budget_where_free_memory_is_unknown():
    assert memory_budget(torch.device("cpu")) is None


@on_a_gpu
def test_budget_is_a_share_of_free_memory():
    if DEVICE == "cpu":
        pytest.skip("for a GPU")
    free, total = torch.cuda.mem_get_info()
    assert 0.4 * free < memory_budget(torch.device("cuda")) <= 0.5 * total


def saved_bytes(layer, hidden_BSD) -> int:
    """Bytes that autograd saves, each piece of memory once, parameters not counted."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # kept alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        layer(hidden_BSD)
    return sum(storage.nbytes() for address, storage in storages.items() if address not in parameters)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 96])
def test_bytes_of_a_layer_are_what_autograd_saves(dtype, width):
    backends = dict.fromkeys(("ssd_backend", "conv_backend", "norm_backend"), "triton")
    config = VambaMamba2Config(hidden_size=width, state_size=16, head_dim=16, chunk_size=16, **backends)
    block = Mamba2Block(config).to(DEVICE, dtype)
    short, long = (torch.randn(1, n, width, dtype=dtype, device=DEVICE, requires_grad=True) for n in (64, 128))
    costs = mamba2_costs(config, dtype)
    mixer = (saved_bytes(block.mixer, long) - saved_bytes(block.mixer, short)) / 64
    norm = dtype.itemsize * width  # its input; its output is the mixer's input
    assert mixer == pytest.approx(costs.layer - norm, rel=0.05)
    assert (saved_bytes(block, long) - saved_bytes(block, short)) / 64 == pytest.approx(costs.layer, rel=0.05)


def test_bytes_of_a_state():
    config = CONFIGS["370m"]
    with torch.device("meta"):
        block = Mamba2Block(config).bfloat16()
        _, state = block(torch.empty(1, 300, 1024, dtype=torch.bfloat16))
    assert mamba2_costs(config, torch.bfloat16).state == sum(tensor.nbytes for tensor in state)
