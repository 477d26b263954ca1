"""Tasks of EleutherAI's lm-evaluation-harness, by name or from YAML files of one's own, with its answers kept item by item.

It renders, asks and grades; Limbeck keeps what it says of every document, so that two models are compared on the same ones. A document is
known by its task, number, content and prompt: where another version or template asks otherwise, ids differ and nothing is paired.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from limbeck.errors import DataError, RecipeError, nearest
from limbeck.evaluate.base import Benchmark, Item, Metric, Subject, ratio
from limbeck.log import say

CHOSEN = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info"}
"""Metrics of the harness that are shares of right choices."""
IFEVAL = {f"{level}_level_{how}_acc" for level in ("prompt", "inst") for how in ("strict", "loose")}
SHARES = CHOSEN | IFEVAL | {"exact_match", "em", "accuracy", "non_greedy_accuracy", "mc1", "mc2"}
"""Metrics of the harness whose best value is 1."""
BUILDERS = {"json", "csv", "parquet", "arrow", "text", "pandas", "xml", "webdataset", "imagefolder", "audiofolder"}
"""What a task names in place of a data set, where its data are files."""
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
        if isinstance(tree, dict) and isinstance(tree.get("task"), str) and not tree.get("name"):
            return {**tree, "name": re.sub(r"[^A-Za-z0-9._+-]", "-", tree["task"]).lstrip("._+-")[:100]}
        return tree

    @field_validator("include_path")
    @classmethod
    def _at_home(cls, path: str | None) -> str | None:
        return os.path.expanduser(path) if path is not None else None

    def check(self) -> None:
        if find_spec("lm_eval") is None:
            raise RecipeError(f"evaluate: {self.key!r} needs lm-evaluation-harness; expected its package: pip install 'limbeck[eval]'")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise RecipeError(f"evaluate: {self.key!r}: include_path: found no folder {self.include_path!r}")
        known = _index(self.include_path, self._files())
        if self.task not in known:
            raise RecipeError(
                f"evaluate: {self.key!r}: task: found {self.task!r}, expected one of the harness's {len(known)}{nearest(self.task, known)}"
            )
        for name, config in self._leaves().items():
            if config.get("unsafe_code"):
                raise RecipeError(f"evaluate: {self.key!r}: {name!r} would run code that a model wrote, which Limbeck never does")
            for file in _data_files(config):
                if not file.is_file():
                    raise RecipeError(
                        f"evaluate: {self.key!r}: {name!r}: found no file {str(file)!r}; paths in a task are seen from the current folder"
                    )
            if lacking := _not_at_hand(config):
                raise RecipeError(
                    f"evaluate: {self.key!r}: {name!r} needs the data set {lacking!r} of the hub, which is not in its cache, and the hub "
                    "is switched off (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE); run it once with a network, or remove it"
                )

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        if self.include_path is not None:
            digest.update(self._files().encode())
            for file in (file for config in self._leaves().values() for file in _data_files(config) if file.is_file()):
                digest.update(hashlib.sha256(file.read_bytes()).digest())
        return f"lm-eval {metadata.version('lm-eval')} {digest.hexdigest()[:16]}"

    def _files(self) -> str:
        """Hash of the folder of tasks, but for what Python leaves there."""
        digest, folder = hashlib.sha256(), Path(self.include_path or "")
        for file in sorted(folder.rglob("*")) if self.include_path else ():
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(file.relative_to(folder).as_posix().encode() + hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    def _leaves(self) -> dict[str, dict[str, Any]]:
        """The tasks in a task, group or tag, with what their files say."""
        return dict(_leaves(_index(self.include_path, self._files()), self.task))

    def run(self, subject: Subject) -> Iterator[Item]:
        from lm_eval.models.huggingface import HFLM

        if self.prompt == "chat" and not subject.tokenizer.chat_template:
            raise DataError(f"evaluate: {self.key!r}: the tokenizer has no chat template; set `prompt: plain`")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        manager = _manager(self.include_path, self._files())
        with self._foreign(self.task):
            tasks = manager.load([self.task])["tasks"]
            model = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=self.batch_size)
        for name in _left(list(tasks), subject.done):
            say(f"{self.key}: lm-evaluation-harness asks {name}")
            with self._foreign(name):
                found = self._ask(model, tasks[name], manager)
            for task, samples in found["samples"].items():
                if unused := _left_out(samples, found["configs"].get(task, {})):
                    say(f"{self.key}: {task}: left out, as they are no means over documents: {', '.join(unused)}")
                yield from _items(task, samples, found["higher_is_better"].get(task, {}), found["configs"].get(task, {}))

    def _ask(self, model: Any, task: Any, manager: Any) -> Any:
        from lm_eval import simple_evaluate

        return simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=manager,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            apply_chat_template=self.prompt == "chat",
            bootstrap_iters=0,
            log_samples=True,
            confirm_run_unsafe_code=False,
        )

    @contextmanager
    def _foreign(self, name: str) -> Iterator[None]:
        """Tasks are foreign programs, and their data may not be here: what they raise is no defect of ours."""
        try:
            yield
        except Exception as error:
            if "unsafe" in str(error).lower():
                raise DataError(f"evaluate: {self.key!r}: {name!r} would run code that a model wrote, which Limbeck never does") from error
            raise DataError(f"evaluate: {self.key!r}: the harness could not run {name!r}: {error or type(error).__name__}") from error

    def metrics(self, items: Sequence[Item]) -> dict[str, Metric]:
        names = dict.fromkeys(name for item in items for name in item.sums)
        told = {name: bool(up) for item in items for name, up in item.detail["higher_is_better"].items()}
        return {name: ratio(items, name, told.get(name, True), _chance(items, name), _ceiling(name)) for name in names}


@lru_cache(maxsize=4)
def _manager(include_path: str | None, files: str) -> Any:
    """The harness's tasks and those of a folder, which take seconds to read. `files` is the folder's content, which may change."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _index(include_path: str | None, files: str) -> Mapping[str, Any]:
    """Every task, group and tag by its name."""
    return _manager(include_path, files).task_index  # type: ignore[no-any-return]


def _leaves(index: Mapping[str, Any], task: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, configuration) of the tasks in a task, group or tag. A member of a group may be a mapping with changes of its own."""
    changes = task if isinstance(task, dict) else {}
    name = changes.get("task", changes.get("group", "")) if changes else task
    if isinstance(name, list):  # a group inside a group
        yield from (leaf for member in name for leaf in _leaves(index, member))
        return
    entry = index.get(str(name))
    own = (entry.cfg if entry else None) or {}
    members = own.get("task") if "group" in own else sorted(entry.tags) if entry and entry.cfg is None else None
    if isinstance(members, list):
        yield from (leaf for member in members for leaf in _leaves(index, member))
    else:
        yield str(name), {**own, **changes}


def _data_files(config: Mapping[str, Any]) -> list[Path]:
    """Files that a task names as its data; neither URLs nor patterns."""

    def names(value: Any) -> Iterable[str]:
        if isinstance(value, str):
            return [value]
        return [name for each in (value.values() if isinstance(value, dict) else value or ()) for name in names(each)]

    if config.get("dataset_path") not in BUILDERS:
        return []
    folder = (config.get("dataset_kwargs") or {}).get("data_dir") or ""
    found = names((config.get("dataset_kwargs") or {}).get("data_files"))
    return [Path(folder, name) for name in found if "://" not in name and not set(name) & set("*?[")]


def _not_at_hand(config: Mapping[str, Any]) -> str | None:
    """The data set of the hub that a task needs and that cannot be had."""
    from datasets import config as settings
    from huggingface_hub.constants import HF_HUB_CACHE

    name = config.get("dataset_path")
    if not settings.HF_HUB_OFFLINE or not isinstance(name, str) or name in BUILDERS or os.path.exists(os.path.expanduser(name)):
        return None
    places = (Path(settings.HF_DATASETS_CACHE, name.replace("/", "___")), Path(HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}"))
    wanted = {str(place).lower() for place in places}
    there = {str(found).lower() for place in places if place.parent.is_dir() for found in place.parent.iterdir()}
    return None if wanted & there else name


def _left(names: Sequence[str], done: Mapping[str, Item]) -> Sequence[str]:
    """The tasks that an interrupted group goes on with: all but those before the last one that has items."""
    begun = {item.partition("/")[0] for item in done}
    return names[max((number for number, name in enumerate(names) if name in begun), default=0) :]


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
        choices = _num_choices(sample) if config.get("output_type") == "multiple_choice" else None
        before = found.get(name, Item(name, {}, {}, {"higher_is_better": {}, "num_choices": choices}))
        found[name] = Item(
            name,
            before.sums | {metric: total for metric, (total, _) in pairs.items()},
            before.counts | {metric: count for metric, (_, count) in pairs.items()},
            before.detail | {"higher_is_better": before.detail["higher_is_better"] | directions},
        )
    return list(found.values())


def _num_choices(sample: dict[str, Any]) -> int:
    """For mutual information, each answer is asked for without its question, too."""
    return len(sample["arguments"]) // (2 if "acc_mutual_info" in sample["metrics"] else 1)


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
    if metric.partition("/")[0] not in CHOSEN or len(known) < len(numbers) or not known:
        return None
    return sum(1 / number for number in known) / len(known)
