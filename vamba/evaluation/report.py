"""The report of an evaluation, and of two compared: Markdown for people, JSON for programs, a picture for either."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vamba.bench.report import table

from .asking import Answer
from .needle_heatmap import HEATMAP, has_depths, heatmap_section
from .questions import Question
from .run_folder import SUMMARY, RunFolder
from .scoring import Comparison, compare, outcomes


REPORT, PLOT = "report.md", "report.png"
SHOWN = 20  # videos that could not be used, of all
MOST_BARS = 40  # of categories, the largest
COLOUR, CHANCE = "#3465a4", "#888888"


def write_report(
    run: RunFolder, summary: Mapping[str, Any], questions: Sequence[Question], answers: Sequence[Answer]
) -> None:
    """Writes summary.json, report.md and, where matplotlib is installed, report.png into a run's folder; for a needle
    suite heatmap.png as well."""
    run.write(SUMMARY, json.dumps(summary, indent=1) + "\n")
    with run.replacing(PLOT) as path:
        drawn = draw_accuracy(path, summary)
    text = markdown(run.settings(), summary, PLOT if drawn else None)
    if has_depths(questions):
        right = outcomes(questions, answers, run.settings()["circular"])
        with run.replacing(HEATMAP) as path:
            text += heatmap_section(path, questions, right)
    run.write(REPORT, text)


def markdown(settings: Mapping[str, Any], summary: Mapping[str, Any], picture: str | None = None) -> str:
    """The report's text."""
    lines = [f"# {settings['model']}", "", headline(summary), ""]
    if picture:
        lines += [f"![accuracy]({picture})", ""]
    for title, key in (("Category", "by_category"), ("Duration", "by_duration")):
        if rows := [{title.lower(): name, **_shown(score)} for name, score in summary[key].items()]:
            lines += [f"## {title}", "", table(rows), ""]
    if summary["letters"]:
        shares = ", ".join(f"{letter} {count}" for letter, count in summary["letters"].items())
        lines += [f"Options chosen: {shares}; {summary['undecided']} replies name none.", ""]
    if summary["unusable"]:
        lines += ["## Not usable", "", "These count as wrong.", ""]
        lines += [f"- {error} ({count} questions)" for error, count in list(summary["unusable"].items())[:SHOWN]]
        lines += [f"- and {len(summary['unusable']) - SHOWN} more"] if len(summary["unusable"]) > SHOWN else []
        lines += [""]
    asked = {name: value for name, value in settings.items() if name not in ("weights", "model")}
    lines += ["## How it was asked", "", "```json", json.dumps(asked, indent=1), "```", ""]
    return "\n".join(lines)


def headline(summary: Mapping[str, Any]) -> str:
    """The numbers of a run in one line."""
    asked = f"{summary['questions']} questions about {summary['videos']} videos"
    broken = sum(summary["unusable"].values())
    broken_text = f", {broken} of them not usable" if broken else ""
    if summary["score"] is None:
        return f"{asked} answered{broken_text}; none of the right answers is known."
    score = summary["score"]
    text = f"accuracy {score['accuracy']:.3f} ({score['low']:.3f} to {score['high']:.3f})"
    if summary["chance"] is not None:
        text += f", chance {summary['chance']:.3f}"
    if summary["first_order"] is not None:
        text += f", in the first order of the options alone {summary['first_order']['accuracy']:.3f}"
    return f"{text}: {score['right']} of {score['total']} right; {asked}{broken_text}."


def _shown(score: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "accuracy": f"{score['accuracy']:.3f}",
        "95% interval": f"{score['low']:.3f} to {score['high']:.3f}",
        "questions": score["total"],
    }


def draw_accuracy(path: Path, summary: Mapping[str, Any]) -> bool:
    """Draws accuracy with intervals, over all and by part; whether there was something to draw and matplotlib to do
    it."""
    if summary["score"] is None:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    categories = sorted(summary["by_category"].items(), key=lambda part: -part[1]["total"])[:MOST_BARS]
    bars = [("all", summary["score"]), *sorted(categories), *summary["by_duration"].items()]
    figure = Figure(figsize=(7, 1.2 + 0.35 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for place, (_, score) in enumerate(bars):
        low, high = max(0.0, score["accuracy"] - score["low"]), max(0.0, score["high"] - score["accuracy"])
        axes.barh(place, score["accuracy"], xerr=[[low], [high]], color=COLOUR, alpha=0.85, ecolor="black", capsize=3)
    axes.set_yticks(range(len(bars)), [f"{' '.join(name.split())[:40]} ({score['total']})" for name, score in bars])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a category may hold dollars
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="accuracy, 95% interval")
    if summary["chance"] is not None:
        axes.axvline(summary["chance"], color=CHANCE, linestyle="--", linewidth=1, label="chance")
        axes.legend(fontsize="small", loc="lower right")
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)
    return True


def compare_runs(first: RunFolder, second: RunFolder) -> tuple[Comparison, str]:
    """Two runs on the questions that both were asked, and the same in Markdown."""
    settings, answers = [run.settings() for run in (first, second)], [run.answers() for run in (first, second)]
    questions = {question.id: question for question in second.questions()}
    # an id may stand for another question in another file
    known = [question for question in first.questions() if _same(question, questions.get(question.id))]
    left_out = len(first.questions()) + len(questions) - 2 * len(known)
    other = [name for name in ("model", *settings[1]) if settings[0].get(name) != settings[1].get(name)]
    about = f"The runs differ in: {', '.join(dict.fromkeys(other)) or 'nothing'}. {left_out} questions are of one only."
    circular = settings[0]["circular"] and settings[1]["circular"]
    found = compare(*(outcomes(known, given, circular) for given in answers))
    return found, _comparison(first, second, found, questions, answers, circular, about)


def _same(one: Question, other: Question | None) -> bool:
    """Whether they ask the same about videos of the same names, wherever these are."""
    return other is not None and _asked(one) == _asked(other)


def _asked(question: Question) -> tuple:
    videos = tuple(os.path.basename(video) for video in question.videos)
    return question.text, question.options, question.answer, videos, question.start, question.end


def _comparison(
    first: RunFolder,
    second: RunFolder,
    found: Comparison,
    questions: Mapping[str, Question],
    answers: Sequence[Sequence[Answer]],
    circular: bool,
    about: str,
) -> str:
    replies = [{answer.id: answer for answer in given if answer.rotation == 0} for given in answers]
    low, high = found.interval
    lines = [
        f"# {first.folder} and {second.folder}",
        "",
        f"{found.total} questions in common{', circular' if circular else ''}: accuracy "
        f"{(found.both + len(found.lost)) / found.total:.3f} and {(found.both + len(found.gained)) / found.total:.3f}, "
        f"difference {found.difference:+.3f} ({low:+.3f} to {high:+.3f}), p = {found.p_value:.3g} (McNemar, exact).",
        "",
        f"Both right {found.both}, both wrong {found.neither}, only the first {len(found.lost)}, only the second "
        f"{len(found.gained)}.",
        "",
        about,
        "",
    ]
    for title, names in (("Only the first is right", found.lost), ("Only the second is right", found.gained)):
        rows = [
            {
                "id": name,
                "question": questions[name].text,
                "right": _right(questions[name]),
                "first": _said(replies[0][name]),
                "second": _said(replies[1][name]),
            }
            for name in names
        ]
        lines += [f"## {title}", "", table(rows), ""] if rows else []
    return "\n".join(lines)


def _right(question: Question) -> str:
    if isinstance(question.answer, int):
        return question.options[question.answer]
    return question.answer if isinstance(question.answer, str) else " / ".join(question.answer or ())


def _said(answer: Answer) -> str:
    return answer.error or " ".join(answer.reply.split())
