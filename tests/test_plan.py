"""The plan: a simulated step holds what a real one does, arithmetic over processes adds up, a change that is advised fits."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import limbeck
from helpers import write_jsonl
from limbeck import cli
from limbeck.errors import ModelError, RecipeError
from limbeck.flops import flops_per_token
from limbeck.log import megabytes
from limbeck.parallel import Parallel
from limbeck.plan import plan
from limbeck.plan.devices import device
from limbeck.plan.fit import changes
from limbeck.plan.memory import Live, Memory, Shapes, Sizes, simulate
from limbeck.plan.processes import each_holds, wire_bytes
from limbeck.recipe import parse_recipe

ROWS = [
    {"messages": [{"role": "user", "content": "x " * (1 + i)}, {"role": "assistant", "content": f"It is {i}. " * 4}]} for i in range(12)
]
FSDP2 = Parallel(strategy="fsdp2")
planning = importlib.import_module("limbeck.plan")  # `limbeck.plan` is the function
SHAPES = Shapes(rows=4, width=64, scored=100, most_scored=100, microbatches=2, vocabulary=400)


@pytest.fixture(scope="module")
def recipe(model_dir: Path) -> dict[str, Any]:
    return {
        "student": {"model": str(model_dir), "keep_layers": [0, 3]},
        "teacher": {"type": "model", "model": str(model_dir)},
        "source": {"type": "dataset", "data": {"rows": ROWS}},
        "objective": [{"type": "ce"}, {"type": "logits"}],
        "train": {"steps": 3, "batch_size": 8, "micro_batch_size": 4},
    }


def test_an_architecture_that_is_not_known_is_named(recipe: dict[str, Any], model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    for kind in ("no-such-type", "t5"):
        (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))
        with pytest.raises(ModelError, match=r"architecture of model '.*model' cannot be loaded(?s:.*)cause: "):
            memory(recipe, f"student.model={folder}")


def memory(recipe: dict[str, Any], *overrides: str, shapes: Shapes = SHAPES) -> Memory:
    return simulate(parse_recipe(recipe, overrides), shapes)


def test_weights_gradients_and_moments_are_counted(recipe: dict[str, Any]) -> None:
    trained = parse_recipe(recipe).student.num_parameters()["trained"]
    found = memory(recipe)
    assert (found.weights, found.gradients, found.optimizer) == (4 * trained, 4 * trained, 8 * trained)
    teacher = parse_recipe(recipe, ["student.keep_layers=null"]).student.num_parameters()["trained"]
    assert found.teacher == 4 * teacher and found.peak == sum(found.parts.values())
    assert memory(recipe, "teacher.dtype=bfloat16").teacher == 2 * teacher
    alone = memory(recipe, "teacher={type: none}", "objective=[{type: ce}]")
    assert alone.teacher == 0 and alone.head_chunk == 4 * 100 * 400 and found.head_chunk == 2 * alone.head_chunk


def test_the_simulated_peak_is_that_of_a_real_step(model_dir: Path) -> None:
    """The same count over tensors that have numbers."""
    from transformers import AutoModelForCausalLM

    from limbeck.batch import Signal
    from limbeck.learner import Learner
    from limbeck.plan.memory import _batch

    shapes = Shapes(rows=4, width=64, scored=100, most_scored=100, microbatches=1, vocabulary=400)
    spec = parse_recipe(
        {
            "student": {"model": str(model_dir)},
            "source": {"type": "dataset", "data": {"rows": ROWS}},
            "objective": [{"type": "ce"}],
            "train": {"steps": 1},
        }
    )
    found = simulate(spec, shapes)
    learner = Learner(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), spec.terms, 400).train()
    live = Live()
    with live:
        loss, _ = learner(_batch(shapes), Signal(), {"ce": 1.0})
        loss.backward()
    assert found.activations + found.gradients + found.head_chunk == pytest.approx(live.peak, rel=0.02)


def test_what_saves_memory_saves_it_here(recipe: dict[str, Any]) -> None:
    shapes = Shapes(rows=4, width=400, scored=1200, most_scored=1200, microbatches=2, vocabulary=400)
    base = memory(recipe, shapes=shapes)
    assert memory(recipe, "train.gradient_checkpointing=true", shapes=shapes).activations < base.activations
    assert memory(recipe, "train.head_memory_mb=1", shapes=shapes).head_chunk < base.head_chunk
    smaller = memory(recipe, shapes=Shapes(rows=1, width=400, scored=300, most_scored=300, microbatches=8, vocabulary=400))
    assert smaller.activations < base.activations / 2
    hidden = memory(recipe, "objective=[{type: ce}, {type: hidden, pairs: cka}]", shapes=shapes)
    assert hidden.activations != base.activations


def test_a_teacher_that_is_the_students_base_costs_nothing(recipe: dict[str, Any]) -> None:
    pytest.importorskip("peft")
    found = memory(recipe, "student.keep_layers=null", "student.lora={rank: 4}")
    assert found.teacher == 0 and 0 < found.gradients < found.weights / 2


def test_processes_are_arithmetic() -> None:
    one = Memory(100, 100, 200, 50, 10, 80, largest_block=20, root=30, teacher_whole=16, sizes=Sizes(25, 0, 25, 20))
    assert each_holds(one, 1, FSDP2) == one.parts
    assert each_holds(one, 4, Parallel()) == {**one.parts, "buckets": 100}
    shared = each_holds(one, 4, FSDP2)
    assert (shared["weights"], shared["optimizer"], shared["teacher"], shared["gathered"]) == (25, 50, 16 + 16, 30 + 40)
    assert shared["buffer"] == 30
    assert wire_bytes(one, 4, Parallel(), 3) == 150 and wire_bytes(one, 4, FSDP2, 3) == 3 * 0.75 * (2 * 70 + 30 + 64 + 100)
    kept = Parallel(strategy="fsdp2", reshard_after_forward=False, shard_teacher=False)
    held = each_holds(one, 4, kept)
    assert (held["gathered"], held["teacher"]) == (100, 80) and wire_bytes(one, 4, kept, 3) == 3 * 0.75 * (70 + 30 + 100)
    assert each_holds(one, 4, FSDP2, "bfloat16")["gathered"] == 30 + 20
    copies = Parallel(strategy="fsdp2", shard_over=2)
    assert each_holds(one, 4, copies)["weights"] == 50
    assert wire_bytes(one, 4, copies, 3) == 3 * 0.5 * (2 * 70 + 30 + 64 + 100) + 2 * 0.5 * 100 / 2


def test_processes_share_as_the_recipe_says(recipe: dict[str, Any]) -> None:
    said = plan({**recipe, "parallel": {"strategy": "fsdp2"}}, processes=2)
    asked = plan(recipe, processes=2, strategy="fsdp2")
    assert said["strategy"] == asked["strategy"] == "fsdp2" and said["memory"].keys() == asked["memory"].keys()
    whole = plan(recipe, processes=2)
    assert whole["strategy"] == "ddp" and said["memory"]["weights"] < whole["memory"]["weights"] == 2 * said["memory"]["weights"]
    assert ("parallel.strategy=fsdp2",) in [change.overrides for change in changes(parse_recipe(recipe), 2)]
    assert not any("parallel" in change.overrides[0] for change in changes(parse_recipe(recipe)))
    with pytest.raises(RecipeError, match="found 'single' with 2 processes"):
        plan(recipe, processes=2, strategy="single")


def test_counts_are_those_of_the_run(recipe: dict[str, Any], tmp_path: Path) -> None:
    found = plan(recipe, ["train.checkpoint_every=2", "train.micro_batch_size=2"])
    run = limbeck.train(recipe, tmp_path / "run", ["train.checkpoint_every=2", "train.micro_batch_size=2"])
    totals = run.read_json("run.json")
    assert (found["num_steps"], found["tokens"]) == (totals["steps"], totals["tokens"])
    assert found["positions"] >= found["tokens"] and found["fits"] and found["seconds"] > 0
    weights = sum(file.stat().st_size for file in run.student.glob("*.safetensors"))
    assert found["disk"]["student"] - weights < 5 * 2**20
    kept = sum(file.stat().st_size for file in run.checkpoints.glob("*/*.safetensors"))
    assert found["disk"]["checkpoints"] == pytest.approx(2 * kept, rel=0.1)
    measured = {**recipe, "evaluate": [{"type": "bits_per_byte", "data": str(write_jsonl(tmp_path / "held-out.jsonl", ROWS))}]}
    chosen = plan(measured, ["train.checkpoint_every=2", "train.evaluate_every=2", "train.best.benchmark=bits_per_byte"])
    # without the optimizer's two numbers per weight: as it was at one checkpoint, as it is, and one that is being written
    assert "best" not in found["disk"] and chosen["disk"]["best"] == pytest.approx(kept, rel=0.1)
    assert found["flops"] > found["teacher_flops"] > 0


def test_operations_are_those_of_a_studys_forecast(recipe: dict[str, Any]) -> None:
    for overrides in ([], ["student.keep_layers=null", "student.lora={rank: 4}"]):
        if overrides:
            pytest.importorskip("peft")
        parsed, sizes = parse_recipe(recipe, overrides), memory(recipe, *overrides).sizes
        expected = flops_per_token(parsed)
        assert sizes.flops_per_position == expected["student"] + expected["teacher"] and 2 * sizes.taught == expected["teacher"]
        counted = parsed.student.num_parameters()
        assert sizes.saved == (counted["frozen"] or counted["trained"])


def test_config_and_tokenizer_alone_tell_all(recipe: dict[str, Any], model_dir: Path, tmp_path: Path) -> None:
    for file in model_dir.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    bare = {"student": {"model": str(tmp_path), "keep_layers": [0, 3]}, "teacher": {"type": "model", "model": str(tmp_path)}}
    here, there = plan(recipe, device="l4-24g"), plan({**recipe, **bare}, device="l4-24g")
    assert {key: here[key] for key in ("memory", "disk", "flops", "seconds")} == {
        key: there[key] for key in ("memory", "disk", "flops", "seconds")
    }


def test_a_capture_has_a_plan_too(recipe: dict[str, Any], tmp_path: Path) -> None:
    live = plan(recipe)
    limbeck.capture(parse_recipe({**recipe, "capture": {"path": str(tmp_path / "store")}}))
    offline = plan({**recipe, "teacher": {"type": "store", "path": str(tmp_path / "store")}})
    assert offline["memory"]["teacher"] == offline["teacher_flops"] == 0
    assert offline["flops"] == live["flops"] - live["teacher_flops"] and offline["seconds"] > 0


def test_what_a_process_may_hold(tmp_path: Path, monkeypatch: Any) -> None:
    machine = planning._machine(1)
    assert planning._machine(2) == machine / 2
    for number, text in enumerate(("max\n", "9223372036854771712\n", "1000000\n")):
        (tmp_path / str(number)).write_text(text)
    monkeypatch.setattr(planning, "CONTAINER", (tmp_path / "0", tmp_path / "1", tmp_path / "none"))
    assert planning._machine(1) == machine
    monkeypatch.setattr(planning, "CONTAINER", (tmp_path / "2",))
    assert planning._machine(2) == 500000


def test_times_and_sizes_are_readable() -> None:
    assert [planning._duration(seconds) for seconds in (0.037, 45, 200, 9000, 1e6)] == [
        "0.037 seconds",
        "45 seconds",
        "3.3 minutes",
        "2.5 hours",
        "11.6 days",
    ]
    assert [megabytes(size) for size in (0, 2**17, 3000 * 2**20)] == ["0", "0.12", "3,000"]


def test_measured_steps_and_devices_tell_the_time(recipe: dict[str, Any]) -> None:
    here = plan(recipe, measure=2)
    assert here["basis"] == "2 steps measured here" and here["seconds"] > 0 and here["measured_peak"] > 0
    there = plan(recipe, device="a100-80g", processes=2, strategy="fsdp2")
    assert "data sheet" in there["basis"] and "assumed utilisation 40%" in there["basis"] and there["limit"] == 80e9
    wire = there["wire_bytes"] / (300 * 1e9)
    assert there["seconds"] == pytest.approx(there["flops"] / (19.5e12 * 0.4) / 2 + wire)
    with pytest.raises(RecipeError, match="did you mean 'a100-80g'"):
        device("a100-80")
    with pytest.raises(RecipeError, match="--measure: found with --device"):
        plan(recipe, measure=1, device="a100-80g")


def test_memory_of_the_machine_is_not_added_to_that_of_an_accelerator(monkeypatch: Any) -> None:
    assert planning._process() != planning.CONTEXT
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert planning._process() == planning.CONTEXT


def test_a_change_that_is_advised_fits(recipe: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(planning, "_process", lambda: 0)  # what Python holds comes and goes, and is more than this model
    rows = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "It is so. " * 60}]}] * 8
    wide = parse_recipe({**recipe, "source": {"type": "dataset", "data": {"rows": rows}}})
    full = plan(wide)
    limit = full["peak"] - full["memory"]["activations"] // 4
    advised = plan(wide, memory_gb=limit / 1e9)
    assert not advised["fits"] and advised["to_fit"]["fits"]
    (change,) = advised["to_fit"]["changes"]
    assert change["overrides"] == ("train.micro_batch_size=2",) and advised["to_fit"]["peak"] <= limit
    hopeless = plan(wide, memory_gb=0.0001)["to_fit"]
    assert not hopeless["fits"] and len(hopeless["changes"]) > 2
    keys = [change.overrides[0] for change in changes(wide)]
    assert keys[0].startswith("train.micro_batch_size") and not any("lora" in key for key in keys)


def test_the_command_line(recipe: dict[str, Any], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["limbeck", "plan", str(file), *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    code, out, err = run()
    assert (code, out) == (0, "") and "head chunk" in err and "fits in" in err
    code, out, _ = run("--json", "--memory-gb", "0.01")
    assert code == 1 and not json.loads(out)["fits"]
