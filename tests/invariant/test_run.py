"""Equivalences of whole runs, through the same entry points that users have: curves, weights and exports."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import limbeck
from helpers import killed_run, make_tokenizer, save_model, tiny_model, write_jsonl
from limbeck.errors import ModelError, RunError


@pytest.fixture(scope="module")
def base(make_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe on tiny models: 7 conversations, so that batches of 4 wrap around an epoch."""
    words = ["weather", "Paris", "teacher", "student", "answer", "five", "fox", "dog", "sunny", "sleeps", "lazy", "quick"]
    rows = [{"prompt": " ".join(words[: 2 + i % 3]) + ":", "completion": " ".join(words[i : i + 5])} for i in range(7)]
    data = write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows)
    return {
        "student": {"model": str(make_model_dir(layers=2, seed=1))},
        "teacher": {"type": "model", "model": str(make_model_dir(layers=3, width=48, seed=2))},
        "source": {"type": "dataset", "data": str(data)},
        "objective": [{"type": "ce", "weight": 0.5}, {"type": "logits"}, {"type": "hidden"}],
        "train": {"steps": 6, "batch_size": 4, "optimizer": {"learning_rate": 0.01}},
    }


def _train(base: dict[str, Any], path: Path, *overrides: str) -> limbeck.Run:
    return limbeck.train(base, path, overrides)


def _weights(run: limbeck.Run) -> dict[str, torch.Tensor]:
    return load_file(run.student / "model.safetensors")


def _losses(run: limbeck.Run) -> list[float]:
    return [row["loss"] for row in run.metrics()]


def _assert_equal_bits(a: limbeck.Run, b: limbeck.Run) -> None:
    assert _losses(a) == _losses(b)
    ours, theirs = _weights(a), _weights(b)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_accumulation_gives_the_same_run(base: dict[str, Any], tmp_path: Path) -> None:
    one, four = _train(base, tmp_path / "1", "train.micro_batch_size=1"), _train(base, tmp_path / "4", "train.micro_batch_size=4")
    assert _losses(one) == pytest.approx(_losses(four), rel=1e-5)
    assert _losses(one)[-1] < _losses(one)[0]
    for name, value in _weights(one).items():
        torch.testing.assert_close(value, _weights(four)[name], rtol=1e-3, atol=1e-4)


def test_packing_gives_the_same_run(base: dict[str, Any], tmp_path: Path) -> None:
    plain, packed = _train(base, tmp_path / "plain"), _train(base, tmp_path / "packed", "train.pack_length=40", "train.micro_batch_size=2")
    assert _losses(packed) == pytest.approx(_losses(plain), rel=1e-5)
    for key in ("tokens", "scored_tokens"):
        assert [row[key] for row in packed.metrics()] == [row[key] for row in plain.metrics()]
    assert packed.read_json("data.json") == plain.read_json("data.json")
    for name, value in _weights(plain).items():
        torch.testing.assert_close(value, _weights(packed)[name], rtol=1e-3, atol=1e-4)


def test_same_seed_same_bits_and_other_seed_other_order(base: dict[str, Any], tmp_path: Path) -> None:
    a, b, c = (_train(base, tmp_path / name, f"seed={seed}") for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    _assert_equal_bits(a, b)
    assert a.read_json("data.json")["order_sha256"] == b.read_json("data.json")["order_sha256"] != c.read_json("data.json")["order_sha256"]
    assert a.read_json("data.json")["initial_weights_sha256"] == c.read_json("data.json")["initial_weights_sha256"]
    assert _losses(a) != _losses(c)


def test_weight_zero_is_sft_bit_for_bit(base: dict[str, Any], tmp_path: Path) -> None:
    """Also where the dropped terms would have needed a teacher: none is loaded."""
    sft = _train({**base, "objective": [{"type": "ce"}], "teacher": {"type": "none"}}, tmp_path / "sft")
    zero = _train(
        {**base, "objective": [{"type": "ce"}, {"type": "logits", "weight": 0}, {"type": "hidden", "weight": 0}]}, tmp_path / "zero"
    )
    _assert_equal_bits(sft, zero)
    assert "teacher_nll" not in zero.metrics()[0]


def test_order_does_not_depend_on_anything_but_seed_and_step(base: dict[str, Any], tokenizer: Any) -> None:
    recipe = limbeck.parse_recipe(base)
    source = recipe.source.open(tokenizer, 5)
    again = recipe.source.open(tokenizer, 5)
    late_first = [again.at(step, 4) for step in (9, 0, 3)]
    assert [[s.sample_id for s in step] for step in late_first] == [[s.sample_id for s in source.at(step, 4)] for step in (9, 0, 3)]
    one_epoch = [sample.sample_id for position in range(7) for sample in source.at(position, 1)]
    assert sorted(one_epoch) == sorted(sample.sample_id for sample in source.samples)


def test_resume_after_a_kill_gives_the_bits_of_a_straight_run(base: dict[str, Any], tmp_path: Path) -> None:
    settings = ["train.steps=40", "train.checkpoint_every=3"]
    straight = _train(base, tmp_path / "straight", *settings)
    path = killed_run(base, tmp_path, settings)
    checkpoints = sorted((path / "checkpoints").glob("step-*[0-9]"))
    assert checkpoints
    resumed = _train(base, path, *settings)
    rows = resumed.metrics()
    assert [row["step"] for row in rows] == list(range(1, 41))
    _assert_equal_bits(straight, resumed)
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in straight.metrics()]


def test_finished_run_is_not_trained_again(base: dict[str, Any], tmp_path: Path) -> None:
    run = _train(base, tmp_path / "run")
    before = run.metrics_file.stat().st_mtime_ns
    _train(base, tmp_path / "run")
    assert run.metrics_file.stat().st_mtime_ns == before


def test_finished_run_is_graded_again_where_cases_were_edited(base: dict[str, Any], tmp_path: Path) -> None:
    """Or it would show the scores on the old cases as those of the new."""
    cases = write_jsonl(tmp_path / "cases.jsonl", [{"prompt": "five", "completion": word} for word in ("fox", "dog")])
    base = base | {"evaluate": [{"type": "bits_per_byte", "data": str(cases)}], "objective": base["objective"][:1]}
    run = _train(base, tmp_path / "run")
    before, metrics, weights = run.evals()["bits_per_byte"], run.metrics(), _weights(run)
    write_jsonl(cases, [{"prompt": "five", "completion": word} for word in ("fox", "lazy", "answer")])
    after = _train(base, tmp_path / "run").evals()["bits_per_byte"]
    assert len(before["items"]) == 2 and len(after["items"]) == 3 and run.is_finished
    assert run.metrics() == metrics and all(torch.equal(weights[name], value) for name, value in _weights(run).items())


def test_cases_that_choose_must_stay_as_they_were(base: dict[str, Any], tmp_path: Path) -> None:
    """Scores on other cases do not compare, so the best of both would be nothing."""
    cases = write_jsonl(tmp_path / "cases.jsonl", [{"prompt": "five", "completion": word} for word in ("fox", "dog")])
    base = base | {"evaluate": [{"type": "bits_per_byte", "data": str(cases)}], "objective": base["objective"][:1]}
    base["train"] = base["train"] | {"steps": 2, "evaluate_every": 1, "best": {"benchmark": "bits_per_byte"}}
    _train(base, tmp_path / "run")
    write_jsonl(cases, [{"prompt": "five", "completion": "lazy"}])
    with pytest.raises(RunError, match=r"the cases of train\.best\.benchmark changed since this run began"):
        _train(base, tmp_path / "run")


def test_directory_of_another_recipe_is_refused(base: dict[str, Any], tmp_path: Path) -> None:
    _train(base, tmp_path / "run")
    with pytest.raises(RunError, match=r"train\.steps is 6 there, 7 here"):
        _train(base, tmp_path / "run", "train.steps=7")


@pytest.mark.parametrize("what", ["source.data", "student.model", "the teacher", "the capture", "convert.edited_here"])
@pytest.mark.parametrize("kill", [True, False], ids=["interrupted", "finished"])
def test_what_lies_behind_a_name_must_stay_as_it_was(
    base: dict[str, Any], make_model_dir: Callable[..., Path], tmp_path: Path, what: str, kill: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data that were edited, or a model that was trained anew under the same name, would mix two runs, or show an old one as new."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "edited_here", raising=False)
    student, teacher, data = tmp_path / "student", tmp_path / "teacher", tmp_path / "data.jsonl"
    shutil.copytree(base["student"]["model"], student)
    shutil.copytree(base["teacher"]["model"], teacher)
    shutil.copy(base["source"]["data"], data)
    code = "def convert(row): return row\n"
    Path("edited_here.py").write_text(code)
    source = {"type": "dataset", "data": {"path": str(data), "convert": "edited_here:convert"}}
    base = base | {"student": {"model": str(student)}, "teacher": {"type": "model", "model": str(teacher)}, "source": source}
    base |= {"objective": base["objective"][:2], "train": dict(base["train"])}
    if what == "the capture":
        limbeck.capture(base | {"objective": [], "capture": {"path": "store"}})
        base["teacher"] = {"type": "store", "path": "store"}
    if kill:
        base["train"] |= {"steps": 3000, "checkpoint_every": 1}
        path = killed_run(base, tmp_path, [])
    else:
        path = _train(base, tmp_path / "run").path
    written = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    if what == "source.data":
        data.write_text(data.read_text().replace("lazy", "slow"))
    elif what == "convert.edited_here":
        Path("edited_here.py").write_text(f"# edited\n{code}")
    elif what == "the capture":
        shutil.rmtree("store")
        other = {"type": "model", "model": str(make_model_dir(layers=3, width=48, seed=9))}
        limbeck.capture(base | {"objective": [], "teacher": other, "capture": {"path": "store"}})
    else:
        changed, sizes = (student, {"layers": 2}) if what == "student.model" else (teacher, {"layers": 3, "width": 48})
        shutil.rmtree(changed)
        shutil.copytree(make_model_dir(seed=9, **sizes), changed)
    named = "the teacher" if what == "the capture" else what
    with pytest.raises(
        RunError, match=f"{path.name}: .*{named} changed since this run began; choose another run directory, or delete this one"
    ):
        _train(base, path)
    assert written == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}, "nothing is lost"


def test_export_reloads_to_equal_logits_and_holds_no_projections(base: dict[str, Any], tmp_path: Path) -> None:
    run = _train(base, tmp_path / "run", "train.checkpoint_every=6")
    assert not [name for name in _weights(run) if "projection" in name]
    trained = load_file(run.checkpoints / "step-00000006" / "learner.safetensors")
    assert [name for name in trained if name.startswith("projections.")], "projections are trained, so a resume needs them"
    model = AutoModelForCausalLM.from_pretrained(run.student, dtype=torch.float32)
    for name, value in model.named_parameters():
        assert torch.equal(value, trained[f"student.{name}"])


def test_export_generates_where_limbeck_is_not_installed(base: dict[str, Any], tmp_path: Path) -> None:
    run = _train(base, tmp_path / "run", "train.steps=2")
    code = (
        "import sys; sys.modules['limbeck'] = None\n"
        "from transformers import pipeline\n"
        f"print(pipeline('text-generation', model={str(run.student)!r})('The weather', max_new_tokens=4)[0]['generated_text'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("The weather"), done.stderr


def test_projections_are_trained_and_reduced_like_any_weight(base: dict[str, Any], tmp_path: Path) -> None:
    run = _train(base, tmp_path / "run", "train.checkpoint_every=1", "train.keep_checkpoints=10", "train.optimizer.schedule=constant")
    first, last = (load_file(run.checkpoints / f"step-0000000{step}" / "learner.safetensors") for step in (1, 6))
    moved = [name for name in first if name.startswith("projections.") and not torch.equal(first[name], last[name])]
    assert len(moved) == 2


def test_gradient_that_is_not_finite_stops_the_run_and_touches_nothing(base: dict[str, Any], tmp_path: Path) -> None:
    settings = ["train.checkpoint_every=1", "train.steps=50", "train.optimizer.learning_rate=1e30", "train.optimizer.max_grad_norm=null"]
    with pytest.raises(RunError, match=r"step \d+: loss .* not finite"):
        _train(base, tmp_path / "run", *settings)
    (latest,) = (tmp_path / "run" / "checkpoints").glob("step-*[0-9]")
    assert all(torch.isfinite(value).all() for value in load_file(latest / "learner.safetensors").values())


def test_bfloat16_is_autocast_over_float32_weights(base: dict[str, Any], tmp_path: Path) -> None:
    full, half = _train(base, tmp_path / "full"), _train(base, tmp_path / "half", "train.precision=bfloat16")
    assert _losses(half) == pytest.approx(_losses(full), rel=0.05) and _losses(half) != _losses(full)
    assert all(value.dtype == torch.float32 for value in _weights(half).values())


def test_logged_loss_is_the_weighted_sum_of_logged_terms(base: dict[str, Any], tmp_path: Path) -> None:
    for row in _train(base, tmp_path / "run").metrics():
        assert row["loss"] == pytest.approx(0.5 * row["loss/ce"] + row["loss/logits"] + row["loss/hidden"])
        assert row["teacher_nll"] > 0 and 0 < row["teacher_share"] < 1 and row["peak_memory_mb"] > 50


def test_token_that_the_teacher_lacks_is_refused_before_the_first_step(base: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    student = save_model(tmp_path / "student", tiny_model(layers=2), tokenizer)
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "The weather", "completion": " is <extra>."}])
    changed = {**base, "student": {"model": str(student)}, "source": {"type": "dataset", "data": str(data)}}
    with pytest.raises(ModelError, match=r"the data has token \d+ \('<extra>'\), expected one of the \d+"):
        limbeck.train(changed, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    limbeck.train({**changed, "objective": [{"type": "ce"}]}, tmp_path / "sft")


def test_teacher_on_the_hub_that_cannot_be_reached_is_named(base: dict[str, Any], tmp_path: Path) -> None:
    """Its config is fetched before the layer map is made; offline that is one clear error."""
    with pytest.raises(ModelError, match="config of model 'owner/nowhere'"):
        limbeck.train({**base, "teacher": {"type": "model", "model": "owner/nowhere"}}, tmp_path / "run")
