"""The strip of the page that shows where the model looked: a curve over time, and the moments that counted most.

What is unusual: it is plain HTML, pictures included, so a page can show it as it is. What can be clicked carries
`data-medium` and `data-seconds` (or `data-span` for a whole curve), from which `SEEK` tells the page what was clicked.
"""

import base64
import io
import math
from html import escape
from typing import Any

from PIL import Image

from vamba.where import Moment, Where, clock


MOMENTS = 6
FRAMES = 12  # of a strip
THUMBNAIL = (192, 144)  # pixels at most
WIDTH, HEIGHT = 1000, 100  # of a curve, in units of its drawing

# Tells the page which medium was clicked, which then shows it, and seeks in it: now, and if it has to be loaded, then.
SEEK = """
element.addEventListener('click', event => {
  const target = event.target.closest('[data-medium]');
  if (!target) return;
  const box = target.getBoundingClientRect();
  const {medium, seconds, span} = target.dataset;
  const second = +(seconds ?? span * (event.clientX - box.left) / box.width);
  const player = document.querySelector('#player'), video = player.querySelector('video');
  player.addEventListener('loadedmetadata', loaded => { loaded.target.currentTime = second; },
    {capture: true, once: true, signal: AbortSignal.timeout(5000)});
  if (video) video.currentTime = second;
  trigger('click', {medium: +medium});
});
"""


def short(seconds: float) -> str:
    """A time without hours where there are none: mm:ss, with tenths within the first minute."""
    return clock(seconds).removeprefix("0:")


def timeline_html(where: Where, strips: dict[int, str]) -> str:
    """Where the model looked: for each video a curve over its time and its frames, and the top moments of all.

    Args:
        strips: the frames of each medium in HTML, which this fills, to be used again for the next answer.
    """
    moments = sorted(where.moments(MOMENTS), key=lambda moment: (moment.medium, moment.peak))
    strongest = max((moment.share for moment in moments), default=0.0)
    for medium in range(len(where.curves)):
        strips[medium] = strips.get(medium) or _strip(where, medium)
    curves = [_curve(where, medium, moments, strips[medium]) for medium in range(len(where.curves))]
    buttons = [_button(where, moment, moment.share == strongest) for moment in moments]
    return (
        f'<div class="where"><p>Where it looked for “{escape(where.question)}”</p>{"".join(curves)}'
        f'<div class="moments">{"".join(buttons)}</div><p class="how">{escape(where.reduction)}</p></div>'
    )


def _begin(where: Where, medium: int) -> float:
    """When a video begins, on the clock of the memory."""
    return float(where.curves[medium].seconds[0, 0])


def _name(where: Where, medium: int) -> str:
    """Which of several videos and images it is."""
    return f"{where.curves[medium].kind} {medium + 1}: " if len(where.curves) > 1 else ""


def _strip(where: Where, medium: int) -> str:
    """Frames spread over a video, each in its place; nothing where it cannot be read."""
    count = 0 if where.unread else min(FRAMES, len(where.curves[medium].weights))
    patches = [int((place + 0.5) / count * len(where.curves[medium].weights)) for place in range(count)]
    urls = (_data_url(where.frame(medium, patch, width=THUMBNAIL[0])) for patch in patches)
    return "".join(f'<img alt="" src="{url}"/>' for url in urls)


def _curve(where: Where, medium: int, moments: list[Moment], strip: str) -> str:
    """How much was looked at each time of one video, as steps, the top moments behind it; nothing for an image."""
    curve, begin = where.curves[medium], _begin(where, medium)
    length = float(curve.seconds[-1, 1]) - begin
    if not length > 0:  # an image, or unknown
        return ""

    def x(seconds: Any) -> str:
        return f"{WIDTH * (float(seconds) - begin) / length:.1f}"

    highest = max(float(of.heights.max()) for of in where.curves)
    steps = "".join(
        f"L{x(start)} {y:.1f}L{x(end)} {y:.1f}"
        for (start, end), y in zip(curve.seconds, (HEIGHT * (1 - 0.95 * height / highest) for height in curve.heights))
    )
    marks = "".join(
        f'<path class="mark" d="M{x(moment.start)} 0V{HEIGHT}H{x(moment.end)}V0Z"/>'
        for moment in moments
        if moment.medium == medium
    )
    ticks = "".join(f"<span>{short(length * part / 4)}</span>" for part in range(5))
    return (
        f'<div class="curve" data-medium="{medium}" data-span="{length:.3f}">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="attention over time">'
        f'{marks}<path d="M0 {HEIGHT}{steps}L{WIDTH} {HEIGHT}Z"/></svg><div class="strip">{strip}</div></div>'
        f'<div class="ticks">{ticks}</div>'
    )


def _button(where: Where, moment: Moment, is_strongest: bool) -> str:
    begin = _begin(where, moment.medium)
    label = _name(where, moment.medium)
    if where.curves[moment.medium].kind == "video":
        label += f"{short(moment.start - begin)} – {short(moment.end - begin)}"
    picture = "" if where.unread else f'<img alt="" src="{_data_url(where.picture(moment))}"/>'
    peak = float(where.curves[moment.medium].seconds[moment.peak, 0])
    seconds = 0.0 if math.isnan(peak) else peak - begin
    kind = "strongest" if is_strongest else ""
    return (
        f'<button type="button" class="{kind}" data-medium="{moment.medium}" data-seconds="{seconds:.3f}">'
        f"{picture}<b>{label}</b><span>{moment.share:.0%}</span></button>"
    )


def _data_url(picture: Image.Image) -> str:
    picture = picture.convert("RGB")
    picture.thumbnail(THUMBNAIL)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
