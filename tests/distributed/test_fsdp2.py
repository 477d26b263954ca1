"""Two gloo processes under FSDP2 give what one gives: gradients of every term, checkpoints from any number of processes, the student.

All that two processes do is done in one launch (`two_ranks.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import limbeck
from distributed.two_ranks import stopped
from helpers import write_jsonl
from limbeck.errors import RecipeError, RunError

pytest.importorskip("peft")

LORA = {"rank": 4, "alpha": 8}
DORA = {**LORA, "dora": True}
TERMS: dict[str, list[dict[str, Any]]] = {
    "ce": [{"type": "ce"}],
    "forward_kl": [{"type": "logits", "temperature": 2.0}],
    "reverse_kl": [{"type": "logits", "divergence": "reverse_kl"}],
    "jsd": [{"type": "logits", "divergence": "jsd"}],
    "tvd": [{"type": "logits", "divergence": "tvd"}],
    "mse_logits": [{"type": "mse_logits"}],
    "ranking": [{"type": "ranking"}],
    "hidden": [{"type": "hidden"}],
    "hidden_as_published": [{"type": "hidden_as_published"}],
}
TERMS["everything"] = [{**TERMS[name][0], "weight": 0.3 + 0.2 * i} for i, name in enumerate(("ce", "forward_kl", "reverse_kl", "hidden"))]
STEPS = (
    *TERMS,
    "ddp", "untied", "packed", "packed untied", "lora untied", "lora packed", "base as teacher", "untied base as teacher",
    "base as teacher, kept after forward", "ddp, base as teacher", "plain head", "recomputed", "kept after forward", "whole teacher",
    "one conversation", "bfloat16", "ddp, lora", "ddp, dora", "ddp, dora packed", "ddp, dora, base as teacher", "dora untied",
    "dora packed", "dora, base as teacher", "dora recomputed", "dora kept after forward",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp2")


@pytest.fixture(scope="module")
def base(folder: Path, make_model_dir: Callable[..., Path]) -> dict[str, Any]:
    """5 conversations of very unequal length in microbatches of 2: rank 1 gets one microbatch less, so an empty one."""
    rows = [{"prompt": "The weather", "completion": " in Paris is sunny." * (1 + 3 * i)} for i in range(5)]
    return {
        "student": {"model": str(make_model_dir(layers=2, seed=1))},
        "teacher": {"type": "model", "model": str(make_model_dir(layers=3, width=48, seed=2))},
        "source": {"type": "dataset", "data": str(write_jsonl(folder / "data.jsonl", rows))},
        "objective": TERMS["everything"],
        "train": {
            "steps": 4,
            "batch_size": 5,
            "micro_batch_size": 2,
            "checkpoint_every": 2,
            "keep_checkpoints": 9,
            "optimizer": {"learning_rate": 0.003, "epsilon": 1e-4},
        },
        "parallel": {"strategy": "fsdp2"},
    }


@pytest.fixture(scope="module")
def recipes(base: dict[str, Any], make_model_dir: Callable[..., Path]) -> dict[str, dict[str, Any]]:
    """The recipe of each step by name: its words say in what it differs from `base`."""
    untied = str(make_model_dir(layers=2, seed=1, tied=False))

    def recipe(name: str) -> dict[str, Any]:
        train, parallel, student = dict(base["train"]), dict(base["parallel"]), dict(base["student"])
        train["optimizer"] = {**train["optimizer"], "max_grad_norm": None}
        if "packed" in name:
            train |= {"pack_length": 80, "micro_batch_size": 1}
        if "one conversation" in name:
            train |= {"batch_size": 1}
        train |= {"precision": "bfloat16"} if "bfloat16" in name else {}
        train |= {"head": "plain"} if "plain" in name else {}
        train |= {"gradient_checkpointing": True} if "recomputed" in name else {}
        parallel |= {"strategy": "ddp"} if "ddp" in name else {}
        parallel |= {"reshard_after_forward": False} if "kept" in name else {}
        parallel |= {"shard_teacher": False} if "whole teacher" in name else {}
        student |= {"model": untied} if "untied" in name else {}
        student |= {"lora": LORA} if "lora" in name or "base" in name else {}
        student |= {"lora": DORA} if "dora" in name else {}
        teacher = {"type": "model", "model": student["model"]} if "base" in name else base["teacher"]
        return {
            **base,
            "student": student,
            "teacher": teacher,
            "objective": TERMS.get(name, TERMS["everything"]),
            "train": train,
            "parallel": parallel,
        }

    return {name: recipe(name) for name in STEPS}


def choosing(base: dict[str, Any]) -> dict[str, Any]:
    """With evaluations, and a student that is the best of them by what gets worse with every step."""
    held_out = {"type": "agreement", "data": base["source"]["data"]}
    chosen = {"steps": 3, "evaluate_every": 1, "best": {"benchmark": "agreement", "metric": "kl"}, "optimizer": {"learning_rate": 0.03}}
    return {**base, "objective": TERMS["ce"], "evaluate": [held_out], "train": {**base["train"], **chosen}}


@pytest.fixture(scope="module")
def alone(base: dict[str, Any], folder: Path) -> limbeck.Run:
    return limbeck.train(base, folder / "alone")


@pytest.fixture(scope="module")
def two(base: dict[str, Any], recipes: dict[str, dict[str, Any]], alone: limbeck.Run, folder: Path) -> dict[str, Any]:
    """What the two processes found."""
    lora, dora = ({**base, "student": {**base["student"], "lora": adapters}} for adapters in (LORA, DORA))
    ddp_only = {"parallel": {"strategy": "ddp"}}
    ddp = {**base, **ddp_only}
    chosen = choosing(base)
    work = {
        "steps": recipes,
        "broken": recipes["ce"],
        "runs": [
            {"recipe": base, "path": str(folder / "straight")},
            {"recipe": lora, "path": str(folder / "lora")},
            {"recipe": dora, "path": str(folder / "dora")},
            {"recipe": {**dora, **ddp_only}, "path": str(folder / "dora as ddp"), "from": str(folder / "dora"), "after": 2},
            {"recipe": base, "path": str(folder / "resumed"), "from": str(folder / "straight"), "after": 2},
            {"recipe": base, "path": str(folder / "from one"), "from": str(alone.path), "after": 2},
            {"recipe": ddp, "path": str(folder / "as ddp"), "from": str(folder / "straight"), "after": 2},
            {"recipe": chosen, "path": str(folder / "chosen")},
            {"recipe": {**chosen, "parallel": {"strategy": "ddp"}}, "path": str(folder / "chosen by ddp")},
        ],
    }
    (folder / "work.json").write_text(json.dumps(work))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(Path(__file__).parent / "two_ranks.py")]
    done = subprocess.run(
        [*command, str(folder / "work.json"), str(folder / "found.json")],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads((folder / "found.json").read_text()))


@pytest.mark.parametrize("name", STEPS)
def test_gradients_are_those_of_one_process(two: dict[str, Any], name: str) -> None:
    found = two["steps"][name]
    assert found["missing"] == [], "every parameter has its gradient"
    tolerance = 2e-2 if name == "bfloat16" else 1e-6
    assert found["error"] <= tolerance
    assert found["values"] == pytest.approx(found["expected"], rel=tolerance, abs=1e-7)
    assert found["is_divided"] == ("ddp" not in name)
    holes_matter = "ddp" not in name or "lora" in name or "dora" in name or "base as teacher" in name
    assert found["large_blocks_have_pages"] in (holes_matter, None), "what is gathered leaves no holes in the heap"


def test_a_gradient_that_is_no_number_is_seen_by_all(two: dict[str, Any]) -> None:
    assert len(two["broken"]) == 2 and all(norm != norm for norm in two["broken"])


def _assert_same(ours: Path, theirs: Path, exactly: bool = False) -> None:
    """Log, student and what was measured of it."""
    a, b = limbeck.Run(ours), limbeck.Run(theirs)
    assert [row["step"] for row in a.metrics()] == [row["step"] for row in b.metrics()] == [1, 2, 3, 4]
    for key in ("loss", "grad_norm", "tokens"):
        values = [[row[key] for row in run.metrics()] for run in (a, b)]
        assert values[0] == (values[1] if exactly else pytest.approx(values[1], rel=1e-6)), key
    weights, expected = load_file(a.student / "model.safetensors"), load_file(b.student / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0 if exactly else 1e-6, msg=name)


def test_a_run_is_that_of_one_process(two: dict[str, Any], alone: limbeck.Run, folder: Path) -> None:
    _assert_same(folder / "straight", alone.path)
    moved = load_file(alone.student / "model.safetensors")
    start = load_file(Path(alone.read_json("recipe.json")["student"]["model"]) / "model.safetensors")
    assert max((moved[name] - start[name]).abs().max() for name in moved) > 1e-3


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_adapters_come_out_whole(two: dict[str, Any], base: dict[str, Any], folder: Path, name: str) -> None:
    adapters = LORA if name == "lora" else DORA
    expected = limbeck.train({**base, "student": {**base["student"], "lora": adapters}}, folder / f"{name} alone")
    for path in (folder / name, folder / "dora as ddp") if name == "dora" else (folder / name,):
        _assert_same(path, expected.path)
        ours, theirs = (load_file(run / "adapters" / "adapter_model.safetensors") for run in (path, expected.path))
        assert ours.keys() == theirs.keys() and any("magnitude" in key for key in ours) == (name == "dora")
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-6, msg=key)


def test_a_resume_on_as_many_processes_gives_the_same_bits(two: dict[str, Any], folder: Path) -> None:
    _assert_same(folder / "resumed", folder / "straight", exactly=True)


@pytest.mark.parametrize("name", ["from one", "as ddp"])
def test_a_resume_on_others_gives_the_same(two: dict[str, Any], folder: Path, name: str) -> None:
    _assert_same(folder / name, folder / "straight")


def test_one_process_goes_on_where_two_stopped(two: dict[str, Any], base: dict[str, Any], folder: Path) -> None:
    stopped(folder / "straight", folder / "one of two", after=2)
    _assert_same(limbeck.train(base, folder / "one of two").path, folder / "straight")


@pytest.mark.parametrize("name", ["chosen", "chosen by ddp"])
def test_processes_agree_on_the_best(two: dict[str, Any], base: dict[str, Any], folder: Path, name: str) -> None:
    expected, found = limbeck.train(choosing(base), folder / f"{name} alone"), limbeck.Run(folder / name)
    kls = [[row["metrics"]["agreement"]["kl"]["value"] for row in run.evaluations()] for run in (expected, found)]
    assert len(kls[0]) == 4 and kls[0] == pytest.approx(kls[1], rel=1e-4)
    assert expected.read_json("run.json")["best"]["step"] == found.read_json("run.json")["best"]["step"] == kls[0].index(min(kls[0])) < 3
    ours, theirs = (load_file(run.student / "model.safetensors") for run in (expected, found))
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-5, msg=key)


def test_checkpoints_are_written_in_parts_without_pickle(two: dict[str, Any], alone: limbeck.Run, folder: Path) -> None:
    parts = folder / "straight" / "checkpoints" / "step-00000002"
    files = {file.name for file in parts.iterdir()}
    assert {file.partition("-")[0] for file in files} == {"shard", "state.json", "manifest.json"}
    assert {file.rpartition(".")[2] for file in files} == {"safetensors", "json"}
    assert {file[6:11] for file in files if file.startswith("shard")} == {"00001", "00002"}
    weights = sum(file.stat().st_size for file in parts.glob("*.safetensors"))
    whole = sum(file.stat().st_size for file in (alone.checkpoints / "step-00000002").glob("*.safetensors"))
    assert weights == pytest.approx(whole, rel=0.2), "no part is there twice"


@pytest.mark.parametrize("harm", ["flipped", "missing", "foreign"])
def test_a_damaged_part_is_named(two: dict[str, Any], base: dict[str, Any], folder: Path, harm: str) -> None:
    path = folder / harm
    stopped(folder / "straight", path, after=2)
    part = path / "checkpoints" / "step-00000002" / "shard-00002-model-00001-of-00002.safetensors"
    if harm == "flipped":
        data = bytearray(part.read_bytes())
        data[-1] ^= 1
        part.write_bytes(data)
    elif harm == "missing":
        part.unlink()
    else:
        part.with_name("shard-00003-model-00001-of-00002.safetensors").write_bytes(part.read_bytes())
    name = "shard-00003" if harm == "foreign" else "shard-00002-model-00001"
    with pytest.raises(RunError, match=rf"step-00000002: damaged: {name}.*Delete this folder to go on from the beginning"):
        limbeck.train(base, path)


def test_parts_of_another_student_are_refused(two: dict[str, Any], base: dict[str, Any], folder: Path) -> None:
    from limbeck import checkpoint, optim
    from limbeck.learner import Learner
    from limbeck.models import load_model
    from limbeck.objectives import CrossEntropy

    learner = Learner(load_model(base["student"]["model"]), {"ce": CrossEntropy()}, 100)  # without the projections
    with pytest.raises(RunError, match="holds other weights than this recipe's student"):
        checkpoint.load_latest(folder / "straight" / "checkpoints", learner, optim.build(optim.Optimizer(), learner))


def test_processes_that_do_not_fit_are_refused() -> None:
    from limbeck.parallel import Parallel

    with pytest.raises(RecipeError, match=r"parallel.strategy: found 'single' with 2 processes"):
        Parallel(strategy="single").check(2)
    with pytest.raises(RecipeError, match=r"parallel.shard_over: found 3, expected a number that divides the 4 processes"):
        Parallel(strategy="fsdp2", shard_over=3).check(4)
    tree = {"source": {"type": "dataset", "data": {"rows": []}}, "teacher": {"type": "model", "model": "owner/model", "load_in": "4bit"}}
    recipe = limbeck.parse_recipe({**tree, "parallel": {"strategy": "fsdp2"}})
    with pytest.raises(RecipeError, match=r"teacher.load_in: found '4bit' with parallel.strategy 'fsdp2'"):
        recipe.parallel.check(2, recipe.teacher)
    recipe.parallel.check(1, recipe.teacher)
    Parallel(strategy="single").check(1)
    Parallel(strategy="fsdp2", shard_over=3).check(1)
