"""The accuracy in a needle suite by the depth of the needle and the length of the video: a table and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from vamba.bench.report import table
from vamba.errors import UserError

from .questions import Question


HEATMAP = "heatmap.png"

Cell = tuple[float, float]  # depth and length


def has_depths(questions: Sequence[Question]) -> bool:
    """Whether some of them are of a needle suite."""
    return any(_has_depth(question) for question in questions)


def _has_depth(question: Question) -> bool:
    return type(question.extra.get("depth")) in (int, float) and None not in (question.category, question.duration)


def heatmap_section(path: Path, questions: Sequence[Question], right: Mapping[str, bool]) -> str:
    """The table, and the picture written to `path`, to be called heatmap.png; where matplotlib is missing, that it is.

    Args:
        right: see `scoring.outcomes`.
    """
    try:
        draw_heatmap(path, questions, right)
        picture = f"![heatmap]({HEATMAP})"
    except UserError as error:
        picture = f"{error}."
    return f"\n## Depth and length\n\n{picture}\n\n{heatmap_table(questions, right)}\n"


def _cells(questions: Sequence[Question], right: Mapping[str, bool]) -> dict[str, dict[Cell, list[bool]]]:
    """Which questions of each task and cell are answered rightly."""
    tasks: dict[str, dict[Cell, list[bool]]] = {}
    for question in questions:
        if question.id in right and _has_depth(question):
            task = tasks.setdefault(f"{question.category}".partition("/")[0], {})
            task.setdefault((question.extra["depth"], question.duration), []).append(right[question.id])
    return tasks


def heatmap_table(questions: Sequence[Question], right: Mapping[str, bool]) -> str:
    """Markdown: how many questions are right of how many, a row for each task and depth, a column for each length."""
    rows = []
    for task, found in _cells(questions, right).items():
        for depth in sorted({depth for depth, _ in found}):
            row = {"task": task, "depth": f"{depth:g}"}
            for length in sorted({length for _, length in found}):
                cell = found.get((depth, length), [])
                row[f"{length:g} s"] = f"{sum(cell)}/{len(cell)}"
            rows.append(row)
    return table(rows)


def draw_heatmap(path: Path, questions: Sequence[Question], right: Mapping[str, bool]) -> Path:
    """Writes a PNG: for each task a panel with depth against length, the share of right answers as number and colour.

    Raises:
        UserError: matplotlib is not installed.
    """
    tasks = _cells(questions, right)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"{path.name} was not drawn: plots need matplotlib (pip install matplotlib)") from error
    figure = Figure(figsize=(4.5 * len(tasks), 4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, (task, found) in zip(panels, tasks.items()):
        depths, lengths = (sorted(set(values)) for values in zip(*found))
        cells = [[found.get((depth, length), []) for length in lengths] for depth in depths]
        shares = [[sum(cell) / len(cell) if cell else float("nan") for cell in row] for row in cells]
        image = axes.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                if cells[y][x]:
                    colour = "white" if abs(share - 0.5) > 0.4 else "black"
                    axes.text(x, y, f"{100 * share:.0f}", color=colour, ha="center", va="center")
        axes.set_xticks(range(len(lengths)), [f"{length:g}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        count = sum(map(len, found.values()))
        axes.set(title=f"{task} ({count} questions)", xlabel="length, s", ylabel="depth")
    figure.colorbar(image, ax=panels, label="share of right answers")
    figure.savefig(path, dpi=120)
    return path
