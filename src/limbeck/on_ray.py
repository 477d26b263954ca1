"""Ray: the only file that calls it. Runs of a study become tasks, and shards of a capture rows of a data set whose actors hold the teacher.

Every node has to see the same folders under the same paths: a run leaves its weights and records there. A worker that dies is replaced, and
what it did is begun again, which for a run is at its checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from limbeck.errors import LimbeckError, RecipeError, RunError
from limbeck.jobs import Job, Worker
from limbeck.log import MODE_VARIABLE, alert, progress, say

RETRIES = 3
"""How often a job is begun again whose worker died."""
PASSED_ON = ("LIMBECK_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TOKENIZERS_PARALLELISM")
"""Variables that workers are given, so that they find what the driver finds. No keys: Ray shows these to anybody."""

DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # else it reports its use to its makers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it warns of what will be
    "RAY_worker_niceness": "0",  # else a driver that waits comes before the workers that it waits for
}
"""How Ray is run where the environment does not say otherwise."""


@dataclass(frozen=True)
class OnRay:
    """The cluster that RAY_ADDRESS names, or that runs on this machine, or else one that is started here and ends with this process."""

    cpus: float = 1.0
    """Of each worker; its threads, too."""
    gpus: float | None = None
    """Of each worker; one where the cluster has any."""

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[str, Any]]:
        """Side by side, as many as there is room for. Where one fails, the others go on, and the first error comes at the end."""
        if not jobs:
            return
        ray = _connected()
        with progress("jobs on Ray", len(jobs)) as bar:
            task, room = ray.remote(_do), self._room(ray)
            refs: dict[str, Any] = {}
            for job in jobs:
                before = [refs[name] for name in job.after]
                refs[job.name] = task.options(name=job.name, max_retries=RETRIES, **room).remote(_here(), job.do, *before)
            names, befores = {ref: name for name, ref in refs.items()}, {job.name: job.after for job in jobs}
            failed: dict[str, Exception] = {}
            while names:
                (ref,), _ = ray.wait(list(names))
                name = names.pop(ref)
                try:
                    result = ray.get(ref)
                except Exception as error:
                    failed[name] = _told(error, f"{name}: ")
                    if failed.keys().isdisjoint(befores[name]):
                        alert(f"{name}: {failed[name]}; what does not need it goes on", style="red")
                else:
                    bar.advance(note=name)
                    yield name, result
            if failed:
                raise next(iter(failed.values()))

    def map(self, make: Callable[[], Worker], items: Sequence[int]) -> Iterator[Any]:
        """With Ray Data: a pool of actors that grows to what the cluster has room for."""
        ray = _connected()
        from ray import data

        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        room = self._room(ray)
        rows = data.from_items([{"item": item} for item in items], override_num_blocks=len(items))
        # a shard is a block, so that any worker may take the next one
        done = rows.map(
            _Actor,
            fn_constructor_args=(_here(), make),
            compute=data.ActorPoolStrategy(min_size=1, max_size=min(_capacity(ray, room), len(items)), max_tasks_in_flight_per_actor=2),
            max_restarts=RETRIES,
            max_task_retries=RETRIES,
            **room,
        )
        try:
            for row in done.iter_rows():
                yield row["result"]
        except Exception as error:
            raise _told(error) from None

    def _room(self, ray: Any) -> dict[str, float]:
        """What each worker takes of a node."""
        total = ray.cluster_resources()
        gpus = self.gpus if self.gpus is not None else float("GPU" in total)
        for what, wanted in (("CPU", self.cpus), ("GPU", gpus)):
            if wanted > total.get(what, 0.0):
                raise RunError(
                    f"Ray: a worker takes {wanted:g} {what}, and the cluster has {total.get(what, 0.0):g}; ask for less, or add nodes"
                )
        return {"num_cpus": self.cpus, "num_gpus": gpus}


def require_ray() -> None:
    """RecipeError where the package is not there."""
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise RecipeError("Ray is asked for, and is not installed; expected its package: pip install 'limbeck[ray]'")


def _connected() -> Any:
    """Ray, connected for as long as this process lives: it ends what it has started here."""
    require_ray()
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return ray
    variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ} | {MODE_VARIABLE: "quiet"}
    ours = signal.getsignal(signal.SIGTERM)
    try:
        context = ray.init(logging_level="WARNING", include_dashboard=False, runtime_env={"env_vars": variables})
    except Exception as error:  # of several kinds, a bare one among them
        raise RunError(f"Ray: no cluster could be reached or started: {error}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ours)  # Ray's own, which it puts there, aborts
    room = ray.cluster_resources()
    say(f"Ray at {context.address_info['gcs_address']}: {room.get('CPU', 0):g} CPUs, {room.get('GPU', 0):g} GPUs")
    return ray


def _capacity(ray: Any, room: dict[str, float]) -> int:
    """Workers for which the cluster has room."""
    total = ray.cluster_resources()
    kinds = (("CPU", room["num_cpus"]), ("GPU", room["num_gpus"]))
    return max(int(min((total.get(what, 0.0) // wanted for what, wanted in kinds if wanted), default=1)), 1)


@dataclass(frozen=True)
class _Here:
    """Where the driver works, and with what."""

    folder: str
    version: str

    def go(self) -> None:
        """Work there, too. Other code would give other results, and another folder none."""
        if (version := metadata.version("limbeck")) != self.version:
            raise RunError(f"Ray: a node has Limbeck {version}, the driver {self.version}; install the same on all nodes")
        try:
            os.chdir(self.folder)
        except OSError as error:
            raise RunError(f"Ray: a node cannot work in {self.folder}: {error.strerror}; expected folders that all nodes share") from None


def _here() -> _Here:
    return _Here(str(Path.cwd()), metadata.version("limbeck"))


def _do(here: _Here, do: Callable[[], Any], *before: Any) -> Any:
    """In a worker: one job. Ray has waited for what came before."""
    here.go()
    return do()


class _Actor:
    """In a worker: what holds the teacher."""

    def __init__(self, here: _Here, make: Callable[[], Worker]) -> None:
        here.go()
        self._worker = make()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"result": self._worker(row["item"])}


def _told(error: BaseException, where: str = "") -> Exception:
    """The error as a worker raised it, where it was one of ours; else one that says what Ray did not manage."""
    for one in _causes(error):
        if isinstance(one, LimbeckError) and not hasattr(one, "cause"):  # Ray's own wrapping is of the wrapped kind, too
            return one
    return RunError(f"{where}Ray: {error}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        cause = getattr(error, "cause", None)
        error = cause if isinstance(cause, BaseException) else error.__cause__
