"""Plots of a report as SVG text: dots with error bars, and loss curves. Deterministic, and readable on light and on dark ground.

matplotlib draws with placeholder colours; these become CSS variables, which the page (or the SVG's own style, in a file) sets by scheme.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from limbeck.report.collect import Evidence
from limbeck.report.judge import Judgement
from limbeck.report.records import RunRecord
from limbeck.report.summary import score, total_flops
from limbeck.report.tables import metric_name

# placeholder -> (variable, light, dark)
PALETTE = {
    "#010101": ("ink", "#1f2328", "#e6e6e3"),
    "#020202": ("muted", "#656d76", "#9a9a96"),
    "#030303": ("grid", "#e3e3df", "#3a3a38"),
    "#0a0001": ("c0", "#1a5fb4", "#78aeed"),
    "#0a0002": ("c1", "#b5490b", "#f0975c"),
    "#0a0003": ("c2", "#26734d", "#6cc494"),
    "#0a0004": ("c3", "#7a3e9d", "#c79be0"),
    "#0a0005": ("c4", "#8a6d00", "#dcbf55"),
    "#0a0006": ("c5", "#a51d4b", "#f0869f"),
}
INK, MUTED, GRID, *SERIES = PALETTE
WIDTH = 2.8  # inches: at the width of a narrow screen the type is still legible


@dataclass(frozen=True)
class Plot:
    """An SVG without size, to be placed in a page or written to a file. `title` and `description` are for those who cannot see it."""

    key: str
    title: str
    description: str
    svg: str

    def file_text(self) -> str:
        """The SVG as a file of its own, with both colour schemes in it."""
        light, dark = css_variables(dark=False), css_variables(dark=True)
        font = "text{font-family:system-ui,sans-serif!important}"
        style = f"<style>svg{{{light}}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}{font}</style>"
        return self.svg.replace(">", f">{style}", 1) + "\n"


def css_variables(dark: bool) -> str:
    """The palette for a page's style sheet."""
    return "".join(f"--plot-{name}:{colours[dark]};" for name, *colours in PALETTE.values())


def quality_plots(evidence: Evidence) -> list[Plot]:
    """One plot per benchmark, of its first metric: a row and a dot per model, ticks per seed, bars of two standard errors over items."""
    models = list(evidence.models())
    colours = arm_colours(evidence)
    plots = []
    for number, (benchmark, metric, example) in enumerate(evidence.headlines()):
        with new_figure(0.5 + 0.24 * len(models)) as (figure, axes):
            for row, (label, per_seed) in enumerate(reversed(models)):
                found = score(per_seed, benchmark, metric)
                if found is None or found.value is None:
                    continue
                colour = colours.get(label, MUTED)
                axes.errorbar(
                    found.value, row, xerr=2 * (found.stderr or 0), fmt="o", color=colour, markersize=5, elinewidth=1.6, capsize=0
                )
                seeds = [s.value for evals in per_seed if (s := score([evals], benchmark, metric)) and s.value is not None]
                if len(seeds) > 1:
                    axes.plot(seeds, [row - 0.24] * len(seeds), "|", color=colour, markersize=5)
            if example.get("chance") is not None:
                axes.axvline(example["chance"], color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)))
                axes.text(example["chance"], len(models) - 0.42, "chance", color=MUTED, fontsize=7.5, ha="center", va="bottom")
            axes.set_ylim(-0.6, len(models) - 0.4)
            axes.set_yticks(range(len(models)), [label for label, _ in reversed(models)])
            axes.margins(x=0.08)
            axes.locator_params(axis="x", nbins=4)
            axes.grid(axis="x", color=GRID, linewidth=0.8)
            title = metric_name(benchmark, metric, example)
            plots.append(
                to_plot(
                    figure, f"quality-{number}", title, f"{title} of {', '.join(label for label, _ in models)}; the table has the figures"
                )
            )
    return plots


def verdict_plot(evidence: Evidence, judged: Judgement) -> Plot:
    """The primary metric's differences with their intervals, and the margin as a band: what is left or right of it matters."""
    rows = [(f"{arm} − {other}", its, SERIES[0]) for (arm, other), its in judged.verdicts.items()]
    for its, role in ((judged.again, "again"), (judged.planted, "planted")):
        if its is not None:
            rows.append((f"{evidence.of_role(role)} − {evidence.baseline}", its, MUTED))
    with new_figure(0.6 + 0.34 * len(rows)) as (figure, axes):
        axes.axvspan(-judged.margin, judged.margin, color=GRID, linewidth=0)
        axes.axvline(0, color=MUTED, linewidth=0.9)
        for row, (_, its, colour) in enumerate(reversed(rows)):
            low, high = its.interval or (its.value, its.value)
            axes.plot([low, high], [row, row], color=colour, linewidth=1.6)
            axes.plot([its.value], [row], "o", color=colour, markersize=5)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_yticks(range(len(rows)), [f"{label}\n{its.outcome}" for label, its, _ in reversed(rows)], fontsize=7)
        axes.margins(x=0.05)
        axes.locator_params(axis="x", nbins=4)
        title = f"{judged.benchmark.replace('_', ' ')}: {judged.metric.replace('_', ' ')}, difference"
        return to_plot(
            figure, "verdicts", title, f"{title} with intervals: {'; '.join(f'{label} {its.outcome}' for label, its, _ in rows)}"
        )


def cost_plot(evidence: Evidence, judged: Judgement) -> Plot | None:
    """The primary metric against what it cost: all floating-point operations of student and teacher, a parent's included."""
    points = []
    for arm, runs in evidence.finished.items():
        found = score([run.evals for run in runs], judged.benchmark, judged.metric)
        spent = [cost for run in runs if (cost := total_flops(run.about)) is not None]
        if found and found.value is not None and spent:
            points.append((arm, sum(spent) / len(spent) / 1e12, found.value, found.sd or 0.0))
    if len(points) < 2:
        return None
    colours = arm_colours(evidence)
    with new_figure(2.2) as (figure, axes):
        spread_out = max(value for _, _, value, _ in points) - min(value for _, _, value, _ in points)
        written: dict[float, float] = {}
        for arm, flops, value, sd in sorted(points, key=lambda point: point[2]):
            axes.errorbar(flops, value, yerr=sd, fmt="o", color=colours[arm], markersize=5, elinewidth=1.2)
            # arms of equal cost stand above each other: their names must not
            place = max(value, written.get(round(flops, 1), -float("inf")) + spread_out / 14)
            written[round(flops, 1)] = place
            axes.annotate(arm, (flops, place), xytext=(5, -2), textcoords="offset points", color=colours[arm], fontsize=6.5)
        axes.set_xlabel("TFLOPs of student and teacher")
        axes.margins(x=0.25, y=0.15)
        axes.grid(color=GRID, linewidth=0.8)
        axes.locator_params(nbins=5)
        title = f"{judged.benchmark.replace('_', ' ')} {judged.metric.replace('_', ' ')} against compute"
        named = "; ".join(f"{arm} {value:.3f} for {flops:.1f} TFLOPs" for arm, flops, value, _ in points)
        return to_plot(figure, "cost", title, f"{title}: {named}; bars are standard deviations over seeds")


def loss_plots(evidence: Evidence) -> list[Plot]:
    """One plot per arm, on shared axes: the total, each term, and the teacher's own NLL; over seeds the mean with the range."""
    arms = {arm: [run for run in runs if run.metrics] for arm, runs in evidence.arms.items()}
    curves = {arm: _curves(runs) for arm, runs in arms.items() if runs}
    if not curves:
        return []
    steps = max(len(rows) for by_name in curves.values() for runs in by_name.values() for rows in runs)
    top = max(value for by_name in curves.values() for runs in by_name.values() for rows in runs for _, value in rows)
    terms = list(dict.fromkeys(name for by_name in curves.values() for name in by_name if name not in FIXED))
    colours = FIXED | {name: SERIES[i % len(SERIES)] for i, name in enumerate(terms)}
    plots = []
    for number, (arm, by_name) in enumerate(curves.items()):
        with new_figure(1.9) as (figure, axes):
            for name, runs in by_name.items():
                dashed = (0, (4, 2)) if name == "teacher NLL" else "solid"
                _line(axes, runs, colours[name], dashed, name)
            axes.set_xlim(1, max(steps, 2))
            axes.set_ylim(0, top * 1.05 or 1)
            axes.grid(color=GRID, linewidth=0.8)
            axes.locator_params(axis="x", integer=True, nbins=5)
            axes.set_xlabel("optimizer step")
            axes.set_ylabel("loss per token")
            axes.legend(frameon=False, fontsize=7.5, labelcolor=INK, loc="upper right", handlelength=1.6, borderaxespad=0.1)
            plots.append(to_plot(figure, f"loss-{number}", arm, f"loss of {arm} over {steps} steps: {', '.join(by_name)}"))
    return plots


def evaluation_plots(evidence: Evidence) -> list[Plot]:
    """One plot per benchmark that was asked during training, of its first metric (and of the one that chose): a line per arm, over seeds
    the mean with the range, for a single run two standard errors over items. Rings are on what was chosen."""
    arms = {arm: [run for run in runs if run.evaluations] for arm, runs in evidence.arms.items()}
    arms = {arm: runs for arm, runs in arms.items() if runs}
    found: dict[tuple[str, str], None] = {}
    for runs in arms.values():
        for benchmark, metrics in runs[0].evaluations[0]["metrics"].items():
            found[benchmark, next(iter(metrics))] = None
        if best := runs[0].totals.get("best"):
            found[best["benchmark"], best["metric"]] = None
    colours, plots = arm_colours(evidence), list[Plot]()
    for benchmark, metric in found:
        drawn = {arm: [_evaluated(run, benchmark, metric) for run in runs] for arm, runs in arms.items()}
        drawn = {arm: curves for arm, curves in drawn.items() if all(curves)}
        if not drawn:
            continue
        example: dict[str, Any] = next(iter(drawn.values()))[0][0][1]
        with new_figure(1.9) as (figure, axes):
            for arm, curves in drawn.items():
                _line(axes, [[(step, its["value"]) for step, its in curve] for curve in curves], colours[arm], "solid", arm)
                if len(curves) == 1:
                    steps, low, high = zip(*((step, *_band(its)) for step, its in curves[0]), strict=True)
                    axes.fill_between(steps, low, high, color=colours[arm], alpha=0.18, linewidth=0)
                for run, curve in zip(arms[arm], curves, strict=True):
                    best = run.totals.get("best") or {}
                    at = [(step, its["value"]) for step, its in curve if (benchmark, metric, step) == tuple(map(best.get, _CHOSEN))]
                    axes.scatter(*zip(*at, strict=True), s=30, color="none", edgecolor=INK, linewidth=0.9, zorder=3) if at else None
            axes.grid(color=GRID, linewidth=0.8)
            axes.locator_params(axis="x", integer=True, nbins=5)
            axes.set_xlabel("optimizer step")
            if len(drawn) > 1:
                axes.legend(frameon=False, fontsize=7.5, labelcolor=INK, handlelength=1.6, borderaxespad=0.1)
            title = metric_name(benchmark, metric, example)
            plots.append(to_plot(figure, f"evaluations-{len(plots)}", title, f"{title} during training of {', '.join(drawn)}"))
    return plots


_CHOSEN = ("benchmark", "metric", "step")


def _evaluated(run: RunRecord, benchmark: str, metric: str) -> list[tuple[int, dict[str, Any]]]:
    """(step, metric) of a run's evaluations that have a value."""
    rows = [(row["step"], row["metrics"].get(benchmark, {}).get(metric, {})) for row in run.evaluations]
    return [(step, its) for step, its in rows if its.get("value") is not None]


def _band(metric: dict[str, Any]) -> tuple[float, float]:
    spread = 2 * (metric["stderr"] or 0.0)
    return metric["value"] - spread, metric["value"] + spread


def layer_map_plots(evidence: Evidence) -> list[Plot]:
    """One plot per hidden term whose map the data decided: a dot per pair of blocks, as large as they are alike; the chosen ones ringed."""
    plots: list[Plot] = []
    for arm, runs in evidence.arms.items():
        for key, found in (runs[0].data.get("layer_maps", {}) if runs else {}).items():
            rows, columns, chosen = found["student_blocks"], found["teacher_blocks"], found["pairs"]
            points = [(x, row, 12 * found["cka"][i][j] ** 2) for i, row in enumerate(rows) for j, x in enumerate(columns)]
            with new_figure(0.7 + 0.13 * len(rows)) as (figure, axes):
                axes.scatter(*zip(*points, strict=True), color=SERIES[0], linewidth=0)
                axes.scatter(*zip(*((x, y, 22) for y, x in chosen), strict=True), color="none", edgecolor=INK, linewidth=0.8)
                axes.locator_params(integer=True, nbins=6)
                axes.set_xlabel("teacher block")
                axes.set_ylabel("student block")
                pairs = ", ".join(f"{student} to {teacher}" for student, teacher in chosen)
                plots.append(to_plot(figure, f"layers-{len(plots)}", f"{arm}, {key}", f"likeness of blocks in {arm}; mapped: {pairs}"))
    return plots


FIXED = {"total": INK, "teacher NLL": MUTED}


def arm_colours(evidence: Evidence) -> dict[str, str]:
    """A colour per arm; references have none."""
    return {arm: SERIES[i % len(SERIES)] for i, arm in enumerate(evidence.recipes)}


def _curves(runs: Sequence[RunRecord]) -> dict[str, list[list[tuple[int, float]]]]:
    """(step, value) rows by name of what is drawn, one list per run. A total that is its only term is drawn once."""
    names = {f"loss/{key.removeprefix('loss/')}": key.removeprefix("loss/") for key in runs[0].metrics[-1] if key.startswith("loss/")}
    if len(names) > 1:
        names = {"loss": "total", **names}
    if any("teacher_nll" in run.metrics[-1] for run in runs):
        names["teacher_nll"] = "teacher NLL"
    return {
        name: [[(row["step"], row[key]) for row in run.metrics if key in row] for run in runs if key in run.metrics[-1]]
        for key, name in names.items()
    }


def _line(axes: Any, runs: list[list[tuple[int, float]]], colour: str, dashes: Any, label: str) -> None:
    length = min(len(rows) for rows in runs)
    steps = [step for step, _ in runs[0][:length]]
    columns = [[rows[i][1] for rows in runs] for i in range(length)]
    axes.plot(steps, [sum(column) / len(column) for column in columns], color=colour, linestyle=dashes, linewidth=1.5, label=label)
    if len(runs) > 1:
        axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.18, linewidth=0)


@contextmanager
def new_figure(height: float, panels: int = 1, colours: tuple[str, str, str] = (INK, MUTED, GRID)) -> Iterator[tuple[Any, Any]]:
    """A figure in our style, with its axes (an array of several, one above the other); settings are given back afterwards."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink, muted, grid = colours
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "limbeck",
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 8.5,
        "text.color": ink,
        "axes.labelcolor": muted,
        "axes.edgecolor": grid,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "xtick.color": grid,
        "ytick.color": grid,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": ink,
        "ytick.major.size": 0,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.subplots(panels)


def to_plot(figure: Any, key: str, title: str, description: str) -> Plot:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # a name in a script that the layout's font lacks: the reader's browser has one
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Plot(key, title, description, _clean(buffer.getvalue(), key))


def _clean(svg: str, key: str) -> str:
    """The bare element: no prologue, no size, ids of its own (several stand on one page), colours by variable."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    body = re.sub(r'\bid="([^"]*)"', rf'id="{key}-\1"', body)
    body = re.sub(r"url\(#", f"url(#{key}-", body)
    body = re.sub(r'xlink:href="#', f'href="#{key}-', body)
    for placeholder, (name, *_) in PALETTE.items():
        body = body.replace(placeholder, f"var(--plot-{name})")
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box[0]} role="img" aria-hidden="true">{body.strip()}'
