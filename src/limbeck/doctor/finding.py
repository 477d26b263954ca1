"""What the doctor found: one sentence with its figures, and whether to go on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from limbeck.log import console, visible

Level = Literal["ok", "warning", "unknown", "stop"]
"""`stop` is no-go: it cannot work, or its result would say nothing. `unknown` could not be looked at, and stops nothing."""
_COLOURS = {"ok": "green", "warning": "yellow", "unknown": "cyan", "stop": "bold red"}


@dataclass(frozen=True)
class Finding:
    """`check` is what was looked at; `detail` has the figures for programs."""

    check: str
    level: Level
    message: str
    detail: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def is_go(findings: Iterable[Finding]) -> bool:
    """Whether nothing stops."""
    return all(finding.level != "stop" for finding in findings)


def show(findings: Iterable[Finding]) -> None:
    """A row per finding on the terminal. What it quotes is foreign text: no markup, and control characters in their escapes."""
    from rich.table import Column, Table
    from rich.text import Text

    table = Table("check", "", Column("found", overflow="fold"), box=None, padding=(0, 2, 0, 0))
    for finding in findings:
        table.add_row(Text(visible(finding.check)), Text(finding.level, style=_COLOURS[finding.level]), Text(visible(finding.message)))
    console.print(table)
