"""A training step against the length of the video: plain, per-layer and multi-axis checkpointing, and a peer.

    python benchmarks/training.py [--frames 512 1024 4096] [--modes layer multi_axis offload] [--stages stage1 stage2]
                                  [--peer 128] [--lora 3600] [--model 7b] [--out training.json]
    python benchmarks/training.py --report training.json... --out DIR/training

Forward and backward of one sample, 640x360 frames and 128 text tokens, without optimizer, bf16, random weights; the
vision tower is frozen. "stage1" trains cross-attention, Mamba blocks and alpha, "stage2" the language model and the
merger as well. Seconds are the median of three steps after one to warm up; GiB are the peak over the weights, gradients
included. MFU counts useful operations only (`vamba.training.flops`). `--lora` fine-tunes adapters with AdamW on that
many frames and prints the losses. Out of memory is recorded, and the run goes on. A report has a table and a plot of
the steps of several runs.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from vamba.bench import GIB
from vamba.bench.clock import default_device, machine, now, peak, release, reset_peak, seconds_of_steps
from vamba.bench.models import SEVEN_BILLION, load_ours, load_peer
from vamba.bench.report import Line, draw, table
from vamba.modeling import VambaConfig
from vamba.training.flops import FlopsModel, peak_flops


TEXT, GRID = 128, (26, 46)  # text tokens; patches of a 640x360 frame
TRAINED = {
    "stage1": ("video_encoder.", "cross_attn.", ".alpha"),
    "stage2": ("video_encoder.", "language_model.", "lm_head.", "merger."),
}
DEVICE = default_device()
MODES = ("plain", "layer", "multi_axis", "offload")
LIMIT = 600  # seconds for the steps of one length


def sample(model, frames: int, seed: int = 0) -> dict:
    """Text with labels, and raw patches on the CPU, pinned as by Trainer's loader."""
    generator, device = torch.Generator().manual_seed(seed), model.device
    vision, (h, w) = model.config.vision_config, GRID
    per_patch, vocabulary = 3 * vision.temporal_patch_size * vision.patch_size**2, model.config.text_config.vocab_size
    patches = torch.randint(0, 256, (h * w, per_patch), generator=generator, dtype=torch.uint8).repeat(frames // 2, 1)
    ids = torch.randint(vocabulary // 10, vocabulary // 2, (1, TEXT), generator=generator).to(device)
    return {
        "input_ids": ids,
        "labels": ids,
        "pixel_values_videos": patches.pin_memory() if device.type == "cuda" else patches,
        "video_grid_thw": torch.tensor([[frames // 2, h, w]]),
        "use_cache": False,
    }


def video_tokens(frames: int) -> int:
    return frames // 2 * GRID[0] * GRID[1] // 4


def choose_trainable(model, stage: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED[stage]))


def choose_checkpointing(model, mode: str) -> None:
    model.train()
    model.disable_multi_axis_checkpointing()
    model.gradient_checkpointing_disable()
    if mode != "plain":
        model.gradient_checkpointing_enable()
    if mode in ("multi_axis", "offload"):
        model.enable_multi_axis_checkpointing(offload=mode == "offload")


def measure(model, inputs: dict, frames: int) -> dict:
    """Seconds of a step and its peak over the weights."""

    def step():
        model(**inputs).loss.backward()
        model.zero_grad(set_to_none=True)

    measured = seconds_of_steps(step, DEVICE, LIMIT)
    if measured["status"] != "ok":
        model.zero_grad(set_to_none=True)
        return measured
    seconds, over = measured["seconds"], measured["over"]
    row = {"seconds": round(seconds, 3), "video_tokens_per_s": round(video_tokens(frames) / seconds)}
    return row if over is None else row | {"peak_GiB": round(over / GIB, 2)}


def ours(args) -> list[dict]:
    model = load_ours(args.model, DEVICE)
    flops, rows = FlopsModel(model.config), []
    for stage in args.stages:
        choose_trainable(model, stage)
        flops.trains(model)
        for frames in args.frames:
            inputs = sample(model, frames)
            for mode in args.modes:
                choose_checkpointing(model, mode)
                row = {"model": "vamba", "stage": stage, "frames": frames, "checkpointing": mode}
                row |= measure(model, inputs, frames)
                if "seconds" in row and DEVICE.type == "cuda":
                    useful = flops.step([(TEXT, TEXT - 1, [(frames // 2, *GRID)])])
                    row["MFU"] = round(useful / row["seconds"] / peak_flops(DEVICE), 3)
                rows.append(row)
                print(row, flush=True)
    if args.lora:
        rows.append(lora(model, args.lora))
    return rows


def lora(model, frames: int, steps: int = 4) -> dict:
    """Adapters trained with AdamW on one sample over and over, whose loss has to fall."""
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    choose_checkpointing(model, "multi_axis")
    targets = r".*(language_model|video_encoder).*([qkvo]|in|out|gate|up|down)_proj"
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-4)
    inputs, losses, times = sample(model, frames), [], []
    reset_peak(DEVICE)
    for _ in range(steps):
        start = now(DEVICE)
        loss = adapted(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(loss.item(), 4))
        times.append(now(DEVICE) - start)
    row = {"model": "vamba", "stage": "LoRA with AdamW", "frames": frames, "checkpointing": "multi_axis"}
    row |= {"seconds": round(statistics.median(times[1:]), 3), "losses": losses}
    row["peak_GiB_with_weights"] = round((peak(DEVICE) or 0) / GIB, 2)
    print(row, flush=True)
    if not losses[-1] < losses[0]:
        sys.exit(f"the loss does not fall: {losses}")
    return row


def peer(args) -> list[dict]:
    """Qwen2-VL, language model and merger training, with its own checkpointing."""
    config = VambaConfig(**SEVEN_BILLION)
    model = load_peer(config, DEVICE, torch.bfloat16).train()
    model.gradient_checkpointing_enable()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("visual" not in name or "merger" in name)
    rows = []
    for frames in args.peer:
        inputs = sample(model, frames)
        video = torch.full((1, video_tokens(frames)), config.video_token_id, device=DEVICE)
        ids = torch.cat([video, inputs["input_ids"]], 1)
        inputs["labels"] = torch.cat([torch.full_like(video, -100), inputs["labels"]], 1)
        inputs["input_ids"], inputs["mm_token_type_ids"] = ids, 2 * (ids == config.video_token_id).int()
        pixels = inputs["pixel_values_videos"].to(DEVICE, torch.bfloat16) / 255
        inputs |= {"pixel_values_videos": pixels, "video_grid_thw": inputs["video_grid_thw"].to(DEVICE)}
        row = {"model": "qwen2-vl", "stage": "stage2", "frames": frames, "checkpointing": "layer"}
        rows.append(row | measure(model, inputs, frames))
        print(rows[-1], flush=True)
    return rows


def report(files: list[Path], out: Path) -> None:
    """`out` with ".md" and ".png": the steps of several runs, a line for each model and way of checkpointing."""
    runs = [json.loads(path.read_text()) for path in files]
    rows = [row for run in runs for row in run["steps"]]
    ways, panels = list(dict.fromkeys((row["model"], row["stage"], row["checkpointing"]) for row in rows)), []
    for quantity, label in (("seconds", "seconds"), ("peak_GiB", "peak over weights, GiB")):
        lines = []
        for number, way in enumerate(ways):
            mine = [row for row in rows if (row["model"], row["stage"], row["checkpointing"]) == way]
            points = sorted((row["frames"], row[quantity]) for row in mine if quantity in row)
            lines += [Line(", ".join(way), points, f"C{number}")] if points else []
        panels.append((label, lines))
    plot = draw(out.with_name(f"{out.name}.png"), panels, "frames", sorted({row["frames"] for row in rows}))
    text = ["# A training step against the length of the video\n", __doc__.partition("\n\n")[2].partition("\n\n")[2]]
    for run in runs:
        facts = ", ".join(f"{name} {value}" for name, value in run.items() if name not in ("command", "steps"))
        text.append(f"`{run['command']}`: {facts}\n")
    out.with_name(f"{out.name}.md").write_text("\n".join([*text, table(rows), f"\n![steps]({plot.name})\n"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[512, 1024, 4096])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["layer", "multi_axis"])
    parser.add_argument("--stages", nargs="+", choices=TRAINED, default=["stage1"])
    parser.add_argument("--peer", type=int, nargs="*", default=[], help="frames for Qwen2-VL")
    parser.add_argument("--lora", type=int, help="frames of a LoRA fine-tuning of a few steps")
    parser.add_argument("--model", default="7b")
    parser.add_argument("--report", type=Path, nargs="+", help="results of runs to join, instead of a run")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.report:
        if args.out is None:
            parser.error("--report needs --out, the name of the report without its ending")
        report(args.report, args.out)
        return
    rows = ours(args)
    release(DEVICE)
    rows += peer(args) if args.peer else []
    if args.out:
        args.out.write_text(json.dumps(machine(DEVICE) | {"steps": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
