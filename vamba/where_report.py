"""Writes what `Where` found as a page or a picture: frames with the curve beneath, the top moments, their heat maps.

The page is one file without scripts: pictures are data URIs, the curve is SVG, and links lead from the curve to the
moments. It follows the reader's choice of light or dark. The picture is drawn by matplotlib.
"""

import base64
import html
import io
import os
from typing import Any

from PIL import Image

from .files import written_whole
from .where import Curve, Moment, Where, check_report_path, clock, overlaid


STRIP = 12  # frames of a strip
THUMBNAIL = 160  # pixels, as wide as a frame of a strip
MOMENTS = 5
GREY = "The source of some frames cannot be read again: they are grey tiles. Name the file with `video`."


def save(where: Where, path: str | os.PathLike, video: Any = None) -> None:
    """See `Where.save`."""
    path = check_report_path(path)
    if path.suffix.lower() == ".html":
        whole = page(where, video)
        with written_whole(path) as partial:
            partial.write_text(whole, encoding="utf-8")
    else:
        drawn = figure(where, video)
        with written_whole(path) as partial:
            drawn.savefig(partial, dpi=110)


def _places(curve: Curve) -> list[float]:
    """Where each temporal patch starts and the last ends, from 0 to 1: by time, or in order where that is unknown."""
    starts, end = curve.seconds[:, 0], float(curve.seconds[-1, 1])
    if curve.seconds.isnan().any() or end <= float(starts[0]):
        return [at / len(starts) for at in range(len(starts) + 1)]
    first = float(starts[0])
    return [*((starts - first) / (end - first)).tolist(), 1.0]


def _strip(curve: Curve) -> list[int]:
    """The temporal patches shown above a curve: those at the middles of equal parts of it."""
    places = _places(curve)
    count = min(STRIP, len(curve.weights))
    return [max(i for i, place in enumerate(places[:-1]) if place <= (part + 0.5) / count) for part in range(count)]


def _title(where: Where, medium: int) -> str:
    curve = where.curves[medium]
    kind = curve.kind.capitalize()
    share = float(curve.weights.sum())
    return kind if len(where.curves) == 1 else f"{kind} {medium + 1}: {share:.0%} of what was looked at"


def _highest(where: Where) -> float:
    """What all curves are drawn against."""
    return max(1e-12, *(float(curve.heights.max()) for curve in where.curves))


# --- the page --------------------------------------------------------------------------------------------------------


def page(where: Where, video: Any = None) -> str:
    """The whole page."""
    moments = where.moments(MOMENTS)
    media = "\n".join(_medium(where, medium, moments, video) for medium in range(len(where.curves)))
    cards = "\n".join(_card(where, number, moment, video) for number, moment in enumerate(moments, 1))
    note = f'<p class="note">{html.escape(GREY)}</p>' if where.unread and video is None else ""
    return _PAGE.format(
        style=_STYLE,
        question=html.escape(where.question),
        answer=html.escape(where.answer),
        media=media,
        cards=cards,
        note=note,
        reduction=html.escape(where.reduction),
    )


def _medium(where: Where, medium: int, moments: list[Moment], video: Any) -> str:
    curve = where.curves[medium]
    frames = []
    for patch in _strip(curve):
        frame = where.frame(medium, patch, video, THUMBNAIL)
        name = html.escape(clock(float(curve.seconds[patch, 0])))
        heat = _data_uri(overlaid(frame, curve.heat[patch], curve.heat.max()))
        both = f'<img src="{_data_uri(frame)}" alt="{name}"><img class="heat" src="{heat}" alt="">'
        frames.append(f"<figure>{both}</figure>")
    columns = f"grid-template-columns:repeat({len(frames)},1fr)"
    here = [(number, moment) for number, moment in enumerate(moments, 1) if moment.medium == medium]
    drawn = _svg(curve, here, _highest(where)) if len(curve.weights) > 1 else ""
    wide = ' style="min-width:40rem"' if len(frames) > 3 else ' style="max-width:20rem"'
    return (
        f'<section><h2>{_title(where, medium)}</h2><div class="scroll"><div{wide}>'
        f'<div class="strip" style="{columns}">{"".join(frames)}</div>{drawn}</div></div></section>'
    )


def _svg(curve: Curve, moments: list[tuple[int, Moment]], top: float) -> str:
    """The curve over time, 1000 x 150, with its moments marked and the time beneath."""
    width, height = 1000, 120
    places, heights = [width * place for place in _places(curve)], curve.heights
    tops = (height - (height - 18) * heights / top).tolist()
    steps = " ".join(f"{a:.1f},{y:.1f} {b:.1f},{y:.1f}" for a, b, y in zip(places, places[1:], tops))
    parts = []
    for number, moment in moments:
        a, b = (places[patch] for patch in moment.patches)
        middle = min(max((places[moment.peak] + places[moment.peak + 1]) / 2, 12), width - 12)
        parts.append(
            f'<a href="#moment-{number}"><rect class="band" x="{a:.1f}" y="0" width="{max(b - a, 4):.1f}" '
            f'height="{height}"/><text class="number" x="{middle:.1f}" y="13">{number}</text></a>'
        )
    known = not curve.seconds.isnan().any()
    first, last = float(curve.seconds[0, 0]), float(curve.seconds[-1, 1])
    for part in range(5):
        label = clock(first + (last - first) * part / 4) if known else f"{round(len(heights) * part / 4)}"
        anchor = {0: "start", 4: "end"}.get(part, "middle")
        parts.append(f'<text x="{width * part / 4:.0f}" y="{height + 20}" text-anchor="{anchor}">{label}</text>')
    return (
        f'<svg viewBox="0 0 {width} {height + 28}" role="img" aria-label="Share of the attention over time">'
        f'<polygon class="area" points="0,{height} {steps} {width},{height}"/>'
        f'<line x1="0" x2="{width}" y1="{height}" y2="{height}"/>{"".join(parts)}</svg>'
    )


def _card(where: Where, number: int, moment: Moment, video: Any) -> str:
    when = "image" if where.curves[moment.medium].kind == "image" else moment.when
    medium = f" · {where.curves[moment.medium].kind} {moment.medium + 1}" if len(where.curves) > 1 else ""
    picture = _data_uri(where.picture(moment, video))
    return (
        f'<figure class="card" id="moment-{number}"><a href="#moment-{number}"><img src="{picture}" '
        f'alt="Frame at {html.escape(when)} with what was looked at"></a><figcaption><b>{number}</b> '
        f"<time>{html.escape(when)}</time>{medium}<span>{moment.share:.0%}</span></figcaption></figure>"
    )


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


_STYLE = """
:root{--back:#fafaf8;--front:#1c1c1a;--soft:#6b6a66;--line:#d9d7d1;--card:#fff;--warm:#e4572e}
@media(prefers-color-scheme:dark){:root{--back:#171716;--front:#ecebe7;--soft:#a3a19b;--line:#3a3936;--card:#222120;
--warm:#ff8352}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 3rem;max-width:68rem;background:var(--back);color:var(--front);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.35rem;line-height:1.3;margin:0}h2{font-size:1rem;margin:1.6rem 0 .5rem}
.answer{font-size:1.15rem;margin:.4rem 0 0;border-left:4px solid var(--warm);padding-left:.7rem;white-space:pre-wrap}
.scroll{overflow-x:auto}.strip{display:grid;gap:3px}
figure{margin:0;position:relative}img{display:block;width:100%;border-radius:4px}
.strip .heat{position:absolute;inset:0;opacity:0}#heat:checked~main .strip .heat{opacity:1}
svg{display:block;width:100%;margin-top:4px;font-size:15px}svg text{fill:var(--soft)}line{stroke:var(--line)}
.area{fill:var(--warm);fill-opacity:.75}.band{fill:var(--warm);fill-opacity:.14}.band:hover{fill-opacity:.3}
svg .number{fill:var(--front);font-weight:700;text-anchor:middle}
.cards{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,17rem),1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;overflow:hidden}
.card:target{border-color:var(--warm);box-shadow:0 0 0 2px var(--warm)}.card img{border-radius:0}
figcaption{padding:.5rem .7rem;display:flex;gap:.5rem;align-items:baseline}
figcaption span{margin-left:auto;color:var(--soft)}
time{font-variant-numeric:tabular-nums}.note,footer,label{color:var(--soft);font-size:.9rem}footer{margin-top:2rem}
"""
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark"><title>Where did it look? {question}</title><style>{style}</style></head>
<body><header><h1>{question}</h1><p class="answer">{answer}</p></header>
<p></p><input type="checkbox" id="heat"> <label for="heat">heat maps over the frames</label>
<main>{media}
<section><h2>Where it looked most</h2><div class="cards">{cards}</div></section></main>
{note}<footer>{reduction} The curve is the share of what was looked at, by time; a moment reaches to half its peak.
</footer>
</body></html>
"""


# --- the picture -----------------------------------------------------------------------------------------------------


def figure(where: Where, video: Any = None) -> Any:
    """The same as a matplotlib figure."""
    from matplotlib.figure import Figure

    moments = where.moments(MOMENTS)
    drawn = Figure(figsize=(12, 1.4 + 2.9 * len(where.curves) + 2.4), layout="constrained")
    said = f"{where.question}\n{where.answer}".replace("$", r"\$")  # no formula
    drawn.suptitle(said, fontsize=13, wrap=True)
    drawn.supxlabel(where.reduction, fontsize=8, color="gray", wrap=True)
    ratios = [*[2.9] * len(where.curves), 2.4]
    *rows, last = drawn.subfigures(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]
    for medium, row in enumerate(rows):
        _draw_medium(row, where, medium, [(n, m) for n, m in enumerate(moments, 1) if m.medium == medium], video)
    for number, (axes, moment) in enumerate(zip(last.subplots(1, MOMENTS), moments), 1):
        axes.imshow(where.picture(moment, video))
        axes.set_title(f"{number}: {moment.when} ({moment.share:.0%})", fontsize=9)
    for axes in last.axes:
        axes.set_axis_off()
    return drawn


def _draw_medium(part: Any, where: Where, medium: int, moments: list[tuple[int, Moment]], video: Any) -> None:
    curve, shown = where.curves[medium], _strip(where.curves[medium])
    above, below = part.subfigures(2, 1, height_ratios=[1, 1.3])
    above.suptitle(_title(where, medium), fontsize=10)
    for axes, patch in zip(above.subplots(1, len(shown), squeeze=False)[0], shown):
        axes.imshow(where.frame(medium, patch, video, THUMBNAIL))
        axes.set_axis_off()
    if len(curve.weights) == 1:
        return
    places, axes, top = _places(curve), below.subplots(), _highest(where)
    axes.stairs(curve.heights.numpy(), places, fill=True, color="#e4572e", alpha=0.8)
    for number, moment in moments:
        a, b = (places[patch] for patch in moment.patches)
        axes.axvspan(a, b, color="#e4572e", alpha=0.15)
        axes.text((a + b) / 2, 1.04 * top, str(number), ha="center", weight="bold")
    known = not curve.seconds.isnan().any()
    first, last = float(curve.seconds[0, 0]), float(curve.seconds[-1, 1])
    ticks = [part / 4 for part in range(5)]
    axes.set_xticks(ticks, [clock(first + (last - first) * tick) if known else f"{tick:.0%}" for tick in ticks])
    axes.set(xlim=(0, 1), ylim=(0, 1.2 * top), yticks=[], ylabel="looked at")
