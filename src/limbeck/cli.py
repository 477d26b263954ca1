"""The command line: one verb, one function of the Python API. Heavy modules load inside the verbs, so that `--help` and errors are instant.

People read stderr (progress, tables); programs read stdout (`--json` prints one object, last). Exit code 2: bad input, with one message.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from limbeck import stopping
from limbeck.cli_assets import assets_app
from limbeck.cli_options import (
    Json,
    Overrides,
    RecipeFile,
    StoreOut,
    Version,
    Where,
    WorkerCpus,
    WorkerGpus,
    captured,
    executor_of,
    finish,
    read_capture,
    read_recipe,
)
from limbeck.cli_store import store_app
from limbeck.errors import LimbeckError, out_of_memory, without_secrets
from limbeck.log import MODE_VARIABLE, alert, is_main_process, say, set_mode
from limbeck.parallel import Strategy

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Knowledge distillation of language models: capture a teacher, train students, compare methods fairly.",
)
app.add_typer(assets_app, name="assets")
app.add_typer(store_app, name="store")

INTERRUPTED = 130
"""What typer makes of a KeyboardInterrupt."""
NO_GO = 1
"""The input is right, and what it asks for would be in vain."""
ANYWHERE = ("--plain", "--quiet")
"""Options of the whole program that may stand behind the verb too."""


class SchemaOf(StrEnum):
    """What `schema` describes."""

    recipe = "recipe"
    study = "study"


@app.callback()
def modes(
    plain: Annotated[bool, typer.Option("--plain", help="No bars and no colours: a line now and then, for log files.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only warnings and errors, and what --json prints.")] = False,
    version: Version = False,
) -> None:
    """How much is shown; LIMBECK_LOG=plain or quiet does the same."""
    set_mode("quiet" if quiet else "plain" if plain else os.environ.get(MODE_VARIABLE) or "auto")


@app.command()
def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Directory of the demo's runs and report.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per arm; 5 is the long form.")] = 1,
    as_json: Json = False,
) -> None:
    """SFT, logit and hidden-state distillation of SmolLM2-135M into its pruned half, compared in a report."""
    from limbeck.demo import demo as run_demo

    finish(run_demo(out, seeds=seeds, overrides=overrides or []), as_json)


@app.command()
def init(
    method: Annotated[str, typer.Argument(help="sft, logits, logits-offline, hidden, lora or study.")] = "logits",
    out: Annotated[Path | None, typer.Option(help="New file; recipe.yaml or study.yaml where not given.")] = None,
    as_json: Json = False,
) -> None:
    """Write a commented starter recipe for a method."""
    from limbeck.init import init as run_init

    path = run_init(method, out)
    say(f"wrote {path}; next: limbeck check {path}")
    finish({"path": str(path), "method": method}, as_json)


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    show_data: Annotated[
        bool, typer.Option("--show-data", help="Show what is trained on: scored tokens, lengths, losses, padding.")
    ] = False,
    rows: Annotated[int, typer.Option(min=0, help="Conversations that --show-data prints, in the order of training.")] = 3,
    headroom: Annotated[bool, typer.Option("--headroom", help="Load both models, and measure what there is to learn.")] = False,
    as_json: Json = False,
) -> None:
    """Validate a recipe or study, and say whether student, teacher and data fit together. Exit code 1: they do not."""
    from limbeck.check import check as run_check
    from limbeck.check import diagnose, show, show_diagnoses
    from limbeck.doctor.finding import is_go

    found = run_check(recipe, overrides or [])
    if not as_json:
        show(found)
    if show_data:
        from limbeck.show import show_data as run_show

        found["data"] = run_show(recipe, overrides or [], rows, quiet=as_json)
    diagnoses = diagnose(recipe, overrides or [], headroom)
    found["findings"] = {arms: [finding.to_json() for finding in findings] for arms, findings in diagnoses.items()}
    found["go"] = all(map(is_go, diagnoses.values()))
    if not as_json:
        show_diagnoses(recipe, found, diagnoses)
    finish(found, as_json)
    if not found["go"]:
        raise typer.Exit(NO_GO)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    measure: Annotated[int, typer.Option(min=0, help="Take the time from so many real steps here; loads the models.")] = 0,
    device: Annotated[str | None, typer.Option(help="Or from the peak figures of a device, such as a100-80g.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes that train together.")] = 1,
    strategy: Annotated[Strategy | None, typer.Option(help="How they share the run; the recipe's where not given.")] = None,
    memory_gb: Annotated[float | None, typer.Option(min=0.001, help="What a process may hold; the device's where not given.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a recipe's training takes: memory by part, disk, operations, time. Exit code 1: it does not fit."""
    from limbeck.plan import plan as run_plan
    from limbeck.plan import show

    found = run_plan(recipe, overrides or [], measure, device, processes, strategy, memory_gb)
    if not as_json:
        show(found)
    finish(found, as_json)
    if not found["fits"]:
        raise typer.Exit(NO_GO)


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; runs/NAME of the recipe where not given.")] = None,
    as_json: Json = False,
) -> None:
    """Train a student. Started again with the same directory, it resumes."""
    parsed = read_recipe(recipe, overrides)
    parsed.for_training()
    from limbeck.trainer import train as run_train

    run = run_train(parsed, out or Path("runs") / recipe.stem)
    finish({"run": str(run.path), "student": str(run.student), **run.read_json("run.json"), "evals": _metrics(run.evals())}, as_json)
    say(f"student: {run.student}")


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="Directory of a run with a step that was not finite.", metavar="RUN")], as_json: Json = False
) -> None:
    """Do the step again that was infinite or no number, sample by sample, and say where that comes from."""
    from limbeck.replay import replay as run_replay
    from limbeck.replay import show

    found = run_replay(run)
    if not as_json:
        show(found)
    finish(found, as_json)


@app.command()
def capture(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: StoreOut = None,
    target_kl: Annotated[float | None, typer.Option(help="Choose how much is kept: as little as loses at most this KL, in nats.")] = None,
    bytes_per_token: Annotated[float | None, typer.Option(help="Choose how much is kept: as much as takes at most these bytes.")] = None,
    engine: Annotated[Where, typer.Option(help="This process and those of torchrun, or workers on a Ray cluster.")] = Where.local,
    worker_cpus: WorkerCpus = 1.0,
    worker_gpus: WorkerGpus = None,
    as_json: Json = False,
) -> None:
    """Score the recipe's source with its teacher once, and keep the signal for many students."""
    wanted = {"target_kl": target_kl, "bytes_per_token": bytes_per_token}
    targets = [f"capture.{key}={value}" for key, value in wanted.items() if value is not None]
    executor = executor_of(engine, worker_cpus, worker_gpus)
    parsed = read_capture(recipe, [*(overrides or []), *targets], out)
    from limbeck.capture import capture as run_capture

    finish(captured(parsed, run_capture(parsed, executor=executor)), as_json)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Model: a folder, a cached name or a hub name.", metavar="MODEL")],
    overrides: Overrides = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe whose `evaluate` (and `teacher`) is used.")] = None,
    suite: Annotated[str | None, typer.Option(help="Or a suite: core, tools, published, or a YAML file with `evaluate`.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for evals/NAME.json; an interrupted benchmark goes on there.")] = None,
    as_json: Json = False,
) -> None:
    """Grade a model with the benchmarks of a recipe or of a suite."""
    from limbeck.cache import resolve_model
    from limbeck.errors import RecipeError
    from limbeck.suites import load_suite

    if (recipe is None) == (suite is None):
        raise RecipeError(f"eval: found {'both' if recipe else 'neither of'} --recipe and --suite, expected one of them")
    if suite is not None and overrides:
        raise RecipeError(f"eval: found {overrides[0]!r} with --suite, expected overrides with --recipe only")
    parsed = read_recipe(recipe, overrides) if recipe is not None else None
    benchmarks = parsed.evaluate if parsed else load_suite(str(suite))
    if not benchmarks:
        raise RecipeError(f"{recipe}: evaluate is empty; expected at least one benchmark")
    resolve_model(model)
    from limbeck.evaluate.runner import evaluate_model
    from limbeck.report.terminal import print_results

    results = [result.to_json() for result in evaluate_model(model, benchmarks, parsed.teacher if parsed else None, out)]
    evals = {result["name"]: result for result in results}
    print_results(model, evals)
    finish({"model": model, "evals": _metrics(evals)}, as_json)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="Study (YAML).", metavar="STUDY")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the study; runs/NAME where not given.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder of records and report, small enough to commit; --out where not given.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show runs, tokens, time and memory to be expected; do nothing.")] = False,
    executor: Annotated[Where, typer.Option(help="Runs one by one here, or side by side on a Ray cluster.")] = Where.local,
    worker_cpus: WorkerCpus = 1.0,
    worker_gpus: WorkerGpus = None,
    as_json: Json = False,
) -> None:
    """Train arms x seeds, evaluate them alike, and write the report. What is recorded is not done again."""
    from limbeck.study import load_study

    where = executor_of(executor, worker_cpus, worker_gpus)
    spec = load_study(file, overrides or [])
    path = out or Path("runs") / spec.name
    if dry_run:
        from limbeck.forecast import forecast, show

        expected = forecast(spec, path, results)
        show(expected)
        finish(expected, as_json)
        return
    from limbeck.conduct import run_study

    finish(run_study(spec, path, results, where), as_json)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="Directory of a study or of a run.", metavar="DIRECTORY")], as_json: Json = False
) -> None:
    """Write the report of a study or run that lies on disk, as HTML, Markdown and JSON."""
    from limbeck.report.page import build_report

    paths = build_report(path)
    for file in (paths.html, paths.markdown):
        say(f"report: {file}")
    finish({"html": str(paths.html), "markdown": str(paths.markdown), "json": str(paths.json)}, as_json)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Directory of a finished run.", metavar="RUN")],
    out: Annotated[Path | None, typer.Option(help="New folder; RUN/export where not given.")] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="Upload it to this repository too, as owner/name.", metavar="REPO")] = None,
    as_json: Json = False,
) -> None:
    """Copy a run's student, verified, with its tokenizer and a model card."""
    from limbeck.export import export as run_export

    path = run_export(run, out, push_to_hub)
    say(f"export: {path}")
    finish({"path": str(path), "pushed_to": push_to_hub}, as_json)


@app.command()
def schema(of: Annotated[SchemaOf, typer.Argument(help="recipe or study.")] = SchemaOf.recipe) -> None:
    """Print the JSON schema of recipes or studies, for editors."""
    from limbeck.schema import recipe_schema, study_schema

    print(json.dumps(recipe_schema() if of is SchemaOf.recipe else study_schema(), indent=2))


def _metrics(evals: dict[str, Any]) -> dict[str, Any]:
    return {name: result["metrics"] for name, result in evals.items()}


def main() -> None:
    """Entry point: every LimbeckError and misuse becomes one message and exit code 2; an orderly stop is code 75."""
    try:
        # not standalone, or typer would handle misuse and an interrupt itself
        with stopping.listening():
            code = app(args=in_order(sys.argv[1:]), prog_name="limbeck", standalone_mode=False)
    except LimbeckError as error:
        _fail(str(error))
    except OSError as error:  # a full disk, a folder that may not be written: nothing that a traceback would explain
        _fail(f"{error.filename or 'system'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if (message := out_of_memory(error)) is None:
            raise
        _fail(message)
    except typer.TyperException as error:
        context, message = getattr(error, "ctx", None), error.format_message()
        if not message:  # nothing was asked for, and the help is printed
            sys.exit(2)
        _fail(f"{message} See: {context.command_path if context else 'limbeck'} --help")
    if code == INTERRUPTED:
        if is_main_process():
            alert("stopped; start the same command again to go on from what was written")
        code = stopping.TRY_AGAIN
    sys.exit(code)


def in_order(arguments: list[str]) -> list[str]:
    """The arguments, with options of the whole program before the verb."""
    return sorted(arguments, key=lambda argument: argument not in ANYWHERE)


def _fail(message: str) -> NoReturn:
    message = without_secrets(message)
    with suppress(OSError):  # which may be what failed
        finish({"error": message}, "--json" in sys.argv)
    alert(f"error: {message}", style="red")
    sys.exit(2)
