"""What SECURITY.md says: no code out of models and data, no way out of a folder, no secret on the disk. House rules on the source are in
test_house.py, hostile text in reports in report/test_page.py, names in manifests of stores in store/test_damage.py."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import limbeck
from helpers import exit_code, forked, make_tokenizer, save_model, tiny_model, write_jsonl
from limbeck import checkpoint
from limbeck.errors import LimbeckError, ModelError, RecipeError, without_secrets
from limbeck.ledger import Ledger
from limbeck.models import load_model, load_tokenizer
from limbeck.study import Study

FLAG = "import pathlib; pathlib.Path(__file__).with_name('was_run').touch()\n"
TERM = """
from typing import Literal
from limbeck.objectives import Needs, OutputTerm

class Constant(OutputTerm):
    type: Literal["{name}"] = "{name}"
    def needs(self, student_layers, teacher_layers):
        return Needs()
    def values(self, student, teacher, targets):
        return -student.log_probs().gather(-1, targets[:, None])[:, 0]
"""


@pytest.fixture
def recipe(model_dir: Path, tmp_path: Path) -> dict[str, Any]:
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "Why?", "completion": " Because."}] * 2)
    return {
        "student": {"model": str(model_dir)},
        "source": {"type": "dataset", "data": str(data)},
        "objective": [{"type": "ce"}],
        "train": {"steps": 1, "batch_size": 1},
    }


# ---- code from models


def test_code_beside_a_model_is_not_run(recipe: dict[str, Any], tmp_path: Path) -> None:
    """A config that names classes of its own in the folder, as a hub repository with code has it."""
    folder = save_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": classes}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}))
    (folder / "evil.py").write_text(FLAG)
    limbeck.train({**recipe, "student": {"model": str(folder)}}, tmp_path / "run")
    assert not (folder / "was_run").exists()


def test_a_model_that_is_nothing_without_its_code_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "architectures": ["Evil"],
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(FLAG)
    with pytest.raises(ModelError, match=r"evil|custom code|trust_remote_code"):
        load_model(str(folder))
    assert not (folder / "was_run").exists()


class Evil:
    """Unpickled, it would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder, flag = save_model(tmp_path / "model"), tmp_path / "was_run"
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Evil(flag)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(str(folder))
    assert not flag.exists()


@pytest.mark.parametrize("name", ["learner.safetensors", "optimizer.safetensors", "state.json"])
def test_a_pickle_in_the_place_of_a_checkpoints_file_is_not_unpickled(recipe: dict[str, Any], tmp_path: Path, name: str) -> None:
    """Even one whose checksum is right, as whoever writes the file can write the manifest."""
    path = tmp_path / "run"
    limbeck.train(recipe, path, ["train.checkpoint_every=1", "train.steps=2"])
    run, flag = limbeck.Run(path), tmp_path / "was_run"
    run.write_json("run.json", {"status": "running"})
    (folder,) = run.checkpoints.iterdir()
    (folder / name).write_bytes(pickle.dumps(Evil(flag)))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[name] = checkpoint._describe(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LimbeckError, match="step-00000002"):
        limbeck.train(recipe, path, ["train.checkpoint_every=1", "train.steps=2"])
    assert not flag.exists()


def test_a_chat_template_cannot_reach_the_system(tmp_path: Path) -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = load_tokenizer(str(save_model(tmp_path / "model", tiny_model(), make_tokenizer(template=template))))
    from limbeck.tokens.render import render_all
    from limbeck.tokens.sample import Conversation

    with pytest.raises(LimbeckError):
        render_all([Conversation(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])], tokenizer, 64)


# ---- plugins


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_plugin_is_imported_from_the_recipes_list_and_only_then(recipe: dict[str, Any], here: Path) -> None:
    (here / "their_terms.py").write_text(TERM.format(name="their_term"))
    asked = {**recipe, "objective": [{"type": "their_term"}]}
    with pytest.raises(RecipeError, match=r"objective\.0: found type 'their_term', expected one of: ce"):
        limbeck.parse_recipe(asked)
    run = limbeck.train({**asked, "plugins": ["their_terms"]}, here / "run")
    assert run.read_json("recipe.json")["plugins"] == ["their_terms"] and run.metrics()[0]["loss/their_term"] > 0
    assert str(here) not in sys.path


def test_a_plugin_by_the_command_line_in_a_study(recipe: dict[str, Any], here: Path) -> None:
    (here / "more_terms.py").write_text(TERM.format(name="more_term"))
    base = {key: value for key, value in recipe.items() if key != "objective"} | {"plugins": ["more_terms"]}
    (here / "study.yaml").write_text(json.dumps({"name": "s", "base": base, "arms": {"theirs": {"objective": [{"type": "more_term"}]}}}))
    assert exit_code(forked(["check", "study.yaml", "--json"], here / "log.txt")) == 0
    log = (here / "log.txt").read_text().replace("\n", "")
    assert "plugin more_terms: " in log and "more_terms.py" in log


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("plugin_a", None, r"plugins: found no module 'plugin_a' in .* or among what is installed"),
        ("plugin_b", "import nothing_like_this", r"plugins: plugin_b imports 'nothing_like_this', which is not installed"),
        ("plugin_c", "1 / 0", r"plugins: importing plugin_c raised ZeroDivisionError: division by zero"),
        ("plugin_d", "def", r"plugins: importing plugin_d raised SyntaxError"),
        ("../plugin", None, r"plugins: found '\.\./plugin', expected the name of a module"),
        ("", None, r"plugins: found '', expected the name of a module"),
        (3, None, r"plugins\.0: found 3, expected a valid string"),
    ],
)
def test_a_plugin_that_cannot_be_imported(recipe: dict[str, Any], here: Path, name: Any, source: str | None, message: str) -> None:
    if source is not None:
        (here / f"{name}.py").write_text(source)
    with pytest.raises(RecipeError, match=message):
        limbeck.parse_recipe({**recipe, "plugins": [name]})


def test_plugins_and_what_is_in_them_decide_a_run(recipe: dict[str, Any], here: Path) -> None:
    def key(names: list[str]) -> str:
        ledger = Ledger(Study(name="s", base={**recipe, "plugins": names}, arms={"sft": {"objective": [{"type": "ce"}]}}), here)
        return ledger.key(ledger.tasks()[0])

    (here / "edited.py").write_text("A = 1\n")
    without, first = key([]), key(["edited"])
    (here / "edited.py").write_text("A = 2\n")
    assert len({without, first, key(["edited"])}) == 3
    assert "plugins" not in limbeck.parse_recipe(recipe).to_json()


# ---- secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("git clone https://ann:hunter2@host/x", "git clone https://***@host/x"),
        ("teacher.url=http://h/v1?api_key=hunter2&b=1", "teacher.url=http://h/v1?api_key=***&b=1"),
        ("s3://bucket/a?X-Amz-Signature=hunter2", "s3://bucket/a?X-Amz-Signature=***"),
        ("train.steps=3 --out runs/key=1 mail@host", "train.steps=3 --out runs/key=1 mail@host"),
    ],
)
def test_urls_lose_their_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_rows_may_talk_of_addresses(recipe: dict[str, Any]) -> None:
    rows = [{"text": "git clone ssh://git@host/code and open https://host/?token=x"}]
    parsed = limbeck.parse_recipe({**recipe, "source": {"type": "dataset", "data": {"rows": rows}}})
    assert parsed.source.data.rows == rows


@pytest.mark.parametrize("url", ["https://ann:hunter2@host/store", "s3://bucket/store?token=hunter2"])
def test_a_recipe_with_a_secret_in_it_is_refused_without_showing_it(recipe: dict[str, Any], url: str) -> None:
    with pytest.raises(RecipeError, match=r"capture\.path: found a URL that holds a key or a password") as caught:
        limbeck.parse_recipe({**recipe, "capture": {"path": url}})
    assert "hunter2" not in str(caught.value)


def test_no_variable_of_the_environment_is_written(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setattr(sys, "argv", ["limbeck", "train", "https://ann:hunter2@host/recipe.yaml"])
    run = limbeck.train(recipe, tmp_path / "run")
    paths = limbeck.build_report(run.path)
    out, err = capfd.readouterr()
    assert "hunter2" not in out + err
    for file in [*run.path.rglob("*"), paths.html]:
        assert not file.is_file() or b"hunter2" not in file.read_bytes(), file
    assert run.read_json("environment.json")["command"][-1] == "https://***@host/recipe.yaml"


# ---- folders


@pytest.mark.parametrize("name", ["../../outside.safetensors", "/etc/hostname"])
def test_names_in_a_checkpoints_manifest_do_not_lead_out_of_it(recipe: dict[str, Any], tmp_path: Path, name: str) -> None:
    run = limbeck.train(recipe, tmp_path / "run", ["train.checkpoint_every=1", "train.steps=2"])
    run.write_json("run.json", {"status": "running"})
    (folder,) = run.checkpoints.iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[name] = manifest.pop("state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LimbeckError, match="step-00000002"):
        limbeck.train(recipe, run.path, ["train.checkpoint_every=1", "train.steps=2"])
