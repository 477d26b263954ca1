"""Tables as text: columns of one precision, and texts that stay what they are in Markdown and on the terminal."""

from __future__ import annotations

import fake
import pytest

from limbeck.report.tables import Cell, Column, Numbers, Row, Table, escape_markdown, to_markdown
from limbeck.report.terminal import print_results, print_table


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a | b", r"a \| b"),
        ("two\nlines\t here", "two lines here"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("`x` *y* _z_ ~w~ $v$ # [u](t)", r"\`x\` \*y\* \_z\_ \~w\~ \$v\$ \# \[u\](t)"),
        ("back\\slash", r"back\\slash"),
    ],
)
def test_markdown_escapes(text, escaped):
    assert escape_markdown(text) == escaped


def test_markdown_table():
    table = Table("arm", [Column("kl ↓", "agreement", "48 items"), Column("|")], [Row("a|b", [Cell("1", "± 2"), Cell("–")], "note")])
    assert to_markdown(table) == "| arm | agreement kl ↓<br>48 items | \\| |\n| --- | ---: | ---: |\n| a\\|b<br>note | 1 ± 2 | – |"


@pytest.mark.parametrize(
    ("values", "value", "shown"),
    [([0.5, 0.25], 0.25, "0.250"), ([12.0, 0.5], 0.5, "0.50"), ([340.0], -1.25, "\N{MINUS SIGN}1.2"), ([], None, "–")],
)
def test_one_precision_for_a_column(values, value, shown):
    assert Numbers(values).show(value) == shown


def test_terminal_shows_texts_as_they_are(capsys):
    print_table(Table("[red]arm", [Column("[/]")], [Row("[bold]x", [Cell("[1]", "[2]")])]), "[link]t")
    shown = capsys.readouterr().err
    assert all(text in shown for text in ("[red]arm", "[/]", "[bold]x", "[1] [2]", "[link]t"))


@pytest.mark.parametrize("num_metrics", [2, 10])
def test_no_number_is_cut_on_a_narrow_terminal(capsys, num_metrics):
    """Many arms by many metrics come in several tables; a number that loses its end is another number."""
    rows = [Row(f"arm-{arm}", [Cell(f"{arm}.25{metric}", "± 0.062") for metric in range(num_metrics)]) for arm in range(9)]
    print_table(Table("model", [Column("bits per byte")] * num_metrics, rows), "study")
    shown = capsys.readouterr().err
    assert "\u2026" not in shown and max(map(len, shown.splitlines())) <= 80
    assert all(cell.text + "±0.062" in shown for row in rows for cell in row.cells) and shown.count("study") == 1
    assert all(row.label in shown for row in rows)


def test_results_of_one_model(capsys):
    print_results("some/model", {"piqa": fake.result("piqa", "sft")})
    shown = capsys.readouterr().err
    metric = fake.result("piqa", "sft")["metrics"]["accuracy"]
    assert "some/model" in shown and "piqa: accuracy" in shown and f"{metric['value']:.3f}±{metric['stderr']:.3f}" in shown
    assert "48" in shown.split() and "0.5" in shown
