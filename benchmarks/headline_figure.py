"""Draws docs/headline.svg, the figure of the README, from the tables in benchmarks/results.

python benchmarks/headline_figure.py
"""

import csv
from pathlib import Path

import matplotlib


matplotlib.use("svg")
from matplotlib import pyplot as plt  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LENGTHS = RESULTS / "2026-11-21_video_length.csv"
ORIGINAL = RESULTS / "2026-11-20_original_code.csv"
FIGURE = ROOT / "docs" / "headline.svg"

Points = list[tuple[int, float, float]]  # frames, seconds of prefill, GiB over the weights


def read_points(path: Path, peak: str, scale: float, model: str | None = None) -> Points:
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["prefill_s"] and row.get("model") == model]
    return [(int(row["frames"]), float(row["prefill_s"]), float(row[peak]) / scale) for row in rows]


def draw(figure: Path = FIGURE) -> None:
    ours = read_points(LENGTHS, "peak_over_weights_bytes", 2**30, "vamba")
    qwen = read_points(LENGTHS, "peak_over_weights_bytes", 2**30, "qwen2-vl")
    original = read_points(ORIGINAL, "peak_over_weights_GiB", 1)
    lines = [
        ("Vamba, this package", ours, "#1f6f8b", "o-"),
        ("Vamba, original code", original, "#8a8a8a", "s--"),
        ("Qwen2-VL-7B", qwen, "#c8553d", "^--"),
    ]
    # fixed, so that the same tables give the same file
    plt.rcParams.update({"svg.hashsalt": "vamba", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10})
    canvas, panels = plt.subplots(1, 2, figsize=(8.4, 3.1), constrained_layout=True)
    titles = ("prefill, seconds", "peak memory over the weights, GiB")
    for column, (panel, title, ticks) in enumerate(zip(panels, titles, ((0.5, 2, 8, 32), (4, 16, 64))), 1):
        for name, points, colour, style in lines:
            panel.plot([p[0] for p in points], [p[column] for p in points], style, color=colour, label=name, ms=4)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        frames = [128, 512, 2048, 10000]
        panel.set_xticks(frames, [f"{count:,}" for count in frames])
        panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
        panel.set_xlabel("frames")
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=9)
    canvas.savefig(figure, metadata={"Date": None})


if __name__ == "__main__":
    draw()
    print(FIGURE)
