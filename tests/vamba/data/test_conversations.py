"""Examples in both formats to messages, and which of their tokens are labelled, for several chat templates."""

import pytest
import torch
from transformers import AutoProcessor

from vamba.data import ConversationEncoder, ExampleError, spoken_parts, to_messages
from vamba.demo.tiny_checkpoints import CHAT_TEMPLATE


def said(role, *content):
    return {"role": role, "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}


def video(path, **options):
    return {"type": "video", "video": path, **options}


def test_chat_messages_with_media_under_a_root():
    example = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            said("user", video("a.mp4", fps=2.0, start=None), {"type": "image", "path": "/abs/b.png"}, "What?"),
            said("assistant", "This."),
            said("user", video({"path": "c.mp4", "start": 1.5, "end": 4, "fps": None}), "And?"),
            {"role": "assistant", "content": "That."},
        ]
    }
    assert to_messages(example, "/data") == [
        said("system", "Be brief."),
        said("user", video("/data/a.mp4", fps=2.0), {"type": "image", "image": "/abs/b.png"}, "What?"),
        said("assistant", "This."),
        said("user", video("/data/c.mp4", start=1.5, end=4), "And?"),
        said("assistant", "That."),
    ]


@pytest.mark.parametrize(
    ("item", "source"),
    [
        ({"type": "image", "image": {"bytes": b"PNG", "path": "a.png"}}, b"PNG"),
        ({"type": "image", "image": {"bytes": None, "path": "a.png"}}, "/r/a.png"),
        ({"type": "image", "image": b"PNG"}, b"PNG"),
        ({"type": "image", "base64": "UE5H"}, b"PNG"),
        ({"type": "image_url", "image_url": {"url": "https://x/a.png", "detail": "low"}}, "https://x/a.png"),
        ({"type": "image_url", "image_url": "data:image/png;base64,UE5H"}, "data:image/png;base64,UE5H"),
        ({"type": "video_url", "video_url": {"url": "file:///a.mp4"}}, "file:///a.mp4"),
        ({"type": "video", "video": {"bytes": b"MP4", "path": None}}, b"MP4"),
        ({"type": "video", "video": "a: b.mp4"}, "/r/a: b.mp4"),
        ({"type": "image", "image": "images/a"}, "/r/images/a"),
    ],
)
def test_sources_as_others_write_them(item, source):
    kind = item["type"].removesuffix("_url")
    example = {"messages": [said("user", item, "?"), said("assistant", "!")]}
    assert to_messages(example, "/r")[0]["content"][0] == {"type": kind, kind: source}


def test_columns_of_media_fill_the_items_without_a_source():
    items = [{"type": "image"}, {"type": "video"}, {"type": "image"}]
    example = {"messages": [said("user", *items, "?"), said("assistant", "!")], "images": ["a.png", "b.png"]}
    assert to_messages(example | {"videos": ["c.mp4"]})[0] == said(
        "user", {"type": "image", "image": "a.png"}, video("c.mp4"), {"type": "image", "image": "b.png"}, "?"
    )


def test_llava_conversations():
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<video>\nWhat is <image> in it?"},
        {"from": "gpt", "value": "This.\n"},
    ]
    expected = [
        said("system", "Be brief."),
        said("user", video("/r/a.mp4"), "What is", {"type": "image", "image": "/r/b.png"}, "in it?"),
        said("assistant", "This."),
    ]
    assert to_messages({"conversations": turns, "video": "a.mp4", "image": "b.png"}, "/r") == expected


def test_llava_video_writes_image_for_a_video():
    turns = [{"from": "human", "value": "<image>\n<image>What?"}, {"from": "gpt", "value": "This."}]
    found = to_messages({"conversations": turns, "video": ["a.mp4", {"path": "b.mp4", "start": 2}], "image": None})
    assert found[0] == said("user", video("a.mp4"), video("b.mp4", start=2), "What?")


QUESTION, ANSWER = said("user", "What?"), said("assistant", "This.")
WRONG = {
    "neither": ({"text": "hello"}, "neither `messages` nor `conversations`"),
    "no list": ({"messages": "hello"}, "give a list of turns"),
    "silent": ({"messages": [QUESTION]}, "no assistant turn"),
    "empty answer": ({"messages": [QUESTION, said("assistant", " ")]}, "no assistant turn"),
    "role": ({"messages": [said("narrator", "x"), ANSWER]}, "'narrator'; roles are"),
    "item": ({"messages": [said("user", {"type": "sound"}), ANSWER]}, "types are text, video and image"),
    "content": ({"messages": [{"role": "user", "content": 7}, ANSWER]}, "the content of a message is 7"),
    "too few": ({"messages": [said("user", {"type": "video"}), ANSWER]}, "room for 1 videos, 0 are given"),
    "too many": ({"messages": [QUESTION, ANSWER], "video": "a.mp4"}, "room for 0 videos, 1 are given"),
    "no path": ({"messages": [said("user", video({"start": 1})), ANSWER]}, "names no video"),
    "value": ({"conversations": [{"from": "human", "value": None}]}, "give a text"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_what_is_wrong_with_an_example_is_said(mistake):
    example, message = WRONG[mistake]
    with pytest.raises(ExampleError, match=message):
        to_messages(example)


# --- labels -----------------------------------------------------------------------------------------------------------

TEMPLATES = {
    "qwen2-vl": (CHAT_TEMPLATE, "<|im_end|>"),
    "marked": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'][0]['text'] }}<|im_end|>{% endgeneration %}\n"
        "{% else %}{% for c in m['content'] %}{% if c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "llama-2": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'][0]['text'] }}<|endoftext|>"
        "{% else %}[INST]{% for c in m['content'] %}{% if c['type'] == 'video' %}<|vision_start|><|vision_end|>"
        "{% else %} {{ c['text'] }}{% endif %}{% endfor %} [/INST]{% endif %}{% endfor %}",
        "<|endoftext|>",
    ),
    "vicuna": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}ASSISTANT:{{ m['content'][0]['text'] }}<|endoftext|>"
        "{% else %}USER:{% for c in m['content'] %}{% if c['type'] == 'video' %}<|vision_start|><|vision_end|>"
        "{% else %} {{ c['text'] }}{% endif %}{% endfor %} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        "<|endoftext|>",
    ),
}  # fmt: skip
ANSWERS = ["A square: it moves.", "naïve 视频\n\n  twice", "To the right."]


@pytest.fixture(scope="module")
def processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint)


def conversation(clip=None):
    turns = []
    for index, answer in enumerate(ANSWERS):
        media = [video(str(clip), fps=4.0)] if clip is not None and index != 1 else []
        turns += [said("user", *media, f"Question {index}, assistant?"), said("assistant", answer)]
    return {"messages": turns}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("seen", [False, True], ids=["text", "videos"])
def test_labels_are_the_answers_with_their_ends(name, seen, processor, clip):
    template, end = TEMPLATES[name]
    before, processor.chat_template = processor.chat_template, template
    try:
        sample = ConversationEncoder(processor)(conversation(clip if seen else None))
    finally:
        processor.chat_template = before
    labels, ids = sample["labels"], sample["input_ids"]
    spoken = labels != -100
    assert torch.equal(labels[spoken], ids[spoken])
    runs = torch.split(ids, torch.unique_consecutive(spoken, return_counts=True)[1].tolist())
    answers = [processor.tokenizer.decode(run) for run in runs[1::2]]
    assert answers == [answer + end for answer in ANSWERS]
    assert not spoken[0] and ("video_grid_thw" in sample) == seen


def test_a_template_that_renders_turns_anew_is_refused(processor):
    template = (
        "{% for m in messages %}{{ m['role'] }}: {% if not loop.last and m['role'] == 'assistant' %}(left out)"
        "{% else %}{{ m['content'][0]['text'] }}{% endif %}\n{% endfor %}"
    )
    before, processor.chat_template = processor.chat_template, template
    try:
        with pytest.raises(ExampleError, match="generation"):
            spoken_parts(processor, to_messages(conversation()))
    finally:
        processor.chat_template = before


def test_what_the_template_refuses_is_no_example(processor):
    template = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('begin with a system turn') }}{% endif %}"
    for marks in ("", "{% generation %}{% endgeneration %}"):
        before, processor.chat_template = processor.chat_template, template + marks
        try:
            with pytest.raises(ExampleError, match="refuses it: begin with a system turn"):
                ConversationEncoder(processor).plan(conversation())
        finally:
            processor.chat_template = before


def test_nobody_answers_nothing(processor):
    with pytest.raises(ExampleError, match="speaks first"):
        spoken_parts(processor, [ANSWER])


def test_an_answer_that_is_also_in_the_question_is_labelled_once(processor):
    example = {"messages": [said("user", "Say: yes<|im_end|>\n<|im_start|>assistant\nyes"), said("assistant", "yes")]}
    sample = ConversationEncoder(processor)(example)
    labels = sample["labels"]
    assert processor.tokenizer.decode(labels[labels != -100]) == "yes<|im_end|>"
    assert (labels[-3:] == -100).sum() == 1  # the line break after it


def test_named_chat_templates(checkpoint):
    processor = AutoProcessor.from_pretrained(checkpoint)
    example = {"messages": [said("user", "What?"), said("assistant", "This.")]}
    labels = ConversationEncoder(processor)(example)["labels"]
    processor.chat_template = {"default": processor.chat_template, "rag": "{{ documents }}"}
    assert torch.equal(ConversationEncoder(processor)(example)["labels"], labels)
    processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template .* set its chat_template"):
        ConversationEncoder(processor)(example)
