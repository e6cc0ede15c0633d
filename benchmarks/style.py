"""How figures look: each is drawn twice, for light and for dark pages, the same from the same rows.

drawn("quality", quality)    # quality(theme) makes the figure
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.figure import Figure

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"
"""Where documents look for them."""


@dataclass(frozen=True)
class Theme:
    """Colours of one kind of page; the series are Okabe and Ito's, which the colour-blind tell apart.

    text and faint are for words and lines; ours, plain and the others for series.
    """

    name: str
    text: str
    faint: str
    plain: str
    ours: str
    blue: str
    green: str
    purple: str
    sky: str


THEMES = (
    Theme("light", "#24292f", "#c9ced6", "#6e7781", "#d55e00", "#0072b2", "#009e73", "#b5548d", "#2e9bd6"),
    Theme("dark", "#e3e6eb", "#4a505c", "#a3abb8", "#ff8a3d", "#5aaef0", "#2fc798", "#e08fc0", "#8fd0f7"),
)


def drawn(name: str, draw: Callable[[Theme], Figure], out: Path = FIGURES) -> list[Path]:
    """Draw `name`-light.svg and `name`-dark.svg on transparent ground.

    Args:
        name: of the figure.
        draw: makes it with the colours of a theme.
        out: folder, which exists.
    """
    paths = []
    for theme in THEMES:
        with pyplot.rc_context(_settings(theme)):
            figure = draw(theme)
            path = out / f"{name}-{theme.name}.svg"
            figure.savefig(path, metadata={"Date": None}, transparent=True)
            pyplot.close(figure)
        # matplotlib leaves blanks at the ends of lines
        path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))
        paths.append(path)
    return paths


def _settings(theme: Theme) -> dict[str, Any]:
    return {
        "svg.hashsalt": "kvmix",  # the same file from the same rows
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.text,
        "axes.titlecolor": theme.text,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": theme.text,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "grid.color": theme.faint,
        "grid.alpha": 0.5,
        "legend.frameon": False,
        "legend.labelcolor": theme.text,
        "figure.constrained_layout.use": True,
    }


def colours(theme: Theme) -> dict[str, str]:
    """The series' colours by name."""
    names = [field.name for field in dataclasses.fields(theme)][3:]
    return {name: getattr(theme, name) for name in names}
