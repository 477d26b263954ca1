"""Trackers: the rows of metrics.jsonl, sent on to TensorBoard, trackio or Weights & Biases as they are. The only file that imports these.

metrics.jsonl stays the record. A tracker that fails while a run goes on is given up with a warning, and the run goes on.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from limbeck.errors import RecipeError, RunError
from limbeck.log import warn
from limbeck.run import Run

TrackerName = Literal["tensorboard", "trackio", "wandb"]
Row = Mapping[str, Any]
PROJECT = "limbeck"


class Tracker(Protocol):
    """One run in one tracker. `first` is the number of steps that are behind: a resumed run goes on in the same place."""

    def __init__(self, run: Run, first: int) -> None: ...

    def log(self, row: Row) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in the run's own directory: `tensorboard --logdir runs`."""

    def __init__(self, run: Run, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what a killed process logged behind the checkpoint is done again
        self._writer: Any = SummaryWriter(str(run.path / "tensorboard"), purge_step=first + 1)

    def log(self, row: Row) -> None:
        for key, value in row.items():
            if key != "step":
                self._writer.add_scalar(key, value, row["step"])

    def close(self, failed: bool) -> None:
        self._writer.close()


class Trackio:
    """trackio's local database, shown by `trackio show`; its own environment variables send it elsewhere."""

    def __init__(self, run: Run, first: int) -> None:
        import trackio

        self._trackio: Any = trackio
        name, key = identity(run)
        config = run.read_json("recipe.json")
        trackio.init(project=PROJECT, name=f"{name}-{key}", config=config, resume="allow", auto_log_gpu=False, auto_log_cpu=False)

    def log(self, row: Row) -> None:
        self._trackio.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    def close(self, failed: bool) -> None:
        self._trackio.finish()


class WandB:
    """A run of Weights & Biases; WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE=offline are wandb's own."""

    def __init__(self, run: Run, first: int) -> None:
        import os

        import wandb

        name, key = identity(run)
        project = None if "WANDB_PROJECT" in os.environ else PROJECT
        config = run.read_json("recipe.json")
        self._run: Any = wandb.init(project=project, name=name, id=key, dir=str(run.path), config=config, resume="allow", save_code=False)
        # as an axis and not as wandb's own step, which cannot go back to a checkpoint
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Row) -> None:
        self._run.log(dict(row))

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": WandB}


def require(names: Iterable[str]) -> None:
    """Refuse a tracker whose package is not installed."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise RecipeError(f"train.report_to: {missing[0]!r} is not installed; expected its package: pip install {' '.join(missing)}")


@contextmanager
def tracking(names: Iterable[str], run: Run, first: int) -> Iterator[Callable[[Row], None]]:
    """A function that sends a row to each of these trackers."""
    opened: dict[str, Tracker] = {}
    failed = True

    def guarded(name: str, call: Callable[[], None]) -> None:
        try:
            # theirs is no result of ours
            with redirect_stdout(sys.stderr):
                call()
        except Exception as error:  # of a foreign package, about a copy of what metrics.jsonl has
            opened.pop(name, None)
            warn(f"{name}: {type(error).__name__}: {error}; nothing more is sent to it, metrics.jsonl has everything")

    def send(row: Row) -> None:
        for name, tracker in list(opened.items()):
            guarded(name, lambda tracker=tracker: tracker.log(row))  # type: ignore[misc]

    for name in names:
        try:
            with redirect_stdout(sys.stderr):
                opened[name] = TRACKERS[name](run, first)
        except Exception as error:
            raise RunError(f"train.report_to: {name!r} could not be started: {type(error).__name__}: {error}") from error
    try:
        yield send
        failed = False
    finally:
        for name, tracker in list(opened.items()):
            guarded(name, lambda tracker=tracker: tracker.close(failed))  # type: ignore[misc]


def identity(run: Run) -> tuple[str, str]:
    """A name for people, and a key that stays with the directory wherever it is moved."""
    known = run.read_json("trackers.json", {})
    if not known:
        known = {"name": _name(run.path.resolve()), "key": uuid.uuid4().hex[:8]}
        run.write_json("trackers.json", known)
    return known["name"], known["key"]


def _name(path: Path) -> str:
    """`logits` of runs/logits, `demo-sft-seed-0` of runs/demo/arms/sft/seed-0."""
    parts = path.parts[-4:]
    return "-".join(part for part in parts if part != "arms") if "arms" in parts[:-1] else path.name
