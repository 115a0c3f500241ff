"""Two processes share Video-Ma2mba's weights (FSDP2): one has a video, the other has none or a shorter one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path


RANK = """
import json, os, sys
import torch, torch.distributed as dist
sys.path.append(sys.argv[1])
from tiny_video_ma2mba import prompt, tiny_model, video
from torch.distributed.fsdp import fully_shard
import vamba.modeling.video_model as room
room.MAX_CHUNK_FRAMES = 2
dist.init_process_group("gloo")
mesh, rank = dist.device_mesh.init_device_mesh("cpu", (2,)), dist.get_rank()

def batch(length, *frames):
    ids = prompt(length, len(frames), seed=length)
    return {"input_ids": ids, "labels": ids, **(video(*frames) if frames else {})}

def gradients(model, batch):
    model.zero_grad()
    model(**batch, use_cache=False, skip_logits=True, num_items_in_batch=10).loss.backward()
    return [p.grad for p in model.parameters()]

def made(frozen):
    model = tiny_model().train()
    model.model.visual.requires_grad_(not frozen)
    return model

worst = {}
for name, batches, frozen, cells in (
    ("text only", [batch(9, 5), batch(4)], False, False),
    ("shorter, in cells", [batch(9, 3, 4), batch(6, 1)], False, True),
    ("frozen", [batch(4), batch(9, 5)], True, True),
):
    both = [[None if g is None else g.clone() for g in gradients(made(frozen), batch)] for batch in batches]
    assert min(max(float(g.abs().max()) for g in one if g is not None) for one in both) > 0.01
    model = made(frozen)
    for module in model.modules():
        if type(module).__name__ in ("VideoMa2mbaBlock", "CLIPEncoderLayer"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if cells:
        model.gradient_checkpointing_enable()
        model.enable_multi_axis_checkpointing(2, 16)
    worst[name] = 0.0
    for found, *expected in zip(gradients(model, batches[rank]), *both):
        expected = [g for g in expected if g is not None]
        assert (found is None) == (not expected), name
        if expected:
            worst[name] = max(worst[name], float((found.full_tensor() - sum(expected) / 2).abs().max()))
if rank == 0:
    print(json.dumps(worst), flush=True)
dist.barrier()
os._exit(0)  # gloo's threads may outlive the interpreter's end, which then aborts
"""


def test_ranks_with_other_videos_make_as_many_passes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK, str(Path(__file__).resolve().parents[1])]
    running = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=100) for process in running]
    finally:  # one may wait for the other for ever
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), [err[-2000:] for _, err in printed]
    worst = json.loads(printed[0][0].splitlines()[-1])
    assert worst.keys() == {"text only", "shorter, in cells", "frozen"} and max(worst.values()) < 1e-5, worst
