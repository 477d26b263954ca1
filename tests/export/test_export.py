"""An export is the model that was trained, says what it is, and leaves the machine only when asked to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import limbeck
from helpers import write_jsonl
from limbeck.errors import LimbeckError, RunError
from limbeck.export import export
from limbeck.export.card import model_card, model_licence, public
from limbeck.run import Run


@pytest.fixture(scope="module")
def trained(make_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with a teacher, checkpoints and a benchmark. Read-only."""
    path = tmp_path_factory.mktemp("trained")
    rows = [{"prompt": "The weather", "completion": " in Paris is sunny." * (1 + i)} for i in range(5)]
    data = write_jsonl(path / "my|data.jsonl", rows)
    recipe = {
        "student": {"model": str(make_model_dir(layers=3, seed=1)), "num_layers": 2},
        "teacher": {"type": "model", "model": str(make_model_dir(layers=3, width=48, seed=2))},
        "source": {"type": "dataset", "data": str(data)},
        "objective": [{"type": "ce", "weight": 0.5}, {"type": "logits"}, {"type": "hidden"}],
        "train": {"steps": 3, "batch_size": 2, "checkpoint_every": 3},
        "evaluate": [{"type": "bits_per_byte", "name": "heldout", "data": str(data)}],
    }
    return limbeck.train(recipe, path / "run")


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    """A copy that a test may change."""
    return Run(Path(shutil.copytree(trained.path, tmp_path / "run")))


def test_export_is_the_trained_student(trained: Run, tmp_path: Path) -> None:
    """Its logits are those of the weights that training left in the last checkpoint."""
    path = export(trained, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(path)("The weather in Paris")["input_ids"]])
    found = model(input_ids=ids).logits
    checkpoint = load_file(trained.checkpoints / "step-00000003" / "learner.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint[f"student.{name}"])
    assert torch.equal(model(input_ids=ids).logits, found)
    assert {file.suffix for file in path.iterdir()} <= {".safetensors", ".json", ".jinja", ".md"}
    assert not list(tmp_path.glob(".*"))


def test_card_says_what_the_model_is(trained: Run, tmp_path: Path) -> None:
    card = ModelCard.load(export(trained, tmp_path / "my-student") / "README.md")
    assert card.data.library_name == "transformers" and card.data.model_name == "my-student"
    (result,) = card.data.eval_results
    value = trained.evals()["heldout"]["metrics"]["bits_per_byte"]["value"]
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("heldout", "bits_per_byte", value)
    text = card.text
    stderr = trained.evals()["heldout"]["metrics"]["bits_per_byte"]["stderr"]
    assert f"| heldout | bits_per_byte ↓ | {value:.4g} ± {stderr:.2g} | 5 |" in text
    assert "0.5 ce + 1 logits (divergence: forward_kl, temperature: 1.0) + 1 hidden" in text
    assert "pruned to 2 blocks" in text and "3 steps of 2 conversations" in text
    assert "| data | my\\|data.jsonl, 5 conversations" in text
    assert 'pipeline("text-generation", model="my-student")' in text
    for folder in (trained.path.parent, Path(trained.read_json("recipe.json")["teacher"]["model"]).parent):
        assert str(folder) not in text, "a folder of this machine is nobody's business"
    recipe = yaml.safe_load(text.partition("```yaml\n")[2].partition("\n```")[0])
    assert recipe["objective"] == trained.read_json("recipe.json")["objective"]


def test_licences_come_from_cards_and_the_catalogue(run: Run, model_dir: Path, tmp_path: Path) -> None:
    assert model_licence(str(model_dir)) == "not known to Limbeck"
    licensed = Path(shutil.copytree(model_dir, tmp_path / "licensed"))
    (licensed / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    assert model_licence(str(licensed)) == "mit"
    assert model_licence("HuggingFaceTB/SmolLM2-135M-Instruct") == "Apache-2.0"
    recipe = run.read_json("recipe.json")
    recipe["student"]["model"] = recipe["teacher"]["model"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    run.write_json("recipe.json", recipe)
    card = ModelCard(model_card(run, "me/mine"))
    assert card.data.license == "apache-2.0" and card.data.base_model == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    recipe["teacher"]["model"] = str(licensed)
    run.write_json("recipe.json", recipe)
    card = ModelCard(model_card(run, "me/mine"))
    assert card.data.license is None, "two licences are for people to weigh"
    assert (
        "- teacher, licensed: mit" in card.text
        and "- student before training, HuggingFaceTB/SmolLM2-135M-Instruct: Apache-2.0" in card.text
    )


def test_recipe_cannot_close_its_fence(run: Run) -> None:
    recipe = run.read_json("recipe.json")
    recipe["source"]["data"] = "x```\n# not a heading\n````"
    run.write_json("recipe.json", recipe)
    text = model_card(run, "m")
    fence = "`" * 5
    block = text.partition(f"{fence}yaml\n")[2].partition(f"\n{fence}")[0]
    assert yaml.safe_load(block)["source"]["data"] == "x```\n# not a heading\n````"


def test_data_is_named_in_each_form_that_a_recipe_knows(run: Run) -> None:
    recipe = run.read_json("recipe.json")
    recipe["source"]["data"] = [{"path": "/x/mine.parquet"}, {"hub": "owner/set"}, "limbeck/demo-train", {"rows": [{"text": "secret"}]}]
    run.write_json("recipe.json", recipe)
    text = model_card(run, "m")
    assert "| data | mine.parquet, owner/set, limbeck/demo-train, rows in memory, 5 conversations" in text
    assert "secret" not in text and "rows: 1 rows" in text


def test_folders_are_left_out_at_any_depth() -> None:
    assert public({"a": ["/x/y/z", "owner/name", {"b": "~/models/m"}], "c": 3}) == {"a": ["z", "owner/name", {"b": "m"}], "c": 3}


def test_run_that_has_not_finished_is_refused(run: Run) -> None:
    run.write_json("run.json", {"status": "running"})
    with pytest.raises(RunError, match="found status 'running', expected a finished run"):
        export(run)
    with pytest.raises(RunError, match="expected a run directory"):
        export(run.path / "student")


def test_student_that_was_changed_is_refused(run: Run, tmp_path: Path) -> None:
    file = run.student / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(RunError, match="it has another set of weights than the run trained; the student's folder was changed"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_foreign_folder_is_kept(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="out: exists, and is no export of this run"):
        export(run, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    assert export(run) == run.path / "export" == export(run), "an export of this run may be used again"


class Hub:
    """Stands in for the hub: what would be sent where."""

    calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repository: str, **settings: Any) -> None:
        self.calls.append((repository, settings))

    def upload_folder(self, **settings: Any) -> None:
        if settings["repo_id"] == "nobody/allowed":
            raise PermissionError("403 Forbidden")
        self.calls.append(("upload", settings))


def test_nothing_is_pushed_unless_asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    path = export(run)
    assert Hub.calls == []
    export(run, push_to_hub="me/mine")
    (repository, settings), (_, upload) = Hub.calls
    assert repository == "me/mine" and settings == {"private": True, "exist_ok": True}
    assert upload["repo_id"] == "me/mine" and upload["folder_path"] == str(path)
    assert 'model="me/mine"' in (path / "README.md").read_text()


def test_hub_errors_are_ours(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    with pytest.raises(LimbeckError, match="--push-to-hub: found 'mine', expected the name of a repository, owner/name"):
        export(run, push_to_hub="mine")
    with pytest.raises(
        LimbeckError, match=r"nobody/allowed: could not be pushed \(PermissionError: 403 Forbidden\); the export is complete in"
    ):
        export(run, push_to_hub="nobody/allowed")
