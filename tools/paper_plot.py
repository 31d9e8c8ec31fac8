"""A line plot as a small SVG file: readable in light and dark, and series differ by dash and mark as well as by colour."""

import math
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 340, 56, 470, 34, 292
COLOURS = 6
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "5 2 2 2 2 2", "12 4")
STYLE = """
text { font: 13px sans-serif; fill: #222 } .axis { stroke: #888; fill: none } .grid { stroke: #8884; fill: none }
.s0 { --c: #0b62a4 } .s1 { --c: #b3471b } .s2 { --c: #2c7a3f } .s3 { --c: #8a3b9c } .s4 { --c: #7a6a00 } .s5 { --c: #b3245c }
.line { stroke: var(--c); stroke-width: 2; fill: none } .mark { fill: var(--c) }
@media (prefers-color-scheme: dark) { svg { background: #16181c } text { fill: #ddd }
.s0 { --c: #6cb4ee } .s1 { --c: #f0956a } .s2 { --c: #7ccf8f } .s3 { --c: #d398e2 } .s4 { --c: #d3c255 } .s5 { --c: #f08cb4 } }
"""


def lines(title, x_label, y_label, series, log=True):
    """A plot of shares: `series` are (name, [(x, y), ...]), at the same x, which are on a scale of logarithms if `log`; at most
    six."""
    assert 0 < len(series) <= COLOURS, "as many as there are colours"
    xs = [x for x, _ in series[0][1]]
    place = (lambda x: math.log(x)) if log else float
    left, right = place(min(xs)), place(max(xs))
    most = max(y for _, points in series for _, y in points)
    tick = 0.2 if most > 0.5 else 0.1
    ticks = max(1, math.ceil(most / tick - 1e-9))
    top = tick * ticks

    def at_x(x):
        return LEFT + (RIGHT - LEFT) * ((place(x) - left) / (right - left) if right > left else 0.5)

    def at_y(y):
        return BOTTOM - (BOTTOM - TOP) * y / top

    middle = (TOP + BOTTOM) / 2
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<text x="{LEFT}" y="18" font-weight="bold">{escape(title)}</text>',
        f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y_label)}</text>',
    ]
    for y in (tick * i for i in range(ticks + 1)):
        out.append(f'<path class="grid" d="M{LEFT} {at_y(y):.1f}H{RIGHT}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{y:.1f}</text>')
    for x in xs:
        out.append(f'<path class="axis" d="M{at_x(x):.1f} {BOTTOM}v5"/>')
        out.append(f'<text x="{at_x(x):.1f}" y="{BOTTOM + 19}" text-anchor="middle">{x:g}</text>')
    out.append(f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>')
    for i, (name, points) in enumerate(series):
        path = "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in points)
        y = TOP + 10 + 22 * i
        out.append(f'<g class="s{i}"><path class="line" stroke-dasharray="{DASHES[i]}" d="M{path}"/>')
        out += [mark(i, at_x(x), at_y(y)) for x, y in points]
        out.append(
            f'<path class="line" stroke-dasharray="{DASHES[i]}" d="M{RIGHT + 16} {y}h30"/>{mark(i, RIGHT + 31, y)}</g>'
        )
        out.append(f'<text x="{RIGHT + 54}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join(out) + "\n</svg>\n"


def mark(series, x, y):
    """A shape of its own for each series."""
    shapes = (
        "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
        "m-4 -4h8v8h-8z",
        "m0 -5l5 9h-10z",
        "m0 -5l5 5l-5 5l-5 -5z",
        "m0 5l5 -9h-10z",
        "m-5 -2h3v-3h4v3h3v4h-3v3h-4v-3h-3z",
    )
    return f'<path class="mark" d="M{x:.1f} {y:.1f}{shapes[series]}"/>'
