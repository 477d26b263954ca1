"""What a recipe trains on, looked at before it is trained on: conversations with their scored tokens, and the counts that tell whether the
data is what one thinks. Loads the tokenizer, and no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.errors import RecipeError
from limbeck.evaluate.heldout import HeldOut
from limbeck.log import console, visible
from limbeck.recipe import Recipe, is_study, tokenizer_name
from limbeck.recipe import parse_recipe as parse
from limbeck.sources.dataset import DatasetSource, OpenDataset
from limbeck.tokens.pack import lay_out, num_positions
from limbeck.tokens.sample import Sample

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
MAX_STEPS = 200
"""Steps of which the share of padding is measured."""
OPENING, CLOSING = "⟦", "⟧"


def show_data(path: str | Path, overrides: Iterable[str] = (), rows: int = 3, quiet: bool = False) -> dict[str, Any]:
    """Show the first `rows` samples and the numbers of a recipe's data (for a study: of each data set that its arms train on)."""
    overrides = list(overrides)
    if not is_study(path):
        return _show(parse(path, overrides), rows, quiet)
    from limbeck.study import load_study

    arms: dict[str, list[str]] = {}
    recipes = load_study(path, overrides).recipes()
    for arm, recipe in recipes.items():
        arms.setdefault(f"{recipe.source.model_dump_json()} {tokenizer_name(recipe)}", []).append(arm)
    found = {}
    for names in arms.values():
        if not quiet:
            _print(f"\narms: {', '.join(names)}")
        found[", ".join(names)] = _show(recipes[names[0]], rows, quiet)
    return found


def _show(recipe: Recipe, rows: int, quiet: bool) -> dict[str, Any]:
    from limbeck.models import load_tokenizer

    if not isinstance(recipe.source, DatasetSource):
        raise RecipeError(f"source.type: found {recipe.source.type!r}, expected 'dataset': other sources write their tokens in training")
    tokenizer = load_tokenizer(*tokenizer_name(recipe))
    source = recipe.source.open(tokenizer, recipe.seed)
    found = numbers(recipe, source, tokenizer)
    if not quiet:
        for number, sample in enumerate(source.at(0, rows)):
            print_sample(sample, tokenizer, number)
        _print("")
        for name, text in summary(found):
            _print(f"{name:<9} {text}")
    return found


def _print(line: str) -> None:
    """Not wrapped: columns stay columns, and a pager may scroll."""
    console.print(visible(line), markup=False, soft_wrap=True)


def numbers(recipe: Recipe, source: OpenDataset, tokenizer: Any) -> dict[str, Any]:
    """Counts, lengths, shares, and what padding and packing make of a step."""
    samples, spec = source.samples, recipe.train
    found = source.describe() | {
        "lengths": quantiles(len(sample.ids) for sample in samples),
        "lengths_before_cutting": quantiles(sample.num_total for sample in samples),
        "scored_per_sample": quantiles(sample.num_scored for sample in samples),
    }
    if spec is not None:
        per_epoch = source.steps_per_epoch(spec.batch_size)
        steps = [source.at(step, spec.batch_size) for step in range(min(per_epoch, spec.steps or per_epoch, MAX_STEPS))]
        pack_length = spec.pack_length or getattr(recipe.source, "max_length", 0)
        found["steps_per_epoch"] = per_epoch
        found["epochs"] = spec.steps / per_epoch if spec.steps else spec.epochs
        found["share_not_padding"] = {
            "padded": _share_not_padding(steps, spec.micro_batch_size, None),
            "packed": _share_not_padding(steps, spec.micro_batch_size, pack_length),
            "pack_length": pack_length,
            "is_packed": spec.pack_length is not None,
        }
    trained = {sample.sample_id for sample in samples}
    found["held_out"] = {}
    for benchmark in recipe.evaluate:
        if isinstance(benchmark, HeldOut):
            cases = {sample.sample_id for sample in benchmark.rendered(tokenizer)}
            found["held_out"][benchmark.key] = {"cases": len(cases), "also_trained_on": len(cases & trained)}
    return found


def _share_not_padding(steps: Sequence[Sequence[Sample]], micro_batch_size: int, pack_length: int | None) -> float:
    """Tokens as a share of the positions that are computed."""
    positions = sum(num_positions(lay_out(samples, micro_batch_size, pack_length)) for samples in steps)
    return sum(len(sample.ids) for samples in steps for sample in samples) / positions


def quantiles(values: Iterable[int]) -> dict[str, int]:
    """Minimum to maximum, each a value that occurs."""
    array = np.fromiter(values, dtype=np.int64)
    return {name: int(np.quantile(array, share, method="nearest")) for name, share in QUANTILES.items()}


def summary(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The numbers in lines for people."""
    lines = [("data", _origin(origin)) for origin in found["data"]]
    scored, repeated = f"{found['num_scored']:,} scored ({found['share_scored']:.1%})", found["num_duplicates"]
    lines.append(("samples", f"{found['num_samples']:,} of {found['num_tokens']:,} tokens, {scored}; {repeated:,} are repeated"))
    lines += [
        (name, "  ".join(f"{quantile} {value:,}" for quantile, value in found[key].items()))
        for name, key in (("tokens", "lengths"), ("uncut", "lengths_before_cutting"), ("scored", "scored_per_sample"))
    ]
    rows = {"truncated": "num_truncated", "split": "num_split", "too long": "num_too_long", "too short": "num_too_short"}
    counts = ", ".join(f"{found[key]:,} {name}" for name, key in {**rows, "without a target": "num_dropped"}.items() if found[key])
    lost = f"; {found['tokens_cut']:,} tokens are cut, {found['targets_cut']:,} of them scored" if found["tokens_cut"] else ""
    lines.append(("rows", f"{found['num_rows']:,}: {counts or 'all used in whole'}{lost}"))
    if layout := found.get("share_not_padding"):
        lines.append(("steps", f"{found['steps_per_epoch']:,} per epoch; {found['epochs']:.3g} epochs"))
        packed = f"with train.pack_length: {layout['pack_length']}" + (", as set" if layout["is_packed"] else "")
        lines.append(("padding", f"{1 - layout['padded']:.1%} of what is computed; {1 - layout['packed']:.1%} {packed}"))
    for name, cases in found["held_out"].items():
        lines.append(("held out", f"{name}: {cases['cases']:,} cases, {cases['also_trained_on']:,} of them are trained on too"))
    return lines


def _origin(origin: dict[str, Any]) -> str:
    formats = ", ".join(f"{count:,} {name}" for name, count in origin["formats"].items())
    others = {"left out by convert": origin["left_out_by_convert"], "held out": origin["held_out"]}
    rest = "".join(f", {count:,} {name}" for name, count in others.items() if count)
    return f"{origin['name']}: {origin['rows_used']:,} of {origin['rows_read']:,} rows ({formats}){rest}"


def print_sample(sample: Sample, tokenizer: Any, number: int) -> None:
    """A sample's text, what is learned in another colour; in brackets where there are no colours."""
    from rich.text import Text

    has_colours = console.is_terminal and not console.no_color
    legend = "scored tokens in green" if has_colours else f"scored tokens in {OPENING}{CLOSING}"
    title = f"\n--- sample {number + 1}: {len(sample.ids):,} tokens, {sample.num_scored:,} scored ({legend})\n"
    text = Text.assemble((title, "bold"))
    for is_scored, part in segments(sample, tokenizer):
        if has_colours:
            text.append(part, style="green" if is_scored else "dim")
        else:
            text.append(f"{OPENING}{part}{CLOSING}" if is_scored else part)
    console.print(text, soft_wrap=True)


def segments(sample: Sample, tokenizer: Any) -> list[tuple[bool, str]]:
    """The text in runs of scored and other tokens.

    A run is what it adds to the text before it: some tokenizers drop the first space of what they decode. A character whose bytes two runs
    share belongs to the second, which completes it.
    """
    runs, end, length = [], 0, 0
    for is_scored, run in groupby(sample.is_target.tolist()):
        end += len(list(run))
        text = tokenizer.decode(sample.ids[:end].tolist(), clean_up_tokenization_spaces=False)
        text = text if end == len(sample.ids) else text.rstrip("\ufffd")
        runs.append((is_scored, visible(text[length:])))
        length = len(text)
    return runs
