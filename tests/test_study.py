"""A small study on a tiny model, through the same functions as a real one: what it leaves, what it keeps, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import limbeck.trainer
from helpers import write_jsonl
from limbeck.errors import LimbeckError, RecipeError, RunError
from limbeck.run import Run
from limbeck.study import Study, load_study, run_study

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
    """The runs that were trained in this test."""
    names: list[str] = []
    original = limbeck.trainer.train

    def train(recipe: Any, path: Path) -> Run:
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


def test_a_reference_that_is_missing_is_made(copied, make_study, trained):
    (copied / "references" / "untrained" / "evals" / "agreement.json").unlink()
    before = times(copied)
    run_study(make_study(), copied)
    changed = {file for file, time in times(copied).items() if before.get(file) != time}
    assert not trained and all(file.startswith("references/untrained/") for file in changed)
    assert "references/untrained/evals/agreement.json" in changed


def test_more_seeds_can_be_added(copied, make_study, trained):
    figures = run_study(make_study(seeds=[0, 3]), copied)
    assert trained == ["sft/seed-3", "logits/seed-3", "hidden/seed-3"]
    assert figures["seeds"] == [0, 3] and "2 seeds" in figures["statement"] and figures["budgets"]["equal"] is True
    orders = {seed: Run(copied / "arms" / "sft" / f"seed-{seed}").read_json("data.json")["order_sha256"] for seed in (0, 3)}
    assert orders[0] != orders[3]
    assert figures["scores"]["sft"]["agreement"]["kl"]["num_seeds"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"arms": ARMS | {"logits": {"objective": [{"type": "ce"}, {"type": "logits"}]}}},
            r"logits\.objective\.0\.weight is 0\.5 there, 1\.0 here\);",
        ),
        ({"arms": ARMS | {"sft": ARMS["sft"] | {"train": {"steps": 3}}}}, r"sft\.train\.steps is 2 there, 3 here"),
        ({"arms": {"sft": ARMS["sft"]}}, r"logits is present there, absent here; hidden is present there, absent here"),
        ({"arms": ARMS | {"more": ARMS["sft"]}}, r"more is absent there, present here"),
        (
            {"arms": {arm: changes | {"train": {"steps": 3}} for arm, changes in ARMS.items()}},
            r"in every arm train\.steps is 2 there, 3 here\);",
        ),
        ({"capture": None}, r"capture is present there, absent here"),
    ],
)
def test_another_study_in_the_same_directory_is_refused(finished, make_study, trained, changes, message):
    path, _ = finished
    before = times(path) | {"study.json": (path / "study.json").stat().st_mtime_ns}
    with pytest.raises(RunError, match=rf"holds another study \({message}"):
        run_study(make_study(**changes), path)
    assert not trained and times(path) | {"study.json": (path / "study.json").stat().st_mtime_ns} == before


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


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt key of the study": ({"arm": {}}, "arm: unknown key; did you mean 'arms'"),
    "no arms": ({"arms": {}}, "arms: .*found no arm"),
    "misspelt key of an arm": (
        {"arms": {"fast": ARMS["sft"] | {"train": {"step": 3}}}},
        "arm 'fast': train.step: unknown key; did you mean 'steps'",
    ),
    "term of an arm": ({"arms": {"x": {"objective": [{"type": "logit"}]}}}, "arm 'x': .*did you mean 'logits'"),
    "arm without objective": ({"arms": {"idle": {}}}, "arm 'idle': objective: missing"),
    "arm named like a path": ({"arms": {"../x": ARMS["sft"]}}, "found arm '../x', expected a file name"),
    "arm named like a reference": ({"arms": {"teacher": ARMS["sft"]}}, "found arm 'teacher'"),
    "arms that differ by case": ({"arms": {"a": ARMS["sft"], "A": ARMS["sft"]}}, "differ by more than case"),
    "teacher of an arm": (
        {"arms": {"x": ARMS["sft"] | {"teacher": {"type": "none"}}}},
        "arm 'x' sets 'teacher'; all arms of a study have one",
    ),
    "seed of an arm": ({"arms": {"x": ARMS["sft"] | {"seed": 3}}}, "arm 'x' sets 'seed'; .*set `seeds`"),
    "seed twice": ({"seeds": [1, 1]}, r"seeds: .*found \[1, 1\], expected at least one number from 0, none twice"),
    "name like a path": ({"name": "a/b"}, "name: .*found 'a/b', expected a file name"),
}


@pytest.mark.parametrize(("changes", "message"), ERRORS.values(), ids=ERRORS)
def test_study_that_cannot_work(make_study, tmp_path, changes, message):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(make_study().model_dump(mode="json") | changes, sort_keys=False))
    with pytest.raises(RecipeError, match=f"study.yaml: .*{message}"):
        load_study(file)


def test_capture_wants_a_live_teacher(make_study, tmp_path):
    base = make_study().model_dump(mode="json")["base"] | {"teacher": {"type": "none"}, "evaluate": []}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"name": "x", "base": base, "arms": {"sft": ARMS["sft"]}, "capture": {}}, sort_keys=False))
    with pytest.raises(RecipeError, match=r"capture is set, and base\.teacher is 'none'"):
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
