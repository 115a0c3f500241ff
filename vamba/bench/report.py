"""Tables, plots and reports, of `vamba bench` and of the scripts in benchmarks/.

What is unusual: plots are drawn from the written table, so that it may be done on any machine.
"""

import csv
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from vamba.errors import UserError, opening

from . import GIB


# column of the plots -> (name of the file, label, unit's factor, column of the floor, what that is)
_PLOTS = {
    "prefill_s": ("prefill", "prefill, s", 1, "prefill_floor_s", "floor"),
    "decode_ms": ("decode", "decoding, ms per token", 1, "decode_floor_ms", "floor"),
    "peak_over_weights_bytes": (
        "memory", "peak over weights, GiB", 1 / GIB, "video_memory_bytes", "keys and values"
    ),
}  # fmt: skip
_LENGTHS = {
    "model": "model",
    "frames": "frames",
    "video_tokens": "video tokens",
    "prefill_s": "prefill s",
    "prefill_floor_s": "floor s",
    "encode_s": "of it video s",
    "prompt_s": "prompt s",
    "frames_per_s": "frames/s",
    "decode_ms": "decode ms/token",
    "decode_floor_ms": "floor ms",
    "tokens_per_s": "tokens/s",
    "peak_over_weights_bytes": "peak over weights GiB",
    "video_memory_bytes": "of it memory GiB",
    "last_to_first": "last/first tenth",
    "runs": "runs",
    "status": "status",
}
_SECTIONS = {
    "parts": "Parts, one chunk and one prompt",
    "kernels": "Kernels of one Mamba-2 block, one chunk",
    "videos": "Reading video",
}


class Line(NamedTuple):
    """What `draw` draws: (x, y) points in matplotlib's style, e.g. "o-"."""

    label: str | None
    points: Sequence[tuple[float, float]]
    color: str
    style: str = "o-"


def draw(path: Path, panels: Iterable[tuple[str, list[Line]]], label: str, ticks: Sequence[int] = (), **legend) -> Path:
    """Writes a PNG of panels side by side, each a label of what it shows and its lines, on logarithmic axes.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"{path.name} was not drawn: plots need matplotlib (pip install matplotlib)") from error
    panels = list(panels)
    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    for axes, (shown, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for line in lines:
            axes.plot(*(zip(*line.points) if line.points else ((), ())), line.style, color=line.color, label=line.label)
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel=shown)
        if ticks:
            axes.set_xticks(ticks, ticks, rotation=45 if len(ticks) > 8 else 0)
            axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small", **legend)
    figure.savefig(path, dpi=120)
    return path


def table(rows: list[dict], columns: dict[str, str] | None = None) -> str:
    """Markdown of the columns, name to title, that any row has something in; of all columns for None."""
    columns = columns or {name: name for row in rows for name in row}
    columns = {name: title for name, title in columns.items() if any(row.get(name) is not None for row in rows)}
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(name)) for name in columns) + " |")
    return "\n".join(lines)


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= 80 else text[:77] + "…"


def read_table(path: Path) -> list[dict]:
    """The rows of a CSV file: numbers where they are some, None where there is nothing."""
    with opening(path), path.open(newline="", encoding="utf-8") as file:
        return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str | None) -> int | float | str | None:
    for kind in (int, float):
        with suppress(TypeError, ValueError):
            return kind(text)
    return text or None


def write_table(path: Path, rows: list[dict], columns: Iterable[str] | None = None) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns or dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write(results: dict, folder: str | os.PathLike) -> list[Path]:
    """Writes the tables as CSV, the report, and the plots where matplotlib is installed; returns the paths."""
    folder = Path(folder)
    with opening(folder):
        folder.mkdir(parents=True, exist_ok=True)
    stem = f"{results['machine']['date']}_video_length"
    paths = [write_table(folder / f"{stem}.csv", results["lengths"])]
    paths += [write_table(folder / f"{stem}_{name}.csv", results[name]) for name in _SECTIONS]
    try:
        plots = plot(paths[0])
    except UserError as error:
        plots = []
        print(f"{error}, then vamba bench --plot {paths[0]}")
    report = folder / f"{stem}.md"
    text = markdown(results) + "".join(f"\n![{path.stem}]({path.name})\n" for path in plots)
    report.write_text(text, encoding="utf-8")
    return [*paths, *plots, report]


def plot(table: str | os.PathLike) -> list[Path]:
    """Draws prefill, decoding and memory against the number of frames, floors dashed, beside the table.

    Raises:
        UserError: matplotlib is not installed, or `table` is no table of lengths.
    """
    table = Path(table)
    rows = read_table(table)
    if not rows or not {"model", "frames", "prefill_s"} <= rows[0].keys():
        raise UserError(f"{table} is no table of lengths, as vamba bench --out writes it.")
    models = dict(zip(dict.fromkeys(row["model"] for row in rows), ("tab:blue", "tab:orange")))
    paths = []
    for column, (name, label, unit, floor, meaning) in _PLOTS.items():
        if not any(row.get(column) for row in rows):  # the memory, on a CPU
            continue
        lines = [
            Line(of, [(r["frames"], unit * r[shown]) for r in rows if r["model"] == model and r[shown]], color, style)
            for model, color in models.items()
            for shown, style, of in ((column, "o-", model), (floor, "--", f"{model}, {meaning}"))
        ]
        file = table.with_name(f"{table.stem}_{name}.png")
        paths.append(draw(file, [(label, lines)], "frames", sorted({row["frames"] for row in rows})))
    return paths


def markdown(results: dict) -> str:
    """The report: the facts, then a table for each measurement, ratios to the peer beside."""
    machine = dict(results["machine"])
    parts = [
        f"# The model against the length of the video\n\n{machine.pop('date')}, `{machine.pop('command')}`\n",
        ", ".join(f"{name}: {value}" for name, value in machine.items() if value is not None) + ".\n",
        "Medians. Floors: operations of the matrix products at the measured rate; bytes of weights and video "
        "memory at the measured rate of copies. The peak does not count the peer's pixels.\n",
        table([_in_gib(row) for row in results["lengths"]], _LENGTHS),
        *_ratios(results["lengths"]),
    ]
    for name, title in _SECTIONS.items():
        columns = {column: column.replace("_", " ") for row in results[name] for column in row}
        parts += [f"\n## {title}\n", table(results[name], columns)]
    return "\n".join([*parts, ""])


def _in_gib(row: dict) -> dict:
    sizes = ("peak_over_weights_bytes", "video_memory_bytes")
    return {name: value / GIB if name in sizes else value for name, value in row.items()}


def _ratios(rows: list[dict]) -> list[str]:
    """How many times faster the first model is than the second, where both ran."""
    return [
        f"\n{ours['frames']} frames: {ours['model']}'s prefill is {peer['prefill_s'] / ours['prefill_s']:.1f} times as "
        f"fast as {peer['model']}'s, its decoding {peer['decode_ms'] / ours['decode_ms']:.1f} times."
        for ours, peer in combinations([row for row in rows if row["status"] == "ok"], 2)
        if ours["frames"] == peer["frames"]
    ]
