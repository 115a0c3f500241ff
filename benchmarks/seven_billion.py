"""A checkpoint of the published 7B's size from conversion to an answer, with random weights, on one GPU.

    python benchmarks/seven_billion.py --work /tmp/7b [--video clip.mp4] [--layers 28] [--out results.json]

Writes a random Qwen2-VL-7B checkpoint, converts it with `vamba.conversion.convert`, loads it with
`from_pretrained(dtype="bfloat16", device_map="cuda")` and generates from a video; reports the time and the peak memory
of each step. Random weights give random words: this measures, it does not answer.
"""

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from vamba.bench.models import SEVEN_BILLION


class Report:
    """Seconds and peak GPU memory of named steps, printed as they end."""

    def __init__(self):
        self.rows = []

    def measure(self, name, function):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = function()
        torch.cuda.synchronize()
        row = {
            "step": name,
            "seconds": round(time.perf_counter() - start, 2),
            "gpu_peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "host_peak_GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        }
        self.rows.append(row)
        print(row, flush=True)
        return result


def write_random_checkpoint(folder: Path, layers: int) -> None:
    """Qwen2-VL with random bfloat16 weights, made on the GPU and saved by transformers."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(**SEVEN_BILLION, dtype="bfloat16")
    config.text_config.num_hidden_layers = layers
    config.text_config.layer_types = config.text_config.layer_types[:layers]
    with torch.device("cuda"):
        model = Qwen2VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="5GB")
    from vamba.demo.tiny_checkpoints import tiny_tokenizer  # the words are random anyway

    tiny_tokenizer(["What happens in this video?"]).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints, 40 GB at full size")
    parser.add_argument("--video", help="a video file; random frames without it")
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from transformers import AutoModelForImageTextToText

    report = Report()
    report.measure("write random Qwen2-VL-7B", lambda: write_random_checkpoint(args.work / "qwen", args.layers))
    torch.cuda.empty_cache()
    # in a process of its own, so that its peak memory is its own
    command = [sys.executable, "-m", "vamba.conversion", args.work / "qwen", args.work / "vamba", "--no-progress"]
    report.measure("convert", lambda: subprocess.run(command, check=True))
    report.rows[-1]["host_peak_GiB"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2)
    shutil.rmtree(args.work / "qwen")
    model = report.measure(
        "load",
        lambda: AutoModelForImageTextToText.from_pretrained(args.work / "vamba", dtype="bfloat16", device_map="cuda"),
    )
    weights = torch.cuda.memory_allocated() / 2**30
    pixels, grid = frames(args, model)
    ids = torch.randint(1000, 2000, (1, 128), device="cuda")
    greedy = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    video = {"pixel_values_videos": pixels, "video_grid_thw": grid}
    for call in ("first call", "again"):
        name = f"generate 32 tokens from {args.frames} frames, {call}"
        report.measure(name, lambda: model.generate(ids, **video, **greedy))
    memory = report.measure(f"encode {args.frames} frames", lambda: model.encode_video(pixels, grid))
    name = "answer from the memory, 32 tokens"
    report.measure(name, lambda: model.generate(ids, past_key_values=memory.fork(), **greedy))
    import transformers

    summary = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "parameters": model.num_parameters(),
        "weights_GiB": round(weights, 2),
        "video_tokens": memory.video_length,
        "video_memory_GiB": round(memory.video_nbytes / 2**30, 3),
        "steps": report.rows,
    }
    print(json.dumps(summary, indent=1))
    if args.out:
        args.out.write_text(json.dumps(summary, indent=1))


def frames(args, model) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of 640x360 frames, of a file through the reader or random."""
    from transformers import Qwen2VLVideoProcessor

    if args.video:
        from vamba import load_video

        clip, _ = load_video(args.video, num_frames=args.frames, max_pixels=640 * 364)
    else:
        clip = torch.randint(0, 256, (args.frames, 3, 364, 644), dtype=torch.uint8)
    inputs = Qwen2VLVideoProcessor(cap_pixels_per_frame=False)(
        [clip], do_resize=False, return_tensors="pt", device="cuda"
    )
    return inputs["pixel_values_videos"].to(model.dtype).cuda(), inputs["video_grid_thw"].cuda()


if __name__ == "__main__":
    main()
