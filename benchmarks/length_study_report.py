"""The report of `length_study`: plots and tables of what its JSON files hold; the words come from who has read them.

What is unusual: a report that is there keeps what stands above its first table, where the conclusions are.
"""

import json
from contextlib import contextmanager
from pathlib import Path

from vamba.bench.report import table


QUESTIONS = {"shape": "retrieval (shape)", "first": "order (first colour)", "moment": "order (moment)"}
MAIN = {
    "vamba": ("Vamba", "#1f6f8b"),
    "vamba_norm": ("Vamba, levels normalised", "#0b3c49"),
    "vamba_no_mamba": ("Vamba without Mamba blocks", "#8a8a8a"),
    "qwen2_vl": ("Qwen2-VL", "#c8553d"),
    "video_ma2mba": ("Video-Ma2mba", "#e0a030"),
}
TABLES = "<!-- from here on written by length_study.py -->"


def write_report(folder: Path, path: Path) -> None:
    """Writes PATH.md, and as PNG PATH_length, PATH_ablations, PATH_flops and, if it was measured, PATH_prefill."""
    arms = {run["arm"]: run for run in map(_read, sorted(folder.glob("*.json"))) if "arm" in run}
    prefill = folder / "prefill.json"
    names = [*(arm for arm in MAIN if arm in arms), *sorted(arms.keys() - MAIN.keys())]
    equal_steps = {arm: at_step(arms[arm], arms[arm]["steps"]) for arm in names}
    equal_flops = {arm: at_step(arms[arm], arms[arm]["equal_flops_steps"]) for arm in names if arm in MAIN}
    machine = arms[names[0]]["machine"]
    text = [TABLES, "\n" + ", ".join(f"{key}: {value}" for key, value in machine.items() if key != "command")]
    text += ["\n## After equal steps\n", _table(arms, equal_steps)]
    text += ["\n## After equal FLOPs\n", _table(arms, equal_flops)]
    _draw_lengths(Path(f"{path}_length.png"), {arm: equal_steps[arm] for arm in names if arm in MAIN})
    _draw_lengths(Path(f"{path}_ablations.png"), {arm: equal_steps[arm] for arm in names if arm[:5] == "vamba"})
    _draw_flops(Path(f"{path}_flops.png"), {arm: arms[arm] for arm in names if arm in MAIN})
    text += [f"\n![{what}]({path.name}_{what}.png)" for what in ("length", "ablations", "flops")]
    if prefill.exists():
        seconds = _read(prefill)["seconds"]
        rows = [{"model": name, **{f"{n} frames": 1e3 * s for n, s in row.items()}} for name, row in seconds.items()]
        _draw_prefill(Path(f"{path}_prefill.png"), seconds)
        text += ["\n## Prefill, ms\n", table(rows), f"\n![prefill]({path.name}_prefill.png)"]
    report = Path(f"{path}.md")
    words = report.read_text(encoding="utf-8").partition(TABLES)[0].rstrip() if report.exists() else "# Length study"
    report.write_text(words + "\n\n" + "\n".join(text) + "\n", encoding="utf-8")


def _read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def at_step(run: dict, step: int) -> dict:
    """The last measurement of a run that is not after `step`, or its first."""
    return next((point for point in reversed(run["points"]) if point["step"] <= step), run["points"][0])


def _table(arms: dict[str, dict], points: dict[str, dict]) -> str:
    """Accuracies in percent by frames, and after how many steps and FLOPs."""
    rows = []
    for arm, point in points.items():
        row = {"arm": arm, "M parameters": round(arms[arm]["parameters"] / 1e6, 1)}
        row |= {"steps": point["step"], "PFLOP": point["flops"] / 1e15}
        for frames, shares in point["accuracy"].items():
            row[f"{frames} frames"] = " / ".join(f"{100 * shares[question]:.0f}" for question in QUESTIONS)
        rows.append(row)
    return "Right answers in percent: shape / first colour / moment.\n\n" + table(rows)


@contextmanager
def _panels(path: Path, count: int, xlabel: str, ylabel: str):
    """Panels side by side to draw on, which are then written as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(5 * count, 4), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for panel in axes:
        panel.set(xscale="log", xlabel=xlabel)
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
    axes[0].set_ylabel(ylabel)
    yield axes
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _draw_lengths(path: Path, points: dict[str, dict]) -> None:
    with _panels(path, len(QUESTIONS), "frames", "right answers") as axes:
        for panel, (question, title) in zip(axes, QUESTIONS.items()):
            panel.set(title=title, ylim=(0, 1.03))
            for arm, point in points.items():
                name, colour = MAIN.get(arm, (arm, None))
                frames, rows = [int(n) for n in point["accuracy"]], point["accuracy"].values()
                panel.plot(frames, [row[question] for row in rows], "o-", label=name, color=colour)
            panel.set_xticks(frames, frames)


def _draw_flops(path: Path, arms: dict[str, dict]) -> None:
    lengths = [int(n) for n in next(iter(arms.values()))["points"][0]["accuracy"]]
    trained = max(n for run in arms.values() for n in run["trained"])
    shown = [n for n in lengths if n in (trained, 4 * trained, 16 * trained)] or lengths[-1:]
    with _panels(path, len(shown), "training FLOPs", "right answers, mean of the questions") as axes:
        for panel, frames in zip(axes, shown):
            panel.set(title=f"{frames} frames", ylim=(0, 1.03))
            for arm, run in arms.items():
                name, colour = MAIN[arm]
                mean = [sum(point["accuracy"][str(frames)].values()) / len(QUESTIONS) for point in run["points"]]
                panel.plot([point["flops"] for point in run["points"]], mean, "o-", label=name, color=colour)


def _draw_prefill(path: Path, seconds: dict[str, dict[str, float]]) -> None:
    with _panels(path, 1, "frames", "prefill, ms") as (panel,):
        panel.set(yscale="log")
        for arm, row in seconds.items():
            name, colour = MAIN[arm]
            panel.plot([int(n) for n in row], [1e3 * s for s in row.values()], "o-", label=name, color=colour)
