"""Plan: memory by part, disk, operations and time of a run before it is paid for. Tokenizer and config.json are read; weights load only to
measure.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.errors import RecipeError
from limbeck.log import console, say
from limbeck.parallel import Strategy
from limbeck.recipe import Recipe, parse_recipe, require_files
from limbeck.teachers.model import ModelTeacher

if TYPE_CHECKING:
    from limbeck.plan.devices import Device
    from limbeck.plan.memory import Memory
    from limbeck.plan.work import Work

MB, GB = 2**20, 1e9
CONTEXT = 600 * MB
"""What a CUDA context and its libraries hold beside the tensors."""
CONTAINER = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says what a container may hold, in both of its forms."""


def plan(
    recipe: Recipe | dict[str, Any] | str | Path,
    overrides: Iterable[str] = (),
    measure: int = 0,
    device: str | None = None,
    processes: int = 1,
    strategy: Strategy | None = None,
    memory_gb: float | None = None,
) -> dict[str, Any]:
    """What a recipe's training will take, in bytes, operations and seconds. Time is that of `measure` real steps here, of the peak figures
    of `device`, or of a matrix product that is timed here. `memory_gb` is what a process may have: the device's, or this machine's, where
    it is not set; `strategy` is then the recipe's."""
    parsed = parse_recipe(recipe, [*overrides, *([f"parallel.strategy={strategy}"] if strategy else [])])
    _, spec = parsed.for_training()
    parsed.parallel.check(processes, parsed.teacher)
    require_files(parsed)
    if measure and (device or processes > 1):
        raise RecipeError("--measure: found with --device or --processes, expected alone: steps are measured here, in one process")
    from limbeck.plan.devices import device as named
    from limbeck.plan.memory import simulate
    from limbeck.plan.processes import each_holds
    from limbeck.plan.work import disk, work

    there = named(device) if device else None
    source, num_tokens = _opened(parsed)
    todo = work(parsed, source, num_tokens, processes)
    memory = simulate(parsed, todo.shapes)
    held = CONTEXT if there else _process()  # once: it is compared with itself

    def parts_of(recipe: Recipe, memory: Memory) -> dict[str, int]:
        return {**each_holds(memory, processes, recipe.parallel, spec.precision), "process": held}

    def peak_of(changed: Recipe) -> float:
        other = work(changed, source, num_tokens, processes)
        return float(sum(parts_of(changed, simulate(changed, other.shapes)).values()))

    parts = parts_of(parsed, memory)
    peak, limit = sum(parts.values()), memory_gb * GB if memory_gb else there.memory_gb * GB if there else _machine(processes)
    found: dict[str, Any] = {
        "memory": parts,
        "peak": peak,
        "limit": round(limit),
        "fits": peak <= limit,
        "processes": processes,
        "strategy": parsed.parallel.strategy if processes > 1 else None,
        "device": device,
        "disk": disk(parsed, source, memory.sizes),
        "num_steps": todo.num_steps,
        "tokens": todo.tokens,
        "positions": todo.positions,
        "largest_microbatch": asdict(todo.shapes),
        "flops": todo.positions * memory.sizes.flops_per_position,
        "teacher_flops": todo.positions * 2.0 * memory.sizes.taught,
        **_time(parsed, todo, memory, measure, there, processes),
    }
    if peak > limit:
        from limbeck.plan.fit import cheapest

        changes, left = cheapest(parsed, limit, peak_of, processes)
        found["to_fit"] = {"changes": [asdict(change) for change in changes], "peak": round(left), "fits": left <= limit}
    return found


def _opened(recipe: Recipe) -> tuple[Any, int]:
    """The recipe's data, and how many tokens student and teacher share."""
    from limbeck.models import load_tokenizer
    from limbeck.tokens.identity import shared_vocabulary, vocabulary

    student, _ = recipe.for_training()
    tokenizer = load_tokenizer(student.model, student.revision)
    source, teacher = recipe.source.open(tokenizer, recipe.seed), recipe.teacher
    if isinstance(teacher, ModelTeacher):
        return source, shared_vocabulary(tokenizer, load_tokenizer(teacher.model, teacher.revision))
    return source, len(vocabulary(tokenizer))


def _time(recipe: Recipe, todo: Work, memory: Memory, measure: int, there: Device | None, processes: int) -> dict[str, Any]:
    """Seconds of the training steps, and what they are taken from."""
    from limbeck.plan.devices import EFFICIENCY, flops_per_second
    from limbeck.plan.processes import wire_bytes

    _, spec = recipe.for_training()
    if measure:
        from limbeck.plan.measure import measure as measured

        told = measured(recipe, measure)
        seconds = todo.positions * told.seconds_per_position
        return {"seconds": seconds, "basis": f"{told.num_steps} steps measured here", "measured_peak": round(told.peak)}
    flops = todo.positions * memory.sizes.flops_per_position
    if there is None:
        seconds = flops / (flops_per_second() * EFFICIENCY) / processes
        return {"seconds": seconds, "basis": f"a matrix product timed here, of whose speed a step is assumed to reach {EFFICIENCY:.0%}"}
    seconds = flops / there.flops_per_second(spec.precision) / processes
    each_step = wire_bytes(memory, processes, recipe.parallel, todo.shapes.microbatches, spec.precision) if processes > 1 else 0.0
    sent = each_step * todo.num_steps
    basis = f"{getattr(there, spec.precision):g} teraFLOP/s ({there.source}), assumed utilisation {there.utilisation:.0%}"
    return {"seconds": seconds + sent / (there.wire_gb_per_s * GB), "basis": basis, "wire_bytes": round(sent)}


def _process() -> int:
    """What this process holds with its libraries loaded: a training process on a CPU holds it too."""
    for line in Path("/proc/self/status").read_text().splitlines() if os.path.exists("/proc/self/status") else ():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def _machine(processes: int) -> float:
    """Memory of the accelerator here, or else a process's part of this machine's, of which a container may have less."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in CONTAINER:
        with suppress(OSError, ValueError):  # "max" is no limit
            limits.append(int(file.read_text()))
    return min(limits) / processes


def show(found: dict[str, Any]) -> None:
    """The plan on the terminal."""
    from rich.table import Table

    table = Table("at the peak, per process", "MB", box=None, padding=(0, 2, 0, 0))
    for name, size in found["memory"].items():
        table.add_row(name.replace("_", " "), _megabytes(size))
    table.add_row("peak", _megabytes(found["peak"]), style="bold")
    if "measured_peak" in found:
        table.add_row("measured", _megabytes(found["measured_peak"]))
    console.print(table)
    kept = ", ".join(f"{name} {'not known' if size is None else f'{_megabytes(size)} MB'}" for name, size in found["disk"].items())
    say(f"disk: {kept}")
    flops = f"{found['flops']:.2e} FLOP, {found['teacher_flops']:.2e} of them the teacher's"
    say(f"work: {found['num_steps']:,} steps, {found['tokens']:,} tokens ({found['positions']:,} positions with padding), {flops}")
    several = f" by {found['processes']} processes ({found['strategy']})" if found["processes"] > 1 else ""
    say(f"time: {_duration(found['seconds'])} of training{several}, from {found['basis']}")
    within = f"{_megabytes(found['limit'])} MB"
    say(f"fits in {within}" if found["fits"] else f"does not fit in {within}")
    if fit := found.get("to_fit"):
        wanted = " ".join(override for change in fit["changes"] for override in change["overrides"]) or "nothing"
        costs = "; ".join(dict.fromkeys(change["cost"] for change in fit["changes"]))
        say(f"{'cheapest change' if fit['fits'] else 'not even with'}: {wanted} ({_megabytes(fit['peak'])} MB; costs {costs})")


def _megabytes(size: float) -> str:
    return f"{size / MB:,.0f}" if size >= 10 * MB else f"{size / MB:.2g}"


def _duration(seconds: float) -> str:
    """In the largest unit of which there are two."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"
