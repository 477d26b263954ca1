"""Tasks of EleutherAI's lm-evaluation-harness, by name or from YAML files of one's own, with its answers kept item by item.

It renders, asks and grades; Limbeck keeps what it says of every document, so that two models are compared on the same ones. A document is
known by its task, number, content and prompt: where another version or template asks otherwise, ids differ and nothing is paired.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from limbeck.errors import DataError, RecipeError, nearest
from limbeck.evaluate.base import Benchmark, Item, Metric, Subject, ratio
from limbeck.log import say


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
            raise DataError(f"evaluate: {self.key!r}: the harness could not run {self.task!r}: {error or type(error).__name__}") from error
        assert found is not None
        for task, samples in found["samples"].items():
            yield from _items(task, samples, found["higher_is_better"].get(task, {}), found["configs"].get(task, {}))

    def metrics(self, items: Sequence[Item]) -> dict[str, Metric]:
        names = dict.fromkeys(name for item in items for name in item.sums)
        told = {name: bool(up) for item in items for name, up in item.detail["higher_is_better"].items()}
        return {name: ratio(items, name, told.get(name, True), _chance(items, name)) for name in names}


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
        pairs = {metric + suffix: pair for metric in sample["metrics"] if (pair := _pair(sample.get(metric))) is not None}
        if not pairs:
            raise DataError(
                f"evaluate: task {task!r} has no metric of single documents that is a number: {', '.join(sample['metrics']) or 'none'}"
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


def _pair(value: Any) -> tuple[float, float] | None:
    """(sum, count): of a number, or of a list of answers that are right or wrong; None of anything else, as of a corpus metric's parts."""
    import numbers

    if isinstance(value, numbers.Real):
        return float(value), 1.0
    if isinstance(value, list) and value and all(isinstance(each, bool) for each in value):
        return float(sum(value)), float(len(value))
    return None


def _chance(items: Sequence[Item], metric: str) -> float | None:
    """What guessing scores where an answer is chosen among a known number."""
    numbers: list[int | None] = [item.detail["num_choices"] for item in items]
    known = [number for number in numbers if number]
    if metric.partition("/")[0] not in ("acc", "acc_norm") or len(known) < len(numbers) or not known:
        return None
    return sum(1 / number for number in known) / len(known)
