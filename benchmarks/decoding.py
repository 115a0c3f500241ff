"""Decoding from a video memory on one GPU: every kind of memory and every path of `generate`, beside the floor.

    python benchmarks/decoding.py [--frames 1024 3600] [--questions 8] [--model CHECKPOINT] [--trained runs/demo]
                                  [--compile] [--out decoding.json]

Milliseconds a token, from the difference between long and short answers; the video memory is filled with random
numbers. Without `--model`, the 7B's sizes with random weights. The floor is the bytes of the weights that decoding
reads plus those of the memory, at the measured copy rate. `--trained` names a trained checkpoint (`vamba demo` leaves
one) for the error of fp8: the KL divergence of the next-token distributions from those over an exact memory.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import CompileConfig

from vamba.bench import GIB
from vamba.bench.clock import allocated, default_device, machine, measure_rates, now, peak, reset_peak
from vamba.bench.models import decode_bytes, load_ours
from vamba.chat import load_chat
from vamba.demo.videos import QUESTIONS
from vamba.modeling import VideoMemory
from vamba.modeling.kernels_attention import split_key_attention
from vamba.modeling.video_memory import FP8, VideoLevel


DEVICE = default_device()
PROMPT, SHORT, LONG = 128, 8, 72
TOKENS_PER_FRAME = 149.5  # 640x360


def random_memory(model, tokens: int) -> VideoMemory:
    memory, text = VideoMemory(model.config), model.config.text_config
    shape = 1, text.num_key_value_heads, tokens, text.hidden_size // text.num_attention_heads
    for layer in range(text.num_hidden_layers):
        memory.append(layer, *(torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2)))
    memory.append_mask(tokens)
    memory.media = [[["video", 1, 2, 2]]]
    return memory


def answer(model, memory, rows: int, tokens: int, static: bool, **options) -> float:
    """Seconds of an answer."""
    ids = torch.randint(1000, 2000, (rows, PROMPT), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    fork = memory.fork(max_cache_len=PROMPT + LONG) if static else memory.fork()
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    start = now(DEVICE)
    model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=fork, **length, **options)
    return now(DEVICE) - start


def rate(model, memory, rows: int = 1, static: bool = True, **options) -> dict:
    """Milliseconds a token, and seconds of the first tokens (prompt and recording of the graph included)."""
    answer(model, memory, rows, SHORT, static, **options)
    short, long = (
        statistics.median(answer(model, memory, rows, tokens, static, **options) for _ in range(3))
        for tokens in (SHORT, LONG)
    )
    ms = (long - short) / (LONG - SHORT) * 1e3
    return {"ms_per_token": round(ms, 2), f"first_{SHORT}_tokens_s": round(short, 3)}


def measure(model, frames: int, args, bytes_per_second: float) -> list[dict]:
    memory, rows = random_memory(model, int(frames * TOKENS_PER_FRAME)), []

    def row(name, **options):
        reset_peak(DEVICE)
        before = allocated(DEVICE)
        row = {"frames": frames, "memory": name, "memory_GiB": round(memory.video_nbytes / GIB, 2)}
        row |= rate(model, memory, **options)
        floor = decode_bytes(model, memory.video_nbytes) / bytes_per_second * 1e3
        rows.append(row | {"floor_ms": round(floor, 2), "peak_GiB_beside": round(peak(DEVICE, before) / GIB, 2)})
        print(rows[-1], flush=True)

    row("bf16, CUDA graph")
    row("bf16, growing cache", static=False)
    if args.compile:
        row("bf16, torch.compile", compile_config=CompileConfig())
    row(f"bf16, CUDA graph, {args.questions} questions in one batch", rows=args.questions)
    if frames == min(args.frames):
        memory.to("cpu")
        row("bf16 on the CPU")
        memory.to("cuda")
    memory.to(dtype=FP8)
    row("fp8, CUDA graph")
    if frames == min(args.frames):
        memory.to("cpu")
        row("fp8 on the CPU")
    return rows


def attention_kernels(frames: list[int], rates: dict) -> list[dict]:
    """One layer's cross-attention at the 7B's sizes: torch's, ours, ours over fp8."""
    rows = []
    for M in (int(f * TOKENS_PER_FRAME) for f in frames):
        keys, values = (torch.randn(1, 4, M, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for N in (1, 8, 128):
            rows.append(attention_row(VideoLevel(keys, values), N, rates))
            print(rows[-1], flush=True)
    return rows


def attention_row(level: VideoLevel, N: int, rates: dict) -> dict:
    from triton.testing import do_bench

    (keys, values, *_), fp8, M, scale = level, level.stored_as(FP8), level.keys_BHMP.shape[2], 128**-0.5
    queries = torch.randn(1, 28, N, 128, device="cuda", dtype=torch.bfloat16)
    calls = {
        "sdpa_ms": lambda: F.scaled_dot_product_attention(queries, keys, values, enable_gqa=True),
        "split_ms": lambda: split_key_attention(queries, keys, values, scale),
        "split_fp8_ms": lambda: split_key_attention(queries, *fp8[:2], scale, None, *fp8[2:]),
    }
    row = {"keys": M, "queries": N}
    row |= {name: round(do_bench(call, return_mode="median"), 4) for name, call in calls.items()}
    reference = calls["sdpa_ms"]().transpose(1, 2).float()
    error = (calls["split_ms"]().float() - reference).norm() / reference.norm()
    if not error < 1e-2:
        sys.exit(f"split-key attention is wrong by {error:.1e} at {M} keys and {N} queries")
    read = (keys.nbytes + values.nbytes) / rates["copied_bytes_per_s"]
    return row | {"floor_ms": round(1e3 * max(read, 4 * 28 * N * M * 128 / rates["matrix_per_s"]), 4)}


@torch.no_grad()
def fp8_error(folder: str) -> dict:
    """KL(bf16 memory || fp8 memory) of the next token, over the demo's held-out videos and questions."""
    chat = load_chat(folder)
    divergences, agree = [], []
    for video, question in itertools.product(sorted(Path(folder, "videos").glob("*.mp4")), QUESTIONS.values()):
        chat.watch(str(video), progress=False)
        inputs = chat._prompt(question)
        logits = []
        for dtype in (None, FP8):
            memory = chat.memory.fork()
            logits.append(chat.model(**inputs, past_key_values=memory.to(dtype=dtype)).logits[0].float())
        exact, rounded = (x.log_softmax(-1) for x in logits)
        divergences.append(F.kl_div(rounded, exact, log_target=True, reduction="none").sum(-1).tolist())
        agree.append((exact[-1].argmax() == rounded[-1].argmax()).item())
    return {
        "questions": len(agree),
        "KL_mean": statistics.mean(row[-1] for row in divergences),
        "KL_max": max(row[-1] for row in divergences),
        "same_answer": statistics.mean(agree),
        "KL_mean_within_the_prompt": statistics.mean(itertools.chain(*(row[:-1] for row in divergences))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[1024, 3600])
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--model", default="7b")
    parser.add_argument("--trained", help="folder of a trained checkpoint, for the error of fp8")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too; it takes a minute to compile")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    summary = machine(DEVICE)
    if args.trained:
        summary["fp8_error"] = fp8_error(args.trained)
        print(summary["fp8_error"], flush=True)
    if DEVICE.type == "cuda":
        rates = measure_rates(DEVICE, torch.bfloat16)
        summary |= {"copy_TB_s": round(rates["copied_bytes_per_s"] / 1e12, 2)}
        summary["attention"] = attention_kernels(args.frames, rates)
        model, speed = load_ours(args.model, DEVICE), rates["copied_bytes_per_s"]
        summary["decoding"] = [row for frames in args.frames for row in measure(model, frames, args, speed)]
    if args.out:
        args.out.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
