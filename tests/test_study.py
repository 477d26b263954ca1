"""A small study on a tiny model, through the same functions as a real one: what it leaves, what it keeps, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import yaml

import limbeck.trainer
from helpers import write_jsonl
from limbeck import protocol
from limbeck.cache import weight_shapes
from limbeck.check import check
from limbeck.conduct import run_study
from limbeck.errors import LimbeckError, RecipeError, RunError
from limbeck.ledger import Ledger, Task
from limbeck.protocol import declared_primary
from limbeck.report.page import build_report
from limbeck.report.records import RunRecord
from limbeck.run import Run
from limbeck.study import Study, digest, load_study

ARMS: dict[str, dict[str, Any]] = {
    "sft": {"objective": [{"type": "ce"}]},
    "logits": {"objective": [{"type": "ce", "weight": 0.5}, {"type": "logits"}]},
    "hidden": {"objective": [{"type": "ce"}, {"type": "hidden", "pairs": [[0, 1], [1, 3]]}]},
}


def conversations(numbers: range) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"Add {n} and {n}."}, {"role": "assistant", "content": f"The answer is {2 * n}."}]}
        for n in numbers
    ]


@pytest.fixture(scope="module")
def make_study(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Study]:
    """`make_study(seeds=[0, 1], arms=...)`: a study of two steps per arm."""
    folder = tmp_path_factory.mktemp("data")
    train, heldout = (
        write_jsonl(folder / "train.jsonl", conversations(range(10))),
        write_jsonl(folder / "heldout.jsonl", conversations(range(20, 26))),
    )
    base = {
        "student": {"model": str(model_dir), "keep_layers": [0, 3]},
        "teacher": {"type": "model", "model": str(model_dir)},
        "source": {"type": "dataset", "data": str(train)},
        "train": {"steps": 2, "batch_size": 4, "micro_batch_size": 4},
        "evaluate": [{"type": "agreement", "data": str(heldout)}, {"type": "bits_per_byte", "data": str(heldout)}],
    }

    def make(**changes: Any) -> Study:
        return Study.model_validate({"name": "tiny", "base": base, "arms": ARMS, "capture": {}} | changes)

    return make


@pytest.fixture(scope="module")
def finished(make_study: Callable[..., Study], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished study's directory and figures. Read-only: a test that changes it takes `copied`."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    return path, run_study(make_study(), path)


@pytest.fixture
def copied(finished: tuple[Path, dict[str, Any]]) -> Iterator[Path]:
    """The finished directory, to be changed; put back as it was, because runs remember the path of their teacher."""
    path, kept = finished[0], finished[0].with_name("kept")
    shutil.copytree(path, kept)
    yield path
    shutil.rmtree(path)
    kept.rename(path)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that were trained in this test; one that was found finished is none."""
    names: list[str] = []
    original = limbeck.trainer.train

    def train(recipe: Any, path: Path) -> Run:
        if not Run(path).is_finished:
            names.append("/".join(Path(path).parts[-2:]))
        return original(recipe, path)

    monkeypatch.setattr(limbeck.trainer, "train", train)
    return names


def times(path: Path) -> dict[str, int]:
    """When every file was written, the report's apart."""
    files = (file for file in path.rglob("*") if file.is_file() and "report" not in str(file.relative_to(path)))
    return {str(file.relative_to(path)): file.stat().st_mtime_ns for file in files if file.name != "study.json"}


def test_what_a_study_leaves(finished):
    path, figures = finished
    assert (path / "teacher" / "manifest.json").is_file()
    for arm in ARMS:
        run = Run(path / "arms" / arm / "seed-0")
        assert run.is_finished and set(run.evals()) == {"agreement", "bits_per_byte"}
        assert run.read_json("recipe.json")["teacher"] == {"type": "store", "path": str(path / "teacher")}
    assert all(Path(file).is_file() for file in figures["report"].values())
    assert figures["num_runs"] == {"expected": 3, "finished": 3} and figures["budgets"]["equal"] is True
    assert "no verdict across seeds" in figures["statement"]
    assert json.loads(json.dumps(figures)) == figures


def test_references_are_the_teacher_and_the_student_before_its_first_step(finished):
    scores = finished[1]["scores"]
    assert list(scores) == ["teacher", "untrained", "sft", "logits", "hidden"]
    assert scores["teacher"]["agreement"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert scores["teacher"]["agreement"]["top1"]["value"] == 1
    assert scores["untrained"]["agreement"]["kl"]["value"] > 0.01


def test_capture_holds_what_all_arms_ask_for(finished):
    path, _ = finished
    manifest = json.loads((path / "teacher" / "manifest.json").read_text())
    took = json.loads((path / "capture.json").read_text())
    assert manifest["layers"] == [1, 3] and took["layers"] == [1, 3]
    assert took["num_samples"] == 16 and took["seconds"] > 0 and took["complete"]  # ten to train on, six held out


@pytest.mark.parametrize("changes", [{}, {"capture": None}], ids=["captured", "live"])
def test_arms_with_another_teacher(make_study, make_model_dir, finished, tmp_path, trained, changes):
    other = make_model_dir(layers=4, seed=9)
    arms = {name: ARMS[name] for name in ("sft", "logits")}
    for name in ("other", "other_too"):
        arms[name] = ARMS["logits"] | {"teacher": {"model": str(other)}}
    study = make_study(arms=arms, **changes)
    figures = run_study(study, tmp_path / "s")
    own = "teacher-of-other"
    assert list(figures["scores"]) == ["teacher", own, "untrained", *arms]
    kl = {name: its["agreement"]["kl"]["value"] for name, its in figures["scores"].items()}
    assert kl["teacher"] == pytest.approx(0, abs=1e-6) and kl[own] > 0.01, "all are compared with the study's teacher"
    assert kl["other"] == kl["other_too"] != kl["logits"] < kl["other"]
    assert kl["logits"] == pytest.approx(finished[1]["scores"]["logits"]["agreement"]["kl"]["value"], abs=1e-5)
    given = {arm: Run(tmp_path / "s" / "arms" / arm / "seed-0").read_json("recipe.json")["teacher"] for arm in arms}
    if study.capture:
        assert {arm: Path(its["path"]).name for arm, its in given.items()} == {
            "sft": "teacher",
            "logits": "teacher",
            "other": own,
            "other_too": own,
        }
        took = [json.loads((tmp_path / "s" / file).read_text()) for file in ("capture.json", f"capture-{own}.json")]
        assert took[0]["about"]["teacher"] != took[1]["about"]["teacher"] and all(its["complete"] for its in took)
        page = Path(figures["report"]["markdown"]).read_text()
        assert f"{own} scored" in page and "for all arms that have it" in page and f"from {other.name}" in page
        keys = {arm: Ledger(make_study(), tmp_path / "t").key(Task(arm, 0)) for arm in ("sft", "logits")}
        ours = Ledger(study, tmp_path / "s")
        assert {arm: ours.key(Task(arm, 0)) for arm in keys} == keys, "other arms keep their records"
        assert len({ours.key(Task(arm, 0)) for arm in arms}) == 3, "and two that do the same are one and the same"
    else:
        assert [its["model"] for its in given.values()].count(str(other)) == 2
    trained.clear()
    run_study(study, tmp_path / "s")
    assert trained == []


def test_fine_tuning_does_not_open_the_teacher(finished):
    path, _ = finished
    assert all("teacher_nll" not in row for row in Run(path / "arms" / "sft" / "seed-0").metrics())
    assert all("teacher_nll" in row for row in Run(path / "arms" / "hidden" / "seed-0").metrics())


def test_second_start_makes_nothing_anew(finished, make_study, trained):
    path, figures = finished
    before = times(path)
    again = run_study(make_study(), path)
    assert not trained and times(path) == before
    assert {key: again[key] for key in ("scores", "costs", "budgets")} == {key: figures[key] for key in ("scores", "costs", "budgets")}


def test_a_stopped_study_goes_on(make_study, tmp_path, monkeypatch, trained):
    train = limbeck.trainer.train

    def stop(recipe: Any, path: Path) -> Run:
        if "logits" in str(path):
            raise KeyboardInterrupt
        return train(recipe, path)

    with monkeypatch.context() as patch:
        patch.setattr(limbeck.trainer, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            run_study(make_study(), tmp_path / "s")
    before = times(tmp_path / "s")
    assert trained == ["sft/seed-0"] and "arms/sft/seed-0/run.json" in before
    figures = run_study(make_study(), tmp_path / "s")
    assert trained == ["sft/seed-0", "logits/seed-0", "hidden/seed-0"] and figures["num_runs"]["finished"] == 3
    after = times(tmp_path / "s")
    assert {file: after[file] for file in before} == before


def records(path: Path, pattern: str = "*") -> dict[str, int]:
    """When every record was written."""
    return {file.name: file.stat().st_mtime_ns for file in (path / "records").glob(f"{pattern}.json")}


def test_a_reference_that_is_missing_is_made(copied, make_study, trained):
    (missing,) = (copied / "records").glob("reference-untrained-*.json")
    before, kept = records(copied), missing.read_bytes()
    missing.unlink()
    run_study(make_study(), copied)
    assert not trained and missing.read_bytes() == kept
    assert {name for name, time in records(copied).items() if before[name] != time} == {missing.name}


def test_more_seeds_can_be_added(copied, make_study, trained):
    figures = run_study(make_study(seeds=[0, 3]), copied)
    assert trained == ["sft/seed-3", "logits/seed-3", "hidden/seed-3"]
    assert figures["seeds"] == [0, 3] and "2 seeds" in figures["statement"] and figures["budgets"]["equal"] is True
    orders = {seed: Run(copied / "arms" / "sft" / f"seed-{seed}").read_json("data.json")["order_sha256"] for seed in (0, 3)}
    assert orders[0] != orders[3]
    assert figures["scores"]["sft"]["agreement"]["kl"]["num_seeds"] == 2


STEPS = {"train": {"steps": 3}}


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"arms": ARMS | {"logits": {"objective": [{"type": "ce"}, {"type": "logits"}]}}}, ["logits"]),
        ({"arms": ARMS | {"sft": ARMS["sft"] | STEPS}}, ["sft"]),
        ({"arms": {"sft": ARMS["sft"]}}, []),
        ({"arms": ARMS | {"more": ARMS["sft"] | STEPS}}, ["more"]),
        ({"arms": ARMS | {"twin": ARMS["sft"]}}, ["twin"]),
        ({"capture": None}, ["logits", "hidden"]),
        ({"capture": {"codec": {"type": "topk", "k": 8}}, "references": False}, ["logits", "hidden"]),
    ],
    ids=["another weight", "another budget", "an arm less", "an arm more", "a twin", "a live teacher", "another codec"],
)
def test_only_what_was_changed_runs_again(copied, make_study, trained, changes, again):
    """A run is known by all that decides its result; what is not asked for any more stays where it is."""
    before = records(copied)
    figures = run_study(make_study(**changes), copied)
    assert [name.partition("/")[0] for name in trained] == again
    assert set(figures["scores"]) - {"teacher", "untrained"} == set(changes.get("arms", ARMS))
    assert before.keys() <= records(copied).keys(), "what was recorded stays"
    for arm in set(again) & set(ARMS):
        assert "arms" not in changes or list((copied / "replaced").glob(f"{arm}-seed-0-*")), "the old run is kept"
    if again and "arms" in changes:
        trained.clear()
        run_study(make_study(), copied)
        assert not trained, "the study as it was is recorded still"


@pytest.mark.parametrize("stopped_in", ["the run's first step", "nothing at all"])
def test_a_report_of_a_study_that_was_stopped_shows_no_run_of_the_arm_as_it_was(copied, make_study, monkeypatch, stopped_in):
    def stopped(recipe: Any, path: Path) -> Run:
        if stopped_in != "nothing at all":
            Run(path).write_json("recipe.json", recipe.to_json())
        raise KeyboardInterrupt

    monkeypatch.setattr(limbeck.trainer, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_study(make_study(arms=ARMS | {"logits": {"objective": [{"type": "ce"}, {"type": "logits", "weight": 3}]}}), copied)
    figures = json.loads(build_report(copied).json.read_text())
    measured = {arm for arm, scores in figures["scores"].items() if scores}
    assert "logits" not in measured and {"sft", "hidden"} <= measured


def test_what_only_changes_the_speed_runs_nothing_again(copied, make_study, trained):
    base = make_study().model_dump(mode="json")["base"]
    base["train"] |= {"micro_batch_size": 2, "pack_length": 128, "head_memory_mb": 1, "checkpoint_every": 1, "kernels": ["compile"]}
    base["parallel"] = {"strategy": "fsdp2", "shard_over": 4}
    run_study(make_study(base=base), copied)
    assert not trained


def test_processes_are_not_declared(make_study):
    base = make_study().model_dump(mode="json")["base"]
    plain = {key: value for key, value in base.items() if key != "parallel"}
    studies = [make_study(base=tree) for tree in (plain, base | {"parallel": {"strategy": "fsdp2"}})]
    assert len({protocol.declaration(study)["sha256"] for study in studies}) == 1
    assert "parallel" not in str(protocol.declaration(studies[1])["recipes"])


def test_edited_data_are_other_data(make_study, tmp_path, trained):
    base = make_study().model_dump(mode="json")["base"]
    data = write_jsonl(tmp_path / "train.jsonl", conversations(range(10)))
    study = make_study(base=base | {"source": {"type": "dataset", "data": str(data)}}, arms={"sft": ARMS["sft"]}, references=False)
    run_study(study, tmp_path / "s")
    write_jsonl(data, conversations(range(1, 11)))
    run_study(study, tmp_path / "s")
    assert trained == ["sft/seed-0"] * 2


@pytest.mark.parametrize(
    ("which", "again"),
    [("student", ["sft", "logits"]), ("teacher", ["logits"]), ("", [])],
    ids=["another student", "another teacher", "written by another version of transformers"],
)
def test_a_model_that_was_made_anew_is_another_model(make_study, make_model_dir, tmp_path, trained, which, again):
    """Its folder has the name that it had. A capture of the old teacher is put aside, and the new one is measured."""
    folders = {name: tmp_path / name for name in ("student", "teacher")}
    for seed, folder in enumerate(folders.values()):
        shutil.copytree(make_model_dir(seed=seed), folder)
    base = make_study().model_dump(mode="json")["base"]
    base |= {"student": {"model": str(folders["student"])}, "teacher": {"type": "model", "model": str(folders["teacher"])}}
    study = make_study(base=base, arms={name: ARMS[name] for name in ("sft", "logits")})
    first = run_study(study, tmp_path / "s")
    before = records(tmp_path / "s")
    trained.clear()
    if which:
        shutil.rmtree(folders[which])
        shutil.copytree(make_model_dir(seed=7), folders[which])
    else:
        file = folders["teacher"] / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"transformers_version": "99.0"}))
    second = run_study(study, tmp_path / "s")
    assert [name.partition("/")[0] for name in trained] == again
    assert before.keys() <= records(tmp_path / "s").keys(), "what was recorded stays"
    assert (first["scores"] == second["scores"]) == (not which)
    assert bool(list((tmp_path / "s" / "replaced").glob("teacher-*"))) == (which == "teacher")
    changed = {name for name in ("teacher", "untrained") if first["scores"][name] != second["scores"][name]}
    # agreement, which both are measured by, is with the teacher
    assert changed == {"student": {"untrained"}, "teacher": {"teacher", "untrained"}, "": set()}[which]


def test_data_that_are_edited_at_work_are_not_recorded(make_study, tmp_path, trained, monkeypatch):
    """What was trained on the old data is not shown as of the new."""
    base = make_study().model_dump(mode="json")["base"]
    data = write_jsonl(tmp_path / "train.jsonl", conversations(range(10)))
    study = make_study(base=base | {"source": {"type": "dataset", "data": str(data)}}, arms={"sft": ARMS["sft"]}, references=False)
    export = limbeck.trainer._export

    def edit(*args: Any) -> None:
        export(*args)
        write_jsonl(data, conversations(range(1, 11)))

    with monkeypatch.context() as patch:
        patch.setattr(limbeck.trainer, "_export", edit)
        with pytest.raises(RunError, match=r"sft/seed-0: what it is made from was changed while it was trained; start the study again"):
            run_study(study, tmp_path / "s")
    assert not records(tmp_path / "s")
    run_study(study, tmp_path / "s")
    assert trained == ["sft/seed-0"] * 2 and len(records(tmp_path / "s")) == 1


def test_a_student_that_was_altered_is_not_graded(copied, make_study, make_model_dir):
    """Nor recorded under the name of the one that was trained."""
    student = copied / "arms" / "sft" / "seed-0" / "student"
    shutil.rmtree(student)
    shutil.copytree(make_model_dir(layers=2, seed=9), student)
    base = make_study().model_dump(mode="json")["base"]
    base["evaluate"] = [*base["evaluate"], base["evaluate"][1] | {"name": "again", "limit": 2}]
    with pytest.raises(RunError, match=r"student: the weights were altered since they were trained"):
        run_study(make_study(base=base), copied)


def test_adapters_of_an_arm_that_starts_from_another_decide_it(make_study, model_dir, tmp_path):
    base = make_study().model_dump(mode="json")["base"] | {"student": {"model": str(model_dir)}}
    keys = []
    for lora in (None, {"rank": 2}, {"rank": 4}):
        arms = {"sft": ARMS["sft"], "then": ARMS["sft"] | {"student": {"arm": "sft"} | ({"lora": lora} if lora else {})}}
        ledger = Ledger(make_study(base=base, arms=arms), tmp_path / "s")
        keys.append([ledger.key(Task(arm, 0)) for arm in arms])
    assert len({sft for sft, _ in keys}) == 1 and len({then for _, then in keys}) == 3


def test_references_are_asked_with_the_prompts_of_the_student(make_study, make_model_dir, tmp_path):
    """Another chat template of the student's asks the teacher in other words, too."""
    student = tmp_path / "student"
    shutil.copytree(make_model_dir(), student)
    base = make_study().model_dump(mode="json")["base"] | {"student": {"model": str(student)}}
    study = make_study(base=base | {"evaluate": base["evaluate"][1:]}, arms={"sft": ARMS["sft"]}, capture=None)
    first = run_study(study, tmp_path / "s")
    template = student / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>\\n", "<|im_end|>\\n\\n"))
    second, anew = run_study(study, tmp_path / "s"), run_study(study, tmp_path / "anew")
    assert first["scores"]["teacher"] != second["scores"]["teacher"] == anew["scores"]["teacher"]


@pytest.mark.parametrize("what", ["data", "evaluate"])
def test_a_capture_takes_in_what_was_edited_or_added(make_study, tmp_path, trained, what):
    base = make_study().model_dump(mode="json")["base"]
    data = write_jsonl(tmp_path / "train.jsonl", conversations(range(10)))
    base |= {"source": {"type": "dataset", "data": str(data)}}
    run_study(make_study(base=base, arms={"logits": ARMS["logits"]}, references=False), tmp_path / "s")
    if what == "data":
        write_jsonl(data, conversations(range(1, 12)))
    else:
        heldout = write_jsonl(tmp_path / "heldout.jsonl", conversations(range(30, 36)))
        base |= {"evaluate": [*base["evaluate"], base["evaluate"][0] | {"name": "more", "data": str(heldout)}]}
    figures = run_study(make_study(base=base, arms={"logits": ARMS["logits"]}, references=False), tmp_path / "s")
    assert trained == ["logits/seed-0"] * (2 if what == "data" else 1) and ("more" in figures["scores"]["logits"]) == (what == "evaluate")


def test_an_edited_function_makes_other_data(make_study, tmp_path, monkeypatch):
    """`convert` is the user's code, and decides what is trained on as much as the file does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "edited_rows", raising=False)
    study = make_study().model_dump(mode="json")
    study["base"]["source"]["data"] = {"path": study["base"]["source"]["data"], "convert": "edited_rows:same"}
    keys = []
    for code in ("def same(row): return row", "def same(row): return dict(row)"):
        Path("edited_rows.py").write_text(code)
        ledger = Ledger(Study.model_validate(study), tmp_path / "s")
        keys.append(ledger.key(ledger.tasks()[0]))
    assert keys[0] != keys[1]


def test_an_added_benchmark_is_measured_alone(copied, make_study, trained):
    base = make_study().model_dump(mode="json")["base"]
    base["evaluate"] = [*base["evaluate"], base["evaluate"][1] | {"name": "again", "limit": 2}]
    figures = run_study(make_study(base=base), copied)
    assert not trained and all("again" in scores for scores in figures["scores"].values())


def test_records_are_enough_to_go_on_elsewhere(finished, make_study, tmp_path, trained):
    """With the records of a study and nothing else, nothing runs and the report says the same; one that is lacking is made."""
    path, figures = finished
    results = tmp_path / "results"
    shutil.copytree(path / "records", results / "records")
    shutil.copy(path / "study.json", results)
    shutil.copy(path / "capture.json", results)
    again = run_study(make_study(), tmp_path / "work", results)
    assert not trained and [file.name for file in (tmp_path / "work").iterdir()] == ["work.json"]
    assert {key: again[key] for key in ("scores", "differences", "costs", "budgets", "answer")} == {
        key: figures[key] for key in ("scores", "differences", "costs", "budgets", "answer")
    }
    assert "Add 20 and 20" not in "".join(file.read_text() for file in (results / "records").iterdir()), "no text of the data"
    (lost,) = (results / "records").glob("logits-seed-0-*.json")
    lost.unlink()
    run_study(make_study(), tmp_path / "work", results)
    assert trained == ["logits/seed-0"] and lost.is_file() and (tmp_path / "work" / "arms" / "logits" / "seed-0").is_dir()


def test_another_study_in_the_same_directory_is_refused(finished, make_study, trained):
    path, _ = finished
    with pytest.raises(RunError, match=r"holds study 'tiny', found 'other'; choose another directory"):
        run_study(make_study(name="other"), path)
    assert not trained


def test_a_study_that_was_stopped_in_its_capture_goes_on(make_study, tmp_path, monkeypatch):
    """With results elsewhere, its directory is known by more than the runs that it does not have yet; another study's is refused."""
    import limbeck.conduct

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(limbeck.conduct.Conduct, "_refer", stop)
        with pytest.raises(KeyboardInterrupt):
            run_study(make_study(), tmp_path / "work", tmp_path / "results")
    assert (tmp_path / "work" / "teacher").is_dir() and not (tmp_path / "work" / "arms").exists()
    assert run_study(make_study(), tmp_path / "work", tmp_path / "results")["num_runs"]["finished"] == 3
    with pytest.raises(RunError, match=r"work: holds study 'tiny', found 'other'"):
        run_study(make_study(name="other"), tmp_path / "work", tmp_path / "elsewhere")


def test_an_arm_that_starts_from_another(make_study, tmp_path, trained):
    """Seed by seed the parent's student, also where only the parent's record is left; what it cost is said."""
    arms = {"then": {"student": {"arm": "sft"}, "objective": [{"type": "ce"}, {"type": "logits"}]}, "sft": ARMS["sft"]}
    study = make_study(arms=arms, seeds=[0, 1], num_seeds={"then": 1}, references=False)
    run_study(study, tmp_path / "s")
    assert trained == ["sft/seed-0", "then/seed-0", "sft/seed-1"]
    sft, then = (Run(tmp_path / "s" / "arms" / arm / "seed-0") for arm in ("sft", "then"))
    assert then.read_json("recipe.json")["student"]["model"] == str(sft.student)
    assert then.read_json("data.json")["initial_weights_sha256"] == sft.read_json("run.json")["weights_sha256"]
    (record,) = (json.loads(file.read_text()) for file in (tmp_path / "s" / "records").glob("then-seed-0-*.json"))
    assert record["about"]["parent"]["arm"] == "sft" and record["about"]["parent"]["tokens"] == sft.read_json("run.json")["tokens"]
    assert record["about"]["compute"]["student_flops"] > record["about"]["compute"]["teacher_flops"] > 0

    shutil.rmtree(tmp_path / "s" / "arms")
    next((tmp_path / "s" / "records").glob("then-*")).unlink()
    trained.clear()
    run_study(study, tmp_path / "s")
    assert trained == ["sft/seed-0", "then/seed-0"]
    (again,) = (json.loads(file.read_text()) for file in (tmp_path / "s" / "records").glob("then-seed-0-*.json"))
    assert again["totals"]["weights_sha256"] == record["totals"]["weights_sha256"]


def task(**changes: Any) -> dict[str, Any]:
    """A benchmark that may decide."""
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    return {"type": "exact_match", "task": "chain_sum", "settings": settings, "limit": 4, "max_new_tokens": 2, "prompt": "plain"} | changes


def with_task(study: Study) -> dict[str, Any]:
    return {"base": study.model_dump(mode="json")["base"] | {"evaluate": [task(name="sums", seed=50_000)]}}


def test_controls_and_protocol(make_study, tmp_path, trained):
    """A primary metric brings the A/A twin with other seeds and a planted handicap, and is declared before the first run."""
    changes = with_task(make_study()) | {"primary": {"benchmark": "sums", "margin": 0.1}, "references": False}
    study = make_study(**changes, arms={arm: ARMS[arm] for arm in ("sft", "logits")})
    plan = study.plan()
    assert list(plan) == ["sft", "logits", "sft-again", "sft-planted"]
    assert plan["sft-again"].seeds == [10_000] and plan["sft-planted"].recipe.train.steps == 1  # a quarter of two, at least one
    run_study(study, tmp_path / "s")
    assert trained == ["sft/seed-0", "logits/seed-0", "sft-again/seed-10000", "sft-planted/seed-0"]
    declared = json.loads((tmp_path / "s" / "study.json").read_text())
    assert declared["protocol"]["primary"]["margin"] == 0.1 and declared["protocol"]["compared"] == [["logits", "sft"]]
    assert declared["amendments"] == [] and declared["arms"]["sft-planted"]["role"] == "planted"

    run_study(study, tmp_path / "s")
    assert json.loads((tmp_path / "s" / "study.json").read_text())["amendments"] == []
    wider = make_study(**changes | {"primary": {"benchmark": "sums", "margin": 0.2}}, arms={arm: ARMS[arm] for arm in ("sft", "logits")})
    run_study(wider, tmp_path / "s")
    later = json.loads((tmp_path / "s" / "study.json").read_text())
    assert later["protocol"] == declared["protocol"], "the first declaration stays"
    assert [its["changes"] for its in later["amendments"]] == [["primary.margin is 0.1 there, 0.2 here"]]
    assert len(trained) == 4, "and a metric runs nothing again"


def test_a_handicap_that_is_a_rate_outlives_tuning(make_study, tmp_path):
    """Controls take the baseline's chosen rate, but for the one that is a rate itself."""
    handicap = {"train": {"optimizer": {"learning_rate": 0.5}}}
    tune = {"learning_rates": [1e-3, 1e-2], "of": {"sft": [5e-3], "logits": [5e-3]}, "evaluate": task(seed=90_000)}
    primary = {"benchmark": "sums", "margin": 0.1}
    arms = {arm: ARMS[arm] for arm in ("sft", "logits")}
    for planted, expected in ((handicap, 0.5), ({"train": {"steps": 1}}, 5e-3)):
        study = make_study(**with_task(make_study()), arms=arms, tune=tune, capture=None, primary=primary | {"planted": planted})
        ledger = Ledger(study, tmp_path / "s")
        rates = {its.arm: ledger.recipe(its).train.optimizer.learning_rate for its in ledger.tasks()}
        assert rates == {"sft": 5e-3, "logits": 5e-3, "sft-again": 5e-3, "sft-planted": expected}


def test_the_baseline_at_equal_compute(make_study, tmp_path, trained):
    """It gets steps for what the teacher takes, once for arms of one cost, and is judged beside the baseline at equal tokens."""
    changes = with_task(make_study()) | {"references": False}
    changes["base"]["train"]["steps"] = 10
    primary = {"benchmark": "sums", "margin": 0.1, "equal_compute": True, "planted": {"train": {"steps": 1}}}
    arms = ARMS | {
        "then": {"student": {"arm": "sft"}, "objective": [{"type": "ce"}]},
        "other": ARMS["sft"] | {"source": {"max_length": 40}},
    }
    plan = make_study(**changes, primary=primary, arms=arms, num_seeds={"hidden": 1}, seeds=[0, 1]).plan()
    added = {name: arm for name, arm in plan.items() if arm.at_cost_of}
    (name,) = set(added) - {"sft-20-steps"}
    student, teacher = (sum(prod(s) for k, s in shapes.items() if k not in left) for shapes, left in sizes_of(plan["sft"].recipe))
    assert added[name].recipe.train.steps == round(10 * (6 * student + 2 * teacher) / (6 * student)) > 10
    assert added[name].at_cost_of == ["logits", "hidden"] and added[name].seeds == [0, 1]
    assert added["sft-20-steps"].at_cost_of == ["then"], "what it starts from counts; on other data nothing is known beforehand"

    changes["base"]["train"]["steps"] = 4  # a conversation each of ten, four times
    figures = run_study(make_study(**changes, primary=primary, arms={arm: ARMS[arm] for arm in ("sft", "logits")}), tmp_path / "s")
    (name,) = [run.partition("/")[0] for run in trained if run.startswith("sft-") and "steps" in run]
    declared = json.loads((tmp_path / "s" / "study.json").read_text())
    assert declared["protocol"]["compared"] == [["logits", "sft"], ["logits", name]]
    assert declared["arms"][name]["at_cost_of"] == ["logits"] and "at_cost_of" not in declared["arms"]["sft"]
    (equal,) = figures["equal_compute"]
    assert equal["other_flops"] == pytest.approx(equal["flops"], rel=0.15) and equal["passes"] == equal["steps"] * 4 / 10
    text = (tmp_path / "s" / "report.md").read_text()
    assert f"{name} at equal compute" in text and "logits − sft<br>at equal tokens" in text
    assert f"{name} takes" in text and "the data has no more rows, and comes 2." in text


def sizes_of(recipe: Any) -> list[tuple[dict[str, Any], set[str]]]:
    """Shapes of the student's and of the teacher's weights, and which of them are not there in it: two of four blocks."""
    shapes = weight_shapes(recipe.teacher.model)
    assert shapes
    return [(shapes, {name for name in shapes if ".layers.1." in name or ".layers.2." in name}), (shapes, set())]


def test_equal_compute_needs_lengths_and_sizes_that_compare(make_study, monkeypatch):
    changes = with_task(make_study()) | {"primary": {"benchmark": "sums", "margin": 0.1, "equal_compute": True}}
    longer = ARMS["logits"] | {"train": {"steps": None, "epochs": 2}}
    with pytest.raises(RecipeError, match=r"equal_compute: found both train\.steps and train\.epochs in 'logits' and 'sft'"):
        make_study(**changes, arms=ARMS | {"logits": longer}).plan()
    with pytest.raises(RecipeError, match=r"found arm 'sft-\d+-steps', which primary\.equal_compute adds"):
        name = next(name for name, arm in make_study(**changes).plan().items() if arm.at_cost_of)
        make_study(**changes, arms=ARMS | {name: ARMS["sft"]}).plan()
    monkeypatch.setattr("limbeck.flops.weight_shapes", lambda *args: None)
    with pytest.raises(RecipeError, match=r"arm 'logits': the sizes of .* are read from the weights' files, and these are not here"):
        make_study(**changes).plan()


def test_a_key_that_came_later_amends_nothing(make_study, tmp_path):
    """Whatever it does to a hash: what differs is compared, and a key that is not used does not."""
    study, results = make_study(**with_task(make_study()), primary={"benchmark": "sums", "margin": 0.1}), tmp_path / "s"
    protocol.claim(study, results, results)
    (results / "records").mkdir()
    (results / "records" / "sft-seed-0-0.json").write_text("{}")
    tree = json.loads((results / "study.json").read_text())
    for recipe in tree["protocol"]["recipes"].values():
        assert recipe["train"].pop("kernels") is None
    tree["protocol"]["sha256"] = digest({key: value for key, value in tree["protocol"].items() if key != "sha256"})
    (results / "study.json").write_text(json.dumps(tree))
    protocol.claim(study, results, results)
    after = json.loads((results / "study.json").read_text())
    assert after["protocol"] == tree["protocol"] and after["amendments"] == []


def test_recorded_studies_are_declared_as_they_were():
    """A key that is added must not amend, or run again, what is recorded."""
    folder = Path(__file__).parent.parent / "results" / "mini" / "exp1-smollm2"
    recorded = json.loads((folder / "study.json").read_text())["protocol"]
    tree = {key: recorded[key] for key in ("primary", "tune")}
    asked = Study.model_validate({"name": "x", "base": {}, "arms": {arm: {} for arm in recorded["recipes"] if "-" not in arm}} | tree)
    assert declared_primary(asked) == recorded["primary"]
    assert digest({key: value for key, value in recorded.items() if key != "sha256"}) == recorded["sha256"]


def test_students_are_chosen_on_validation_data(make_study, tmp_path, trained):
    """Evaluations that choose nothing are no other run; what chooses is part of what a run is, and its curve of the record."""
    base = make_study().model_dump(mode="json")["base"]
    chosen = base["train"] | {"evaluate_every": 1, "evaluate_only": ["bits_per_byte"], "best": {"benchmark": "bits_per_byte"}}

    def study(train: dict[str, Any], **heldout: Any) -> Study:
        evaluate = [task(name="sums", seed=50_000), base["evaluate"][1] | heldout]
        changes = {"base": base | {"train": train, "evaluate": evaluate}, "capture": None, "references": False}
        return make_study(**changes, arms={"sft": ARMS["sft"]})

    def key(*settings: Any, **more: Any) -> str:
        ledger = Ledger(study(*settings, **more), tmp_path / "s")
        return ledger.key(ledger.tasks()[0])

    plain = key(base["train"])
    assert key(base["train"] | {"evaluate_every": 1}) == key(base["train"] | {"evaluate_every": 2}) == plain != key(chosen)
    others = [chosen | {"evaluate_every": 2}, chosen | {"best": None}, chosen | {"evaluate_only": None}]
    assert [key(other) == key(chosen) for other in others] == [False, False, True]
    assert key(chosen, limit=3) != key(chosen) and key(base["train"], limit=3) == plain

    run_study(study(chosen), tmp_path / "s")
    (record,) = (json.loads(file.read_text()) for file in (tmp_path / "s" / "records").glob("*.json"))
    assert [row["step"] for row in record["evaluations"]] == [0, 1, 2] and set(record["evals"]) == {"sums", "bits_per_byte"}
    values = [row["metrics"]["bits_per_byte"]["bits_per_byte"]["value"] for row in record["evaluations"]]
    assert record["totals"]["best"]["value"] == min(values) == record["evals"]["bits_per_byte"]["metrics"]["bits_per_byte"]["value"]
    assert "Students were chosen during training by bits per byte. Scores on" in (tmp_path / "s" / "report.md").read_text()


def test_rates_are_chosen_on_validation_data(make_study, tmp_path, trained):
    changes = with_task(make_study()) | {"references": False, "arms": {arm: ARMS[arm] for arm in ("sft", "logits")}}
    tune = {"learning_rates": [1e-3, 1e-2], "of": {"logits": [5e-3]}, "evaluate": {**task(seed=90_000), "type": "exact_match"}}
    heldout = make_study().model_dump(mode="json")["base"]["evaluate"][1] | {"limit": 3}
    study = make_study(**changes, tune=tune | {"evaluate": heldout})
    run_study(study, tmp_path / "s")
    assert trained == ["sft/rate-0.001", "sft/rate-0.01", "sft/seed-0", "logits/seed-0"]
    tuning = json.loads((tmp_path / "s" / "study.json").read_text())["index"]["tuning"]
    tried = tuning["sft"]["tried"]
    assert tuning["sft"]["chosen"] == float(min(tried, key=tried.get)) and "logits" not in tuning
    for arm, rate in (("sft", tuning["sft"]["chosen"]), ("logits", 5e-3)):
        recipe = Run(tmp_path / "s" / "arms" / arm / "seed-0").read_json("recipe.json")
        assert recipe["train"]["optimizer"]["learning_rate"] == rate
    trained.clear()
    run_study(study, tmp_path / "s")
    assert not trained


def test_a_metric_of_the_harness_says_itself_which_way_is_better(make_study, tmp_path, monkeypatch):
    tune = {"learning_rates": [1e-3, 1e-2], "evaluate": {"type": "harness", "task": "owner"}}
    losses = {1e-3: 2.0, 1e-2: 1.0}

    def recorded(self, task):
        metrics = {"loss": {"value": losses[task.rate], "higher_is_better": False}}
        return RunRecord(task.arm, task.seed, {}, {}, {}, {}, [], {"owner": {"metrics": metrics}})

    monkeypatch.setattr(Ledger, "recorded", recorded)
    changes = {"arms": {"sft": ARMS["sft"]}, "references": False}
    assert Ledger(make_study(**changes, tune=tune), tmp_path).rate_of("sft") == 1e-2
    with pytest.raises(RunError, match=r"tune\.metric: found 'lss', expected one that 'owner' measured: loss"):
        Ledger(make_study(**changes, tune=tune | {"metric": "lss"}), tmp_path).rate_of("sft")


def test_what_tunes_may_have_the_name_of_what_tests(make_study, tmp_path):
    tune = {"learning_rates": [0.01, 0.03], "evaluate": task(name="sums", seed=60_000)}
    ledger = Ledger(make_study(**with_task(make_study()), tune=tune), tmp_path / "s")
    seeds = [ledger._identity(its)["settings"]["seed"] for its in (*ledger.base.evaluate, ledger.study.tune.evaluate)]
    assert seeds == [50_000, 60_000]


def test_a_directory_of_something_else_is_left_alone(make_study, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is no study's directory"):
        run_study(make_study(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_an_arm_with_another_budget_is_named(make_study, tmp_path):
    arms = {"sft": ARMS["sft"], "longer": ARMS["sft"] | {"train": {"steps": 3}}}
    figures = run_study(make_study(arms=arms, references=False), tmp_path / "s")
    assert figures["budgets"]["equal"] is False
    assert "NOT equal" in figures["budgets"]["statement"] and "optimizer steps: longer differs from sft" in figures["budgets"]["statement"]
    unequal = {budget["field"] for budget in figures["budgets"]["by_seed"] if not budget["equal"]}
    assert unequal == {"steps", "tokens", "scored_tokens", "order_sha256"}
    assert not (tmp_path / "s" / "references").exists()


def test_live_teacher_gives_what_the_captured_one_gives(finished, make_study, tmp_path):
    run_study(make_study(capture=None, references=False, arms={"logits": ARMS["logits"]}), tmp_path / "live")
    assert not (tmp_path / "live" / "teacher").exists()
    live, captured = (Run(path / "arms" / "logits" / "seed-0").metrics() for path in (tmp_path / "live", finished[0]))
    assert [row["loss"] for row in live] == pytest.approx([row["loss"] for row in captured], rel=1e-5)


def test_study_file(make_study, tmp_path):
    """The base may be a file beside the study's; overrides reach into it; a recipe's own seed and capture are not the study's."""
    study = make_study().model_dump(mode="json")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(study["base"] | {"seed": 9, "capture": {"path": "elsewhere"}}, sort_keys=False))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study | {"base": "base.yaml"}, sort_keys=False))
    loaded = load_study(tmp_path / "study.yaml", ["base.train.steps=7", "seeds=[4, 5]"])
    recipes = loaded.recipes()
    assert list(recipes) == list(ARMS)
    assert all(r.train and r.train.steps == 7 and r.seed == 4 and r.capture is None for r in recipes.values())
    assert [term.type for term in recipes["logits"].objective] == ["ce", "logits"]
    found = check(tmp_path / "study.yaml", ["base.train.steps=7", "seeds=[4, 5]"])
    assert found["kind"] == "study" and found["seeds"] == [4, 5]
    with pytest.raises(RecipeError, match=r"base\.yaml: found a recipe, expected a study; `limbeck train"):
        load_study(tmp_path / "base.yaml")


TASK = task(name="sums", seed=50_000)
PRIMARY: dict[str, Any] = {"base": {"evaluate": [TASK]}}
ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt key of the study": ({"arm": {}}, "arm: unknown key; did you mean 'arms'"),
    "no arms": ({"arms": {}}, "arms: .*found no arm"),
    "misspelt key of an arm": (
        {"arms": {"fast": ARMS["sft"] | {"train": {"step": 3}}}},
        "arm 'fast': train.step: unknown key; did you mean 'steps'",
    ),
    "term of an arm": ({"arms": {"x": {"objective": [{"type": "logit"}]}}}, "arm 'x': .*did you mean 'logits'"),
    "arm with an empty objective": ({"arms": {"idle": {"objective": None}}}, "arm 'idle': objective"),
    "arm without objective": ({"arms": {"idle": {}}}, "arm 'idle': objective: missing"),
    "arm named like a path": ({"arms": {"../x": ARMS["sft"]}}, "found arm '../x', expected a file name"),
    "arm named like a reference": ({"arms": {"teacher": ARMS["sft"]}}, "found arm 'teacher'"),
    "arms that differ by case": ({"arms": {"a": ARMS["sft"], "A": ARMS["sft"]}}, "differ by more than case"),
    "arm named like a teacher": ({"arms": {"teacher-of-x": ARMS["sft"]}}, "found arm 'teacher-of-x', .* and teacher-of-"),
    "teacher of an arm": (
        {"arms": {"x": ARMS["logits"] | {"teacher": {"type": "none"}}}},
        "arm 'x': evaluate: 'agreement' compares with a teacher, and teacher is 'none'",
    ),
    "seed of an arm": ({"arms": {"x": ARMS["sft"] | {"seed": 3}}}, "arm 'x' sets 'seed'; .*set `seeds`"),
    "seed twice": ({"seeds": [1, 1]}, r"seeds: .*found \[1, 1\], expected at least one number from 0, none twice"),
    "parent that is not there": (
        {"arms": ARMS | {"x": {"student": {"arm": "stf"}}}},
        "student.arm: found 'stf', .*did you mean 'sft'",
    ),
    "parent that is no name": ({"arms": ARMS | {"x": {"student": {"arm": ["sft"]}}}}, r"student\.arm: found \['sft'\], expected an arm"),
    "parents in a circle": (
        {"arms": {"x": {"student": {"arm": "y"}}, "y": {"student": {"arm": "x"}}}},
        "arm 'x': student.arm leads in a circle: x from y from x",
    ),
    "student of another kind": (
        {"base": {"student": "a/b"}, "arms": {"sft": ARMS["sft"], "x": ARMS["sft"] | {"student": {"arm": "sft"}}}},
        "arm 'sft': student: found 'a/b', expected a mapping",
    ),
    "seeds of an arm that is not there": ({"num_seeds": {"logit": 1}}, "num_seeds: found 'logit', .*did you mean 'logits'"),
    "more seeds than there are": ({"num_seeds": {"sft": 2}}, "num_seeds.sft: found 2, expected 1 to 1"),
    "primary that is not measured": (
        PRIMARY | {"primary": {"benchmark": "sum", "margin": 1}},
        "found 'sum', expected .*did you mean 'sums'",
    ),
    "metric that is not there": (
        PRIMARY | {"primary": {"benchmark": "sums", "metric": "acuracy", "margin": 1}},
        "primary.metric: found 'acuracy', .*did you mean 'accuracy'",
    ),
    "no margin": (PRIMARY | {"primary": {"benchmark": "sums"}}, "primary.margin: .*missing"),
    "likeness can't decide": (
        {"primary": {"benchmark": "agreement", "margin": 1}},
        "measures likeness on text.*can't be primary",
    ),
    "nor can bits per byte": ({"primary": {"benchmark": "bits_per_byte", "margin": 1}}, "can't be primary"),
    "an arm with itself": (PRIMARY | {"primary": {"benchmark": "sums", "margin": 1, "compare": [["sft", "sft"]]}}, "'sft' with itself"),
    "an arm like a control": (
        PRIMARY | {"primary": {"benchmark": "sums", "margin": 1}, "arms": ARMS | {"sft-again": ARMS["sft"]}},
        "found arm 'sft-again', which the study adds itself",
    ),
    "rates chosen on the test": (
        PRIMARY | {"tune": {"learning_rates": [1e-3, 1e-2], "evaluate": TASK | {"limit": 7}}},
        "tune.evaluate has the cases of base.evaluate's 'sums'",
    ),
    "students chosen on the test": (
        {"base": {"evaluate": [TASK, TASK | {"name": "same", "limit": 2}]}, "primary": {"benchmark": "sums", "margin": 1}}
        | {"arms": ARMS | {"x": ARMS["sft"] | {"train": {"evaluate_every": 1, "best": {"benchmark": "same"}}}}},
        "arm 'x': train.best.benchmark: found 'same', which has the cases of primary.benchmark 'sums', so students would be chosen",
    ),
    "one rate": (PRIMARY | {"tune": {"learning_rates": [1e-3], "evaluate": TASK | {"seed": 1}}}, "tune.learning_rates: .*at least 2"),
    "rate below 0": (PRIMARY | {"tune": {"learning_rates": [1e-3, -1], "evaluate": TASK | {"seed": 1}}}, "expected rates above 0"),
    "tuned with a seed of the study": (
        PRIMARY | {"tune": {"learning_rates": [1e-3, 1e-2], "seed": 0, "evaluate": TASK | {"seed": 1}}},
        "tune.seed: found 0, which is one of `seeds`",
    ),
    "name like a path": ({"name": "a/b"}, "name: .*found 'a/b', expected a file name"),
}


@pytest.mark.parametrize(("changes", "message"), ERRORS.values(), ids=ERRORS)
def test_study_that_cannot_work(make_study, tmp_path, changes, message):
    file = tmp_path / "study.yaml"
    study = make_study().model_dump(mode="json")
    changed = study | changes | {"base": study["base"] | changes.get("base", {})}
    file.write_text(yaml.safe_dump(changed, sort_keys=False))
    with pytest.raises(RecipeError, match=f"(?s)study.yaml: .*{message}"):
        load_study(file)


def test_capture_wants_a_live_teacher(make_study, tmp_path):
    base = make_study().model_dump(mode="json")["base"] | {"teacher": {"type": "none"}, "evaluate": []}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"name": "x", "base": base, "arms": {"sft": ARMS["sft"]}, "capture": {}}, sort_keys=False))
    with pytest.raises(RecipeError, match=r"arm 'sft': capture is set, and the teacher is 'none'"):
        load_study(file)


def test_missing_data_is_found_before_anything_runs(make_study, tmp_path):
    study = make_study(arms={"sft": ARMS["sft"] | {"source": {"data": str(tmp_path / "nowhere.jsonl")}}})
    with pytest.raises(LimbeckError, match=r"arm 'sft': data .*nowhere\.jsonl"):
        run_study(study, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_studies_are_read_without_torch(make_study, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(make_study().model_dump(mode="json"), sort_keys=False))
    code = (
        "import sys; from limbeck.study import load_study; load_study(sys.argv[1]);"
        "sys.exit(', '.join(m for m in ('torch', 'transformers') if m in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_demo_is_a_valid_study():
    from limbeck.demo import STUDY

    study = load_study(STUDY, ["seeds=[0, 1, 2, 3, 4]"])
    assert list(study.arms) == ["sft", "logits", "hidden"] and study.capture is not None
    recipes = study.recipes()
    student, train = recipes["sft"].for_training()
    assert student.kept(30)[-1] == 29 and train.steps
    (hidden,) = [term for term in recipes["hidden"].objective if term.type == "hidden"]
    assert all(student.kept(30)[ours] == theirs for ours, theirs in hidden.pairs), (
        "each student block is compared with the one it came from"
    )
    assert recipes["sft"].source.limit == train.steps * train.batch_size, "the teacher scores what is trained on, and no more"
