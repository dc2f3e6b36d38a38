"""How figures look: readable in grey, since lines differ in marker, dash and darkness, and hatches tell bars apart."""

import csv
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")  # Okabe and Ito's
MARKERS = "os^Dv<>PX*"
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
FILLS = ("0.92", "0.55", "0.78", "0.35", "0.65")
HATCHES = ("", "///", "...", "xx", "\\\\\\")
DPI = 150


@dataclass(frozen=True)
class Plot:
    """A finished figure.

    Attributes:
      name: of its files.  title: of its section.  figure: the drawing.
      data: what was drawn, a row a mark, as the CSV has it.
      caption: how to read it; the runs' settings are not in here.
    """

    name: str
    title: str
    figure: Figure
    data: list[dict[str, Any]]
    caption: str

    def save(self, folder: Path) -> dict[str, Path]:
        """Writes name.png, name.pdf and name.csv; their paths by ending."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = {ending: folder / f"{self.name}.{ending}" for ending in ("png", "pdf", "csv")}
        self.figure.savefig(paths["png"])
        self.figure.savefig(paths["pdf"], metadata={"CreationDate": None})  # the same data give the same file
        with open(paths["csv"], "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in self.data for key in row)))
            writer.writeheader()
            writer.writerows(self.data)
        return paths


def canvas(width: float, height: float) -> Figure:
    """An empty figure, in inches, whose parts are laid out without overlap."""
    return Figure(figsize=(width, height), layout="constrained", dpi=DPI)


def line(i: int) -> dict[str, Any]:
    """The i-th line: its colour, marker and dash."""
    return dict(
        color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], linestyle=DASHES[i % len(DASHES)],
        markersize=4.5, linewidth=1.5,
    )  # fmt: skip


def bar(i: int) -> dict[str, Any]:
    """The i-th kind of bar or box: its grey and its hatch."""
    return dict(facecolor=FILLS[i % len(FILLS)], edgecolor="black", hatch=HATCHES[i % len(HATCHES)], linewidth=0.8)


def grid(
    count: int, *, columns: int = 3, width: float = 3.6, height: float = 3.0, sharex: bool = False, ylabel: str = ""
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels with grid lines, the first of each row with the label."""
    across = min(columns, count)
    down = -(-count // across)
    figure = canvas(max(width * across, 6.0), height * down + 0.9)
    panels = figure.subplots(down, across, squeeze=False, sharex=sharex, sharey=True).ravel().tolist()
    for i, axes in enumerate(panels):
        axes.grid(alpha=0.3)
        axes.set_visible(i < count)
        axes.set_ylabel("" if i % across else ylabel)
    return figure, panels[:count]


def text(words: str, *, width: int = 34) -> str:
    """Words from configs and files for a figure: wrapped, printable, and never read as mathematics."""
    clean = "".join(c if c.isprintable() else "?" for c in words).replace("$", r"\$")
    return textwrap.fill(clean.replace(" = ", "\u00a0=\u00a0"), width)  # λ = 2 stays on one line


def legend(figure: Figure, axes: Axes, *, columns: int) -> None:
    """The legend of one panel, below all panels."""
    handles, labels = axes.get_legend_handles_labels()
    labels = [text(label, width=40) for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, max(len(labels), 1)), fontsize=8)
