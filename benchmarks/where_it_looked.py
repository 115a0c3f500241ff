"""Where the model looks: how often the peak falls on the event that is asked about, and what it takes to find out.

    python benchmarks/where_it_looked.py events [--model runs/demo] [--videos 64] [--seeds 101 777] [--out FILE.md]
    python benchmarks/where_it_looked.py cost [--device cuda] [--tokens 400000 1600000] [--layers 4] [--out FILE.md]

"events" tells new stories of the demo, writes them as videos, asks all questions, and counts for each reduction over
layers and heads the answers whose curve peaks within the event (the first flash; the visit of the shape), right or
wrong. The first seed is one of those on which the default was chosen; the second had not been looked at. "cost" fills a
memory of a Vamba with the 7B's sizes and `--layers` layers at random, generates 64 tokens, and finds out where they
looked: seconds and memory beside.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vamba.attention_map import attention_map
from vamba.bench.clock import default_device, machine, now
from vamba.bench.models import SEVEN_BILLION, random_model
from vamba.bench.report import table
from vamba.chat import load_chat
from vamba.demo.evaluation import MAX_NEW_TOKENS, looked_at_event
from vamba.demo.pipeline import LONGER, TRAIN_FRAMES
from vamba.demo.videos import QUESTIONS, render, stories, write_video
from vamba.modeling import VambaConfig, VambaForConditionalGeneration, VideoMemory


PER_FRAME = 299  # video tokens of a pair of frames of 640 x 360 pixels
NEW_TOKENS = 64


def reductions(layers: int) -> dict[str, dict]:
    """By name, what `VideoChat.where` is told; the first is its default."""
    found: dict[str, dict] = {"contribution, all layers": {}, "weights, all layers": {"by": "weights"}}
    for by in ("contribution", "weights"):
        found[f"{by}, largest head, all layers"] = {"by": by, "heads": "max"}
        found |= {f"{by}, layer {layer}": {"by": by, "layers": [layer]} for layer in range(layers)}
    return found


def measure_events(model: str, videos: int, seed: int, frames: tuple[int, ...]) -> list[dict]:
    chat = load_chat(model, device="cpu")
    ways = reductions(chat.model.config.text_config.num_hidden_layers)
    hits: dict[str, list[tuple[str, bool, bool]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        for index, story in enumerate(stories(videos, seed, frames)):
            chat.watch(write_video(Path(folder) / f"{index}.mp4", render(story)), progress=False)
            for kind, question in QUESTIONS.items():
                chat.ask([{"role": "user", "content": question}], max_new_tokens=MAX_NEW_TOKENS)
                for name, options in ways.items():
                    where = chat.where(**options)
                    hits[name].append((kind, *(looked_at_event(where, story, kind, near) for near in (0, 1))))
    return [_row(name, of_way) for name, of_way in hits.items()]


def _row(name: str, hits: list[tuple[str, bool, bool]]) -> dict:
    row: dict = {"reduction": name}
    for kind, question in QUESTIONS.items():
        row[question] = _share([hit for of, hit, _ in hits if of == kind])
    return row | {"all": _share([hit for _, hit, _ in hits]), "all, one patch beside": _share([n for *_, n in hits])}


def _share(hits: list[bool]) -> str:
    return f"{sum(hits) / len(hits):.3f}"


def random_memory(config: VambaConfig, tokens: int, device: torch.device) -> VideoMemory:
    """A memory of one video with random keys and values."""
    text = config.text_config
    memory, patches = VideoMemory(config), tokens // PER_FRAME
    shape = 1, text.num_key_value_heads, patches * PER_FRAME, text.hidden_size // text.num_attention_heads
    memory.append_mask(patches * PER_FRAME)
    for layer in range(text.num_hidden_layers):
        memory.append(layer, *(torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2)))
    return memory


def measure_cost(tokens: int, layers: int, device: torch.device) -> dict:
    sizes = SEVEN_BILLION | {"text_config": SEVEN_BILLION["text_config"] | {"num_hidden_layers": layers}}
    sizes["vision_config"] = SEVEN_BILLION["vision_config"] | {"depth": 1}
    model = random_model(VambaForConditionalGeneration, VambaConfig(**sizes), device, torch.bfloat16)
    memory = random_memory(model.config, tokens, device)
    patches = torch.arange(tokens // PER_FRAME).repeat_interleave(PER_FRAME)
    prompt = torch.randint(0, 1000, (1, 32), device=device)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    text = {"max_cache_len": 128} if device.type == "cuda" else {}

    def answer() -> torch.Tensor:
        return model.generate(prompt, past_key_values=memory.fork(**text), **options)[:, prompt.shape[1] :]

    ids = answer()  # compiles kernels

    def look() -> tuple:
        return attention_map(model, memory.fork(), prompt, ids, patches)

    look()
    row: dict = {"video tokens": memory.video_length, "video memory (GiB)": memory.video_nbytes / 2**30}
    for name, function in {f"{NEW_TOKENS} tokens": answer, "where": look}.items():
        row[f"{name} (s)"], row[f"{name}, beside it (GiB)"] = _measured(function, device)
    return row


def _measured(function: Callable, device: torch.device) -> tuple[float, float | None]:
    """Seconds, and GiB at the peak beyond what is held before; those of a GPU only."""
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    held, start = torch.cuda.memory_allocated(device) if is_cuda else 0, now(device)
    function()
    seconds = now(device) - start
    return seconds, (torch.cuda.max_memory_allocated(device) - held) / 2**30 if is_cuda else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("events", "cost"))
    parser.add_argument("--model", default="runs/demo")
    parser.add_argument("--videos", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 777])
    parser.add_argument("--tokens", type=int, nargs="+", default=[400_000, 1_600_000])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--out", type=Path, help="write a report (Markdown) here")
    args = parser.parse_args()
    device = torch.device("cpu") if args.part == "events" else args.device
    start, text = time.perf_counter(), "# Where the model looks\n\n"
    text += "\n".join(f"- {name}: {value}" for name, value in machine(device).items()) + "\n"
    if args.part == "events":
        longer = (LONGER * max(TRAIN_FRAMES),)
        for seed, frames in [*((seed, TRAIN_FRAMES) for seed in args.seeds), (args.seeds[-1], longer)]:
            told = "chosen on" if seed == args.seeds[0] else "reported on"
            text += f"\n## {args.videos} videos of {', '.join(map(str, frames))} frames, seed {seed} ({told})\n\n"
            text += table(measure_events(args.model, args.videos, seed, frames)) + "\n"
    else:
        text += f"\n{table([measure_cost(tokens, args.layers, device) for tokens in args.tokens])}\n"
    text += f"\nMeasured in {time.perf_counter() - start:.0f} s.\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
