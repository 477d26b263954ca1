"""`limbeck store`: look at a capture, compare it with its checksums, mend it, import one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from limbeck.cli_options import Json, Overrides, RecipeFile, StoreOut, captured, finish, read_capture, read_recipe
from limbeck.log import console, megabytes, say

store_app = typer.Typer(no_args_is_help=True, help="Captures of teachers: look at them, verify, repair and import them.")

StorePath = Annotated[str, typer.Argument(help="Store: a folder, or a URL that fsspec reads.", metavar="STORE")]


BAR = 40
"""Characters of the longest bar."""


@store_app.command()
def inspect(
    path: StorePath,
    plot: Annotated[Path | None, typer.Option(help="Write the bars as a plot too: a file that ends with .svg or .png.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a capture holds, how it is kept, and what was lost."""
    from limbeck.store.inspect import bars, lines, summary

    if plot:
        from limbeck.report.fidelity import check_kind, write_plot

        check_kind(plot)
    found = summary(path)
    if not as_json:
        for name, text in lines(found):
            console.print(f"{name:<14} {text}", markup=False, soft_wrap=True)
        for title, rows in bars(found).items():
            console.print(f"\n{title}", markup=False)
            longest = max(value for _, value, _ in rows) or 1.0
            for label, value, text in rows:
                bar = "█" * max(round(BAR * value / longest), 1 if value else 0)
                console.print(f"{label:<14} {bar} {text}", markup=False, highlight=False, soft_wrap=True)
    if plot:
        write_plot(found, plot)
        say(f"plot: {plot}")
    finish(found, as_json)


@store_app.command("import")
def import_(
    recipe: RecipeFile,
    folder: Annotated[Path, typer.Argument(help="Capture by DistillKit: the folder with its Parquet files.", metavar="CAPTURE")],
    overrides: Overrides = None,
    out: StoreOut = None,
    settings: Annotated[Path | None, typer.Option(help="Its codec's settings; compression_config.yaml in CAPTURE where not given.")] = None,
    teacher: Annotated[str, typer.Option(help="Which teacher it was, for the manifest.")] = "unknown",
    as_json: Json = False,
) -> None:
    """Make a store of what another toolkit captured of a recipe's source."""
    from limbeck.importing import importing_recipe

    parsed = importing_recipe(recipe, folder, overrides or [], out, settings, teacher)
    from limbeck.capture import capture as run_capture

    finish(captured(parsed, run_capture(parsed)), as_json)


@store_app.command()
def verify(
    path: StorePath,
    overrides: Overrides = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe of the capture: run its teacher again on some of what the store holds, and compare.")
    ] = None,
    measure: Annotated[int, typer.Option(min=1, help="Conversations that are compared.")] = 32,
    as_json: Json = False,
) -> None:
    """Read all of a capture, and compare it with its checksums; with a recipe, what comes back with the teacher too."""
    from limbeck.store.verify import verify as run_verify

    parsed = read_recipe(recipe, overrides) if recipe else None
    manifest = run_verify(path)
    missing = f"; {manifest.num_missing} more were not captured yet" if manifest.num_missing else ""
    say(f"{path}: {len(manifest.shards)} shards, {megabytes(manifest.num_bytes)} MB, as they were written{missing}")
    found = {"store": path, "shards": len(manifest.shards), "bytes": manifest.num_bytes}
    if parsed:
        from limbeck.remeasure import remeasure
        from limbeck.store.certificate import in_words

        measured = remeasure(path, parsed, measure)
        before = manifest.certificate
        when_captured = f" ({in_words(before)} when it was captured, on other tokens)" if before else ""
        say(
            f"{path}: {in_words(measured)}{when_captured} on {measured['num_scored']:,} tokens of "
            f"{measured['num_samples']:,} conversations; targets' log-probabilities are off by {measured['observed_error']:.5f}"
        )
        found["measured"] = measured
    finish(found, as_json)


@store_app.command()
def repair(recipe: RecipeFile, overrides: Overrides = None, out: StoreOut = None, as_json: Json = False) -> None:
    """Capture the damaged shards of a recipe's store again, and what is missing; the others stay as they are."""
    parsed = read_capture(recipe, overrides, out)
    from limbeck.capture import repair as run_repair

    damages, manifest = run_repair(parsed)
    finish(captured(parsed, manifest) | {"repaired": [damage.name for damage in damages]}, as_json)
