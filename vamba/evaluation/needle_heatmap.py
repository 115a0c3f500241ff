"""The accuracy of a needle suite by the depth of the needle and the length of the video: a picture, or a table.

draw_heatmap(Path("needles.png"), read_questions(path), answers)
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from vamba.bench.report import table
from vamba.errors import UserError

from .asking import Answer
from .questions import Question


Cell = tuple[float, float]  # depth and length


def cells(questions: Sequence[Question], answers: Iterable[Answer]) -> dict[str, dict[Cell, list[bool]]]:
    """For each task and cell, which of its questions are answered right: in every order in which they were asked.

    Raises:
        UserError: no question has both a depth and an answer.
    """
    right: dict[str, bool] = {}
    for answer in answers:
        if answer.correct is not None:
            right[answer.id] = answer.correct and right.get(answer.id, True)
    tasks: dict[str, dict[Cell, list[bool]]] = {}
    for question in questions:
        if question.id in right and "depth" in question.extra:
            task = tasks.setdefault(f"{question.category}".partition("/")[0], {})
            task.setdefault((question.extra["depth"], question.duration or 0.0), []).append(right[question.id])
    if not tasks:
        raise UserError("None of the answers is to a question of a needle suite, so there is no heatmap of them.")
    return tasks


def heatmap_table(questions: Sequence[Question], answers: Iterable[Answer]) -> str:
    """Markdown: how many questions are right of how many, a row for each task and depth, a column for each length."""
    rows = []
    for task, found in cells(questions, answers).items():
        for depth in sorted({depth for depth, _ in found}):
            row: dict[str, str | float] = {"task": task, "depth": f"{depth:g}"}
            for length in sorted({length for _, length in found}):
                if right := found.get((depth, length)):
                    row[f"{length:g} s"] = f"{sum(right)}/{len(right)}"
            rows.append(row)
    return table(rows)


def draw_heatmap(path: Path, questions: Sequence[Question], answers: Iterable[Answer]) -> Path:
    """Writes a PNG: for each task a panel with depth against length, the share of right answers as number and colour.

    Raises:
        UserError: matplotlib is not installed, or these are not answers to a needle suite.
    """
    tasks = cells(questions, answers)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"{path.name} was not drawn: plots need matplotlib (pip install matplotlib)") from error
    figure = Figure(figsize=(4.5 * len(tasks), 4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, (task, found) in zip(panels, tasks.items()):
        depths, lengths = (sorted(set(values)) for values in zip(*found))
        right = [[found.get((depth, length), []) for length in lengths] for depth in depths]
        shares = [[sum(cell) / len(cell) if cell else float("nan") for cell in row] for row in right]
        image = axes.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                if right[y][x]:
                    axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center")
        axes.set_xticks(range(len(lengths)), [f"{length:g}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        count = sum(map(len, found.values()))
        axes.set(title=f"{task} ({count} questions)", xlabel="length, s", ylabel="depth")
    figure.colorbar(image, ax=panels, label="share of right answers")
    figure.savefig(path, dpi=120)
    return path
