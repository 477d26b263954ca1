"""The runner: grades a model with benchmarks, one after the other, and takes results that are already there, and items of unfinished ones.

They are taken only where the same weights were graded on the same cases with the same settings: a stale one would be believed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from limbeck.cache import model_content
from limbeck.errors import DataError, RecipeError, RunError
from limbeck.evaluate.base import Benchmark, Item, Result, Subject
from limbeck.evaluate.partial import Partial
from limbeck.log import say
from limbeck.run import Run, write_json
from limbeck.teachers import Teacher

SAME = ("name", "version", "settings", "cases", "subject")
"""What two results must have in common to be of the same thing."""


def evaluate(benchmarks: Sequence[Benchmark], subject: Subject, done: Path | None = None, seen: Path | None = None) -> Iterator[Result]:
    """The result of each benchmark, as it is ready.

    `done` is a folder of results (NAME.json) that are taken where they still hold, as are those in `seen`; the caller writes what is new
    into `done` before asking for the next. Meanwhile the items of a benchmark are kept there as they are graded, and an interrupted one
    goes on behind them.
    """
    if not benchmarks:
        return
    if needy := [benchmark.key for benchmark in benchmarks if benchmark.needs_teacher and not _has_teacher(subject.teacher)]:
        raise RecipeError(f"evaluate: {needy[0]!r} compares with a teacher, and there is none; set teacher, or remove it")
    identity = identify(subject)
    for benchmark in benchmarks:
        asked = _told(subject.teacher) if benchmark.needs_teacher and subject.teacher else {}
        empty = Result(
            name=benchmark.key,
            version=benchmark.version,
            settings=json.loads(benchmark.model_dump_json()),
            metrics={},
            items=[],
            seconds=0.0,
            cases=benchmark.fingerprint(),
            subject=identity | asked,
        )
        partial = done / f"{benchmark.key}.partial.jsonl" if done is not None else None
        result = _found(empty, done) or _found(empty, seen)
        if result is None:
            result = _graded(empty, benchmark, subject, partial)
        say(_summary(result))
        yield result
        if partial is not None:
            partial.unlink(missing_ok=True)


def evaluate_model(
    model: str,
    benchmarks: Sequence[Benchmark],
    teacher: Teacher | None = None,
    out: Path | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
) -> list[Result]:
    """Grade a model by folder, cached name or hub name; with `out`, write `out/evals/NAME.json` and take what is there already."""
    keys = [benchmark.key for benchmark in benchmarks]
    if repeated := {key for key in keys if keys.count(key) > 1}:
        raise RecipeError(f"evaluate: found {sorted(repeated)[0]!r} twice; give one of them another `name`")
    for benchmark in benchmarks:
        benchmark.check()
    import torch

    from limbeck.models import load_model, load_tokenizer, verify_head, weights_hash

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(model, revision)
    loaded = load_model(model, dtype, revision, device)
    verify_head(loaded)
    folder = out / "evals" if out is not None else None
    trained = Run(out).read_json("run.json", {}).get("weights_sha256") if out is not None else None
    if trained is not None and weights_hash(dict(loaded.named_parameters())) != trained:
        raise RunError(f"{out}: holds a run, whose student is another model than {model!r}; choose another folder with --out")
    results = []
    for result in evaluate(benchmarks, Subject(loaded, tokenizer, device, teacher, content=model_content(model)), folder):
        if folder is not None:
            write_json(folder / f"{result.name}.json", result.to_json())
        results.append(result)
    return results


def holds(evals: Mapping[str, dict[str, Any]], benchmarks: Sequence[Benchmark], teacher: Teacher | None) -> bool:
    """Whether there is a result of each benchmark, of its cases and of the teacher as they are now."""
    for benchmark in benchmarks:
        found = evals.get(benchmark.key, {})
        asked = _told(teacher) if benchmark.needs_teacher and teacher else {}
        if (found.get("version"), found.get("cases")) != (benchmark.version, benchmark.fingerprint()):
            return False
        if any(found.get("subject", {}).get(name) != value for name, value in asked.items()):
            return False
    return True


def identify(subject: Subject) -> dict[str, Any]:
    """What decides a model's answers: its weights, its vocabulary, its chat template, and what else is known to lie in its folder."""
    from limbeck.models import weights_hash
    from limbeck.tokens.identity import template_hash, vocabulary_hash

    return {
        "weights_sha256": weights_hash(dict(subject.model.named_parameters())),
        "vocabulary_sha256": vocabulary_hash(subject.tokenizer),
        "template_sha256": template_hash(subject.tokenizer),
        **({"content": subject.content} if subject.content else {}),
    }


def _told(teacher: Teacher) -> dict[str, Any]:
    content = teacher.content()
    return {"teacher": teacher.model_dump(mode="json"), **({"teacher_content": content} if content else {})}


def _graded(empty: Result, benchmark: Benchmark, subject: Subject, file: Path | None) -> Result:
    import torch

    model = subject.model
    partial = Partial(file, {name: value for name, value in asdict(empty).items() if name in SAME})
    if partial.items:
        say(f"{benchmark.key}: goes on behind {len(partial.items)} items that are graded already")
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            graded = _checked(benchmark.key, benchmark.run(replace(subject, done=partial.items)))
            items = [*partial.items.values(), *partial.collect(graded)]
    finally:
        model.train(was_training)
    if not items:
        raise DataError(f"evaluate: {benchmark.key!r} has no case to grade")
    return replace(empty, metrics=benchmark.metrics(items), items=items, seconds=partial.seconds)


def _checked(key: str, items: Iterable[Item]) -> Iterator[Item]:
    """Ids are what two models are compared by; a value that is no number would make the whole mean none."""
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise DataError(f"evaluate: {key!r} has item {item.id!r} twice, expected ids that differ")
        seen.add(item.id)
        for name, value in item.sums.items():
            if not math.isfinite(value):
                raise RunError(f"evaluate: {key!r}: {name} of item {item.id!r} is {value}; the model's outputs are not finite")
        yield item


def _found(wanted: Result, done: Path | None) -> Result | None:
    """The result in `done`, if it is of the same model, cases, settings and version."""
    file = done / f"{wanted.name}.json" if done is not None else None
    if file is None or not file.is_file():
        return None
    try:
        result = Result.from_json(json.loads(file.read_text(encoding="utf-8")), str(file))
    except (RunError, ValueError):  # of another version of Limbeck, or damaged: it is made anew
        return None
    same = all(getattr(result, name) == getattr(wanted, name) for name in SAME)
    return result if same else None


def _has_teacher(teacher: Teacher | None) -> bool:
    return teacher is not None and teacher.provides().output


def _summary(result: Result) -> str:
    """One line: `piqa: acc_norm 0.650 ± 0.062, acc 0.667 ± 0.061 (60 items, 4.1 s)`."""
    parts = [
        f"{name} {'none' if metric.value is None else f'{metric.value:.3f}'}"
        + (f" ± {metric.stderr:.3f}" if metric.stderr is not None else "")
        for name, metric in result.metrics.items()
    ]
    return f"{result.name}: {', '.join(parts)} ({len(result.items)} items, {result.seconds:.1f} s)"
