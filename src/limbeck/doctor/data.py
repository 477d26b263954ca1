"""Is the data what one thinks? How much is scored, what truncation takes, whether answers end, what benchmarks share with it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from limbeck.cache import model_file
from limbeck.doctor.finding import Finding, Level
from limbeck.doctor.pair import texts_of
from limbeck.errors import LimbeckError
from limbeck.evaluate.base import Benchmark
from limbeck.evaluate.cases import choose
from limbeck.evaluate.exact_match import ExactMatch
from limbeck.evaluate.function_calling import FunctionCalling
from limbeck.evaluate.heldout import HeldOut
from limbeck.evaluate.multiple_choice import MultipleChoice, read_cases
from limbeck.sources.dataset import OpenDataset
from limbeck.tokens.sample import Conversation, Sample

LITTLE_SCORED = 0.05
"""Share of scored tokens under which most of the compute is context."""
MUCH_LOST = 0.05
"""Share of targets taken by truncation, of samples that are repeats, and of answers without an end that is worth a look."""
VOID = 0.1
"""Share of a benchmark's cases that are trained on from which its result says nothing."""
MIN_CHARACTERS = 20
"""Shorter texts ("hello", "what is 2 + 3?") meet by chance."""


def scored(source: OpenDataset) -> Finding:
    """The share of tokens that are learned."""
    report = source.report
    detail = {"num_samples": report.num_samples, "num_tokens": report.num_tokens, "share_scored": report.share_scored}
    message = f"{report.share_scored:.1%} of {report.num_tokens:,} tokens in {report.num_samples:,} samples are learned"
    if report.share_scored < LITTLE_SCORED:
        return Finding("scored tokens", "warning", f"{message}: nearly all compute goes into context", detail)
    return Finding("scored tokens", "ok", message, detail)


def truncation(source: OpenDataset) -> Finding:
    """What `max_length` takes."""
    report = source.report
    share = report.targets_cut / max(report.targets_cut + report.num_scored, 1)
    out = report.num_dropped + report.num_too_long + report.num_too_short
    detail = {"num_truncated": report.num_truncated, "rows_out": out, "targets_cut": report.targets_cut, "share_of_targets": share}
    message = f"{report.num_truncated:,} of {report.num_rows:,} rows are cut, {out:,} are out; {share:.1%} of what could be learned is lost"
    return Finding("truncation", "warning" if share > MUCH_LOST or out > MUCH_LOST * report.num_rows else "ok", message, detail)


def repeats(source: OpenDataset) -> Finding:
    """Samples that are there more than once."""
    report = source.report
    share = report.num_duplicates / report.num_samples
    message = f"{report.num_duplicates:,} of {report.num_samples:,} samples are there before, token for token"
    return Finding("repeats", "warning" if share > MUCH_LOST else "ok", message, {"num_duplicates": report.num_duplicates, "share": share})


def endings(samples: Sequence[Sample], tokenizer: Any, model: str, revision: str | None) -> Finding:
    """Whether what is learned ends with a token at which generation stops; else the student never learns to."""
    ends = eos_ids(tokenizer, model, revision)
    whole = [sample for sample in samples if len(sample.ids) == sample.num_total and sample.num_scored]
    last = [int(sample.ids[sample.is_target.nonzero()[0][-1]]) for sample in whole]
    open_ended = [token for token in last if token not in ends]
    names = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in sorted(ends))
    detail: dict[str, Any] = {"eos_ids": sorted(ends), "samples": len(whole), "without_end": len(open_ended)}
    if len(open_ended) <= MUCH_LOST * len(whole):
        return Finding(
            "ends of answers", "ok", f"{len(whole) - len(open_ended):,} of {len(whole):,} end with {names or 'no token'}", detail
        )
    example = tokenizer.convert_ids_to_tokens(open_ended[0])
    message = (
        f"{len(open_ended):,} of {len(whole):,} samples end their last answer with {example!r} or the like, and generation stops at "
        f"{names or 'nothing'}: the student would not learn to stop"
    )
    return Finding("ends of answers", "warning", message, detail)


def eos_ids(tokenizer: Any, model: str, revision: str | None) -> set[int]:
    """Tokens at which a model stops: of its tokenizer, generation_config.json and config.json."""
    import json

    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        file = model_file(model, name, revision)
        told = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file else None
        found |= set(told) if isinstance(told, list) else {told}
    return found - {None}


def leaks(benchmarks: Sequence[Benchmark], conversations: Iterable[Conversation]) -> Iterator[Finding]:
    """Cases of each benchmark that are in the training data, word for word after normalisation."""
    if not benchmarks:
        return
    trained: set[str] = set()
    for row in conversations:
        trained.add(normalise(_whole(row)))
        trained.update(normalise(text) for text in texts_of(row))
    for benchmark in benchmarks:
        check = f"trained on: {benchmark.key}"
        try:
            cases = questions(benchmark)
        except LimbeckError as error:
            yield Finding(check, "unknown", str(error))
            continue
        if cases is None:
            yield Finding(check, "unknown", f"a benchmark of type {benchmark.type!r} does not show its cases")
            continue
        plain = [text for text in map(normalise, cases) if len(text) >= MIN_CHARACTERS]
        found = [text for text in plain if text in trained]
        share = len(found) / max(len(cases), 1)
        detail = {"cases": len(cases), "compared": len(plain), "trained_on": len(found), "share": share, "first": found[:3]}
        message = f"{len(found):,} of {len(cases):,} cases are in the training data"
        if short := len(cases) - len(plain):
            message += f"; {short:,} of under {MIN_CHARACTERS} characters were not compared"
        if found:
            message += f", as {found[0][:60]!r}"
        level: Level = "stop" if share >= VOID else "warning" if found else "ok"
        yield Finding(check, level, message, detail)


def questions(benchmark: Benchmark) -> list[str] | None:
    """A text per case by which it is known: the whole conversation where that is scored, else what is asked. None for a foreign kind."""
    if isinstance(benchmark, HeldOut):
        return [_whole(row) for row in benchmark.conversations()]
    if isinstance(benchmark, MultipleChoice):
        return [case.question for case in choose(read_cases(benchmark.data), lambda case: case.id, benchmark.limit)]
    if isinstance(benchmark, ExactMatch):
        return [str(entry["question"]) for entry in benchmark.entries().values()]
    if isinstance(benchmark, FunctionCalling):
        asked = [[str(m.get("content") or "") for m in case.messages if m.get("role") == "user"] for case in benchmark.cases()]
        return [texts[-1] if texts else "" for texts in asked]
    return None


def normalise(text: str) -> str:
    """Case, accents' encoding, white space and punctuation do not make a text another one."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _whole(row: Conversation) -> str:
    return "\n".join(texts_of(row))
