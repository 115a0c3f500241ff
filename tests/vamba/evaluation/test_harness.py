"""The plugin under lmms-eval itself, where that is installed (the extra `eval`): command, requests, tasks."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vamba import UserError
from vamba.chat import load_chat
from vamba.evaluation import PROTOCOLS, evaluate, read_questions
from vamba.loading import load_config, load_model, load_processor

from tiny_vamba import spread


pytest.importorskip("lmms_eval", reason="needs the extra eval")
from lmms_eval.api.instance import Instance  # noqa: E402

from vamba.evaluation import tasks  # noqa: E402
from vamba.evaluation.harness import SimpleVamba, Vamba  # noqa: E402


TASKS = str(Path(tasks.__file__).parent)
COMMAND = ("--model", "vamba", "--device", "cpu", "--include_path", TASKS, "--log_samples")
COMMAND += ("--gen_kwargs", "max_new_tokens=1")
VIDEOS, KINDS = 3, 3


@pytest.fixture(scope="module")
def lettered(checkpoint, tmp_path_factory):
    """A checkpoint that answers with letters, which ones depending on the video."""
    folder = tmp_path_factory.mktemp("lettered") / "model"
    shutil.copytree(checkpoint, folder)
    torch.manual_seed(0)
    model = spread(load_model(str(folder), dtype=torch.float32), kept=("norm", "A_log", "dt_bias"))
    words = load_processor(str(folder), load_config(str(folder))).tokenizer.get_vocab()
    one, other = 10 * torch.randn(2, model.config.text_config.hidden_size)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        for letter, row in zip("ABCD", (one, -one, other, -other)):  # one of which is above zero, whatever is seen
            model.lm_head.weight[words[letter]] = row
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Three questions about each of three videos that differ."""
    import av
    import numpy as np

    folder, rows = tmp_path_factory.mktemp("questions"), []
    for number in range(VIDEOS):
        noise = np.random.default_rng(number)
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
            for _ in range(16):
                picture = np.full((64, 64, 3), noise.integers(0, 255, 3), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        for kind in range(KINDS):
            row = {"id": f"{number}-{kind}", "video": f"{number}.mp4", "question": f"What is it, {kind}?"}
            options = ["red", "green", "blue", "yellow"][: 4 - kind % 2]
            rows.append(row | {"options": options, "answer": "ABC"[(number + kind) % 3]})
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder / "data.jsonl"


def lmms_eval(questions, folder, *arguments, ranks=1):
    """Samples in the order of the documents, and the log, of the command as a user gives it, offline."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    environment = os.environ | {
        "VAMBA_EVAL_DATA": str(questions), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, *start, "-m", "lmms_eval", *COMMAND, "--output_path", folder / "out", *arguments],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    (samples,) = (folder / "out").rglob("*_samples_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    return rows, run.stdout + run.stderr


def encoded(log):
    return [int(line.split(" videos encoded")[0].split()[-1]) for line in log.splitlines() if "videos encoded" in line]


@pytest.fixture(scope="module")
def expected(lettered, questions, tmp_path_factory):
    """Replies and accuracy of `vamba eval`."""
    folder = tmp_path_factory.mktemp("expected") / "run"
    summary = evaluate(lettered, questions, folder, progress=False, device="cpu", max_new_tokens=1)
    replies = [json.loads(line)["reply"] for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(set(replies)) > 1 and 0 < summary["score"]["accuracy"] < 1  # or nothing would be compared
    return replies, summary["score"]["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_command_agrees_with_vamba_eval_on_any_number_of_ranks(lettered, questions, expected, ranks, tmp_path):
    rows, log = lmms_eval(
        questions, tmp_path, "--model_args", f"pretrained={lettered}", "--tasks", "vamba_choices", ranks=ranks
    )
    replies, accuracy = expected
    assert [row["filtered_resps"] for row in rows] == replies
    assert sum(row["accuracy"] for row in rows) / len(rows) == pytest.approx(accuracy)
    assert len(encoded(log)) == ranks and sum(encoded(log)) == VIDEOS


@pytest.mark.slow
def test_multiple_choice_by_likelihood_takes_the_likeliest_letter(lettered, questions, tmp_path):
    arguments = ("--tasks", "vamba_choices_likelihood", "--force_simple", "--model_args", f"pretrained={lettered}")
    rows, log = lmms_eval(questions, tmp_path, *arguments)
    summary = evaluate(lettered, questions, tmp_path / "run", progress=False, device="cpu", likelihood=True)
    assert sum(row["acc"] for row in rows) / len(rows) == pytest.approx(summary["score"]["accuracy"])
    assert 0 < summary["score"]["accuracy"] < 1 and encoded(log) == [VIDEOS]


@pytest.fixture(scope="module")
def spread_ma2mba(ma2mba, tmp_path_factory):
    """A Video-Ma2mba with weights far from their initial ones."""
    folder = tmp_path_factory.mktemp("spread") / "model"
    shutil.copytree(ma2mba, folder)
    torch.manual_seed(0)
    spread(load_model(str(folder), dtype=torch.float32), kept=("norm", "A_log", "dt_bias")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["lettered", "spread_ma2mba"])
def lm(request, questions):
    return with_docs(Vamba(pretrained=str(request.getfixturevalue(request.param)), device="cpu"), questions)


def with_docs(lm, questions):
    docs = [{"video": question.videos[0], "text": question.text} for question in read_questions(questions)]
    lm.task_dict = {"task": {"test": docs}}
    return lm


class Task:
    """Makes messages as lmms-eval's tasks do."""

    def __init__(self, content=None):
        self.content = content or (lambda doc: [video(doc), text(doc["text"])])

    def to_messages(self, doc, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return [{"role": "user", "content": self.content(doc)}]
        if round_idx == 3:
            return None, True, previous_output, None
        turn = [video(doc), text(f"{doc['text']} You said {previous_output[-1]}. And round {round_idx}?")]
        return [{"role": "user", "content": turn}], False, previous_output, previous_round_info

    def to_visual(self, doc):
        return [doc["video"]]


def video(doc, **options):
    return {"type": "video", "url": doc["video"], **options}


def text(words):
    return {"type": "text", "text": words}


def request(doc, content=None, kind="generate_until", **generation):
    arguments = ("", Task(content).to_messages, {"max_new_tokens": 6, **generation}, doc, "task", "test")
    return Instance(kind, arguments, 0, {"task": "task", "doc_id": doc, "repeats": 1})


def doc_of(lm, index):
    return lm.task_dict["task"]["test"][index]


def test_requests_are_answered_as_by_a_chat_in_their_order_and_videos_are_encoded_once(lm):
    before, order = lm.encoded, [4, 0, 8, 1, 5, 0]
    replies = lm.generate_until([request(index, max_new_tokens=6 + index) for index in order])
    assert lm.encoded - before == VIDEOS
    chat = load_chat(lm.chat.model.config._name_or_path, device="cpu")
    for index, reply in zip(order, replies):
        chat.watch(doc_of(lm, index)["video"], progress=False)
        assert reply == chat.ask(doc_of(lm, index)["text"], max_new_tokens=6 + index, do_sample=False)


def test_what_cannot_be_watched_first_goes_the_plain_way_with_the_same_answers(lm):
    """A video in memory has no name by which it is known again; a chat of its own model reads it the plain way."""
    fast = lm.generate_until([request(index) for index in range(0, VIDEOS * KINDS, KINDS)])
    assert len(set(fast)) > 1 or lm.chat.model.config.model_type != "vamba"  # the other's state forgets it, untrained
    before, plain = lm.encoded, []
    for index in range(0, VIDEOS * KINDS, KINDS):
        with lm.chat.processor.video_reader(doc_of(lm, index)["video"]) as reader:
            frames = torch.cat([chunk.frames for chunk in reader])
        content = [{"type": "video", "url": frames}, text(doc_of(lm, index)["text"])]
        plain += lm.generate_until([request(index, lambda doc, content=content: content)])
    assert plain == fast and lm.encoded == before


def test_images_and_text_anywhere_are_answered(lm):
    picture, before = {"type": "image", "url": Image.new("RGB", (64, 64), "red")}, lm.encoded
    for content in ([picture, text("What?")], [text("Look:"), video(doc_of(lm, 0)), text("What?")], [text("Hello?")]):
        asked = request(0, lambda doc, content=content: content)
        (reply,) = lm.generate_until([asked])
        items = [{"type": item["type"], item["type"]: item.get("url", item.get("text"))} for item in content]
        inputs = lm.chat.processor.apply_chat_template(
            [{"role": "user", "content": items}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        output = lm.chat.model.generate(**inputs, max_new_tokens=6, min_new_tokens=1, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        assert reply == lm.chat.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert lm.encoded == before


def test_a_turn_of_the_system_comes_before_the_video(lm):
    before, index, system = lm.encoded, KINDS, {"role": "system", "content": [text("Be brief.")]}
    asked = request(index)
    asked.arguments = ("", lambda doc: [system, *Task().to_messages(doc)], *asked.args[2:])
    (reply,) = lm.generate_until([asked])
    assert lm.encoded - before == (lm.chat.model.config.model_type == "vamba") and not lm.failures
    spoken = [{"type": "video", "video": doc_of(lm, index)["video"]}, text(doc_of(lm, index)["text"])]
    inputs = lm.chat.processor.apply_chat_template(
        [system, {"role": "user", "content": spoken}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    output = lm.chat.model.generate(**inputs, max_new_tokens=6, min_new_tokens=1, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    assert reply == lm.chat.processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_several_videos_and_parts_of_them_are_watched_in_turn(lm):
    first, second = doc_of(lm, 0), doc_of(lm, KINDS)
    content = [video(first, start_time=0.5, end_time=1.5), video(second), text("Which?")]
    (reply,) = lm.generate_until([request(0, lambda doc: content)])
    chat = load_chat(lm.chat.model.config._name_or_path, device="cpu")
    chat.watch(first["video"], progress=False, start=0.5, end=1.5)
    chat.watch(second["video"], progress=False, append=True)
    assert reply == chat.ask("Which?", max_new_tokens=6, do_sample=False)


def test_rounds_go_on_until_the_task_ends_them(lm):
    before = lm.encoded
    ((first, second, third),) = lm.generate_until_multi_round([request(0, kind="generate_until_multi_round")])
    assert lm.encoded - before == 1
    doc = doc_of(lm, 0)
    content = [video(doc), text(f"{doc['text']} You said {second}. And round 2?")]
    assert [third] == lm.generate_until([request(0, lambda doc: content)])
    assert [first] == lm.generate_until([request(0)])


def test_likelihoods_are_losses_of_the_chats(lettered, questions):
    lm = with_docs(SimpleVamba(pretrained=lettered, device="cpu"), questions)
    order = [(0, "A"), (3, "A"), (0, "B C"), (1, "A")]
    asked = [
        Instance("loglikelihood", (f"Is it {doc}?", said, Task().to_visual, doc, "task", "test"), 0,
                 {"task": "task", "doc_id": doc, "repeats": 1})
        for doc, said in order
    ]  # fmt: skip
    found = lm.loglikelihood(asked)
    assert lm.encoded == 2
    for (doc, said), result in zip(order, found):
        lm.chat.watch(doc_of(lm, doc)["video"], progress=False)
        ((total, is_greedy),) = lm.chat.log_likelihoods(f"Is it {doc}?", [said])
        assert result.text == (pytest.approx(-total), is_greedy)


def test_what_cannot_be_answered_is_empty_and_told_of_and_the_rest_is_answered(lm, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    broken = {"video": str(tmp_path / "broken.mp4")}
    unread = [request(0, lambda doc: [video(broken), text("What?")])] * 2
    too_long = request(0, lambda doc: [video(doc), text("What? " * 2**18)])
    replies = lm.generate_until([*unread, too_long, request(1)])
    assert replies[:3] == [""] * 3 and replies[3]
    (named, twice), (long, once) = lm.failures.items()
    assert "broken.mp4" in named and twice == 2 and "characters" in long and once == 1
    with pytest.raises(UserError, match="max_new_tokens"):  # which no request could be answered with
        lm.generate_until([request(1, max_new_tokens=-1)])


def test_the_simple_class_generates_the_same(lm, questions):
    simple = with_docs(SimpleVamba(pretrained=lm.chat.model.config._name_or_path, device="cpu"), questions)
    arguments = (doc_of(lm, 1)["text"], {"max_new_tokens": 6}, Task().to_visual, 1, "task", "test")
    asked = Instance("generate_until", arguments, 0, {"task": "task", "doc_id": 1, "repeats": 1})
    assert simple.generate_until([asked]) == lm.generate_until([request(1)])


def test_generation_arguments_of_tasks(lm):
    (whole,) = lm.generate_until([request(0, max_new_tokens=8)])
    (cut,) = lm.generate_until([request(0, max_new_tokens=8, until=[whole[-1]], temperature=0, top_p=1.0)])
    assert cut == whole.split(whole[-1])[0]
    torch.manual_seed(1)
    drawn = {lm.generate_until([request(0, max_new_tokens=8, temperature=50.0, do_sample=True)])[0] for _ in range(3)}
    assert len(drawn) > 1
    assert lm._generation({"temperature": 0.7, "do_sample": False})[0] == {"max_new_tokens": 128, "do_sample": False}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "pretrained"),
        ({"pretrained": "x", "nframes": 4}, "nframes.*num_frames"),
        ({"pretrained": "x", "protocol": "lvbench"}, "protocol is 'lvbench'.*vamba-lvbench"),
        ({"pretrained": "MODEL", "num_frames": -1}, "num_frames"),
        ({"pretrained": "MODEL", "max_frames": 0}, "max_frames"),
        ({"pretrained": "/nowhere"}, "/nowhere"),
    ],
)
def test_a_wrong_argument_is_one_clear_error(arguments, message, lettered):
    said = ",".join(f"{name}={value}" for name, value in arguments.items()).replace("MODEL", lettered)
    with pytest.raises(UserError, match=message):
        Vamba.create_from_arg_string(said, {"device": "cpu"})


def test_a_preset_with_sizes_is_refused_by_a_model_of_one_size(ma2mba):
    with pytest.raises(UserError, match="32 x 32"):
        Vamba(pretrained=str(ma2mba), device="cpu", protocol="vamba-lvbench")
    assert Vamba(pretrained=str(ma2mba), device="cpu", protocol="video-ma2mba").reading == {"fps": 1.0}


def test_arguments_take_the_place_of_the_protocols(lettered):
    lm = Vamba(pretrained=lettered, device="cpu", protocol="vamba-lvbench", fps=2, max_frames=8, batch_size=1)
    preset = PROTOCOLS["vamba-lvbench"].reading
    assert lm.reading == {name: preset[name] for name in preset if name != "num_frames"} | {"fps": 2, "max_frames": 8}
    assert lm._generation({})[0]["max_new_tokens"] == 512


def test_the_plugin_is_found_and_its_tasks_can_be_read():
    from lmms_eval.tasks import TaskManager

    from vamba.evaluation.plugin import manifest

    assert manifest().chat_class_path.rsplit(".", 1)[-1] == Vamba.__name__ and not Vamba.is_simple
    assert manifest().simple_class_path.rsplit(".", 1)[-1] == SimpleVamba.__name__ and SimpleVamba.is_simple
    known = TaskManager(include_path=TASKS, include_defaults=False, model_name="vamba").all_tasks
    assert set(known) == {path.stem for path in Path(TASKS).glob("*.yaml")}
