"""What several verbs of the command line share: arguments, how a recipe is read, and what is printed at the end."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.log import is_main_process


def _show_version(asked: bool) -> None:
    if asked:
        print(f"limbeck {metadata.version('limbeck')}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", help="Show the version, and end.", callback=_show_version, is_eager=True)]
RecipeFile = Annotated[Path, typer.Argument(help="Recipe (YAML).", metavar="RECIPE")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the recipe, as key.path=value.", metavar="[KEY=VALUE]...")]
StoreOut = Annotated[Path | None, typer.Option(help="Folder of the store; overrides capture.path.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout at the end.")]
WorkerCpus = Annotated[float, typer.Option(min=0.01, help="On Ray: CPUs of each worker, and its threads.")]
WorkerGpus = Annotated[float | None, typer.Option(min=0.0, help="On Ray: GPUs of each worker; 1 where the cluster has any.")]


class Where(StrEnum):
    """Who does the work."""

    local = "local"
    ray = "ray"


def executor_of(where: Where, cpus: float, gpus: float | None) -> Any:
    """The executor that is asked for; None for this process."""
    from limbeck.errors import RecipeError

    if where is Where.local:
        if cpus != 1.0 or gpus is not None:
            raise RecipeError("found --worker-cpus or --worker-gpus without Ray, expected them with ray (or OMP_NUM_THREADS here)")
        return None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("found Ray under torchrun, expected one of them: Ray starts its own workers")
    from limbeck.on_ray import OnRay, require_ray

    require_ray()
    return OnRay(cpus, gpus)


def read_recipe(path: Path, overrides: list[str] | None) -> Any:
    """A recipe whose own checks, and those of the files that it names, have passed; torch is not loaded yet."""
    from limbeck.recipe import load_recipe, require_files

    parsed = load_recipe(path, overrides or [])
    require_files(parsed, str(path))
    return parsed


def read_capture(path: Path, overrides: list[str] | None, out: Path | None) -> Any:
    """A recipe that captures, into `out` where it is given."""
    parsed = read_recipe(path, [*(overrides or []), *([f"capture.path={json.dumps(str(out))}"] if out else [])])
    parsed.for_capture()
    return parsed


def captured(recipe: Any, manifest: Any) -> dict[str, Any]:
    """What a program wants to know of a capture."""
    counts = {"samples": manifest.num_samples, "scored_tokens": manifest.num_scored, "bytes": manifest.num_bytes}
    return {"store": recipe.capture.path, **counts, "layers": list(manifest.layers), "codec": manifest.codec.model_dump(mode="json")}


def finish(result: dict[str, Any], as_json: bool) -> None:
    """The result on standard output, from the main process: the last thing of a command, and there before it ends."""
    if as_json and is_main_process():
        print(json.dumps(result), flush=True)
