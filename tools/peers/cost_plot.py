"""The engine's cost as an SVG plot: points, and the straight line that fits them best, in two panels."""

import math
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 940, 400
PANEL, GAP, LEFT, TOP, BOTTOM = 370, 100, 70, 70, 330
GREY, BLUE = "#808080", "#3b82c4"


def fit(points):
    """a and b of the least-squares line a + b x."""
    xs, ys = zip(*points)
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    b = sum((u - x) * (v - y) for u, v in points) / sum((u - x) ** 2 for u in xs)
    return y - b * x, b


def ms(seconds):
    """Milliseconds with three significant digits, and no more than three after the point."""
    figure = 1000 * abs(seconds)
    digits = min(3, max(0, 2 - math.floor(math.log10(figure)))) if figure > 0 else 0
    return f"{figure:.{digits}f} ms"


def formula(points, unit):
    a, b = fit(points)
    return f"{'-' * (a < 0)}{ms(a)} {'-' if b < 0 else '+'} {ms(b)} per {unit}"


def ticks(most):
    """Round numbers from 0 to at least `most`, at most seven of them."""
    power = 10.0 ** math.floor(math.log10(most / 6))
    step = next(power * k for k in (1, 2, 5, 10) if power * k * 6 >= most)
    return [i * step for i in range(math.ceil(most / step - 1e-9) + 1)]


def text(x, y, words, anchor="middle", size=12, turn=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{turn}>{escape(words)}</text>'


def line(x1, y1, x2, y2, style):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def panel(left, heading, x_label, y_label, unit, points, at):
    """One panel; `at` are the ticks of its x-axis."""
    a, b = fit(points)
    x_most = at[-1]
    marks = ticks(max(max(y for _, y in points), a + b * x_most))

    def place(x, y):
        return left + PANEL * x / x_most, BOTTOM - (BOTTOM - TOP) * y / marks[-1]

    faint, firm = f'stroke="{GREY}" stroke-opacity="0.25"', f'stroke="{GREY}"'
    parts = [text(left + PANEL / 2, TOP - 14, heading, size=13)]
    for y in marks:
        _, at_y = place(0, y)
        parts += [line(left, at_y, left + PANEL, at_y, faint), text(left - 8, at_y + 4, f"{y:g}", "end")]
    for x in at:
        at_x, _ = place(x, 0)
        parts += [line(at_x, BOTTOM, at_x, BOTTOM + 5, firm), text(at_x, BOTTOM + 19, f"{x:g}")]
    parts += [line(left, TOP, left, BOTTOM, firm), line(left, BOTTOM, left + PANEL, BOTTOM, firm)]
    parts.append(text(left + PANEL / 2, BOTTOM + 40, x_label))
    x, y = left - 48, (TOP + BOTTOM) / 2
    parts.append(text(x, y, y_label, turn=f' transform="rotate(-90 {x:.1f} {y:.1f})"'))
    # The line begins where it is not below zero.
    begin = max(0, -a / b) if b > 0 else 0
    dashed = f'stroke="{BLUE}" stroke-width="1.5" stroke-dasharray="6 4"'
    parts.append(line(*place(begin, a + b * begin), *place(x_most, a + b * x_most), dashed))
    parts += ['<circle cx="{:.1f}" cy="{:.1f}" r="4" fill="{}"/>'.format(*place(x, y), BLUE) for x, y in points]
    parts.append(text(left + 12, TOP + 18, f"fit: {formula(points, unit)}", "start", 13))
    return parts


def svg(title, panels):
    """`panels` are the arguments of two panel() calls without the first."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" fill="{GREY}" role="img"><title>{escape(title)}</title>'
    )
    parts = [head, text(WIDTH / 2, 26, title, size=15)]
    for i, arguments in enumerate(panels):
        parts += panel(LEFT + i * (PANEL + GAP), *arguments)
    return "\n".join([*parts, "</svg>"]) + "\n"
