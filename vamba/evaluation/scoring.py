"""From answers to numbers: accuracy by category and duration with intervals, and two runs compared by question.

What is unusual: a question whose video could not be read counts as wrong, and is counted besides. In circular scoring
a question is right only if it is right in every order of its options, which no favourite letter survives.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .asking import Answer
from .choices import LETTERS
from .questions import Question


Z = 1.959964  # of a normal distribution, for 95%
DURATIONS = {"under 1 min": 60, "1 to 3 min": 180, "3 to 15 min": 900, "15 to 60 min": 3600, "over 1 h": math.inf}

UNKNOWN = "not known"  # the duration of a video that could not be read


class Score(NamedTuple):
    """How many of the questions with a known answer are right; `low` and `high` are Wilson's 95% interval."""

    right: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.right / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        if not self.total:
            return math.nan, math.nan
        middle = self.accuracy + Z**2 / (2 * self.total)
        half = Z * math.sqrt(self.accuracy * (1 - self.accuracy) / self.total + (Z / (2 * self.total)) ** 2)
        whole = 1 + Z**2 / self.total
        return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)

    def row(self) -> dict[str, Any]:
        low, high = self.interval
        return {"right": self.right, "total": self.total, "accuracy": self.accuracy, "low": low, "high": high}


def outcomes(questions: Sequence[Question], answers: Iterable[Answer], circular: bool = False) -> dict[str, bool]:
    """Whether each question whose answer is known, and that was asked, is answered rightly."""
    found = {(answer.id, answer.rotation): answer.correct for answer in answers}
    right = {}
    for question in questions:
        orders = range(len(question.options) if circular and question.options else 1)
        verdicts = [found.get((question.id, rotation)) for rotation in orders]
        if question.answer is not None and (question.id, 0) in found:
            right[question.id] = all(verdicts)
    return right


def summarize(questions: Sequence[Question], answers: Sequence[Answer], circular: bool = False) -> dict[str, Any]:
    """All numbers of a run."""
    right = outcomes(questions, answers, circular)
    first = {answer.id: answer for answer in answers if answer.rotation == 0}
    known = [question for question in questions if question.id in right]
    unusable: Counter[str] = Counter(answer.error for answer in first.values() if answer.error)
    letters = Counter(
        answer.choice for question in questions if (answer := first.get(question.id)) and answer.choice is not None
    )
    return {
        "questions": len(first),
        "videos": len({question.watched for question in questions if question.id in first}),
        "score": _score(known, right).row() if known else None,
        "first_order": _score(known, outcomes(questions, answers)).row() if known and circular else None,
        "chance": _chance(known, circular),
        "by_category": _by(known, right, lambda question: question.category),
        "by_duration": _by(known, right, lambda question: _bucket(question, first[question.id]), [*DURATIONS, UNKNOWN]),
        "undecided": sum(
            bool(question.options) and first[question.id].choice is None and not first[question.id].error
            for question in questions
            if question.id in first
        ),
        "unusable": dict(unusable.most_common()),
        "letters": {LETTERS[place]: count for place, count in sorted(letters.items())},
    }


def _score(questions: Iterable[Question], right: Mapping[str, bool]) -> Score:
    verdicts = [right[question.id] for question in questions]
    return Score(sum(verdicts), len(verdicts))


def _by(
    questions: Sequence[Question],
    right: Mapping[str, bool],
    key: Callable[[Question], str | None],
    order: Sequence[str] | None = None,
) -> dict[str, dict]:
    groups: dict[str, list[Question]] = {}
    for question in questions:
        if (name := key(question)) is not None:
            groups.setdefault(name, []).append(question)
    names = sorted(groups) if order is None else [name for name in order if name in groups]
    return {name: _score(groups[name], right).row() for name in names}


def _bucket(question: Question, answer: Answer) -> str | None:
    seconds = question.duration if question.duration is not None else answer.seconds
    if seconds is None:
        return UNKNOWN if answer.error else None
    return next(name for name, most in DURATIONS.items() if seconds < most)


def _chance(questions: Sequence[Question], circular: bool) -> float | None:
    """Accuracy of drawing an option at random each time; None where some questions have none."""
    if not questions or not all(question.options for question in questions):
        return None
    counts = [len(question.options) for question in questions]
    return sum((1 / count) ** (count if circular else 1) for count in counts) / len(counts)


class Comparison(NamedTuple):
    """Two runs on the questions that both were asked.

    Attributes:
        both, neither: how many both runs have right, and wrong. gained, lost: ids that only the second run has right,
            and only the first.
        p_value: of McNemar's exact test that neither run is better, two-sided.
    """

    both: int
    neither: int
    gained: list[str]
    lost: list[str]
    p_value: float

    @property
    def total(self) -> int:
        return self.both + self.neither + len(self.gained) + len(self.lost)

    @property
    def difference(self) -> float:
        """Accuracy of the second run minus that of the first."""
        return (len(self.gained) - len(self.lost)) / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the difference, Agresti and Min's: Wald's for paired proportions with half a question more in
        each of the four cells."""
        total, gained, lost = self.total + 2, len(self.gained) + 0.5, len(self.lost) + 0.5
        middle = (gained - lost) / total
        half = Z * math.sqrt(gained + lost - (gained - lost) ** 2 / total) / total
        return max(-1.0, middle - half), min(1.0, middle + half)


def compare(first: Mapping[str, bool], second: Mapping[str, bool]) -> Comparison:
    """Compares two runs' `outcomes`, question by question. Raises ValueError if they have no question in common."""
    common = [name for name in first if name in second]
    if not common:
        raise ValueError("The two runs have no question in common.")
    gained = [name for name in common if second[name] and not first[name]]
    lost = [name for name in common if first[name] and not second[name]]
    both = sum(first[name] and second[name] for name in common)
    changed, fewer = len(gained) + len(lost), min(len(gained), len(lost))
    tail = sum(math.comb(changed, k) for k in range(fewer + 1)) / 2**changed
    return Comparison(both, len(common) - both - changed, gained, lost, min(1.0, 2 * tail))
