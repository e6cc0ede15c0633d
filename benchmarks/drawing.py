"""The drawing of how it works, light and dark: from a prompt to packed tiles to attention.

python -m benchmarks.drawing    # writes docs/figures/how-it-works-*.svg
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from benchmarks.style import FIGURES, THEMES, Theme

WIDTH, HEIGHT = 560, 900


class Canvas:
    """Shapes of an SVG in one theme; raw tokens are blue, packed ones orange."""

    def __init__(self, theme: Theme) -> None:
        self.theme = theme
        dark = theme.name == "dark"
        self.fills = {
            "raw": "#1f4e73" if dark else "#cfe6f7",
            "packed": "#7a3e12" if dark else "#ffd9bd",
            "box": "#2b313b" if dark else "#eef0f3",
        }
        self.parts: list[str] = []

    def text(
        self, x: float, y: float, words: str, size: int = 15, anchor: str = "middle", bold: bool = False
    ) -> None:
        """One line."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'
        )

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, *lines: str, bold: bool = True
    ) -> None:
        """A rectangle with centred lines, the first in bold."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{self.fills[fill]}" '
            f'stroke="{self.theme.plain}"/>'
        )
        top = y + height / 2 - (len(lines) - 1) * 10 + 5
        for number, line in enumerate(lines):
            self.text(
                x + width / 2, top + 20 * number, line, 15 if number == 0 else 13, bold=bold and number == 0
            )

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line with a head at its end."""
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{self.theme.plain}" stroke-width="2" '
            'marker-end="url(#head)"/>'
        )

    def svg(self) -> str:
        """The file."""
        head = (
            '<marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0,0 L10,5 L0,10 z" fill="{self.theme.plain}"/></marker>'
        )
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'font-family="Helvetica, Arial, sans-serif" fill="{self.theme.text}">\n'
            f"<title>From a prompt to packed tiles to attention</title>\n<defs>{head}</defs>\n"
            f"{body}\n</svg>\n"
        )


def how_it_works(theme: Theme) -> str:
    """From top to bottom: the prompt, a layer's cache, one tile, a decode step."""
    draw = Canvas(theme)
    middle = WIDTH / 2
    draw.box(40, 10, 480, 56, "box", "Prompt", "attends to itself exactly, in the model's own precision")
    draw.arrow((middle, 66), (middle, 104))
    draw.text(middle + 12, 91, "each layer packed as soon as it is done", 13, "start")

    draw.text(10, 128, "Cache of a layer", 15, "start", bold=True)
    draw.box(10, 138, 62, 62, "raw", "sink")
    for number in range(4):
        draw.box(78 + number * 76, 138, 72, 62, "packed", "tile")
    draw.box(388, 138, 162, 62, "raw", "ring", "window + next tile")
    draw.text(41, 219, "raw", 13)
    draw.text(228, 219, "packed: 2 to 4 bits, the only copy", 13)
    draw.text(469, 219, "raw, recent tokens", 13)

    draw.arrow((190, 228), (190, 262))
    draw.text(202, 251, "one tile", 13, "start")
    draw.text(10, 284, "Keys: a scale per channel", 15, "start", bold=True)
    draw.text(295, 284, "Values: a scale per token", 15, "start", bold=True)
    for row in range(4):
        for column in range(6):
            draw.box(10 + column * 40, 322 + row * 26, 38, 24, "packed")
            draw.box(295 + column * 36, 322 + row * 26, 34, 24, "packed")
    for column in range(6):
        draw.box(10 + column * 40, 296, 38, 18, "box")
    for row in range(4):
        draw.box(519, 322 + row * 26, 30, 24, "box")
    draw.text(10, 444, "rows are tokens, columns channels; grey are scales and offsets", 13, "start")
    draw.text(10, 464, "tiers: some channels of keys at 4 bits, the others at 2", 13, "start")

    draw.text(10, 512, "One decode step", 15, "start", bold=True)
    draw.box(10, 522, 140, 56, "box", "New token", "query, key, value")
    draw.arrow((150, 550), (186, 550))
    draw.box(190, 522, 360, 56, "box", "attend", "reads codes as they are; no 16-bit copy is made")
    for x, label, fill in (
        (190, "sink", "raw"),
        (282, "tiles", "packed"),
        (374, "ring", "raw"),
        (466, "itself", "raw"),
    ):
        draw.arrow((x + 40, 578), (x + 40, 606))
        draw.box(x, 610, 84, 34, fill, label)
        draw.arrow((x + 40, 644), (x + 40, 672))
    draw.box(190, 676, 360, 56, "box", "merge", "online softmax: exact, whatever the split")
    draw.arrow((370, 732), (370, 764))
    draw.box(190, 768, 360, 40, "box", "output of the layer", bold=False)
    draw.arrow((80, 578), (80, 764))
    draw.box(10, 768, 140, 56, "box", "append", "into the ring")
    draw.text(10, 850, "When a tile of old tokens has left the window it is flushed:", 13, "start")
    draw.text(10, 870, "rounded once, packed, and its 16-bit copy is gone.", 13, "start")
    return draw.svg()


def main() -> None:
    """Write both."""
    for theme in THEMES:
        Path(FIGURES, f"how-it-works-{theme.name}.svg").write_text(how_it_works(theme))


if __name__ == "__main__":
    main()
