"""A checkpoint of the published 7B's size from conversion to an answer, with random weights, on one GPU.

    python benchmarks/seven_billion.py --work /tmp/7b [--video clip.mp4] [--layers 28] [--out results.json]

Writes a random Qwen2-VL-7B checkpoint, converts it with `vamba.conversion.convert`, loads it with
`from_pretrained(dtype="bfloat16", device_map="cuda")` and generates from a video; reports the time and the peak memory
of each step. Random weights give random words: this measures, it does not answer.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLVideoProcessor,
)

from vamba import load_video
from vamba.bench import GIB
from vamba.bench.clock import machine, now, peak, reset_peak
from vamba.bench.models import SEVEN_BILLION, random_model
from vamba.demo.tiny_checkpoints import tiny_tokenizer


DEVICE, STEPS = torch.device("cuda"), []


def measure(name: str, function, process: int = resource.RUSAGE_SELF):
    """Calls `function`; notes and prints its seconds, the GPU's peak and that of `process` so far."""
    reset_peak(DEVICE)
    start = now(DEVICE)
    result = function()
    seconds, host = now(DEVICE) - start, resource.getrusage(process).ru_maxrss * 1024
    row = {"step": name, "seconds": round(seconds, 2), "gpu_peak_GiB": round(peak(DEVICE) / GIB, 2)}
    STEPS.append(row | {"host_peak_GiB": round(host / GIB, 2)})
    print(STEPS[-1], flush=True)
    return result


def write_random_checkpoint(folder: Path, layers: int) -> None:
    """Qwen2-VL with random bfloat16 weights, made on the GPU and saved by transformers."""
    config = Qwen2VLConfig(**SEVEN_BILLION, dtype="bfloat16")
    config.text_config.num_hidden_layers = layers
    config.text_config.layer_types = config.text_config.layer_types[:layers]
    model = random_model(Qwen2VLForConditionalGeneration, config, DEVICE, torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="5GB")
    tiny_tokenizer(["What happens in this video?"]).save_pretrained(folder)  # the words are random anyway


def frames(args, model) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of 640x360 frames, of a file through the reader or random."""
    if args.video:
        clip, _ = load_video(args.video, num_frames=args.frames, max_pixels=640 * 364)
    else:
        clip = torch.randint(0, 256, (args.frames, 3, 364, 644), dtype=torch.uint8)
    processor = Qwen2VLVideoProcessor(cap_pixels_per_frame=False)
    inputs = processor([clip], do_resize=False, return_tensors="pt", device=DEVICE)
    return inputs["pixel_values_videos"].to(model.dtype).cuda(), inputs["video_grid_thw"].cuda()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints, 40 GB at full size")
    parser.add_argument("--video", help="a video file; random frames without it")
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    qwen, vamba = args.work / "qwen", args.work / "vamba"
    measure("write random Qwen2-VL-7B", lambda: write_random_checkpoint(qwen, args.layers))
    torch.cuda.empty_cache()
    # in a process of its own, so that its peak memory is its own
    command = [sys.executable, "-m", "vamba.conversion", qwen, vamba, "--no-progress"]
    measure("convert", lambda: subprocess.run(command, check=True), resource.RUSAGE_CHILDREN)
    shutil.rmtree(qwen)
    options = {"dtype": "bfloat16", "device_map": "cuda"}
    model = measure("load", lambda: AutoModelForImageTextToText.from_pretrained(vamba, **options))
    weights = torch.cuda.memory_allocated()
    pixels, grid = frames(args, model)
    ids = torch.randint(1000, 2000, (1, 128), device=DEVICE)
    greedy = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    video = {"pixel_values_videos": pixels, "video_grid_thw": grid}
    for call in ("first call", "again"):
        name = f"generate 32 tokens from {args.frames} frames, {call}"
        measure(name, lambda: model.generate(ids, **video, **greedy))
    memory = measure(f"encode {args.frames} frames", lambda: model.encode_video(pixels, grid))
    name = "answer from the memory, 32 tokens"
    measure(name, lambda: model.generate(ids, past_key_values=memory.fork(), **greedy))
    summary = machine(DEVICE) | {
        "parameters": model.num_parameters(),
        "weights_GiB": round(weights / GIB, 2),
        "video_tokens": memory.video_length,
        "video_memory_GiB": round(memory.video_nbytes / GIB, 3),
        "steps": STEPS,
    }
    print(json.dumps(summary, indent=1))
    if args.out:
        args.out.write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
