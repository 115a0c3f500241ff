"""What the tasks of this folder are made of: documents from files of the user, prompts of the papers, scores.

Where the files lie is said by environment variables, as lmms-eval's tasks take no arguments. What is unusual: the
documents are made by `process_docs`, of whatever stands in the file, as `datasets` wants columns and the official
formats have none. The prompts are those of `vamba.evaluation.protocols`.
"""

import json
import os
from pathlib import Path
from typing import Any

from datasets import Dataset

from vamba.errors import UserError
from vamba.evaluation.choices import parse_choice, strip_letters
from vamba.evaluation.protocols import PROTOCOLS
from vamba.evaluation.questions import Question, read_questions


VARIABLES = {
    "CHOICES": ("VAMBA_EVAL_DATA", "a file of questions, one in each line"),
    "HOURVIDEO": ("HOURVIDEO_JSON", "the annotations of HourVideo, with the folder `videos` beside it"),
    "DREAM1K": ("DREAM1K_JSON", "DREAM-1K's annotations, JSON or JSON lines, with the folder `video` beside it"),
}


def __getattr__(name: str) -> dict[str, str]:
    """`data_files` of a task, for its YAML."""
    if name not in VARIABLES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return {"test": str(_file(name))}


def _file(name: str) -> Path:
    variable, what = VARIABLES[name]
    if not os.environ.get(variable):
        raise UserError(f"{variable} is not set; let it name {what}.")
    path = Path(os.environ[variable]).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"{variable} is {path}, which is no file; let it name {what}.")
    return path


# A file of questions of the user's own.


def choices_docs(_: Dataset) -> Dataset:
    questions = read_questions(_file("CHOICES"), os.environ.get("VAMBA_EVAL_MEDIA"))
    if bad := [question.id for question in questions if not question.options or question.answer is None]:
        raise UserError(f"question {bad[0]} has no options or no answer, which this task needs; use `vamba eval`.")
    names = ("id", "videos", "text", "options", "answer", "category", "start", "end")
    return Dataset.from_list([{name: getattr(question, name) for name in names} for question in questions])


def _question(doc: dict) -> Question:
    options, videos = tuple(doc["options"]), tuple(doc["videos"])
    return Question(doc["id"], videos, doc["text"], options, doc["answer"], doc["category"], doc["start"], doc["end"])


def choices_text(doc: dict, lmms_eval_specific_kwargs: Any = None) -> str:
    return PROTOCOLS["letters"].prompt(_question(doc), range(len(doc["options"])))


def choices_visual(doc: dict) -> list:
    span = {
        name: doc[field] for name, field in (("video_start", "start"), ("video_end", "end")) if doc[field] is not None
    }
    return [{"path": video, "type": "video", **span} for video in doc["videos"]]


def choices_messages(doc: dict, lmms_eval_specific_kwargs: Any = None) -> list[dict]:
    videos = [
        {"type": "video", "url": video, "start_time": doc["start"], "end_time": doc["end"]} for video in doc["videos"]
    ]
    return [{"role": "user", "content": [*videos, {"type": "text", "text": choices_text(doc)}]}]


def choices_letters(doc: dict) -> list[str]:
    return PROTOCOLS["letters"].candidates(_question(doc), range(len(doc["options"])))


def choices_score(doc: dict, results: list[str]) -> dict[str, float]:
    return {"accuracy": float(parse_choice(results[0], doc["options"]) == doc["answer"])}


# HourVideo: {video_uid: {"benchmark_dataset": [{"question", "mcq_test", "correct_answer_label", "task", …}]}}


def hourvideo_docs(_: Dataset) -> Dataset:
    path = _file("HOURVIDEO")
    names = ("qid", "task", "question", "mcq_test", "correct_answer_label")
    docs = [
        {"video": str(path.parent / "videos" / f"{uid}.mp4"), **{name: f"{row.get(name, '')}" for name in names}}
        for uid, video in json.loads(path.read_text()).items()
        for row in video["benchmark_dataset"]
    ]
    return Dataset.from_list(docs)


def hourvideo_text(doc: dict, lmms_eval_specific_kwargs: Any = None) -> str:
    """As eval_hourvideo.py asks: the question, then `mcq_test` as it stands in the file."""
    prompt = PROTOCOLS["vamba-hourvideo"].choice_prompt
    return prompt.format(question=doc["question"], options=doc["mcq_test"])


def video_visual(doc: dict) -> list[str]:
    return [doc["video"]]


def hourvideo_score(doc: dict, results: list[str]) -> dict[str, float]:
    chosen = parse_choice(results[0], [f"option {letter}" for letter in "ABCDE"])
    return {"accuracy": float(chosen is not None and "ABCDE"[chosen] == doc["correct_answer_label"])}


# DREAM-1K: {"video_file", "events", "description", …}, or Tarsier's lines with these under "text" and "extra_info"


def dream1k_docs(_: Dataset) -> Dataset:
    path = _file("DREAM1K")
    text = path.read_text()
    is_list = text.lstrip().startswith("[")
    rows = json.loads(text) if is_list else [json.loads(line) for line in text.splitlines() if line.strip()]
    docs = []
    for row in rows:
        events = row.get("events") or row.get("extra_info", {}).get("events", [])
        name = row.get("video_file") or ""
        name = f"{row.get('vid', row.get('idx'))}.mp4" if "placeholder" in name or not name else Path(name).name
        response = row.get("description") or row.get("text", {}).get("response", "")
        docs.append({"idx": f"{row['idx']}", "video": str(path.parent / "video" / name), "events": events})
        docs[-1]["response"] = response
    return Dataset.from_list(docs)


def dream1k_text(doc: dict, lmms_eval_specific_kwargs: Any = None) -> str:
    return PROTOCOLS["vamba-dream1k"].open_prompt


def dream1k_results(doc: dict, results: list[str]) -> dict[str, dict]:
    return {"submission": {name: doc[name] for name in ("idx", "response", "events")} | {"prediction": results[0]}}


def dream1k_write(results: list[dict], args: Any) -> None:
    """Descriptions for AutoDQ, the judge of DREAM-1K (tarsier's evaluation/metrics), which asks GPT-3.5."""
    from lmms_eval.tasks._task_utils.file_utils import generate_submission_file

    path = generate_submission_file("dream1k_predictions.json", args)
    Path(path).write_text(json.dumps(results, indent=1))


# The papers' prompts for tasks that lmms-eval has; documents and scores stay its own.


def _ask(protocol: str, text: str, options: list[str]) -> str:
    """With the options after the question, or, if there are none, in it."""
    if not options:
        return PROTOCOLS[protocol].choice_prompt.format(question=text, options="").strip()
    return PROTOCOLS[protocol].prompt(Question("", (), text, tuple(strip_letters(options))), range(len(options)))


def lvbench_text(doc: dict, lmms_eval_specific_kwargs: Any = None) -> str:
    return _ask("vamba-lvbench", doc["question"], list(doc.get("options") or []))


def videomme_text(doc: dict, lmms_eval_specific_kwargs: Any = None) -> str:
    return _ask("vamba-videomme", doc["question"], list(doc["options"]))


def longvideobench_text(doc: dict, lmms_eval_specific_kwargs: Any = None) -> str:
    options = [doc[f"option{index}"] for index in range(5) if doc[f"option{index}"] != "N/A"]
    return _ask("vamba-longvideobench", doc["question"], options)


def nextqa_text(doc: dict, lmms_eval_specific_kwargs: Any = None) -> str:
    return _ask("vamba-nextqa", doc["question"], [doc[f"a{index}"] for index in range(5)])


def mlvu_text(doc: dict, lmms_eval_specific_kwargs: Any = None) -> str:
    return _ask("vamba-mlvu", doc["question"], [])  # they stand in the question, as MLVU writes them
