"""The strip of moments as HTML."""

import re
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from vamba.serving.timeline import clock, timeline_html


@pytest.mark.parametrize(
    "seconds, tenths, text",
    [(0, True, "0:00.0"), (12.34, True, "0:12.3"), (59.96, True, "1:00.0"), (59.6, False, "1:00"), (754, False, "12:34"),
     (3723.4, False, "1:02:03"), (np.float64(5), False, "0:05")],
)  # fmt: skip
def test_clock(seconds, tenths, text):
    assert clock(seconds, tenths) == text


def looked():
    """Two videos of four moments; the strongest is the third of the second."""
    seconds = np.array([[0, 1], [1, 2], [2, 3], [3, 4]], float)
    weights = [np.array([0.1, 0.0, 0.1, 0.0]), np.array([0.1, 0.1, 0.6, 0.0])]
    moments = [
        SimpleNamespace(start=2.0, end=3.0, share=0.6, medium=1),
        SimpleNamespace(start=0.0, end=1.0, share=0.1, medium=0),
    ]
    return SimpleNamespace(
        curves=[SimpleNamespace(seconds=seconds, weights=w) for w in weights],
        moments=lambda count: moments[:count],
        picture=lambda moment: Image.new("RGBA", (640, 360), "red"),
    )


def test_everything_that_can_be_clicked_names_a_medium_and_a_time_and_the_question_is_text():
    html = timeline_html(looked(), "<script>alert(1)</script>?")
    page = ElementTree.fromstring(re.sub(r"(<img [^>]*)>", r"\1/>", html))  # well-formed
    assert page.find(".//script") is None and "&lt;script&gt;" in html
    curves = page.findall("svg")
    assert [curve.get("data-medium") for curve in curves] == ["0", "1"]
    assert float(curves[1].get("data-start")) == 0 and float(curves[1].get("data-span")) == 4
    buttons = page.findall(".//button")
    assert [(b.get("data-medium"), float(b.get("data-seconds"))) for b in buttons] == [("0", 0.0), ("1", 2.0)]
    assert [b.get("class") for b in buttons] == ["", "strongest"]
    assert all(b.find("img").get("src").startswith("data:image/jpeg;base64,") for b in buttons)
    assert "60%" in html and "0:02.0 – 0:03.0" in html
    marks = curves[1].findall("rect")
    assert [(float(m.get("x")), float(m.get("width"))) for m in marks] == [(500, 250)]


def test_a_memory_from_a_file_has_no_pictures():
    assert "<img" not in timeline_html(looked(), "?", has_pictures=False)
