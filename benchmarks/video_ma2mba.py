"""Video-Ma2mba: memory and time of training against the length of the stream, and hours of video in constant memory.

    python benchmarks/video_ma2mba.py training --sizes 2.7b --modes layer multi_axis --exponents 10 20 --out DIR
    python benchmarks/video_ma2mba.py inference --sizes 2.7b --hours 4 --out DIR
    python benchmarks/video_ma2mba.py report DIR... --out DIR

Training is forward and backward of the language model without optimizer, bf16, random weights: random embeddings with
gradients, as the projector sends them, and a loss on the last 128 tokens. GB (10^9 bytes) are the peak over weights and
their gradients, beside what this package's memory model and the paper's (arXiv 2411.19460, equation 12) say. Rows are
written to DIR as they are measured; out of memory is recorded, and the run goes on. Cells of "multi_axis" and "offload"
take near the least memory, those of "auto" are what training chooses, `--cells 4 32768 --cells 8 16384` gives others.
"""

import argparse
import csv
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vamba.bench.measure import Clock, Stopwatch, allocated, last_to_first, now, peak, release, reset_peak
from vamba.bench.models import random_model
from vamba.modeling import StateMemory, VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration
from vamba.modeling.configuration_video_ma2mba import SIZES
from vamba.modeling.media import default_chunk_frames
from vamba.modeling.multi_axis import (
    MemoryCosts,
    choose_intervals,
    cpu_memory_budget,
    mamba2_costs,
    memory_budget,
    paper_costs,
)
from vamba.modeling.video_model import chunked_causal_lm_loss


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16
TEXT = 128  # tokens of text at the end of a stream
MODES = ("none", "layer", "sqrt", "multi_axis", "auto", "offload")
TRAINING = (
    "size", "residual", "mode", "tokens", "layer_interval", "sequence_interval", "status", "seconds", "tokens_per_s",
    "over_GB", "total_GB", "ours_GB", "paper_GB", "cpu_GB", "runs", "device", "date",
)  # fmt: skip
INFERENCE = (
    "size", "frames", "tokens", "chunk_frames", "seconds", "us_per_token", "first_tenth_us", "last_tenth_us",
    "last_to_first", "over_weights_GB", "state_MB", "decode_tokens_per_s", "decode_plain_tokens_per_s", "device",
    "date",
)  # fmt: skip
# Table 3 of the paper: GB of multi-axis checkpointing on an A100 at 2^10, 2^11, ... tokens.
PAPER_MEASURED = {
    "370m": [0.3, 0.5, 0.6, 1.1, 1.6, 2.4, 3.8, 5.5, 8.8, 15.4, 23.1, 40.2],
    "1.3b": [0.5, 0.9, 1.2, 2.1, 3.7, 4.8, 7.4, 11.3, 17.7, 30.8, 45.8],
    "2.7b": [0.7, 1.1, 1.8, 2.7, 4.2, 6.9, 10.5, 17.2, 25.9, 42.2],
}
PAPER_TOKENS_PER_S = 7914  # 2.7b on an A100


def config_of(size: str, residual: str = "float32") -> VideoMa2mbaConfig:
    """A published size, or "tiny" to try the script."""
    if size != "tiny":
        config = VideoMa2mbaConfig.of_size(size)
    else:
        text = {"vocab_size": 50288, "hidden_size": 64, "num_hidden_layers": 4, "state_size": 16, "head_dim": 16}
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = VideoMa2mbaConfig(text_config=text, vision_config=vision | {"image_size": 32, "patch_size": 8})
    config.text_config.residual_in_fp32 = residual == "float32"
    config.text_config.eos_token_id = None
    return config


def load(size: str, residual: str = "float32") -> VideoMa2mbaForConditionalGeneration:
    return random_model(VideoMa2mbaForConditionalGeneration, config_of(size, residual), DEVICE, DTYPE)


def append(path: Path, columns: tuple[str, ...], row: dict) -> None:
    name = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "CPU"
    row = {"device": name, "date": time.strftime("%Y-%m-%d")} | row
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if fresh:
            writer.writeheader()
        writer.writerow(row)
    print({name: value for name, value in row.items() if value is not None}, flush=True)


# --- training --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Plan:
    """Layers and tokens of a cell, the whole being one cell where nothing is checkpointed."""

    layers: int
    tokens: int
    offload: bool = False

    @classmethod
    def of(
        cls,
        mode: str,
        cells: list[int] | None,
        costs: MemoryCosts,
        num_layers: int,
        tokens: int,
        args: argparse.Namespace,
    ) -> "Plan":
        if mode in ("none", "layer", "sqrt"):
            layers = {"none": num_layers, "layer": 1, "sqrt": round(math.sqrt(num_layers))}[mode]
            return cls(layers, tokens)
        offload = mode == "offload"
        if cells:
            return cls(min(cells[0], num_layers), min(cells[1], tokens), offload)
        budget, waiting = memory_budget(DEVICE) if mode == "auto" else 0, int(cpu_budget(args, 0.7))
        return cls(*choose_intervals(costs, num_layers, tokens, budget, offload=offload, cpu_budget=waiting), offload)

    def switch(self, model: VideoMa2mbaForConditionalGeneration, mode: str) -> None:
        model.train()
        model.disable_multi_axis_checkpointing()
        model.gradient_checkpointing_disable()
        if mode == "layer":
            model.gradient_checkpointing_enable()
        elif mode != "none":
            model.enable_multi_axis_checkpointing(self.layers, self.tokens, offload=self.offload)


def cpu_budget(args: argparse.Namespace, share: float) -> float:
    """Bytes of CPU memory for what is offloaded."""
    return min(cpu_memory_budget(share) or math.inf, 1e9 * args.cpu_gb)


def step(model: VideoMa2mbaForConditionalGeneration, tokens: int) -> None:
    """Forward and backward of one stream."""
    text = min(TEXT, tokens)
    embeds_1SD = torch.randn(1, tokens, model.config.text_config.hidden_size, dtype=DTYPE, device=DEVICE)
    read_at = torch.zeros(text, dtype=torch.long, device=DEVICE), torch.arange(tokens - text, tokens, device=DEVICE)
    memory, vocabulary = StateMemory(model.config), model.config.text_config.vocab_size
    output = model.model.language_model(
        inputs_embeds=embeds_1SD.requires_grad_(), past_key_values=memory, read_at=read_at
    )
    labels_1N = torch.randint(vocabulary, (1, text), device=DEVICE)
    chunked_causal_lm_loss(model.lm_head, output.last_hidden_state[None], labels_1N, vocabulary).backward()


def measure_step(model, tokens: int, limit: float) -> dict:
    """Median seconds of up to three steps, and the peak of memory over weights and gradients, which stay.

    The first one is left out, but where it takes a quarter of the time: then it is the only one.
    """

    def timed() -> float:
        start = now(DEVICE)
        step(model, tokens)
        return now(DEVICE) - start

    release(DEVICE)
    before = allocated(DEVICE)
    reset_peak(DEVICE)
    try:
        times = [timed()]
        while times[0] < limit / 4 and len(times) < 4 and sum(times) + times[-1] < limit:
            times.append(timed())
    except RuntimeError as error:  # of the GPU's memory, or of what can be pinned of the CPU's
        if "out of memory" not in str(error).lower():
            raise
        return {"status": "out of memory"}
    times = times[1:] or times
    seconds, over = statistics.median(times), peak(DEVICE, before)
    row = {"status": "ok", "seconds": round(seconds, 3), "tokens_per_s": round(tokens / seconds), "runs": len(times)}
    return row if over is None else row | {"over_GB": over / 1e9, "total_GB": (over + before) / 1e9}


def train(args: argparse.Namespace) -> None:
    for size in args.sizes:
        model = load(size, args.residual)
        model.model.visual.requires_grad_(False)
        model.model.projector.requires_grad_(False)
        for mode, tokens in (("layer", 300), ("layer", 512), ("multi_axis", 1024)):
            Plan(2, 256).switch(model, mode)
            step(model, tokens)  # kernels are compiled, gradients made
        for mode in args.modes:
            for cells in args.cells if mode in ("multi_axis", "offload") and args.cells else [None]:
                train_mode(model, size, mode, cells, args)
        del model
        release(DEVICE)


def train_mode(model, size: str, mode: str, cells: list[int] | None, args: argparse.Namespace) -> None:
    """Rising lengths until one does not fit or would take too long."""
    text = model.config.text_config
    wide = torch.float32 if text.residual_in_fp32 else DTYPE
    ours, theirs = mamba2_costs(text, DTYPE, residual_dtype=wide), paper_costs(text, DTYPE)
    speed = None
    for exponent in range(args.exponents[0], args.exponents[-1] + 1):
        tokens, layers = 2**exponent, text.num_hidden_layers
        plan = Plan.of(mode, cells, ours, layers, tokens, args)
        taken = (plan.layers, plan.tokens)
        waiting = ours.offloaded(layers, tokens, *taken) if plan.offload else 0
        row = {"size": size, "residual": args.residual, "mode": mode, "tokens": tokens}
        row |= {"layer_interval": plan.layers, "sequence_interval": plan.tokens, "cpu_GB": round(waiting / 1e9, 1)}
        row |= {"ours_GB": round(ours.total(layers, tokens, *taken, plan.offload) / 1e9, 2)}
        row |= {"paper_GB": round(theirs.total(layers, tokens, *taken, plan.offload) / 1e9, 2)}
        expected = tokens / speed if speed else 0.0
        if expected > args.limit:
            row["status"] = f"not tried: about {expected:.0f} s"
        elif waiting > cpu_budget(args, 0.95):
            row["status"] = "not tried: more than the CPU memory"
        else:
            plan.switch(model, mode)
            row |= measure_step(model, tokens, args.limit)
            release(DEVICE)
        append(args.out / "training.csv", TRAINING, row)
        if row["status"] != "ok":
            break
        speed = row["tokens_per_s"]


# --- inference -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def infer(args: argparse.Namespace) -> None:
    """Watches a minute and asks, then all the rest and asks again."""
    for size in args.sizes:
        model = load(size)
        weights, grid = allocated(DEVICE), model.config.grid_size
        chunk = args.chunk_frames or default_chunk_frames(model, grid * grid)
        watch(model, 2 * chunk, chunk, None, lambda: None)  # kernels are compiled
        decode(model, watch(model, 1, 1, None, lambda: None), 4)
        memory, seen, spent = None, 0, 0.0
        for frames in (60, round(3600 * args.hours)):
            release(DEVICE)
            reset_peak(DEVICE)
            clock, start = Stopwatch(DEVICE), now(DEVICE)
            clock.mark()
            memory = watch(model, frames - seen, chunk, memory, clock.mark)
            spent += now(DEVICE) - start
            times, tokens = clock.seconds(), model.config.tokens_per_frame
            tenth, over, seen = len(times) // 10, peak(DEVICE, weights), frames
            row = {"size": size, "frames": frames, "tokens": frames * tokens, "chunk_frames": chunk}
            row |= {"seconds": round(spent, 2), "us_per_token": 1e6 * spent / (frames * tokens)}
            row |= {"over_weights_GB": None if over is None else over / 1e9, "state_MB": memory.video_nbytes / 1e6}
            if tenth:  # the ends are irregular
                first, last = sum(times[1 : tenth + 1]), sum(times[-tenth - 1 : -1])
                per_token = 1e6 / (tenth * chunk * tokens)
                row |= {"first_tenth_us": first * per_token, "last_tenth_us": last * per_token}
                row["last_to_first"] = last_to_first(times)
            row["decode_tokens_per_s"] = decode(model, memory, args.new_tokens)
            row["decode_plain_tokens_per_s"] = decode(model, memory, args.new_tokens, disable_compile=True)
            append(args.out / "inference.csv", INFERENCE, row)
        del model, memory
        release(DEVICE)


def watch(model, frames: int, chunk: int, memory: StateMemory | None, mark: Callable[[], None]) -> StateMemory:
    """Random frames, made on the device a chunk at a time; `mark` is called after each."""
    grid, patch_size = model.config.grid_size, 3 * model.config.vision_config.patch_size**2
    for start in range(0, frames, chunk):
        t = min(chunk, frames - start)
        pixels = torch.randint(0, 256, (t * grid * grid, patch_size), dtype=torch.uint8, device=DEVICE)
        shape = torch.tensor([[t, grid, grid]])
        memory = model.encode_video(pixels, shape, memory=memory, continue_video=memory is not None, chunk_frames=chunk)
        mark()
    return memory


def decode(model, memory: StateMemory, new_tokens: int, **options) -> float:
    """Tokens per second of an answer, its first two not counted."""
    config, clock = model.config, Clock(DEVICE)
    ids = torch.randint(1000, 2000, (1, 34))
    ids[0, :2] = torch.tensor([config.vision_start_token_id, config.vision_end_token_id])
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
    model.generate(
        ids.to(DEVICE), past_key_values=memory.fork(), stopping_criteria=[clock], pad_token_id=0, **length, **options
    )
    clock.times = clock.times[2:]
    return 1e3 / clock.milliseconds_per_token()


# --- report ----------------------------------------------------------------------------------------------------------


def report(args: argparse.Namespace) -> None:
    """Joins the tables of several runs (fresh machines) into one dated report, with the paper's figure redrawn."""
    stem = args.out / f"{time.strftime('%Y-%m-%d')}_video_ma2mba"
    args.out.mkdir(parents=True, exist_ok=True)
    parts, tables = ["# Video-Ma2mba: training and inference against the length of the stream", __doc__.strip()], {}
    for name, columns in (("training", TRAINING), ("inference", INFERENCE)):
        files = [path for folder in args.folders if (path := folder / f"{name}.csv").exists()]
        tables[name] = [row for path in files for row in csv.DictReader(path.open(newline=""))]
        if tables[name]:
            with stem.with_name(f"{stem.name}_{name}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(tables[name])
            parts.append(f"## {name.capitalize()}\n\n{markdown(tables[name], columns)}")
    if not any(tables.values()):
        raise SystemExit(f"there is no training.csv or inference.csv in {', '.join(map(str, args.folders))}")
    if tables["training"]:
        draw(tables["training"], stem.with_suffix(".png"))
        parts.append(
            f"![memory]({stem.name}.png)\n\nThe paper's 2.7b trains {PAPER_TOKENS_PER_S:,} tokens/s on an A100 "
            "(312 TFLOP/s in bf16, to the H200's 989)."
        )
    stem.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    print(stem.with_suffix(".md"))


def markdown(rows: list[dict], columns: tuple[str, ...]) -> str:
    """A table of the columns that say something, numbers rounded."""

    def short(text: str) -> str:
        try:
            value = float(text)
        except ValueError:
            return text
        return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"

    shown = [column for column in columns if any(row[column] for row in rows)]
    lines = [shown, ["---"] * len(shown), *([short(row[column]) for column in shown] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(rows: list[dict], path: Path) -> None:
    """Memory against tokens for each size: measured (points), ours (dashed), the paper's model (dotted).

    Of several cells for one length the leanest that were measured are drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit(
            "the figure needs matplotlib: pip install matplotlib, then run the report again; the tables are written"
        ) from error
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure = Figure(figsize=(6 * len(sizes), 5), layout="constrained")
    for plot, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes):
        curves = {}
        for row in sorted(rows, key=lambda row: (int(row["tokens"]), bool(row["over_GB"]), -float(row["ours_GB"]))):
            if row["size"] == size:
                curves.setdefault((row["mode"], row["residual"]), {})[int(row["tokens"])] = row
        for number, ((mode, residual), by_tokens) in enumerate(curves.items()):
            color, tokens, curve = f"C{number % 10}", list(by_tokens), by_tokens.values()
            measured = [(int(row["tokens"]), float(row["over_GB"])) for row in curve if row["over_GB"]]
            label = f"{mode}, {residual}"
            plot.plot(*zip(*measured), "o-", color=color, label=label) if measured else plot.plot([], label=label)
            plot.plot(tokens, [float(row["ours_GB"]) for row in curve], "--", color=color, linewidth=0.8)
            plot.plot(tokens, [float(row["paper_GB"]) for row in curve], ":", color=color, linewidth=0.8)
        if known := PAPER_MEASURED.get(size):
            plot.plot([2**n for n in range(10, 10 + len(known))], known, "kx", label="the paper's, A100")
        plot.set(xscale="log", yscale="log", title=size, xlabel="tokens", ylabel="GB over weights and gradients")
        plot.set_xscale("log", base=2)
        plot.legend(title="dashed: our model, dotted: the paper's")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("training")
    training.add_argument("--modes", nargs="+", choices=MODES, default=["layer", "multi_axis"])
    training.add_argument("--exponents", type=int, nargs="+", default=[10, 20], help="first and last power of two")
    training.add_argument("--residual", choices=("float32", "bfloat16"), default="float32")
    training.add_argument(
        "--cells", type=int, nargs=2, action="append", help="layers and tokens of a cell of multi_axis and offload"
    )
    training.add_argument("--cpu-gb", type=float, default=110, help="GB that offloading may take of the CPU's memory")
    training.add_argument("--limit", type=float, default=60, help="seconds for one length; default: 60")
    training.set_defaults(run=train)
    inference = commands.add_parser("inference")
    inference.add_argument("--hours", type=float, default=4.0)
    inference.add_argument("--chunk-frames", type=int, help="default: what `default_chunk_frames` says")
    inference.add_argument("--new-tokens", type=int, default=128)
    inference.set_defaults(run=infer)
    for command in (training, inference):
        command.add_argument("--sizes", nargs="+", choices=(*SIZES, "tiny"), default=["2.7b"])
    joined = commands.add_parser("report")
    joined.add_argument("folders", type=Path, nargs="+")
    joined.set_defaults(run=report)
    for command in (training, inference, joined):
        command.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
