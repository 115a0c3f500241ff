"""What a hybrid learns of videos longer than those it was trained on: small models from scratch, on equal data.

    for arm in vamba vamba_norm ...; do python benchmarks/length_study.py train $arm --out DIR --steps 800 & done; wait
    python benchmarks/length_study.py prefill --out DIR
    python benchmarks/length_study.py report --out DIR --report benchmarks/results/DATE_length_study

Every arm has some 23 million parameters and sees the same videos (`moving_shapes`) in the same order, of 16 to 48
frames, and is asked about videos of up to 16 times as many. It learns for as many steps as cost what `--steps` of the
Qwen2-VL cost, but at most `--most` times as many; what it knows is measured on the way, so that runs are compared after
equal steps and after equal FLOPs. So that a run may be cut anywhere, the learning rate does not depend on the end
(it falls with the square root of the step), and it is a running average of the weights that is asked.
"""

import argparse
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from length_study_report import write_report
from moving_shapes import NUM_ANSWERS, QUESTIONS, make_videos, patches_of
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from vamba.bench.clock import default_device, machine, now
from vamba.modeling import (
    VambaConfig,
    VambaForConditionalGeneration,
    VideoMa2mbaConfig,
    VideoMa2mbaForConditionalGeneration,
)


DEVICE = default_device()
TRAINED, TESTED = (16, 24, 32, 48), (24, 48, 96, 192, 384, 768)  # frames
TEST_SEED = 77
LEARNING_RATE, WARMUP = 1e-3, 100
CHUNK_FRAMES = 8192  # of 4 tokens, or of 2 in Vamba
START, END, PAD, VIDEO, FIRST_QUESTION, FIRST_ANSWER, VOCABULARY = 0, 1, 2, 3, 4, 8, 64
IDS = {"vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": VIDEO, "image_token_id": 63}
PATCH, VISION_WIDTH, VISION_DEPTH = 12, 128, 2


@dataclass(frozen=True)
class Arm:
    """One model of the study, and how it differs from the defaults."""

    kind: str = "vamba"
    text: dict = field(default_factory=dict)
    mixer: dict = field(default_factory=dict)
    blocks: bool = True
    normalised_keys: bool = False  # the layer's norm before the keys' and values' projections, and there only
    lengths: tuple[int, ...] = TRAINED


NORM, POSITIONS = {"cross_attn_use_layer_norm": True}, {"cross_attn_use_position_embeddings": True}
SLOW = {"time_step_min": 1e-4, "time_step_max": 1e-2, "time_step_floor": 1e-5}
ARMS = {
    "vamba": Arm(),
    "vamba_norm": Arm(text=NORM),
    "vamba_no_mamba": Arm(blocks=False),
    "qwen2_vl": Arm("qwen2_vl"),
    "video_ma2mba": Arm("video_ma2mba"),
    "vamba_key_norm": Arm(normalised_keys=True),
    "vamba_slow_dt": Arm(mixer=SLOW),
    "vamba_small_a": Arm(mixer={"A_init_bounds": (0.01, 1.0)}),
    "vamba_positions": Arm(text=POSITIONS),
    "vamba_norm_positions": Arm(text=NORM | POSITIONS),
    "vamba_fixed_length": Arm(lengths=(48,)),
    "vamba_norm_fixed_length": Arm(text=NORM, lengths=(48,)),
    "video_ma2mba_slow_dt": Arm("video_ma2mba", mixer=SLOW),
}
BATCH = {"standard": 32, "tiny": 2}
SIZES = {  # width and layers
    "standard": {"vamba": (384, 6), "qwen2_vl": (384, 10), "video_ma2mba": (512, 14)},
    "tiny": {"vamba": (128, 2), "qwen2_vl": (128, 2), "video_ma2mba": (128, 2)},
}


def build(arm: Arm, size: str = "standard", attention: str = "sdpa", seed: int = 0) -> nn.Module:
    """The model with random weights, on the CPU in float32."""
    torch.manual_seed(seed)
    width, layers = SIZES[size][arm.kind]
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "initializer_range": width**-0.5,
    }
    common |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}
    mixer = {"state_size": 64, "head_dim": 32, "chunk_size": 64} | arm.mixer
    if arm.kind == "video_ma2mba":
        vision = {"hidden_size": VISION_WIDTH, "intermediate_size": 2 * VISION_WIDTH, "num_attention_heads": 4}
        vision |= {"num_hidden_layers": VISION_DEPTH + 1, "image_size": 4 * PATCH, "patch_size": PATCH}
        return VideoMa2mbaForConditionalGeneration(
            VideoMa2mbaConfig(text_config=common | mixer, vision_config=vision, attn_implementation=attention, **IDS)
        )
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}  # of heads of 64
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "intermediate_size": 4 * width}
    text = common | heads | {"rope_parameters": rope, "max_position_embeddings": 2**17}
    vision = {"depth": VISION_DEPTH, "embed_dim": VISION_WIDTH, "hidden_size": width, "mlp_ratio": 2, "num_heads": 4}
    vision |= {"patch_size": PATCH, "initializer_range": 0.06}
    options = {"vision_config": vision, "tie_word_embeddings": False, "attn_implementation": attention, **IDS}
    if arm.kind == "qwen2_vl":
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, **options))
    mixer |= {"hidden_size": width, "initializer_range": width**-0.5}
    model = VambaForConditionalGeneration(VambaConfig(text_config=text | arm.text, mamba_config=mixer, **options))
    for level, layer in zip(model.model.video_encoder.levels, model.model.language_model.layers):
        if not arm.blocks:
            level.block = None
        if arm.normalised_keys:
            level.k_proj, level.v_proj = (nn.Sequential(layer.input_layernorm, p) for p in (level.k_proj, level.v_proj))
    return model


def model_inputs(model: nn.Module, frames: Tensor, tail_BN: Tensor) -> dict:
    """The prompt: the video, and behind it the text `tail_BN`; logits are for the text only."""
    config, B = model.config, len(tail_BN)
    patches, grid = patches_of(frames, PATCH, config.vision_config.temporal_patch_size)
    is_qwen = config.model_type == "qwen2_vl"
    head = torch.tensor([START, *[VIDEO] * (int(grid[0].prod()) // 4 if is_qwen else 0), END])
    kinds = (2 * (head == (VIDEO if is_qwen else START))).unsqueeze(0)  # 2 says that it is a video
    kinds = nn.functional.pad(kinds, (0, tail_BN.shape[1]))
    input_ids = torch.cat([head.to(tail_BN.device).expand(B, -1), tail_BN], 1)
    inputs = {"input_ids": input_ids, "mm_token_type_ids": kinds.expand(B, -1).to(tail_BN.device)}
    if is_qwen:  # it would compute the positions of each row by itself, and wait for the GPU
        positions, _ = model.model.get_rope_index(input_ids[:1].cpu(), kinds, video_grid_thw=grid[:1])
        inputs["position_ids"] = positions.expand(-1, B, -1).to(tail_BN.device)
        grid = grid.to(tail_BN.device)
    dtype = model.get_input_embeddings().weight.dtype
    return inputs | {"pixel_values_videos": patches.to(dtype), "video_grid_thw": grid, "use_cache": False}


def ask(model: nn.Module, frames: Tensor, answers_B3: Tensor, order_B3: Tensor) -> tuple[Tensor, Tensor]:
    """Asks all questions in an order of each video's own: logits (B, 3, VOCABULARY), and the right tokens (B, 3)."""
    firsts = torch.tensor([sum(NUM_ANSWERS[:i]) for i in range(len(NUM_ANSWERS))], device=frames.device)
    tokens_B3 = (FIRST_ANSWER + firsts + answers_B3).gather(1, order_B3)
    tail = torch.stack([FIRST_QUESTION + order_B3, tokens_B3], 2).flatten(1)
    with torch.autocast(frames.device.type, torch.bfloat16, enabled=frames.is_cuda):
        logits = model(**model_inputs(model, frames, tail), logits_to_keep=tail.shape[1]).logits
    return logits[:, ::2].float(), tokens_B3


def loss_of(model: nn.Module, batch: int, num_frames: int, generator: torch.Generator) -> Tensor:
    frames, answers = make_videos(batch, num_frames, generator)
    order = torch.rand(answers.shape, device=answers.device, generator=generator).argsort(1)
    logits, tokens = ask(model, frames, answers, order)
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


@torch.no_grad()
def accuracies(model: nn.Module, lengths: Sequence[int], videos: int) -> dict[str, dict[str, float]]:
    """By frames and question, on the same videos for every arm."""
    model.eval()
    found = {}
    for frames in lengths:
        generator, right = torch.Generator(DEVICE).manual_seed(TEST_SEED), []
        batch = min(videos, max(1, 12288 // frames))
        for _ in range(-(-videos // batch)):
            pictures, answers = make_videos(batch, frames, generator)
            order = torch.arange(len(QUESTIONS), device=DEVICE).expand(batch, -1)
            logits, tokens = ask(model, pictures, answers, order)
            right.append(logits.argmax(-1) == tokens)
        found[str(frames)] = dict(zip(QUESTIONS, torch.cat(right)[:videos].float().mean(0).tolist()))
    return found


@cache
def flops_per_step(name: str, size: str) -> float:
    """Of forward and backward of a batch, in the mean over the lengths; of the kernels it counts their references."""
    model, counts = build(ARMS[name], size, attention="eager"), []
    for frames in ARMS[name].lengths:
        with FlopCounterMode(display=False) as counter:
            loss_of(model, 1, frames, torch.Generator().manual_seed(0)).backward()
        counts.append(counter.get_total_flops())
    return BATCH[size] * sum(counts) / len(counts)


def train(name: str, args: argparse.Namespace) -> None:
    """Trains and measures one arm, and leaves NAME.json; one that is complete is not trained again."""
    called, steps, arm = f"{name}-{args.seed}" if args.seed else name, args.steps, ARMS[name]
    file = args.out / f"{called}.json"
    if file.exists() and json.loads(file.read_text())["complete"]:
        return print(f"{called}: done already")
    flops = flops_per_step(name, args.size)
    equal = round(steps * flops_per_step("qwen2_vl", args.size) / flops)
    last = max(steps, min(equal, round(args.most * steps)))
    early = (max(1, steps // part) for part in (16, 8, 4, 2))
    stops = {*early, min(equal, last), last, *range(steps, last, steps)}
    results = {"arm": called, "flops_per_step": flops, "steps": steps, "equal_flops_steps": equal, "last": last}
    results |= {"trained": arm.lengths, "machine": machine(DEVICE), "points": []}
    model, began = build(arm, args.size, seed=args.seed).to(DEVICE), now(DEVICE)
    results["parameters"] = sum(p.numel() for p in model.parameters())
    for step, loss, average in learning(model, arm.lengths, BATCH[args.size], last, args.seed):
        if step in stops:
            if not loss.isfinite():
                raise SystemExit(f"{called}: the loss is {loss.item()} after {step} steps")
            point = {"step": step, "flops": step * flops, "loss": loss.item(), "seconds": now(DEVICE) - began}
            point["accuracy"] = accuracies(average, args.tested, args.videos)
            print(called, json.dumps(point), flush=True)
            results["points"].append(point)
            written = file.with_suffix(".part")
            written.write_text(json.dumps(results | {"complete": step == last}, indent=1) + "\n")
            os.replace(written, file)


def learning(model: nn.Module, frames: tuple[int, ...], batch: int, steps: int, seed: int) -> Iterator:
    """Trains the model; yields, after each step, its number, its loss and the model with averaged weights."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=DEVICE.type == "cuda"
    )
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / WARMUP, (WARMUP / (s + 1)) ** 0.5))
    generator, lengths = torch.Generator(DEVICE).manual_seed(1 + seed), random.Random(seed)
    model.train()
    for step in range(1, steps + 1):
        loss = loss_of(model, batch, lengths.choice(frames), generator)
        loss.backward()
        if nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():  # or all weights would be lost at once
            optimizer.step()
        rate.step()
        optimizer.zero_grad(set_to_none=True)
        average.update_parameters(model)
        yield step, loss, average.module


@torch.no_grad()
def prefill(file: Path, lengths: Sequence[int], size: str, repeats: int = 3) -> None:
    """Median seconds from pixels on the device to the first token's logits, batch 1, by model and frames.

    Frames are small: a chunk of ours has as many tokens as for the 7B, of 640x360 frames, rather than as many frames.
    """
    found = {"machine": machine(DEVICE), "seconds": {}}
    for name in ("vamba", "qwen2_vl", "video_ma2mba"):
        model = build(ARMS[name], size).to(DEVICE, torch.bfloat16).eval()
        seconds = found["seconds"][name] = {}
        for frames in lengths:
            pictures = torch.rand(1, frames, 48, 48, 3, device=DEVICE, dtype=torch.bfloat16) * 255
            inputs, times = model_inputs(model, pictures, torch.tensor([[FIRST_QUESTION]], device=DEVICE)), []
            for _ in range(repeats + 1):  # the first compiles
                start = now(DEVICE)
                if name == "qwen2_vl":
                    model(**inputs | {"use_cache": True}, logits_to_keep=1)
                else:
                    video = inputs["pixel_values_videos"], inputs["video_grid_thw"]
                    memory = model.encode_video(*video, chunk_frames=CHUNK_FRAMES)
                    model(input_ids=inputs["input_ids"][:, 1:], past_key_values=memory, logits_to_keep=1)
                times.append(now(DEVICE) - start)
            seconds[str(frames)] = sorted(times[1:])[repeats // 2]
            file.write_text(json.dumps(found, indent=1) + "\n")
        print(name, seconds, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "prefill", "report"))
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"for train: of {', '.join(ARMS)}")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the results, one JSON per arm")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--most", type=float, default=3, help="times as many steps for arms whose steps cost less")
    parser.add_argument("--seed", type=int, default=0, help="of weights and videos; others than 0 leave ARM-SEED.json")
    parser.add_argument("--size", choices=SIZES, default="standard")
    parser.add_argument("--tested", type=int, nargs="+", default=TESTED, metavar="FRAMES")
    parser.add_argument("--videos", type=int, default=128, help="asked about at each length")
    parser.add_argument("--report", type=Path, metavar="PATH", help="for report: what its files are called, no suffix")
    args = parser.parse_args()
    if unknown := set(args.arms) - set(ARMS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; choose of {', '.join(ARMS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "report":
        return write_report(args.out, args.report)
    if args.what == "prefill":
        return prefill(args.out / "prefill.json", args.tested, args.size)
    for name in args.arms:
        train(name, args)


if __name__ == "__main__":
    main()
