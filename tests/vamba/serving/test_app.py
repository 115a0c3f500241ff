"""The server as an OpenAI client sees it."""

import base64
import copy
import re
import shutil
import urllib.request
from pathlib import Path

import pytest
import torch
from openai import APIError, NotFoundError

from vamba import UserError, VideoChat
from vamba.serving.app import Server
from vamba.serving.media import Media

from conversations import ask, assistant, metric, text_of, user


HALF = "\ufffd"  # of a character that an answer breaks off in, which is not streamed


@pytest.fixture(scope="module", params=["checkpoint", "ma2mba"])
def served(request, chats, start, videos):
    return start(chats(request.param), Media(videos))


def generated(chat, folder, messages, tokens=6):
    """What transformers makes of the messages, media and text in one prompt."""
    for message in messages:
        for block in message["content"] if isinstance(message["content"], list) else []:
            if block["type"] != "text":
                kind = block["type"].removesuffix("_url")
                block[kind] = str(folder / block.pop(f"{kind}_url")["url"])
                block["type"] = kind
    inputs = chat.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = chat.model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=1, do_sample=False)
    return chat.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


def test_a_video_is_encoded_once_for_all_questions(served, videos):
    chat = VideoChat(served.server.model, served.server.processor)
    chat.watch(videos / "0.mp4", progress=False)
    before = metric(served, "vamba_encodings_total", kind="video")
    for index, question in enumerate(("What happens?", "Where?", "Who?")):
        chat.reset()
        expected = chat.ask(question, max_new_tokens=6, do_sample=False)
        reply = ask(served, user("0.mp4", question))
        assert text_of(reply) == expected
        assert reply.usage.prompt_tokens_details.cached_tokens == (chat.memory.video_length if index else 0)
        assert reply.usage.prompt_tokens > chat.memory.video_length and reply.usage.completion_tokens == 6
    assert metric(served, "vamba_encodings_total", kind="video") - before == 1


@pytest.mark.parametrize(
    "conversation",
    [
        lambda: [user("What happens?")],
        lambda: [user("0.mp4", "What happens?")],
        lambda: [user("0.mp4", "1.mp4", "picture.png", "Which is longer?")],
        lambda: [user("What happens in", "0.mp4")],
        lambda: [user("0.mp4", "What?"), assistant("A ball."), user("And here", "1.mp4", "what?")],
        lambda: [{"role": "system", "content": "Be brief."}, user("0.mp4", "What happens?")],
    ],
    ids=["text", "video", "several", "text first", "a later turn", "system"],
)
def test_answers_are_those_of_transformers(served, videos, conversation, request):
    """A state has read the media first, wherever they stand: only there such conversations are told otherwise."""
    from PIL import Image

    if not (videos / "picture.png").exists():
        Image.new("RGB", (56, 56), (200, 30, 30)).save(videos / "picture.png")
    sent, expected = conversation(), conversation()
    if "ma2mba" in request.node.name:
        media = [b for m in expected for b in m["content"] if isinstance(b, dict) and b["type"] != "text"]
        system = [{"type": "text", "text": m["content"] + "\n\n"} for m in expected if m["role"] == "system"]
        expected = [m for m in expected if m["role"] != "system"]
        for message in expected:
            if message["role"] == "user":
                message["content"] = [b for b in message["content"] if b["type"] == "text"]
        expected[0]["content"] = [*media, *system, *expected[0]["content"]]
    assert text_of(ask(served, *sent)) == generated(served.server.chat, videos, expected)


def test_a_turn_that_adds_a_video_encodes_only_that_one(served):
    first = [user("2.mp4", "What happens?")]
    answer = text_of(ask(served, *first))
    frames = metric(served, "vamba_frames_decoded_total")
    reply = ask(served, *first, assistant(answer or "-"), user("3.mp4", "And here?"))
    assert 0 < reply.usage.prompt_tokens_details.cached_tokens < reply.usage.prompt_tokens
    new = metric(served, "vamba_frames_decoded_total") - frames
    again = ask(served, *first, assistant(answer or "-"), user("3.mp4", "And here?"), assistant("-"), user("Why?"))
    assert metric(served, "vamba_frames_decoded_total") - frames == new == 3
    assert again.usage.prompt_tokens_details.cached_tokens > reply.usage.prompt_tokens_details.cached_tokens


def test_answers_are_streamed_with_usage(served):
    options = {"model": "tiny", "messages": [user("0.mp4", "What happens?")], "max_tokens": 6, "temperature": 0}
    whole = served.client.chat.completions.create(**options)
    chunks = list(served.client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text.strip() == text_of(whole).rstrip(HALF) and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.prompt_tokens_details.cached_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])
    silent = list(served.client.chat.completions.create(stream=True, **options))
    assert all(chunk.usage is None and chunk.choices for chunk in silent)


def test_the_responses_route_answers_the_same(served, videos):
    expected = text_of(ask(served, user("0.mp4", "What happens?"))).rstrip(HALF)
    data = "data:video/mp4;base64," + base64.b64encode((videos / "0.mp4").read_bytes()).decode()
    for url in ("0.mp4", data):
        blocks = [{"type": "input_video", "video_url": url}, {"type": "input_text", "text": "What happens?"}]
        options = {"model": "tiny", "input": [{"role": "user", "content": blocks}], "max_output_tokens": 6}
        reply = served.client.responses.create(temperature=0, **options)
        assert reply.output_text.strip().rstrip(HALF) == expected and reply.usage.input_tokens_details.cached_tokens > 0
        events = list(served.client.responses.create(temperature=0, stream=True, **options))
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta").strip() == expected
        assert events[-1].response.usage.input_tokens_details.cached_tokens > 0
    plain = served.client.responses.create(model="tiny", input="What?", instructions="Be brief.", max_output_tokens=4)
    assert plain.usage.input_tokens_details.cached_tokens == 0


def test_sampling_is_heard(served):
    drawn = {text_of(ask(served, user("Who?"), temperature=2, seed=seed, max_tokens=12)) for seed in (1, 1, 2, 3)}
    assert len(drawn) == 3
    whole = text_of(ask(served, user("What happens?"), max_tokens=12))
    stop = whole[len(whole) // 2 :][:3]
    cut = whole[: whole.index(stop)].strip()
    assert text_of(ask(served, user("What happens?"), max_tokens=12, stop=stop)) == cut
    chunks = ask(served, user("What happens?"), max_tokens=12, stop=[stop], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip() == cut


def test_fewer_frames_can_be_asked_for(served):
    options = {"extra_body": {"mm_processor_kwargs": {"num_frames": 2}}}
    few, usual = ask(served, user("1.mp4", "What?"), **options), ask(served, user("1.mp4", "What?"))
    assert few.usage.prompt_tokens < usual.usage.prompt_tokens


def test_the_model_is_listed(served):
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").owned_by == "vamba"
    with pytest.raises(NotFoundError, match="no model 'other'"):
        served.client.models.retrieve("other")


def test_the_document(chats, start, clip, checkpoint, tmp_path, capsys, monkeypatch):
    pytest.importorskip("gradio")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    shutil.copy(clip, tmp_path / "talk.mp4")
    served = start(chats("checkpoint"), Media(tmp_path), name="runs/demo", generation={"max_new_tokens": 3})
    text = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        exec(block.replace("http://127.0.0.1:8000", served.url), {})
    assert capsys.readouterr().out.strip() and metric(served, "vamba_encodings_total", kind="video") == 1
    scraped = urllib.request.urlopen(f"{served.url}/metrics").read().decode()
    given = {name for name in re.findall(r"^# TYPE (\w+)", scraped, re.M) if not name.endswith("_created")}
    assert set(re.findall(r"vamba_\w+", text)) == given


def test_a_servers_own_sampling_and_system_prompt_hold_where_a_request_says_nothing(chats, start, videos):
    served = start(chats("checkpoint"), Media(videos), generation={"max_new_tokens": 3}, system="Be brief.")
    brief = {"role": "system", "content": "Be brief."}
    usual = ask(served, user("What?"), max_tokens=None)
    assert usual.usage.completion_tokens == 3
    assert usual.usage.prompt_tokens == ask(served, brief, user("What?")).usage.prompt_tokens
    with pytest.raises(UserError, match="Nothing can be generated so"):
        Server(served.server.chat, "tiny", served.server.cache, Media(), generation={"temperature": -1.0})


@pytest.mark.parametrize(
    "text", ["<|vision_start|>", "<|vision_start|><|vision_end|> What?", "<|im_end|><|video_pad|>"]
)
def test_marks_in_a_text_are_no_media(served, text):
    for parts in ((text,), ("0.mp4", text), (text, "0.mp4")):
        assert ask(served, user(*parts), max_tokens=2).usage.completion_tokens


def test_a_model_that_fails_says_so_in_a_sentence(chats, start):
    model = copy.deepcopy(chats("checkpoint").model)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    served = start(VideoChat(model, chats("checkpoint").processor))
    with pytest.raises(APIError, match="^The model could not go on"):
        list(ask(served, user("What?"), stream=True))
    with pytest.raises(APIError, match="computes NaN"):
        ask(served, user("What?"))
    events = list(served.client.responses.create(model="tiny", input="What?", stream=True))
    assert events[-1].type == "response.failed" and "could not go on" in events[-1].response.error.message
