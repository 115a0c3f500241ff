"""The tasks for lmms-eval read the official formats, ask as the papers' scripts and score; without lmms-eval."""

import json
from pathlib import Path

import pytest
import yaml

from vamba import UserError
from vamba.evaluation import tasks
from vamba.evaluation.tasks import readers


FOLDER = Path(tasks.__file__).parent


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_hourvideo_reads_the_annotations_and_asks_as_the_script(tmp_path, monkeypatch):
    row = {
        "qid": "u_1",
        "task": "summarization",
        "question": "Who?",
        "mcq_test": "Who?\nA. me\nB. you\nC. x\nD. y\nE. z",
    }
    rows = [row | {"correct_answer_label": "B"}, row | {"qid": "u_2", "correct_answer_label": "E", "extra": [1, None]}]
    path = write(tmp_path / "dev.json", {"uid": {"video_metadata": {"a": 1}, "benchmark_dataset": rows}})
    monkeypatch.setenv("HOURVIDEO_JSON", path)
    docs = readers.hourvideo_docs(None)
    assert readers.video_visual(docs[1]) == [str(tmp_path / "videos" / "uid.mp4")] and readers.HOURVIDEO == {
        "test": path
    }
    assert readers.hourvideo_text(docs[0]) == (
        "Select the best answer to the following multiple-choice question based on the video.\nWho?\n"
        "Who?\nA. me\nB. you\nC. x\nD. y\nE. z\nRespond with only the letter (A, B, C, D, or E) of the correct option."
    )
    right = [readers.hourvideo_score(doc, [reply])["accuracy"] for doc in docs for reply in ("b", "(E) z", "F", "")]
    assert right == [1, 0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("kind", ["list", "lines"])
def test_dream1k_reads_the_list_of_the_hub_and_the_lines_of_tarsier(kind, tmp_path, monkeypatch):
    listed = [{"idx": 1, "video_file": "video/1.mp4", "description": "It rains.", "events": ["It rains"]}]
    line = {
        "idx": 1,
        "video_file": "<placeholder>",
        "vid": 1,
        "text": {"prompt": "<video>\nDescribe", "response": "It rains."},
    }
    line["extra_info"] = {"events": ["It rains"]}
    content = listed if kind == "list" else f"{json.dumps(line)}\n\n"
    monkeypatch.setenv("DREAM1K_JSON", write(tmp_path / "metadata.json", content))
    (doc,) = readers.dream1k_docs(None)
    assert readers.video_visual(doc) == [str(tmp_path / "video" / "1.mp4")]
    assert readers.dream1k_text(doc) == "Describe the video in detail."
    found = readers.dream1k_results(doc, ["Rain."])["submission"]
    assert found == {"idx": "1", "prediction": "Rain.", "response": "It rains.", "events": ["It rains"]}


def test_questions_of_ones_own_are_asked_as_vamba_eval_asks_them(tmp_path, monkeypatch):
    rows = [{"video": ["a.mp4", "b.mp4"], "question": "Which?", "options": ["red", "blue"], "answer": "B", "start": 1}]
    monkeypatch.setenv("VAMBA_EVAL_DATA", write(tmp_path / "data.jsonl", json.dumps(rows[0])))
    (doc,) = readers.choices_docs(None)
    (turn,) = readers.choices_messages(doc)
    assert [item["url"] for item in turn["content"][:2]] == [str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")]
    assert [item["start_time"] for item in turn["content"][:2]] == [1, 1]
    assert turn["content"][2]["text"] == readers.choices_text(doc)
    assert readers.choices_text(doc).startswith("Which?\nA. red\nB. blue\nAnswer with")
    assert [readers.choices_score(doc, [reply])["accuracy"] for reply in ("B", "blue", "A", "")] == [1, 1, 0, 0]
    assert readers.choices_letters(doc) == ["A", "B"]
    monkeypatch.setenv("VAMBA_EVAL_DATA", write(tmp_path / "open.jsonl", '{"video": "a.mp4", "question": "What?"}'))
    with pytest.raises(UserError, match="question 1 has no options"):
        readers.choices_docs(None)


@pytest.mark.parametrize("variable, name", [(variable, name) for name, (variable, _) in readers.VARIABLES.items()])
def test_a_file_that_is_not_there_is_told_of_with_its_variable(variable, name, monkeypatch):
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match=variable):
        getattr(readers, name)
    monkeypatch.setenv(variable, "/nowhere.json")
    with pytest.raises(UserError, match=f"{variable} is /nowhere.json"):
        getattr(readers, name)


def test_the_prompts_of_the_papers_for_lmms_evals_documents():
    lettered = {"question": "What?", "options": ["A. one", "B. two", "C. three", "D. four"]}
    assert readers.videomme_text(lettered).endswith("option.\nWhat?\nA. one B. two C. three D. four")
    assert readers.lvbench_text({"question": "What?", "options": ["one", "two"]}).endswith("\nWhat?\n(A) one\n(B) two")
    assert readers.lvbench_text({"question": "What?\n(A) one"}).endswith("correct option.\nWhat?\n(A) one")
    assert readers.mlvu_text({"question": "What?\n(A) one"}).endswith("correct option.\nWhat?\n(A) one")
    options = {f"option{index}": text for index, text in enumerate(["x", "y", "z", "N/A", "N/A"])}
    assert readers.longvideobench_text({"question": "What?", **options}).endswith("\nWhat?\nA. x\nB. y\nC. z")
    answers = {f"a{index}": text for index, text in enumerate("vwxyz")}
    assert readers.nextqa_text({"question": "why?", **answers}).endswith("why?\nA. v\nB. w\nC. x\nD. y\nE. z")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_task_names_functions_that_there_are(path, monkeypatch):
    named = []

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: named.append(loader.construct_scalar(node)))
    assert yaml.load(path.read_text(), Loader)["task"] == path.stem
    ours = [name.rpartition(".") for name in named if name.startswith("vamba.")]
    assert ours and all(module == readers.__name__ for module, _, _ in ours)
    assert all(name in readers.VARIABLES or callable(getattr(readers, name)) for _, _, name in ours)
