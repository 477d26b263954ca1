"""Tasks of EleutherAI's lm-evaluation-harness, by name or from YAML files of one's own, with its answers kept item by item.

It renders, asks and grades; Limbeck keeps what it says of every document, so that two models are compared on the same ones. A document is
known by its task, number, content and prompt: where another version or template asks otherwise, ids differ and nothing is paired.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from limbeck.errors import DataError, RecipeError, nearest
from limbeck.evaluate.base import Benchmark, Item, Metric, Subject, ratio
from limbeck.log import say

SHARES = {"acc", "acc_norm", "exact_match"}
"""Metrics of the harness that are shares of right answers."""
COMPUTED_OF_ALL = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "f1", "mcc", "bleu", "chrf", "ter"}
"""Metrics of the harness that are no means over documents unless a task says so."""


class Harness(Benchmark):
    """A task, group or tag of lm-evaluation-harness. Its metrics are the harness's, averaged over all documents of a group alike; one that
    comes by several ways of reading an answer is named with the way, as `exact_match/strict-match`."""

    type: Literal["harness"] = "harness"
    task: str
    """Name of a task, a group or a tag: `lm-eval ls tasks` has them."""
    include_path: str | None = None
    """Folder of task YAML files of your own. Python functions that they name are your code, and run."""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples before each question; as the task says where it is not set."""
    limit: int | None = Field(None, gt=0)
    """Use the first this many documents of each task."""
    batch_size: int = Field(8, gt=0)
    """Requests at once."""
    prompt: Literal["chat", "plain"] = "plain"
    """`chat` asks by the tokenizer's chat template, `plain` as the task is written."""

    version: ClassVar[int] = 1
    higher_is_better: ClassVar[dict[str, bool]] = {}

    @model_validator(mode="before")
    @classmethod
    def _named_by_its_task(cls, tree: Any) -> Any:
        """Several tasks in one recipe have results of their own."""
        return (
            {**tree, "name": tree["task"]}
            if isinstance(tree, dict) and isinstance(tree.get("task"), str) and not tree.get("name")
            else tree
        )

    @field_validator("include_path")
    @classmethod
    def _at_home(cls, path: str | None) -> str | None:
        return os.path.expanduser(path) if path is not None else None

    def check(self) -> None:
        if find_spec("lm_eval") is None:
            raise RecipeError(f"evaluate: {self.key!r} needs lm-evaluation-harness; expected its package: pip install 'limbeck[eval]'")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise RecipeError(f"evaluate: {self.key!r}: include_path: found no folder {self.include_path!r}")
        known = _tasks(self.include_path)
        if self.task not in known:
            raise RecipeError(
                f"evaluate: {self.key!r}: task: found {self.task!r}, expected one of the harness's {len(known)}{nearest(self.task, known)}"
            )

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for file in sorted(Path(self.include_path).rglob("*")) if self.include_path else ():
            if file.is_file():
                digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
        return f"lm-eval {metadata.version('lm-eval')} {digest.hexdigest()[:16]}"

    def run(self, subject: Subject) -> Iterator[Item]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        if self.prompt == "chat" and not subject.tokenizer.chat_template:
            raise DataError(f"evaluate: {self.key!r}: the tokenizer has no chat template; set `prompt: plain`")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        say(f"{self.key}: lm-evaluation-harness asks {self.task}")
        try:
            found = simple_evaluate(
                model=HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=self.batch_size),
                tasks=[self.task],
                task_manager=TaskManager(include_path=self.include_path),
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                apply_chat_template=self.prompt == "chat",
                bootstrap_iters=0,
                log_samples=True,
                confirm_run_unsafe_code=False,
            )
        except Exception as error:  # tasks are foreign programs, and their data may not be here
            if "unsafe" in str(error).lower():
                raise DataError(
                    f"evaluate: {self.key!r}: {self.task!r} would run code that a model wrote, which Limbeck never does"
                ) from error
            raise DataError(f"evaluate: {self.key!r}: the harness could not run {self.task!r}: {error or type(error).__name__}") from error
        assert found is not None
        for task, samples in found["samples"].items():
            if unused := _left_out(samples, found["configs"].get(task, {})):
                say(f"{self.key}: {task}: left out, as they are no means over documents: {', '.join(unused)}")
            yield from _items(task, samples, found["higher_is_better"].get(task, {}), found["configs"].get(task, {}))

    def metrics(self, items: Sequence[Item]) -> dict[str, Metric]:
        names = dict.fromkeys(name for item in items for name in item.sums)
        told = {name: bool(up) for item in items for name, up in item.detail["higher_is_better"].items()}
        return {name: ratio(items, name, told.get(name, True), _chance(items, name), _ceiling(name)) for name in names}


@lru_cache(maxsize=4)
def _tasks(include_path: str | None) -> frozenset[str]:
    """Every name that the harness knows."""
    from lm_eval.tasks import TaskManager

    return frozenset(TaskManager(include_path=include_path).all_tasks)


def _items(task: str, samples: Sequence[dict[str, Any]], up: dict[str, Any], config: dict[str, Any]) -> list[Item]:
    """An item per document; what several filters make of one answer are metrics of the same item."""
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    found: dict[str, Item] = {}
    for sample in samples:
        name = f"{task}/{sample['doc_id']}/{sample['doc_hash'][:12]}/{sample['prompt_hash'][:12]}"
        suffix = "" if len(filters) == 1 else f"/{sample['filter']}"
        pairs = {metric + suffix: pair for metric in sample["metrics"] if (pair := _usable(sample, metric, config)) is not None}
        if not pairs:
            raise DataError(
                f"evaluate: task {task!r} has no metric that is a mean over documents: {', '.join(sample['metrics']) or 'none'}"
            )
        directions = {metric + suffix: up.get(metric, True) for metric in sample["metrics"]}
        choices = len(sample["arguments"]) if config.get("output_type") == "multiple_choice" else None
        before = found.get(name, Item(name, {}, {}, {"higher_is_better": {}, "num_choices": choices}))
        found[name] = Item(
            name,
            before.sums | {metric: total for metric, (total, _) in pairs.items()},
            before.counts | {metric: count for metric, (_, count) in pairs.items()},
            before.detail | {"higher_is_better": before.detail["higher_is_better"] | directions},
        )
    return list(found.values())


def _usable(sample: dict[str, Any], metric: str, config: dict[str, Any]) -> tuple[float, float] | None:
    """What a document adds to a metric that is a mean over documents, or over the answers in them."""
    value = sample.get(metric)
    return _pair(value) if isinstance(value, list) or _is_mean(metric, config) else None


def _left_out(samples: Sequence[dict[str, Any]], config: dict[str, Any]) -> list[str]:
    return [metric for metric in samples[0]["metrics"] if _usable(samples[0], metric, config) is None] if samples else []


def _is_mean(metric: str, config: dict[str, Any]) -> bool:
    """Whether the task averages this metric over documents: what it computes of all at once (perplexity, F1) is no mean, and left out."""
    told = {entry.get("metric"): entry.get("aggregation") for entry in config.get("metric_list") or ()}
    aggregation = told.get(metric)
    return aggregation == "mean" or (aggregation is None and metric not in COMPUTED_OF_ALL)


def _pair(value: Any) -> tuple[float, float] | None:
    """(sum, count): of a number, or of a list of answers that are right or wrong; None of anything else, as of a corpus metric's parts."""
    import numbers

    if isinstance(value, numbers.Real):
        return float(value), 1.0
    if isinstance(value, list) and value and all(isinstance(each, bool) for each in value):
        return float(sum(value)), float(len(value))
    return None


def _ceiling(metric: str) -> float | None:
    return 1.0 if metric.partition("/")[0] in SHARES else None


def _chance(items: Sequence[Item], metric: str) -> float | None:
    """What guessing scores where an answer is chosen among a known number."""
    numbers: list[int | None] = [item.detail["num_choices"] for item in items]
    known = [number for number in numbers if number]
    if metric.partition("/")[0] not in ("acc", "acc_norm") or len(known) < len(numbers) or not known:
        return None
    return sum(1 / number for number in known) / len(known)
