"""Three processes share the weights (FSDP2, ZeRO-3), and their batches differ in all that decides what is called."""

import importlib.util
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch


WORKER = Path(__file__).with_name("ranks_worker.py")
MIXTURES = list(itertools.combinations_with_replacement(("text", "image", "short", "long"), 3))
MODES = [("vamba", False, False), ("vamba", True, False), ("vamba", False, True), ("vamba", True, True)]
MODES += [("video_ma2mba", False, False), ("video_ma2mba", False, True)]


def cases() -> list:
    """All mixtures in all modes if VAMBA_FULL is set, else half of the mixtures, all modes among them."""
    if os.environ.get("VAMBA_FULL"):
        return [[*mode, mixture] for mode in MODES for mixture in MIXTURES]
    return [[*MODES[index % len(MODES)], mixture] for index, mixture in enumerate(MIXTURES[::2])]


def run_ranks(*arguments: str, ranks: int = 3, timeout: int = 250) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    common |= {} if torch.cuda.device_count() >= ranks else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    running = [
        subprocess.Popen(
            [sys.executable, str(WORKER), *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]
    try:
        printed = [process.communicate(timeout=timeout) for process in running]
    finally:  # one may wait for the other for ever
        for process in running:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(running, printed)]


needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_losses_and_gradients_are_those_of_each_batch_alone(kind):
    chosen = cases()[:: 2 if kind == "ddp" else 1]
    ended = run_ranks(kind, json.dumps(chosen), timeout=1400)
    assert all(code == 0 for code, _, _ in ended), [errors[-3000:] for _, _, errors in ended]
    worst = json.loads(ended[0][1].splitlines()[-1])
    assert len(worst) == len(chosen) and max(worst.values()) < 1e-5, worst


def test_answers_are_those_of_each_rank_alone():
    mixtures = [("text", "short"), ("short", "long"), ("image", "text"), ("long", "long")]
    asked = [[name, mixture] for name in ("vamba", "video_ma2mba") for mixture in mixtures]
    ended = run_ranks("generate", json.dumps(asked), ranks=2, timeout=100)
    assert all(code == 0 for code, _, _ in ended), [errors[-3000:] for _, _, errors in ended]
    wrong = json.loads(ended[0][1].splitlines()[-1])
    assert len(wrong) == 8 and not any(wrong.values()), wrong


def test_an_error_on_one_rank_ends_all():
    start = time.perf_counter()
    mixture = ["short", "broken short", "text"]
    ended = run_ranks("fsdp2", json.dumps([["vamba", False, False, mixture]]), timeout=60)
    assert all(code != 0 for code, _, _ in ended) and time.perf_counter() - start < 60
    assert "ValueError: video_grid_thw announces" in ended[1][2]


@pytest.mark.gpu
@needs_gpus
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_on_two_gpus(kind):
    """Through NCCL and the kernels, whose sums come in another order."""
    pairs = itertools.combinations_with_replacement(("text", "image", "short", "long"), 2)
    mixtures = [[*MODES[index % len(MODES)], pair] for index, pair in enumerate(pairs)]
    ended = run_ranks(kind, json.dumps(mixtures), ranks=2, timeout=500)
    assert all(code == 0 for code, _, _ in ended), [errors[-3000:] for _, _, errors in ended]
    worst = json.loads(ended[0][1].splitlines()[-1])
    assert len(worst) == len(mixtures) and max(worst.values()) < 2e-3, worst
