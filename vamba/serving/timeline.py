"""The strip of the page that shows where the model looked: a curve over time, and the moments that counted most.

What is unusual: it is plain HTML, pictures included, so a page can show it as it is. What can be clicked carries
`data-medium` and `data-seconds` (or `data-start` and `data-span` for a whole curve), from which `SEEK` tells the page.
"""

import base64
import io
from html import escape
from typing import Any

from PIL import Image


MOMENTS = 6
THUMBNAIL = (192, 144)  # pixels at most
SHORT = 60  # seconds of a video whose times are shown with tenths
WIDTH, HEIGHT = 1000, 100  # of a curve, in units of its drawing

# Tells the page what was clicked.
SEEK = """
element.addEventListener('click', event => {
  const target = event.target.closest('[data-medium]');
  if (!target) return;
  const {medium, seconds, start, span} = target.dataset;
  const box = target.getBoundingClientRect();
  const share = (event.clientX - box.left) / box.width;
  trigger('click', {medium: +medium, seconds: seconds ? +seconds : +start + share * +span});
});
"""


def clock(seconds: float, tenths: bool = False) -> str:
    """12.3 -> 0:12 or 0:12.3, 3723 -> 1:02:03."""
    minutes, rest = divmod(round(float(seconds), 1) if tenths else round(seconds), 60)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{minutes:02d}:" if hours else f"{minutes}:"
    return (f"{hours}:" if hours else "") + text + (f"{rest:04.1f}" if tenths else f"{rest:02.0f}")


def timeline_html(where: Any, question: str, has_pictures: bool = True) -> str:
    """Where the model looked while it answered a question.

    Args:
        where: what `VideoChat.where` returns.
        has_pictures: whether the video can still be read.
    """
    moments = sorted(where.moments(MOMENTS), key=lambda moment: (moment.medium, moment.start))
    strongest = max((moment.share for moment in moments), default=0)
    curves = [_curve(curve, index, moments) for index, curve in enumerate(where.curves)]
    tenths = all(len(curve.seconds) == 0 or curve.seconds[-1][1] < SHORT for curve in where.curves)
    buttons = [
        _button(where, moment, tenths, moment.share == strongest, has_pictures) for moment in moments
    ]
    return (
        f'<div class="where"><p>Where it looked for “{escape(question)}”</p>{"".join(curves)}'
        f'<div class="moments">{"".join(buttons)}</div></div>'
    )


def _curve(curve: Any, medium: int, moments: list) -> str:
    """The weight of each moment of one medium, as steps, and the strongest moments behind it."""
    spans = [(float(start), float(end)) for start, end in curve.seconds]
    weights = [float(weight) for weight in curve.weights]
    if not spans:
        return ""
    start = spans[0][0]
    length, highest = max(spans[-1][1] - start, 1e-6), max(*weights, 1e-9)

    def x(seconds: float) -> float:
        return round(WIDTH * (seconds - start) / length, 1)

    steps = "".join(
        f"L{x(begin)} {y:.1f}L{x(end)} {y:.1f}"
        for (begin, end), y in zip(spans, (HEIGHT * (1 - 0.95 * weight / highest) for weight in weights))
    )
    marks = "".join(
        f'<rect x="{x(moment.start)}" width="{max(x(moment.end) - x(moment.start), 2):.1f}" height="{HEIGHT}"/>'
        for moment in moments
        if moment.medium == medium
    )
    ticks = "".join(f"<span>{clock(start + length * part / 4, length < SHORT)}</span>" for part in range(5))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="attention over time" '
        f'data-medium="{medium}" data-start="{start:.3f}" data-span="{length:.3f}">{marks}'
        f'<path d="M0 {HEIGHT}{steps}L{WIDTH} {HEIGHT}Z"/></svg><div class="ticks">{ticks}</div>'
    )


def _button(where: Any, moment: Any, tenths: bool, is_strongest: bool, has_picture: bool) -> str:
    picture = f'<img alt="" src="{_data_url(where.picture(moment))}">' if has_picture else ""
    label = f"{clock(moment.start, tenths)} – {clock(moment.end, tenths)}"
    return (
        f'<button type="button" class="{"strongest" if is_strongest else ""}" data-medium="{moment.medium}" '
        f'data-seconds="{moment.start:.3f}" title="Show {label}">{picture}'
        f"<b>{label}</b><span>{moment.share:.0%}</span></button>"
    )


def _data_url(picture: Image.Image) -> str:
    picture = picture.convert("RGB")
    picture.thumbnail(THUMBNAIL)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
