"""Objectives that cannot work, through the command line: `check` and `train` refuse them with one message, before any model is loaded."""

from __future__ import annotations

import importlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import write_jsonl
from limbeck import cli
from limbeck.store import Codec
from limbeck.store.hidden import Float32
from limbeck.store.manifest import Manifest, TeacherIdentity, write_manifest

BLOCKS, WIDTH, V = 6, 48, 400


def only(*terms: Any) -> dict[str, Any]:
    return {"objective": list(terms)}


def beside(**term: Any) -> dict[str, Any]:
    return only({"type": "ce"}, term)


def logits(**knobs: Any) -> dict[str, Any]:
    return beside(type="logits", **knobs)


def hidden(**knobs: Any) -> dict[str, Any]:
    return beside(type="hidden", **knobs)


def store(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    return {"teacher": {"type": "store", "path": name}, **changes}


def captured(**codec: Any) -> dict[str, Any]:
    return {"capture": {"path": "new", "codec": codec}}


def lora(**knobs: Any) -> dict[str, Any]:
    return {"student": {"model": "student", "lora": knobs}}


NO_TEACHER = {"teacher": {"type": "none"}}
NAN, INF = float("nan"), float("inf")
COOLING = {"type": "linear", "start": 2, "end": 1}
NO_LORA = pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")

CASES = {
    # weights
    "all weights 0": (
        only({"type": "ce", "weight": 0}, {"type": "logits", "weight": 0}),
        "objective: every weight is 0; expected at least",
    ),
    "negative weight": (logits(weight=-1), "objective.1.weight: found -1, expected a number greater than or equal to 0"),
    "huge weight": (logits(weight=1e300), "objective.1.weight: found 1e+300, expected a number less than or equal to 1000000"),
    "weight nan": (logits(weight=NAN), "objective.1.weight: found nan, expected a finite number"),
    "weight inf": (logits(weight=INF), "objective.1.weight: found inf, expected a finite number"),
    "weight nan as text": (logits(weight="nan"), "objective.1.weight: found 'nan', expected a finite number"),
    "no weight": (logits(weight=None), "objective.1.weight: found None, expected a valid number"),
    "weight true": (logits(weight=True), "objective.1.weight: found True, expected a number"),
    "schedule of 0": (
        logits(weight={"type": "linear", "start": 0, "end": 0}),
        "objective.1.weight: found start 0 and end 0, expected at least",
    ),
    "unknown schedule": (
        logits(weight={"type": "cosin", "start": 1, "end": 0}),
        "objective.1.weight: found type 'cosin', expected one of: cosine, linear; did you mean 'cosine'?",
    ),
    # temperatures
    "negative temperature": (logits(temperature=-2), "objective.1.temperature: found -2, expected a number greater than or equal to 0.01"),
    "temperature 0": (logits(temperature=0), "objective.1.temperature: found 0, expected a number greater than or equal to 0.01"),
    "huge temperature": (logits(temperature=1e30), "objective.1.temperature: found 1e+30, expected a number less than or equal to 100"),
    "temperature nan": (logits(temperature=NAN), "objective.1.temperature: found nan, expected a finite number"),
    "temperature inf": (logits(temperature=INF), "objective.1.temperature: found inf, expected a finite number"),
    "huge temperature of features": (
        beside(type="hidden_as_published", temperature=1e200),
        "objective.1.temperature: found 1e+200, expected a number less than or equal to 100",
    ),
    "temperature without its tail": (
        store("top", logits(temperature=2)),
        "objective: the 'logits' term: found temperature 2, expected one for which the capture stored its tail: 1 or 4; set that, or "
        "capture again with 2 in capture.codec.temperatures",
    ),
    "temperature without its tail, spread": (
        store("spread", logits(temperature=2)),
        "objective: the 'logits' term: found temperature 2, expected",
    ),
    "temperature of draws": (
        store("drawn", logits(temperature=2)),
        "objective: the 'logits' term: found temperature 2, expected 1, at which tokens were drawn; set 1, or capture with another codec",
    ),
    "schedule without its tails": (
        store("top", logits(temperature=COOLING)),
        "objective: the 'logits' term: found temperature linear from 2 to 1, expected one for which the capture stored its tail: 1 or 4; "
        "set that, or take a live teacher or a capture with the codec exact or quantized",
    ),
    "schedule of draws": (
        store("drawn", logits(temperature=COOLING)),
        "objective: the 'logits' term: found temperature linear from 2 to 1, expected 1, at which",
    ),
    "temperature nobody can serve": (
        captured(type="topk", temperatures=[1, 1e30]),
        "capture.codec.temperatures: found [1.0, 1e+30], expected different temperatures from 0.01 to 100, and 1 among them",
    ),
    # divergences
    "unknown divergence": (
        logits(divergence="kl"),
        "objective.1.divergence: found 'kl', expected one of: adaptive_kl, alpha_beta, forward_kl",
    ),
    "no divergence": (logits(divergence=None), "objective.1.divergence: found None, expected a name, or a mapping with a `type`"),
    "two divergences": (logits(divergence=["jsd"]), "objective.1.divergence: found ['jsd'], expected a name, or a mapping with a `type`"),
    "parameter of another": (
        logits(divergence={"type": "jsd", "alpha": 0.1}),
        "objective.1.divergence.alpha: unknown key; known keys: type, beta, normalize",
    ),
    "parameter in another place": (
        logits(divergence="jsd", beta=0.1),
        "objective.1.beta: unknown key; known keys: type, weight, divergence",
    ),
    "beta of 2": (
        logits(divergence={"type": "jsd", "beta": 2}),
        "objective.1.divergence.beta: found 2, expected a number less than or equal to",
    ),
    "beta of almost 0": (
        logits(divergence={"type": "jsd", "beta": 1e-300, "normalize": True}),
        "objective.1.divergence.beta: found 1e-300, expected a number greater than or equal to 0.001",
    ),
    "alpha of 0": (
        logits(divergence={"type": "skew_kl", "alpha": 0}),
        "objective.1.divergence.alpha: found 0, expected a number greater than or equal to 0.001",
    ),
    "weight of a direction": (
        logits(divergence={"type": "symmetric_kl", "forward_weight": 2}),
        "objective.1.divergence.forward_weight: found 2, expected a number less than or equal to 1",
    ),
    "alpha of almost 1": (
        logits(divergence={"type": "skew_reverse_kl", "alpha": 1 - 1e-16}),
        "objective.1.divergence.alpha: found 0.9999999999999999, expected a number less than or equal to 0.999",
    ),
    "vanishing exponents": (
        logits(divergence={"type": "alpha_beta", "alpha": 1e-300, "beta": 0}),
        "objective.1.divergence: found alpha 1e-300 and beta 0, expected together at least 0.01; (1, 0) is forward_kl",
    ),
    "huge exponent": (
        logits(divergence={"type": "alpha_beta", "alpha": 1e9}),
        "objective.1.divergence.alpha: found 1000000000.0, expected a number",
    ),
    "divergence of draws": (
        store("drawn", logits(divergence="reverse_kl")),
        "objective: the 'logits' term: reverse_kl is defined on dense and top_k, and the teacher gives sampled",
    ),
    "trust of 0": (logits(trust_threshold=0), "objective.1.trust_threshold: found 0, expected a number greater than 0"),
    "trust of 1": (logits(trust_threshold=1), "objective.1.trust_threshold: found 1, expected a number less than 1"),
    # what the teacher lacks
    "logits without a teacher": (
        logits() | NO_TEACHER,
        "objective: the 'logits' term needs a teacher's output, and teacher type 'none' gives",
    ),
    "ranking without a teacher": (beside(type="ranking") | NO_TEACHER, "objective: the 'ranking' term needs a teacher's output"),
    "hidden without a teacher": (
        hidden() | NO_TEACHER,
        "objective: the 'hidden' term needs a teacher's hidden states, and teacher type 'none'",
    ),
    "hidden without states": (
        store("top", hidden()),
        "objective: the 'hidden' term needs a teacher's hidden states, and teacher type 'store'",
    ),
    "other blocks": (
        store("states", hidden(pairs=[[0, 2]])),
        "objective: the 'hidden' term maps teacher blocks [2], the capture holds [1, 5]; capture again with capture.layers, or map those",
    ),
    "cka without all blocks": (
        store("states", hidden(pairs="cka")),
        "objective: the 'hidden' term maps teacher blocks [0, 2, 3, 4], the capture",
    ),
    "ranking of draws": (
        store("drawn", beside(type="ranking")),
        "objective: the 'ranking' term: ranking is defined on dense and top_k, and the teacher gives sampled",
    ),
    "logits of a few": (
        store("top", beside(type="mse_logits")),
        "objective: the 'mse_logits' term: mse_logits is defined on dense, and the",
    ),
    "more than there are": (captured(type="topk", k=401), "capture.codec.k: found 401, expected at most 400, the tokens of the teacher"),
    "more draws than there are": (
        captured(type="sampled", k=401),
        "capture.codec.k: found 401, expected at most 400, the tokens of the teacher",
    ),
    # hidden states
    "student block": (hidden(pairs=[[4, 0]]), "objective.hidden.pairs: found student block 4, expected 0 to 3"),
    "teacher block": (hidden(pairs=[[0, 6]]), "objective.hidden.pairs: found teacher block 6, expected 0 to 5"),
    "more pairs than blocks": (hidden(num_pairs=5), "objective.hidden.num_pairs: found 5, expected at most 4, the student's blocks"),
    "more pairs than blocks, cka": (hidden(pairs="cka", num_pairs=5), "objective.hidden.num_pairs: found 5, expected at most 4"),
    "widths without a projection": (
        hidden(projection="none"),
        "objective.1.projection: found 'none', expected 'random', 'orthogonal' or 'ridge'",
    ),
    "a number beside a list": (
        hidden(pairs=[[0, 0]], num_pairs=1),
        "objective.1: found num_pairs beside a list of pairs, expected it with",
    ),
    # ranking
    "one token in order": (beside(type="ranking", top_k=1), "objective.1.top_k: found 1, expected a number greater than or equal to 2"),
    "too many in order": (beside(type="ranking", top_k=65), "objective.1.top_k: found 65, expected a number less than or equal to 64"),
    "margin of another": (beside(type="ranking", margin=0.1), "objective.1: found margin 0.1 beside measure 'logistic', expected it with"),
    "one token captured": (
        store("one", beside(type="ranking")),
        "objective: the 'ranking' term: found a capture of one token per distribution, expected 2 or more to put in order; "
        "capture again with a larger k",
    ),
    # terms
    "the same term twice": (
        only({"type": "ce"}, {"type": "logits", "temperature": 2}, {"type": "logits", "temperature": 2.0}),
        "objective.2: found the same 'logits' term as objective.1; give one of them both weights",
    ),
    "a term's name alone": (only("ce"), "objective.0: found 'ce', expected a mapping with a `type` (one of: ce, hidden"),
    "no list": ({"objective": {"type": "ce"}}, "objective: found {'type': 'ce'}, expected a valid list"),
    # adapters
    "adapters nowhere": (lora(targets=["q_porj"]), "student.lora.targets: found 'q_porj', expected linear layers of the blocks: "),
    "adapters in the head": (lora(targets=["lm_head"]), "student.lora.targets: found 'lm_head', expected linear layers of the blocks: "),
    "huge alpha": (lora(alpha=1e300), "student.lora.alpha: found 1e+300, expected a number less than or equal to 1000000"),
    "alpha of almost 0": (lora(alpha=1e-300), "student.lora.alpha: found 1e-300, expected a number greater than or equal to 0.001"),
    "all dropped": (
        lora(dropout=1 - 1e-16),
        "student.lora.dropout: found 0.9999999999999999, expected a number less than or equal to 0.99",
    ),
    "rank above the weight's": (
        lora(rank=17),
        "student.lora.rank: found 17, expected at most 16: the weight of model.layers.0.self_attn.k_proj",
    ),
}
PARAMETERS = [pytest.param(*case, id=name, marks=NO_LORA if "lora" in case[1] else ()) for name, case in CASES.items()]


def write_store(path: Path, layers: tuple[int, ...] = (), **codec: Any) -> None:
    """The manifest of a capture: all that is looked at."""
    kind = Codec.members[codec["type"]](**codec)
    teacher = TeacherIdentity(
        name="t", revision=None, dtype="float32", weights_sha256="0", num_layers=BLOCKS, width=WIDTH, head_scale=1.0, head_soft_cap=None
    )
    kept = {"codec": kind, "temperatures": kind.serves, "hidden": Float32(), "head": None, "model": None}
    tokens = {"vocabulary": V, "vocabulary_hash": "0", "template_hash": None, "byte_offsets": True}
    path.mkdir()
    write_manifest(path, Manifest(teacher=teacher, layers=layers, packages={}, **kept, **tokens))


@pytest.fixture(scope="module")
def folder(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of 4 blocks and width 32, a teacher of 6 and 48 that is a config alone, and captures that are manifests alone."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "student").symlink_to(model_dir)
    (folder / "teacher").mkdir()
    config = {"num_hidden_layers": BLOCKS, "hidden_size": WIDTH, "vocab_size": V}
    (folder / "teacher" / "config.json").write_text(json.dumps(config))
    write_jsonl(folder / "data.jsonl", [{"prompt": "The weather", "completion": " is sunny."}])
    write_store(folder / "top", type="topk", temperatures=[1, 4], prior=False)
    write_store(folder / "one", type="nucleus", k=1, prior=False)
    write_store(folder / "spread", type="topk")
    write_store(folder / "drawn", type="sampled")
    write_store(folder / "states", layers=(1, 5), type="exact")
    return folder


@pytest.mark.parametrize(("changes", "message"), PARAMETERS)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LIMBECK_CACHE", str(folder / "cache"))
    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(importlib.import_module("limbeck.models"), name, _refuse_to_load)
    tree = {
        "student": {"model": "student"},
        "teacher": {"type": "model", "model": "teacher"},
        "source": {"type": "dataset", "data": "data.jsonl"},
        "objective": [{"type": "ce"}],
        "train": {"steps": 1},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(tree | changes))
    for command in (["check", "recipe.yaml"], ["train", "recipe.yaml", "--out", "run"]):
        monkeypatch.setattr(sys, "argv", ["limbeck", *command, "--json"])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capfd.readouterr()
        assert caught.value.code == 2, err
        found = json.loads(out)["error"]
        assert found.removeprefix("recipe.yaml: ").removeprefix("recipe: ").startswith(message), found
    assert not Path("run").exists()


def _refuse_to_load(*_: Any, **__: Any) -> None:
    raise AssertionError("a model was loaded")
