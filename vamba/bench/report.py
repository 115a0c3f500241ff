"""Tables, plots and the report of `vamba bench`; plots are drawn from the written table, on any machine."""

import csv
import os
from pathlib import Path

from vamba.errors import UserError, opening


_GIB = 2**30
# column of the plots -> (name of the file, label, unit's factor, column of the floor)
_PLOTS = {
    "prefill_s": ("prefill", "prefill, s", 1, "prefill_floor_s"),
    "decode_ms": ("decode", "decoding, ms per token", 1, "decode_floor_ms"),
    "peak_over_weights_bytes": ("memory", "peak over weights, GiB", 1 / _GIB, "video_memory_bytes"),
}
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


def write(results: dict, folder: str | os.PathLike) -> list[Path]:
    """Writes the tables as CSV, the report, and the plots where matplotlib is installed; returns the paths."""
    folder = Path(folder)
    with opening(folder):
        folder.mkdir(parents=True, exist_ok=True)
    stem = f"{results['machine']['date']}_video_length"
    paths = []
    for name in ("lengths", "parts", "kernels", "videos"):
        paths.append(folder / (f"{stem}.csv" if name == "lengths" else f"{stem}_{name}.csv"))
        _write_table(paths[-1], results[name])
    report = folder / f"{stem}.md"
    try:
        plots = plot(paths[0])
    except UserError as error:
        plots = []
        print(f"no plots: {error}")
    text = markdown(results) + "".join(f"\n![{path.stem}]({path.name})\n" for path in plots)
    report.write_text(text, encoding="utf-8")
    return [*paths, *plots, report]


def _write_table(path: Path, rows: list[dict]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def plot(table: str | os.PathLike) -> list[Path]:
    """Draws prefill, decoding and memory against the number of frames, floors dashed, beside the table.

    Raises:
        UserError: matplotlib is not installed, or `table` is no table of lengths.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"plots need matplotlib: pip install matplotlib, then vamba bench --plot {table}") from error
    table = Path(table)
    with opening(table), table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"model", "frames", "prefill_s"} <= rows[0].keys():
        raise UserError(f"{table} is no table of lengths, as vamba bench --out writes it.")
    paths = []
    for column, (name, label, unit, floor) in _PLOTS.items():
        if not any(row.get(column) for row in rows):  # the memory, on a CPU
            continue
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for color, model in zip(("tab:blue", "tab:orange"), dict.fromkeys(row["model"] for row in rows)):
            for shown, style, of in ((column, "o-", model), (floor, "--", _floor_name(floor, model))):
                points = [
                    (float(r["frames"]), unit * float(r[shown])) for r in rows if r["model"] == model and r[shown]
                ]
                if points:
                    axes.plot(*zip(*points), style, color=color, label=of)
        axes.set(xscale="log", yscale="log", xlabel="frames", ylabel=label)
        lengths = sorted({int(row["frames"]) for row in rows})
        axes.set_xticks(lengths, lengths)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        paths.append(table.with_name(f"{table.stem}_{name}.png"))
        figure.savefig(paths[-1], dpi=120)
    return paths


def _floor_name(column: str, model: str) -> str:
    return f"{model}, keys and values" if column == "video_memory_bytes" else f"{model}, floor"


def markdown(results: dict) -> str:
    """The report: the facts, then a table for each measurement, ratios to the peer beside."""
    machine = dict(results["machine"])
    lines = [f"# The model against the length of the video\n\n{machine.pop('date')}, `{machine.pop('command')}`\n"]
    lines.append(", ".join(f"{name}: {value}" for name, value in machine.items() if value is not None) + ".\n")
    lines.append(
        "Medians. Floors: operations of the matrix products at the measured rate; bytes of weights and video memory at "
        "the measured rate of copies. The peak does not count the peer's pixels.\n"
    )
    lines.append(table(_with_units(results["lengths"]), _LENGTHS))
    lines += _ratios(results["lengths"])
    lines.append("\n## Parts, one chunk and one prompt\n")
    lines.append(table(results["parts"], {"part": "part", "calls": "calls", "ms": "ms", "floor_ms": "floor ms"}))
    lines.append("\n## Kernels of one Mamba-2 block, one chunk\n")
    lines.append(table(results["kernels"], {"kernel": "kernel", "calls": "calls", "ms": "ms"}))
    lines.append("\n## Reading video\n")
    names = ("video", "kept", "frames", "seconds", "decoded_frames_per_s", "times_real_time")
    lines.append(table(results["videos"], {name: name.replace("_", " ") for name in names}))
    return "\n".join(lines) + "\n"


def _with_units(rows: list[dict]) -> list[dict]:
    sizes = ("peak_over_weights_bytes", "video_memory_bytes")
    return [{name: value / _GIB if name in sizes else value for name, value in row.items()} for row in rows]


def _ratios(rows: list[dict]) -> list[str]:
    """How many times faster the first model is than the second, where both ran."""
    by_frames: dict[int, list[dict]] = {}
    for row in rows:
        if row["status"] == "ok":
            by_frames.setdefault(row["frames"], []).append(row)
    pairs = {frames: pair for frames, pair in by_frames.items() if len(pair) == 2}
    return [
        f"\n{frames} frames: {ours['model']}'s prefill is {peer['prefill_s'] / ours['prefill_s']:.1f} times as fast as "
        f"{peer['model']}'s, its decoding {peer['decode_ms'] / ours['decode_ms']:.1f} times."
        for frames, (ours, peer) in pairs.items()
    ]


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """Markdown of the columns, name to title, that any row has."""
    columns = {name: title for name, title in columns.items() if any(name in row for row in rows)}
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(name)) for name in columns) + " |")
    return "\n".join(lines)


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    text = str(value).replace("|", "\\|")
    return text if len(text) <= 80 else text[:77] + "…"
