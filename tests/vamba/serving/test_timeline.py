"""The strip of moments as HTML."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from vamba.demo.videos import render, stories, write_video
from vamba.serving.timeline import short, timeline_html
from vamba.where import Curve, Source, Where


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "video.mp4", render(stories(1, seed=0)[0]), fps=4)


def looked(video: Path | None) -> Where:
    """Two videos of four seconds, one after the other, four moments in each; the seventh of all counts most."""
    weights = [torch.tensor([0.1, 0.0, 0.1, 0.0]), torch.tensor([0.05, 0.1, 0.6, 0.05])]
    starts = [torch.arange(4.0, dtype=torch.float64) + begin for begin in (0, 4)]
    curves = [
        Curve("video", torch.stack([start, start + 1], 1), weight, weight[:, None, None].expand(4, 2, 2) / 4)
        for start, weight in zip(starts, weights)
    ]
    sources = [Source(medium, 0, 4.0 * medium, video, {}) for medium in (0, 1)]
    return Where("<script>alert(1)</script>?", "yes", "the mean", curves, torch.cat(weights)[None], sources)


def test_everything_that_can_be_clicked_names_a_medium_and_a_time_and_the_question_is_text(video):
    strips: dict[int, str] = {}
    html = timeline_html(looked(video), strips)
    page = ElementTree.fromstring(html)
    assert page.find(".//script") is None and "&lt;script&gt;" in html
    curves = page.findall("./div[@class='curve']")
    assert [(curve.get("data-medium"), float(curve.get("data-span"))) for curve in curves] == [("0", 4), ("1", 4)]
    assert [len(curve.findall("./div/img")) for curve in curves] == [4, 4]
    marks = [mark.get("d") for mark in curves[1].findall(".//*[@class='mark']")]
    assert marks == ["M500.0 0V100H750.0V0Z"]  # the third quarter
    buttons = page.findall(".//button")  # in the time of each video
    assert [(b.get("data-medium"), b.get("data-seconds")) for b in buttons] == [
        ("0", "0.000"),
        ("0", "2.000"),
        ("1", "2.000"),
    ]
    assert [b.get("class") for b in buttons] == ["", "", "strongest"]
    assert "".join(buttons[-1].itertext()) == "video 2: 00:02.0 – 00:03.060%"
    assert all(image.get("src").startswith("data:image/jpeg;base64,") for image in page.iter("img"))
    strips[0] = "<i>kept</i>"
    assert "<i>kept</i>" in timeline_html(looked(video), strips)


def test_what_cannot_be_read_again_has_no_pictures():
    page = ElementTree.fromstring(timeline_html(looked(None), {}))
    assert page.find(".//img") is None and len(page.findall(".//button")) == 3


def test_a_video_whose_times_are_unknown_has_no_curve(video):
    where = looked(video)
    where.curves[1].seconds[:] = torch.nan
    page = ElementTree.fromstring(timeline_html(where, {}))
    assert len(page.findall("./div[@class='curve']")) == 1
    assert page.findall(".//button")[-1].get("data-seconds") == "0.000"


def test_short():
    assert [short(seconds) for seconds in (12.34, 754, 3723.4)] == ["00:12.3", "12:34", "1:02:03"]
