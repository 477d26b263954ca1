"""The plot of a capture: what was lost, by how unsure the teacher is, and what takes the room on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.errors import StoreError
from limbeck.report.plots import GRID, INK, MUTED, PALETTE, SERIES, Plot, new_figure, to_plot
from limbeck.store.inspect import bars

KINDS = (".svg", ".png")
WIDTH = 4.0
"""Inches: room for the names of the bars beside their titles."""


def check_kind(file: Path) -> None:
    if file.suffix not in KINDS:
        raise StoreError(f"--plot: found {file.name!r}, expected a file that ends with {' or '.join(KINDS)}")


def write_plot(found: dict[str, Any], file: Path) -> None:
    """The plot of `limbeck.store.inspect.summary`, as SVG (for light and dark ground) or PNG (for light)."""
    check_kind(file)
    charts = bars(found)
    colours = {name: name if file.suffix == ".svg" else PALETTE[name][1] for name in (INK, MUTED, GRID, *SERIES)}
    height = sum(0.6 + 0.26 * len(rows) for rows in charts.values())
    with new_figure(height, len(charts), (colours[INK], colours[MUTED], colours[GRID])) as (figure, axes):
        figure.set_figwidth(WIDTH)
        for panel, (title, rows), colour in zip([axes] if len(charts) == 1 else axes, charts.items(), SERIES, strict=False):
            labels, values, texts = zip(*reversed(rows), strict=True)
            panel.barh(labels, values, height=0.6, color=colours[colour])
            for row, (value, text) in enumerate(zip(values, texts, strict=True)):
                panel.annotate(text, (value, row), (3, 0), textcoords="offset points", va="center", fontsize=7.5)
            panel.set_title(title, fontsize=8.5, loc="left")
            panel.set_xlim(0, 1.22 * max(values) or 1)  # room for the numbers
            panel.set_xticks([])
            panel.spines["bottom"].set_visible(False)
        try:
            if file.suffix == ".png":
                figure.savefig(file, format="png", dpi=200, facecolor="white")
            else:
                plot: Plot = to_plot(figure, "fidelity", "What a capture loses", "; ".join(charts))
                file.write_text(plot.file_text(), encoding="utf-8")
        except OSError as error:
            raise StoreError(f"--plot: {file}: could not be written ({error.strerror or error})") from error
