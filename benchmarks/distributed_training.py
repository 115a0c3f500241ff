"""Training the 7B's shapes on several GPUs with FSDP2: tokens a second of each GPU, and losses that must be one GPU's.

    torchrun --nproc-per-node 2 benchmarks/distributed_training.py [--stage stage2] [--frames 256] [--out FILE]

Each step trains on `--samples` samples in all, shared out among the GPUs: with the same seed the losses of any number
of GPUs are the same up to rounding. Weights that train are float32, computed with in bfloat16; AdamW; checkpointing
per layer. With one process nothing is sharded. Random weights and frames.
"""

import argparse
import json
import os
import statistics
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from training import TRAINED, choose_trainable, sample, video_tokens

from vamba.bench import GIB
from vamba.bench.clock import now, peak, reset_peak
from vamba.bench.models import load_ours
from vamba.modeling.modeling_vamba import VambaDecoderLayer, VambaVideoLevel


def shard(model, stage: str, device: torch.device):
    choose_trainable(model, stage)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.train().gradient_checkpointing_enable()
    if dist.get_world_size() == 1:
        return model
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, (VambaDecoderLayer, VambaVideoLevel)):
            fully_shard(module, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=TRAINED, default="stage2")
    parser.add_argument("--frames", type=int, default=256)
    parser.add_argument("--samples", type=int, default=2, help="of one step, a multiple of the GPUs")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--model", default="7b")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(0)  # the same weights everywhere
    model = shard(load_ours(args.model, device), args.stage, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=cuda)
    world, losses, times = dist.get_world_size(), [], []
    mine = range(dist.get_rank(), args.samples, world)
    reset_peak(device)
    for _ in range(args.steps):
        start, total = now(device), torch.zeros((), device=device)
        for index in mine:
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                loss = model(**sample(model, args.frames, index)).loss / len(mine)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        dist.all_reduce(total)
        losses.append(total.item() / world)
        times.append(now(device) - start)
    tokens, seconds = len(mine) * video_tokens(args.frames), statistics.median(times[1:])
    row = {"gpus": world, "stage": args.stage, "frames": args.frames, "samples": args.samples, "losses": losses}
    row |= {"seconds": seconds, "video_tokens_per_s_per_gpu": tokens / seconds}
    row["peak_GiB"] = peak(device) / GIB if cuda else None
    if dist.get_rank() == 0:
        print(json.dumps(row), flush=True)
        if args.out:
            args.out.write_text(json.dumps(row, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
