"""`vamba bench`: prefill, decoding and memory against the length of the video, for ours and for a peer, in turn.

Beside each time stands its floor, the least that the machine could take: the operations of the matrix products at the
rate of large ones, or the bytes of one decoding step at the rate of large copies, both rates measured here.
"""

import statistics
import sys
import time
from argparse import Namespace

import torch

from . import GIB
from .clock import command, default_device, machine, measure_rates, release
from .models import decode_bytes, load_ours, load_peer
from .parts import measure_kernels, measure_parts, measure_videos
from .subjects import Ours, Peer


REPEATS, REPEAT_SECONDS = 3, 15  # a length is measured again until one of the two is reached


@torch.no_grad()
def measure_all(args: Namespace) -> dict:
    """{"machine", "lengths", "parts", "kernels", "videos"}: facts, and tables as lists of rows; see `report`."""
    device = torch.device(args.device) if args.device else default_device()
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events are recorded on the current one
    model = load_ours(args.model, device)
    rates = measure_rates(device, model.dtype)
    ours = Ours(model, args)
    lengths = measure_lengths(ours, args, rates)
    parts, kernels = measure_parts(ours, rates), measure_kernels(ours)
    config, dtype, facts = model.config, model.dtype, _describe(ours, rates)
    del model, ours
    release(device)
    if args.peer:
        lengths += measure_lengths(Peer(load_peer(config, device, dtype), args), args, rates)
        release(device)
    videos = measure_videos(args.video, config.vision_config)
    return {"machine": facts, "lengths": lengths, "parts": parts, "kernels": kernels, "videos": videos}


def measure_lengths(subject: Ours, args: Namespace, rates: dict) -> list[dict]:
    """One row for each number of frames, in rising order; after one that does not fit, none is tried."""
    rows, full, last = [], False, None
    for frames in sorted(set(args.frames)):
        row = {"model": subject.name, "frames": frames, "video_tokens": subject.tokens(frames), "status": "ok"}
        rows.append(row)
        expected = last["prefill_s"] * (frames / last["frames"]) ** subject.growth if last else 0
        if full:
            row["status"] = "not tried: a shorter one ran out of memory"
        elif expected > args.max_seconds:
            row["status"] = f"not tried: about {expected:.0f} s, more than --max-seconds {args.max_seconds:g}"
        else:
            try:
                if last is None:
                    subject.run(frames)  # kernels are compiled, handles made
                row.update(_measure_length(subject, frames, rates))
                last = row
            except torch.OutOfMemoryError:
                row["status"], full = "out of memory", True
            release(subject.device)
        print(row, file=sys.stderr, flush=True)
    return rows


def _measure_length(subject: Ours, frames: int, rates: dict) -> dict:
    """Medians over up to three runs, with their floors."""
    runs, start = [], time.perf_counter()
    while len(runs) < REPEATS and (not runs or time.perf_counter() - start < REPEAT_SECONDS):
        release(subject.device)
        runs.append(subject.run(frames))
    row = {name: statistics.median(run[name] for run in runs) for name in runs[0] if runs[0][name] is not None}
    return {
        **row,
        "prefill_floor_s": subject.prefill_operations(frames) / rates["matrix_per_s"],
        "decode_floor_ms": 1e3 * decode_bytes(subject.model, row["video_memory_bytes"]) / rates["copied_bytes_per_s"],
        "tokens_per_s": 1e3 / row["decode_ms"],
        "frames_per_s": frames / row["prefill_s"],
        "runs": len(runs),
    }


def _describe(ours: Ours, rates: dict) -> dict:
    """What a report names: machine, versions, command, sizes, rates."""
    model, args = ours.model, ours.args
    return machine(ours.device) | {
        "command": " ".join(["vamba", *command().split(" ")[1:]]),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": model.num_parameters(),
        "weights_GiB": round(ours.weights_bytes / GIB, 2) if ours.weights_bytes else None,
        "patches of a frame": "x".join(map(str, args.patches)),
        "prompt tokens": args.prompt_tokens,
        "matrix products, TFLOP/s": round(rates["matrix_per_s"] / 1e12, 2),
        "copies, TB/s": round(rates["copied_bytes_per_s"] / 1e12, 3),
    }
