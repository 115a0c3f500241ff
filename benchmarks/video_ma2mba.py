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
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from vamba.bench.clock import (
    Stopwatch,
    TokenClock,
    allocated,
    default_device,
    last_to_first,
    machine,
    now,
    peak,
    release,
    reset_peak,
    seconds_of_steps,
)
from vamba.bench.models import paper_costs, random_model
from vamba.bench.report import Line, draw, read_table, table, write_table
from vamba.errors import UserError
from vamba.modeling import StateMemory, VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration
from vamba.modeling.configuration_video_ma2mba import SIZES
from vamba.modeling.media import default_chunk_frames
from vamba.modeling.multi_axis import choose_intervals, cpu_memory_budget, mamba2_costs, memory_budget
from vamba.modeling.video_model import chunked_causal_lm_loss


DEVICE = default_device()
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
LEGEND = "dashed: our model, dotted: the paper's"


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
    """Adds a row to a table on disk, so that what was measured is there whatever happens next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_table(path, [], columns)
    facts = machine(DEVICE)
    with path.open("a", newline="") as file:
        csv.DictWriter(file, columns).writerow({name: facts[name] for name in ("device", "date")} | row)
    print({name: value for name, value in row.items() if value is not None}, flush=True)


# --- training --------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Layers and tokens of a cell, the whole being one cell where nothing is checkpointed."""

    layers: int
    tokens: int


def plan(mode: str, cells: list[int] | None, costs, num_layers: int, tokens: int, args: argparse.Namespace) -> Plan:
    if mode in ("none", "layer", "sqrt"):
        return Plan({"none": num_layers, "layer": 1, "sqrt": round(math.sqrt(num_layers))}[mode], tokens)
    if cells:
        return Plan(min(cells[0], num_layers), min(cells[1], tokens))
    budget, waiting = memory_budget(DEVICE) if mode == "auto" else 0, int(cpu_budget(args, 0.7))
    offload = mode == "offload"
    return Plan(*choose_intervals(costs, num_layers, tokens, budget, offload=offload, cpu_budget=waiting))


def switch(model: VideoMa2mbaForConditionalGeneration, mode: str, cell: Plan) -> None:
    model.train()
    model.disable_multi_axis_checkpointing()
    model.gradient_checkpointing_disable()
    if mode == "layer":
        model.gradient_checkpointing_enable()
    elif mode != "none":
        model.enable_multi_axis_checkpointing(*cell, offload=mode == "offload")


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
    """Seconds of a step, and the peak of memory over weights and gradients, which stay."""
    release(DEVICE)
    before = allocated(DEVICE)
    measured = seconds_of_steps(lambda: step(model, tokens), DEVICE, limit)
    if measured["status"] != "ok":
        return measured
    seconds, over = measured["seconds"], measured["over"]
    row = {"status": "ok", "seconds": round(seconds, 3), "tokens_per_s": round(tokens / seconds)}
    row["runs"] = measured["runs"]
    return row if over is None else row | {"over_GB": over / 1e9, "total_GB": (over + before) / 1e9}


def train(args: argparse.Namespace) -> None:
    for size in args.sizes:
        model = load(size, args.residual)
        model.model.visual.requires_grad_(False)
        model.model.projector.requires_grad_(False)
        for mode, tokens in (("layer", 300), ("layer", 512), ("multi_axis", 1024)) if DEVICE.type == "cuda" else ():
            switch(model, mode, Plan(2, 256))
            step(model, tokens)  # kernels are compiled, gradients made
        for mode in args.modes:
            for cells in args.cells if mode in ("multi_axis", "offload") and args.cells else [None]:
                train_mode(model, size, mode, cells, args)
        del model
        release(DEVICE)


def train_mode(model, size: str, mode: str, cells: list[int] | None, args: argparse.Namespace) -> None:
    """Rising lengths until one does not fit or would take too long."""
    text, speed, offload = model.config.text_config, None, mode == "offload"
    wide, layers = torch.float32 if text.residual_in_fp32 else DTYPE, text.num_hidden_layers
    ours, theirs = mamba2_costs(text, DTYPE, residual_dtype=wide), paper_costs(text, DTYPE)
    for tokens in (2**exponent for exponent in range(args.exponents[0], args.exponents[-1] + 1)):
        cell = plan(mode, cells, ours, layers, tokens, args)
        waiting = ours.offloaded(layers, tokens, *cell) if offload else 0
        row = {"size": size, "residual": args.residual, "mode": mode, "tokens": tokens}
        row |= {"layer_interval": cell.layers, "sequence_interval": cell.tokens, "cpu_GB": round(waiting / 1e9, 1)}
        row |= {"ours_GB": round(ours.total(layers, tokens, *cell, offload) / 1e9, 2)}
        row |= {"paper_GB": round(theirs.total(layers, tokens, *cell, offload) / 1e9, 2)}
        expected = tokens / speed if speed else 0.0
        if expected > args.limit:
            row["status"] = f"not tried: about {expected:.0f} s"
        elif waiting > cpu_budget(args, 0.95):
            row["status"] = "not tried: more than the CPU memory"
        else:
            switch(model, mode, cell)
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
    config, clock = model.config, TokenClock(DEVICE)
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
        tables[name] = [row for path in files for row in read_table(path)]
        if tables[name]:
            write_table(stem.with_name(f"{stem.name}_{name}.csv"), tables[name], columns)
            parts.append(f"## {name.capitalize()}\n\n{table(tables[name])}")
    if not any(tables.values()):
        raise SystemExit(f"there is no training.csv or inference.csv in {', '.join(map(str, args.folders))}")
    if tables["training"]:
        try:
            plot = draw(stem.with_suffix(".png"), panels(tables["training"]), "tokens", title=LEGEND)
        except UserError as error:
            raise SystemExit(f"{error}; then run the report again, the tables are written") from error
        parts.append(
            f"![memory]({plot.name})\n\nThe paper's 2.7b trains {PAPER_TOKENS_PER_S:,} tokens/s on an A100 "
            "(312 TFLOP/s in bf16, to the H200's 989)."
        )
    stem.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    print(stem.with_suffix(".md"))


def panels(rows: list[dict]) -> list[tuple[str, list[Line]]]:
    """Memory against tokens for each size: measured, ours, the paper's model.

    Of several cells for one length the leanest that were measured are drawn.
    """
    found = []
    for size in dict.fromkeys(row["size"] for row in rows):
        curves, lines = {}, []
        for row in sorted(rows, key=lambda row: (row["tokens"], bool(row["over_GB"]), -row["ours_GB"])):
            if row["size"] == size:
                curves.setdefault(f"{row['mode']}, {row['residual']}", {})[row["tokens"]] = row
        for number, (way, by_tokens) in enumerate(curves.items()):
            for label, column, style in ((way, "over_GB", "o-"), (None, "ours_GB", "--"), (None, "paper_GB", ":")):
                points = [(tokens, row[column]) for tokens, row in by_tokens.items() if row[column] is not None]
                lines.append(Line(label, points, f"C{number % 10}", style))
        if known := PAPER_MEASURED.get(size):
            points = [(2 ** (10 + number), value) for number, value in enumerate(known)]
            lines.append(Line("the paper's, A100", points, "k", "x"))
        found.append((f"{size}: GB over weights and gradients", lines))
    return found


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
    main()
