"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from limbeck.log import console
from limbeck.report.summary import score
from limbeck.report.tables import Cell, Column, Row, Table, metric_name, score_cell


def print_table(table: Table, title: str = "") -> None:
    """A table on the terminal, turned where it is wider than long: there are few models and many metrics. What is wider than the terminal
    comes in parts, as a number that is cut would be another. Texts are never markup."""
    from rich.text import Text

    heads = [
        Text.assemble(" ".join(filter(None, [column.group, column.name])), (f"\n{column.note}" if column.note else "", "dim"))
        for column in table.columns
    ]
    labels = [Text(row.label, style="dim" if row.is_reference else "bold") for row in table.rows]
    cells = [[_compact(cell) for cell in row.cells] for row in table.rows]
    if turned := len(table.columns) > len(table.rows):
        heads, labels, cells = labels, heads, [list(column) for column in zip(*cells, strict=True)]
    corner, first = Text("" if turned else table.corner), 0
    while first < len(heads):
        end = len(heads)
        while (shown := _part(corner, heads, labels, cells, slice(first, end), table.is_numeric, title)) and end - first > 1:
            if console.measure(shown, options=console.options.update(max_width=10_000)).minimum <= console.width:
                break
            end -= 1
        console.print(shown)
        first, title = end, ""


def _part(corner: Any, heads: Sequence[Any], labels: Sequence[Any], cells: Sequence[Any], part: slice, is_numeric: bool, title: str) -> Any:
    """Some of the columns."""
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(title=Text(title), title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    shown.add_column(corner)
    for head in heads[part]:
        shown.add_column(head, justify="right" if is_numeric else "left", no_wrap=is_numeric)
    for label, values in zip(labels, cells, strict=True):
        shown.add_row(label, *values[part])
    return shown


def _compact(cell: Cell) -> Any:
    """`0.250±0.062`: five models fit into 80 columns."""
    from rich.text import Text

    note = f" {cell.note}".replace(" ± ", "±") if cell.note else ""
    return Text.assemble(cell.text, (note, "dim"))


def print_results(model: str, evals: dict[str, dict[str, Any]]) -> None:
    """The metrics of one model on the terminal; `evals` holds results as they lie in evals/NAME.json."""
    rows = [
        Row(
            metric_name(name, metric, value),
            [
                score_cell(found, [found]),
                Cell(f"{value['num_items']}"),
                *(Cell("–" if value.get(key) is None else f"{value[key]:.3g}") for key in ("chance", "ceiling")),
            ],
        )
        for name, result in evals.items()
        for metric, value in result["metrics"].items()
        if (found := score([evals], name, metric))
    ]
    print_table(Table("metric", [Column("value"), Column("items"), Column("chance"), Column("ceiling")], rows), model)
