"""Run: a directory that explains itself and can be read without torch.

recipe.json        the resolved recipe                      environment.json   versions, machine, command
data.json          what was trained on: counts, hashes      metrics.jsonl      one object per optimizer step
checkpoints/       see checkpoint.py                        evals/NAME.json    one benchmark result each
student/           the trained model, for any HF tool       run.json           status (running, trained, finished), totals
adapters/          LoRA's, for PEFT; merged into student/   evals/NAME.partial.jsonl   items of one that is not finished
not-finite/        the last step that was not, to replay    evaluations.jsonl, best/, evals/step-N/   see milestones.py
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from limbeck.errors import RunError, without_secrets


@dataclass(frozen=True)
class Run:
    """A run's directory. Reading never writes; `write_json` replaces a file atomically."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def student(self) -> Path:
        return self.path / "student"

    @property
    def adapters(self) -> Path:
        return self.path / "adapters"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations_file(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def not_finite(self) -> Path:
        return self.path / "not-finite"

    @property
    def is_trained(self) -> bool:
        """Whether the student is there, and evaluation alone may be left."""
        return self.is_finished or self.read_json("run.json", {}).get("status") == "trained"

    @property
    def is_finished(self) -> bool:
        return bool(self.read_json("run.json", {}).get("status") == "finished")

    def read_json(self, name: str, default: Any = None) -> Any:
        """The JSON in a file of the run; `default` where it does not exist (an error where there is no default)."""
        file = self.path / name
        if not file.is_file():
            if default is not None:
                return default
            raise RunError(f"{file}: no such file; expected a run directory written by `limbeck train`")
        try:
            return json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        except (ValueError, OSError, RecursionError) as error:
            raise RunError(f"{file}: not readable as JSON: {error}") from None

    def write_json(self, name: str, value: Any) -> None:
        write_json(self.path / name, value)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, as far as they are whole."""
        return list(complete_lines(self.metrics_file))

    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of evaluations.jsonl, as far as they are whole."""
        return list(complete_lines(self.evaluations_file))

    def evals_after(self, step: int) -> Path:
        """The folder of results of an evaluation during training."""
        return self.path / "evals" / f"step-{step:08d}"

    def evals(self) -> dict[str, dict[str, Any]]:
        """Benchmark results by benchmark name."""
        return {file.stem: self.read_json(f"evals/{file.name}") for file in sorted((self.path / "evals").glob("*.json"))}


def _refuse_constant(name: str) -> None:
    """We write no such thing."""
    raise ValueError(f"found {name}, which is no number of JSON")


def write_json(file: Path, value: Any, indent: int | None = 2) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, also after a crash. Half of a surrogate pair is escaped."""
    try:
        with appearing(file) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace") as stream:
            json.dump(value, stream, indent=indent, ensure_ascii=False, allow_nan=False)
            stream.write("\n")
    except OSError as error:
        raise RunError(f"{file}: could not be written ({error})") from error


@contextmanager
def appearing(file: Path) -> Iterator[Path]:
    """A path to write to; what was written there becomes `file` at the end, whole and durable, or, after an error, nothing does."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, file)
        fsync_dir(file.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def fsync_dir(path: Path) -> None:
    """Make a rename in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


SPEED = (
    "micro_batch_size", "pack_length", "gradient_checkpointing", "head", "head_memory_mb", "checkpoint_every",
    "keep_checkpoints", "report_to", "kernels", "evaluate_only",
)  # fmt: skip
"""Settings of `train` that change what a run costs and not what it learns."""


def what_is_run(recipe: dict[str, Any]) -> dict[str, Any]:
    """A resolved recipe without how processes share it: with another number of them, or another strategy, it is the same run."""
    return {key: value for key, value in recipe.items() if key != "parallel"}


def what_is_learned(recipe: dict[str, Any]) -> dict[str, Any]:
    """The same without the settings of `train` that are SPEED: a run that did not fit into memory goes on with others."""
    tree = what_is_run(recipe)
    train = tree.get("train")
    return tree | {"train": {key: value for key, value in train.items() if key not in SPEED}} if isinstance(train, dict) else tree


def differences(old: Any, new: Any, key: str = "") -> list[tuple[str, str]]:
    """(`train.steps`, `train.steps is 20 there, 30 here`) for everything that differs."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and any(isinstance(item, dict) for item in old):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            entry
            for name in dict.fromkeys((*old, *new))
            for entry in differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if old == new else [(key, f"{key} is {_brief(old)} there, {_brief(new)} here".strip())]


def _brief(value: Any) -> str:
    text = "absent" if value is None else "present" if isinstance(value, dict) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def environment() -> dict[str, Any]:
    """Versions and the machine's shape; no host name, user name or environment variable."""
    packages = (
        "limbeck",
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "pyarrow",
        "numpy",
        "pydantic",
        "peft",
        "bitsandbytes",
        "liger-kernel",
    )
    versions = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(terse=True),
        "machine": platform.machine(),
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "command": [Path(sys.argv[0]).name, *map(without_secrets, sys.argv[1:])],
    }


def complete_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, as far as they are whole: a last line that a kill cut short is left out."""
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):  # str.splitlines would split texts of models too
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(row, dict):
            return
        yield row
