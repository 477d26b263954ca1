"""Tables of a report: text in cells, made once and written twice, as HTML by the template and as Markdown here."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from limbeck.report.collect import TEACHER, UNTRAINED, Evidence, model_name, objective_text
from limbeck.report.stats import spread
from limbeck.report.summary import BUDGETS, Budget, Difference, Score, cost, evaluation_seconds, score


@dataclass(frozen=True)
class Column:
    """A column's name, the group that it stands under, and a small line below it."""

    name: str
    group: str = ""
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """What stands in a cell, with a quieter part behind it."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A row. `is_reference` sets it apart from the arms."""

    label: str
    cells: list[Cell]
    note: str = ""
    is_reference: bool = False


@dataclass(frozen=True)
class Table:
    """A table; `caption` is the sentence that says how to read it. `notes_below` puts a cell's quieter part on a line of its own."""

    corner: str
    columns: list[Column]
    rows: list[Row]
    caption: str = ""
    is_numeric: bool = True
    notes_below: bool = False

    @property
    def groups(self) -> list[tuple[str, int]]:
        """(group, how many columns it spans), for neighbours of the same group."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        return spans if any(group for group, _ in spans) else []


@dataclass(frozen=True)
class Numbers:
    """How the values of one column are written: as many decimals for all."""

    values: list[float] = field(default_factory=list)

    def show(self, value: float | None, signed: bool = False) -> str:
        if value is None:
            return "–"
        largest = max((abs(v) for v in self.values), default=0.0)
        decimals = 3 if largest < 10 else 2 if largest < 100 else 1
        return f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def quality(evidence: Evidence) -> Table:
    """Teacher, untrained student and arms by the metrics of all benchmarks."""
    metrics = evidence.benchmarks()
    models = list(evidence.models())
    scores = {(label, b, m): score(per_seed, b, m) for label, per_seed in models for b, m, _ in metrics}
    columns = [_metric_column(b, m, example) for b, m, example in metrics]
    rows = [
        Row(
            label,
            [score_cell(scores[label, b, m], [scores[other, b, m] for other, _ in models]) for b, m, _ in metrics],
            _about(evidence, label),
            label not in evidence.recipes,
        )
        for label, per_seed in models
    ]
    several = max((len(runs) for runs in evidence.finished.values()), default=1) > 1
    value = "Arms: mean over seeds, sd: standard deviation over seeds. Other rows: value" if several else "Value"
    caption = f"{value} ± standard error over items. ↑ higher is better, ↓ lower."
    return Table("model", columns, rows, caption, notes_below=len(columns) > 5)


def _about(evidence: Evidence, label: str) -> str:
    """A line about a model: an arm's objective, or what a reference is."""
    if label in evidence.recipes:
        return evidence.method(label)
    if label == UNTRAINED:
        return "the student before its first step"
    theirs: dict[str, Any] = next(
        (recipe.get("teacher", {}) for arm, recipe in evidence.recipes.items() if evidence.teacher_of(arm) == label), {}
    )
    return model_name(str(theirs.get("model", "")))


def _metric_column(benchmark: str, metric: str, example: dict[str, Any]) -> Column:
    chance = example.get("chance")
    notes = [f"{example['num_items']} items", f"chance {chance:.3g}" if chance is not None else ""]
    name = f"{words(metric)}\N{NO-BREAK SPACE}{arrow(example)}"
    return Column(name, "" if words(benchmark) == words(metric) else words(benchmark), ", ".join(filter(None, notes)))


def metric_name(benchmark: str, metric: str, example: dict[str, Any]) -> str:
    """`agreement: kl ↓`; a benchmark whose one metric has its own name is named once."""
    names = dict.fromkeys([words(benchmark), words(metric)])
    return f"{': '.join(names)}\N{NO-BREAK SPACE}{arrow(example)}"


def arrow(example: dict[str, Any]) -> str:
    return "↑" if example["higher_is_better"] else "↓"


def words(name: str) -> str:
    return name.replace("_", " ")


def score_cell(found: Score | None, column: Sequence[Score | None]) -> Cell:
    numbers = Numbers([other.value for other in column if other and other.value is not None])
    if found is None or found.value is None:
        return Cell("–")
    if found.sd is not None:
        return Cell(numbers.show(found.value), f"sd {numbers.show(found.sd)}")
    return Cell(numbers.show(found.value), f"± {numbers.show(found.stderr)}" if found.stderr is not None else "")


def paired(evidence: Evidence, found: Sequence[Difference]) -> Table:
    """Every arm minus the baseline on the same items; a row per metric, a column per arm."""
    arms = list(dict.fromkeys(difference.arm for difference in found))
    by_key = {(d.benchmark, d.metric, d.arm): d for d in found}
    marks = {"better": "better", "worse": "worse", "level": "within 2 errors", "unknown": "no error known"}
    rows = []
    for benchmark, metric, example in evidence.benchmarks():
        here = [by_key.get((benchmark, metric, arm)) for arm in arms]
        numbers = Numbers([d.value for d in here if d])
        cells = []
        for d in here:
            error = f" ± {numbers.show(d.stderr)}" if d and d.stderr is not None else ""
            seeds = f", sd {numbers.show(d.sd)} over {d.num_seeds} seeds" if d and d.sd is not None else ""
            cells.append(Cell(numbers.show(d.value, signed=True) + error, marks[d.direction] + seeds) if d else Cell("–"))
        num_items = max((d.num_items for d in here if d), default=0)
        if any(here):
            rows.append(Row(metric_name(benchmark, metric, example), cells, f"{num_items} items" if num_items else ""))
    seeds = "one seed" if all(d.num_seeds == 1 for d in found) else "each item averaged over seeds"
    caption = (
        f"Arm minus {evidence.baseline}, paired by item: mean ± standard error of the difference over items, {seeds}. "
        "“better” and “worse” say which way more than two such errors point. They describe these items and are no verdict."
    )
    return Table("metric", [Column(f"{arm} − {evidence.baseline}") for arm in arms], rows, caption, notes_below=True)


def costs(evidence: Evidence) -> Table:
    """Tokens, seconds and memory by arm, and what capturing the teacher took."""
    columns = [
        Column("tokens", "training"),
        Column("scored", "training"),
        Column("seconds", "training"),
        Column("tokens/s", "training"),
        Column("teacher’s share", "training", "of the time"),
        Column("peak memory", "training", "MB"),
        Column("compute", "training", "TFLOPs, teacher and parent included"),
        Column("seconds", "evaluation"),
    ]
    rows = [Row(label, [Cell("–")] * 7 + [_number(evaluation_seconds(per_seed[0]))], "", True) for label, per_seed in evidence.models()]
    rows = [row for row in rows if row.label not in evidence.recipes]
    for arm, runs in evidence.finished.items():
        took = cost(runs)
        seconds = [run.totals["train_seconds"] for run in runs if "train_seconds" in run.totals]
        sd = spread(seconds).sd if seconds else None
        share = took["teacher_share"]
        rows.append(
            Row(
                arm,
                [
                    _number(took["tokens"], 0),
                    _number(took["scored_tokens"], 0),
                    Cell(_number(took["train_seconds"]).text, f"sd {sd:.1f}" if sd is not None else ""),
                    _number(took["tokens_per_second"], 0),
                    Cell("–" if share is None else f"{share:.1%}"),
                    _number(took["peak_memory_mb"], 0),
                    _number(took["flops"] / 1e12 if took["flops"] is not None else None),
                    _number(took["evaluation_seconds"]),
                ],
            )
        )
    return Table("arm", columns, rows, _capture_sentence(evidence))


def _capture_sentence(evidence: Evidence) -> str:
    sentences = [
        f"{'The teacher' if name == TEACHER else name} scored {took['num_scored']:,} tokens of {took['num_samples']:,} conversations once, "
        f"for all arms{'' if len(evidence.captures) == 1 else ' that have it'}: {took['seconds']:.1f} s, "
        f"{took['num_bytes'] / 2**20:,.1f} MB on disk."
        for name, took in evidence.captures.items()
    ]
    return " ".join([*sentences, "Its share above is the reading of that."]) if sentences else ""


def _number(value: float | None, decimals: int = 1) -> Cell:
    return Cell("–" if value is None else f"{value:,.{decimals}f}")


DECLARED = "as declared"
"""In place of what an arm changes by declaration."""


def equal_budgets(evidence: Evidence, found: Sequence[Budget]) -> Table:
    """The hashes and counts that show that arms had the same start, the same data and the same amount of it.

    Over several seeds, a quantity that is equal in all of them takes one row.
    """
    arms = [arm for arm in evidence.finished if any(arm in budget.values for budget in found)]
    rows = []
    for name, label in BUDGETS.items():
        here = [budget for budget in found if budget.field == name]
        if len(here) > 1 and all(budget.is_equal for budget in here):
            cells = [_over_seeds([budget.values[arm] for budget in here if arm in budget.values]) for arm in arms]
            rows.append(Row(label, [*cells, Cell(f"equal in {len(here)} seeds")]))
            continue
        for budget in here:
            verdict = Cell("equal" if budget.is_equal else "NOT equal")
            of_seed = f", seed {budget.seed}" if len(here) > 1 else ""
            cells = [_budget_cell(budget.values[arm]) if arm in budget.values else Cell(DECLARED) for arm in arms]
            rows.append(Row(f"{label}{of_seed}", [*cells, verdict]))
    return Table(
        "quantity", [*map(Column, arms), Column("")], rows, "Hashes are the first 12 digits of a SHA-256; report.json has them whole."
    )


def _over_seeds(values: Sequence[Any]) -> Cell:
    if not values:
        return Cell(DECLARED)
    return _budget_cell(values[0]) if len(set(values)) == 1 else Cell("one per seed")


def _budget_cell(value: Any) -> Cell:
    return Cell(value[:12] if isinstance(value, str) else "–" if value is None else f"{value:,}")


def changes(evidence: Evidence) -> Table:
    """What sets the arms' recipes apart: every key whose value is not the same in all of them."""
    flat = {arm: _flatten(recipe) for arm, recipe in evidence.recipes.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    differing = [key for key in keys if len({_show(values.get(key)) for values in flat.values()}) > 1]
    rows = [Row(arm, [Cell(_show(values.get(key))) for key in differing]) for arm, values in flat.items()]
    return Table("arm", [Column(key) for key in differing], rows, "Everything else is the same in all arms.", is_numeric=False)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys; an objective is shown as its line."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if key == "objective" and not prefix:
            flat[key] = objective_text(tree)
            for term in value:
                flat.update(
                    _flatten({k: v for k, v in term.items() if k in ("pairs", "num_pairs", "normalize")}, f"objective.{term['type']}.")
                )
        elif isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _show(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def to_markdown(table: Table) -> str:
    """A table of GitHub's Markdown; texts are escaped, so that none of them can end a cell or become markup."""
    head = [table.corner, *(" ".join(filter(None, [column.group, column.name])) for column in table.columns)]
    notes = ["", *(column.note for column in table.columns)]
    head = [escape_markdown(name) + (f"<br>{escape_markdown(note)}" if note else "") for name, note in zip(head, notes, strict=True)]
    lines = [_line(head), _line(["---"] + ["---:" if table.is_numeric else "---"] * len(table.columns))]
    for row in table.rows:
        label = escape_markdown(row.label) + (f"<br>{escape_markdown(row.note)}" if row.note else "")
        lines.append(_line([label, *(escape_markdown(f"{cell.text} {cell.note}".strip()) for cell in row.cells)]))
    return "\n".join(lines)


def escape_markdown(text: str) -> str:
    """Any text as one line that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]|~#$])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
