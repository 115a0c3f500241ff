"""Where an answer looked: curves over the time of what was watched, its moments, their pictures, and reports."""

import re
import sys
from html import escape

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vamba
from vamba.where import Curve, Source, Where, clock


GREEDY = {"max_new_tokens": 4, "do_sample": False}
BLANK = {"question": "Who?", "answer": "I.", "reduction": "none", "by_token": torch.ones(1, 1), "sources": []}


@pytest.fixture(scope="module")
def chat(checkpoint) -> vamba.VideoChat:
    processor = AutoProcessor.from_pretrained(checkpoint)
    return vamba.VideoChat(AutoModelForImageTextToText.from_pretrained(checkpoint).eval(), processor)


def curve(*weights, seconds=None, kind="video") -> Curve:
    weights = torch.tensor(weights, dtype=torch.float32)
    starts = torch.arange(len(weights), dtype=torch.float64)[:, None]
    seconds = starts + torch.tensor([0.0, 1.0]) if seconds is None else torch.tensor(seconds, dtype=torch.float64)
    return Curve(kind, seconds, weights, weights[:, None, None].expand(-1, 2, 3) / 6)


def test_what_eager_attention_reports(chat, clip):
    """Of a video, an image and a video, and of an earlier answer in a conversation, streamed or not."""
    chat.watch(clip, fps=8, progress=False)
    chat.watch(Image.new("RGB", (84, 56), "red"), append=True)
    chat.watch(clip, num_frames=3, append=True, progress=False)
    first = chat.ask("What happens?", **GREEDY)
    "".join(chat.ask("And then?", stream=True, **GREEDY))
    where, told = chat.where(0, by="weights"), chat.answers[0]
    assert (where.question, where.answer) == ("What happens?", first) and "weights" in where.reduction
    twin = AutoModelForImageTextToText.from_pretrained(chat.model.name_or_path, attn_implementation="eager").eval()
    with torch.no_grad():
        text = torch.cat([told.prompt, told.ids[:, :-1]], 1)
        output = twin(text, past_key_values=chat.memory.fork(), output_attentions=True)
    weights = torch.stack(output.cross_attentions)[:, 0, :, told.prompt.shape[1] - 1 :].mean((0, 1, 2))
    heat = torch.cat([of.heat.flatten() for of in where.curves])
    torch.testing.assert_close(heat, weights, rtol=1e-5, atol=1e-5)
    assert [of.kind for of in where.curves] == ["video", "image", "video"]
    for of, (_, t, h, w), times in zip(where.curves, chat.memory.media[0], chat.memory.times[0]):
        assert of.heat.shape == (t, h // 2, w // 2) and torch.equal(of.seconds.nan_to_num(), times.nan_to_num())
        torch.testing.assert_close(of.weights, of.heat.sum((1, 2)))
    assert where.by_token.shape == (told.ids.shape[1], 8 + 1 + 2) and len(chat.answers) == 2
    assert chat.where().question == "And then?" and len(chat.history) == 4
    assert chat.ask("What happens?", **GREEDY) and chat.memory.get_seq_length() == 0  # nothing is left behind


def test_what_is_not_known_any_more(chat, clip, ma2mba):
    with pytest.raises(vamba.UserError, match="Nothing was watched yet"):
        vamba.VideoChat(chat.model, chat.processor).where()
    chat.watch(clip, progress=False)
    with pytest.raises(vamba.UserError, match="0 answers are known; ask first"):
        chat.where()
    chat.ask("What happens?", **GREEDY)
    chat.watch(clip, append=True, progress=False)
    with pytest.raises(vamba.UserError, match="has changed since this answer; ask again"):
        chat.where()
    with pytest.raises(vamba.UserError, match="answer=7: 1 answers"):
        chat.where(7)
    model, processor = AutoModelForImageTextToText.from_pretrained(ma2mba).eval(), AutoProcessor.from_pretrained(ma2mba)
    other = vamba.VideoChat(model, processor)
    other.watch(clip, num_frames=4, progress=False)
    other.ask("What happens?", **GREEDY)
    with pytest.raises(vamba.UserError, match="no attention"):
        other.where()


def test_moments_are_peaks_apart_from_each_other():
    where = Where(**BLANK, curves=[curve(0.01, 0.2, 0.15, 0.02, 0.1, 0.04, 0.001, 0.002), curve(0.06, 0.3)])
    found = [(m.medium, m.patches, m.peak, round(m.share, 3), m.start, m.end) for m in where.moments()]
    assert found == [
        (1, (1, 2), 1, 0.3, 1.0, 2.0),
        (0, (1, 3), 1, 0.35, 1.0, 3.0),
        (0, (4, 5), 4, 0.1, 4.0, 5.0),  # what is next to it is below half of it, and the last is too low
    ]
    assert where.moments(1) == where.moments()[:1] and where.moments(0) == []
    assert str(where.moments()[1]) == "0:00:01.0 – 0:00:03.0  35%"
    flat = Where(**BLANK, curves=[curve(0.25, 0.25, 0.25, 0.25)]).moments()
    assert [(m.patches, m.peak) for m in flat] == [((0, 4), 0)]


def test_what_lasts_longer_counts_by_the_second():
    lasting = curve(0.4, 0.3, 0.3, seconds=[[0, 10], [10, 11], [11, 12]])
    assert Where(**BLANK, curves=[lasting]).moments(1)[0].peak == 1
    torch.testing.assert_close(lasting.heights, torch.tensor([0.04, 0.3, 0.3]))
    unknown = curve(0.4, 0.6, seconds=[[float("nan")] * 2] * 2)
    assert (
        torch.equal(unknown.heights, unknown.weights)
        and clock(Where(**BLANK, curves=[unknown]).moments(1)[0].start) == "?"
    )


def test_frames_are_read_again_where_they_were_shown(chat, clip, tmp_path):
    """The square of the clip moves three pixels a frame: it says which frame a picture is of."""

    def left_side(picture) -> float:
        red = torch.tensor(list(picture.resize((64, 64)).crop((0, 30, 64, 31)).getchannel("R").getdata()))
        return (red > 140).nonzero()[0].item()

    chat.watch(clip, fps=8, end=1.0, progress=False)
    chat.watch(clip, fps=8, start=1.0, append=True, continue_video=True, progress=False)
    chat.watch(clip, fps=4, start=0.5, append=True, progress=False)
    chat.ask("What happens?", **GREEDY)
    where = chat.where()
    for medium, patch, frame in ((0, 0, 0), (0, 3, 6), (0, 4, 8), (0, 6, 12), (1, 0, 4), (1, 2, 12)):
        assert abs(left_side(where.frame(medium, patch)) - 3 * frame) <= 2, (medium, patch)
    picture = where.picture(where.moments()[0], width=200)
    assert picture.size == (200, 200) and not where.unread
    chat.memory.save(tmp_path / "m.safetensors")
    chat.memory = vamba.VideoMemory.load(tmp_path / "m.safetensors")
    with pytest.raises(vamba.UserError, match="has changed since"):
        chat.where()
    chat.ask("What happens?", **GREEDY)
    where = chat.where()
    tile = where.frame(0, 3)
    assert where.unread and tile.getpixel((3, 3)) == (128, 128, 128) and tile.getcolors(9999)[0][1] != (128, 128, 128)
    assert abs(left_side(where.frame(0, 3, video=clip)) - 18) <= 2
    chat.watch(Image.new("RGB", (84, 56), "red"), append=True)
    chat.ask("What happens?", **GREEDY)
    where = chat.where()
    assert where.frame(0, 3, video=clip).size and where.frame(2, 0, video=clip).getpixel((1, 1)) == (255, 0, 0)
    with pytest.raises(vamba.VideoReadError, match="nowhere"):
        where.frame(0, 3, video=tmp_path / "nowhere.mp4")


def test_a_clock_that_starts_anew_and_what_is_gone(chat, clip, tmp_path):
    """Of a file that continues another the second is read by its own clock; arrays and removed files are grey."""
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(clip.read_bytes())
    chat.watch(clip, fps=8, progress=False)
    chat.watch(copy, fps=8, append=True, continue_video=True, progress=False)
    source = chat.memory.sources[1]
    assert source == Source(0, 8, 2.0, copy, source.options, source.stamp) and chat.memory.times[0][0][-1].tolist() == [
        3.75,
        4.0,
    ]
    chat.watch(vamba.load_video(clip, fps=8)[0], fps=8, append=True, progress=False)
    chat.ask("What happens?", **GREEDY)
    where = chat.where()
    assert where.frame(0, 8).tobytes() == where.frame(0, 0).tobytes() != where.frame(0, 7).tobytes()
    copy.write_bytes(clip.read_bytes() + b" ")  # another file than was watched
    assert where.frame(0, 8).getpixel((1, 1)) == (128, 128, 128)
    copy.unlink()
    assert {where.frame(*of).getpixel((1, 1)) for of in ((0, 8), (1, 0))} == {(128, 128, 128)} and where.unread


def test_a_page_is_whole_and_says_what_it_shows(chat, clip, tmp_path):
    chat.watch(clip, fps=8, progress=False)
    chat.ask("<b>What</b> & why?", **GREEDY)
    where = chat.where(heads=[0, 2])
    where.save(tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert "&lt;b&gt;What&lt;/b&gt; &amp; why?" in page and "<b>What" not in page and escape(where.reduction) in page
    assert "heads 0, 2" in where.reduction and "grey tiles" not in page
    links, anchors = set(re.findall(r'href="#(moment-\d)"', page)), set(re.findall(r'id="(moment-\d)"', page))
    assert links == anchors == {f"moment-{n}" for n in range(1, len(where.moments()) + 1)}
    assert "0:00:00.0" in page and "0:00:02.0" in page and "<script" not in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # nothing else is asked for
    chat.memory.sources = []
    chat.where().save(tmp_path / "out.html")
    assert "grey tiles" in (tmp_path / "out.html").read_text()
    with pytest.raises(vamba.UserError, match=r"neither .html nor .png"):
        where.save(tmp_path / "out.jpg")
    with pytest.raises(vamba.UserError, match="no such folder"):
        where.save(tmp_path / "none" / "out.html")


def test_a_picture(chat, clip, tmp_path, monkeypatch):
    chat.watch(clip, fps=8, progress=False)
    chat.watch(Image.new("RGB", (84, 56), "red"), append=True)
    chat.ask("What is $a^$?", **GREEDY)  # no formula
    chat.where().save(tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(2**24)) > 50
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as where it is not installed
    with pytest.raises(vamba.UserError, match="needs matplotlib"):
        chat.where().save(tmp_path / "out.png")


def test_clocks():
    assert [clock(s) for s in (0, 59.94, 59.97, 61.2, 3725, float("nan"))] == [
        "0:00:00.0", "0:00:59.9", "0:01:00", "0:01:01", "1:02:05", "?",
    ]  # fmt: skip
