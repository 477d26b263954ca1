"""`limbeck store`: look at a capture, compare it with its checksums, mend it."""

from __future__ import annotations

from typing import Annotated

import typer

from limbeck.cli_options import Json, Overrides, RecipeFile, StoreOut, captured, finish, read_capture
from limbeck.log import console, say

store_app = typer.Typer(no_args_is_help=True, help="Captures of teachers: look at them, verify and repair them.")

StorePath = Annotated[str, typer.Argument(help="Store: a folder, or a URL that fsspec reads.", metavar="STORE")]


@store_app.command()
def inspect(path: StorePath, as_json: Json = False) -> None:
    """Show what a capture holds, how it is kept, and what was lost."""
    from limbeck.store.inspect import lines, summary

    found = summary(path)
    if not as_json:
        for name, text in lines(found):
            console.print(f"{name:<14} {text}", markup=False, soft_wrap=True)
    finish(found, as_json)


@store_app.command()
def verify(path: StorePath, as_json: Json = False) -> None:
    """Read all of a capture, and compare it with its checksums."""
    from limbeck.store.verify import verify as run_verify

    manifest = run_verify(path)
    missing = f"; {manifest.num_missing} more were not captured yet" if manifest.num_missing else ""
    say(f"{path}: {len(manifest.shards)} shards, {manifest.num_bytes / 2**20:.1f} MB, as they were written{missing}")
    finish({"store": path, "shards": len(manifest.shards), "bytes": manifest.num_bytes}, as_json)


@store_app.command()
def repair(recipe: RecipeFile, overrides: Overrides = None, out: StoreOut = None, as_json: Json = False) -> None:
    """Capture the damaged shards of a recipe's store again, and what is missing; the others stay as they are."""
    parsed = read_capture(recipe, overrides, out)
    from limbeck.capture import repair as run_repair

    damages, manifest = run_repair(parsed)
    finish(captured(parsed, manifest) | {"repaired": [damage.name for damage in damages]}, as_json)
