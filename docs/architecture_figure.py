"""Draws docs/architecture.svg: what a Vamba does with video and text, beside a Qwen2-VL and a Video-Ma2mba.

python docs/architecture_figure.py

What is unusual: it is narrow, with large letters, as phones show it at half its size, and it brings its own light
background, so it looks the same on a dark page.
"""

from pathlib import Path
from xml.sax.saxutils import escape


FIGURE = Path(__file__).with_name("architecture.svg")
WIDTH, HEIGHT = 640, 706
INK, GREY = "#22303c", "#5b6b78"
VIDEO, MAMBA, MEMORY, TEXT = "#d6e8f2", "#9fcbe0", "#f6d9a8", "#e3dcf3"  # fills of boxes
EDGES = {VIDEO: "#1f6f8b", MAMBA: "#1f6f8b", MEMORY: "#b8741a", TEXT: "#6a51a3"}
LEVELS = {236: "0", 398: "1", 566: "L-1"}  # where each level and its decoder layer stand


def text(x: float, y: float, words: str, size: int = 16, colour: str = INK, anchor: str = "middle", more="") -> str:
    place = f'x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"'
    return f"<text {place}{more}>{escape(words)}</text>"


def box(x: float, y: float, width: float, height: float, fill: str, words: str = "", size: int = 15) -> str:
    """A rounded box around (x, y), its centre, with one line of words."""
    place = f'x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}" rx="6"'
    drawn = f'<rect {place} fill="{fill}" stroke="{EDGES[fill]}" stroke-width="1.5"/>'
    return drawn + (text(x, y + size * 0.35, words, size) if words else "")


def arrow(x: float, y: float, to_x: float, to_y: float, colour: str = INK) -> str:
    """A line that ends in a head, which points right or down."""
    back = [(-7, -4), (-7, 4)] if to_y == y else [(-4, -7), (4, -7)]
    head = " ".join(f"{to_x + right:g},{to_y + down:g}" for right, down in back)
    line = f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{colour}" stroke-width="2"/>'
    return line + f'<polygon points="{head} {to_x:g},{to_y:g}" fill="{colour}"/>'


def panel(x: float, y: float, width: float, height: float, title: str, words: str) -> str:
    frame = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="#ffffff" stroke="#c9d3da"/>'
    heading = text(x + 16, y + 29, title, 19, anchor="start", more=' font-weight="600"')
    return frame + heading + text(x + width - 16, y + 28, words, 14, GREY, "end")


def frames(x: float, y: float) -> str:
    """Three pictures, one behind the other."""
    return "".join(box(x + shift, y - shift, 46, 34, VIDEO) for shift in (10, 5, 0))


def vamba() -> list[str]:
    video, memory, layer = 98, 182, 322  # heights of the three rows
    drawn = [panel(8, 8, 624, 428, "Vamba", "time: linear in the length")]
    # what comes before the first level, and what the memory is
    drawn += [frames(46, video), text(50, video + 40, "frames", 15), arrow(81, video, 104, video)]
    drawn += [box(136, video, 64, 40, VIDEO, "ViT"), arrow(168, video, 216, video)]
    drawn += [text(24, memory - 2, "video memory", 17, anchor="start", more=' font-weight="600"')]
    drawn += [text(24, memory + 18, "asked many times", 14, GREY, "start")]
    drawn += [f'<rect x="186" y="{memory - 23}" width="434" height="46" rx="10" fill="#fdf1dc"/>']
    drawn += [text(24, layer + 5, "text", anchor="start"), arrow(58, layer, 76, layer, EDGES[TEXT])]
    drawn += [box(121, layer, 90, 36, TEXT, "embedding", 14), arrow(166, layer, 182, layer, EDGES[TEXT])]
    for x, name in LEVELS.items():
        drawn += [box(x, video, 40, 40, VIDEO), level(x, video, name), arrow(x, video + 20, x, memory - 16)]
        drawn += [box(x, memory, 66, 32, MEMORY, "K, V"), *decoder_layer(x, layer, name)]
        drawn += [arrow(x, memory + 16, x, layer - 70, EDGES[MEMORY])]
    # between the levels, and between the decoder layers
    drawn += [
        arrow(256, video, 279, video),
        box(317, video, 76, 40, MAMBA, "Mamba-2", 14),
        arrow(355, video, 378, video),
    ]
    drawn += [arrow(418, video, 432, video), box(470, video, 76, 40, MAMBA, "Mamba-2", 14)]
    drawn += [text(520, video + 4, "…", 18), arrow(531, video, 546, video), arrow(290, layer, 344, layer, EDGES[TEXT])]
    drawn += [arrow(452, layer, 470, layer, EDGES[TEXT]), text(481, layer + 4, "…", 18)]
    drawn += [arrow(492, layer, 512, layer, EDGES[TEXT]), arrow(566, layer + 70, 566, layer + 84, EDGES[TEXT])]
    return drawn + [text(566, layer + 100, "answer"), equation(24, layer + 98)]


def level(x: float, y: float, name: str) -> str:
    small = f'<tspan font-size="11" dy="5" font-style="normal">{name}</tspan>'
    return text(x, y + 5, "V", more=' font-style="italic"').replace("</text>", small + "</text>")


def equation(x: float, y: float) -> str:
    """What a decoder layer does first, in the colours of its parts."""
    parts = {
        "each layer adds  ": GREY,
        "α · self-attention": EDGES[TEXT],
        "  +  ": INK,
        "(1 − α) · cross-attention": EDGES[MEMORY],
    }
    spans = [f'<tspan fill="{colour}">{words}</tspan>' for words, colour in parts.items()]
    return f'<text x="{x}" y="{y}" font-size="15" xml:space="preserve">{"".join(spans)}</text>'


def decoder_layer(x: float, y: float, name: str) -> list[str]:
    drawn = [box(x, y, 108, 140, TEXT), text(x, y - 48, f"layer {name}", 14, GREY)]
    parts = {-22: (MEMORY, "cross-att."), 12: (TEXT, "self-att."), 46: (TEXT, "MLP")}
    return drawn + [box(x, y + down, 94, 28, fill, words, 14) for down, (fill, words) in parts.items()]


def one_stream(x: float, title: str, layers: tuple[str, str], kept: str, cost: str) -> list[str]:
    """A model in which video and text are one row of tokens."""
    y = 446
    drawn = [panel(x, y, 306, 252, title, "one stream")]
    drawn += [box(x + 32 + index * 30, y + 62, 24, 24, VIDEO if index < 6 else TEXT) for index in range(9)]
    drawn += [text(x + 107, y + 94, "frames, through a ViT", 14, GREY), text(x + 242, y + 94, "text", 14, GREY)]
    drawn += [arrow(x + 107, y + 102, x + 107, y + 126), arrow(x + 242, y + 102, x + 242, y + 126, EDGES[TEXT])]
    drawn += [box(x + 153, y + 148, 266, 40, *layers), arrow(x + 88, y + 168, x + 88, y + 184, EDGES[MEMORY])]
    drawn += [box(x + 92, y + 200, 144, 30, MEMORY, kept, 14), arrow(x + 242, y + 168, x + 242, y + 188, EDGES[TEXT])]
    return drawn + [text(x + 242, y + 205, "answer"), text(x + 153, y + 239, cost, 14, GREY)]


def draw(figure: Path = FIGURE) -> None:
    parts = vamba()
    parts += one_stream(
        8, "Qwen2-VL", (TEXT, "L × (self-attention, MLP)"), "K, V of all tokens", "time: the square of the length"
    )
    parts += one_stream(
        326, "Video-Ma2mba", (MAMBA, "L × Mamba-2"), "state of fixed size", "time: linear in the length"
    )
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    font = "font-family=\"system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\""
    title = "<title>Vamba beside Qwen2-VL and Video-Ma2mba</title>"
    ground = f'<rect width="{WIDTH}" height="{HEIGHT}" rx="14" fill="#f4f7f9"/>'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img">', title, ground, *parts, "</svg>"]
    figure.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    draw()
    print(FIGURE)
