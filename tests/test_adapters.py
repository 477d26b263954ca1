"""Adapters: what cannot work is refused before a model is loaded; counts from file headers; the base as teacher without a second copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import limbeck
from helpers import tiny_model, write_jsonl
from limbeck import adapters
from limbeck.adapters import Lora, linear_layers
from limbeck.cache import weight_shapes
from limbeck.check import check
from limbeck.errors import ModelError, RecipeError
from limbeck.models import blocks, forward
from limbeck.objectives.base import Needs
from limbeck.recipe import check_files, parse_recipe
from limbeck.student import Student, build
from limbeck.teachers import ModelTeacher
from limbeck.tokens.datasets import read_conversations
from limbeck.tokens.pad import pad
from limbeck.tokens.render import render_all
from limbeck.tokens.sample import Sample

pytest.importorskip("peft")

NAMES = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


@pytest.fixture
def tree(model_dir: Path, tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": "The weather", "completion": " in Paris is sunny." * (1 + i)} for i in range(3)]
    return {
        "student": {"model": str(model_dir), "lora": {"rank": 4}},
        "source": {"type": "dataset", "data": str(write_jsonl(tmp_path / "data.jsonl", rows))},
        "objective": [{"type": "ce"}],
        "train": {"steps": 3, "optimizer": {"learning_rate": 0.01}},
    }


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"targets": ["q_porj"]},
            f"student.lora.targets: found 'q_porj', expected linear layers of the blocks: {NAMES}; did you mean 'q_proj'?",
        ),
        ({"targets": ["lm_head"]}, f"student.lora.targets: found 'lm_head', expected linear layers of the blocks: {NAMES}"),
        ({"targets": ["embed"]}, f"student.lora.targets: found 'embed', expected linear layers of the blocks: {NAMES}"),
        (
            {"rank": 17},
            "student.lora.rank: found 17, expected at most 16: the weight of model.layers.0.self_attn.k_proj is 16 x 32, and no change of "
            "it has a higher rank",
        ),
    ],
)
def test_adapters_without_a_place_are_refused_before_the_model_is_loaded(tree: dict[str, Any], lora: dict[str, Any], message: str) -> None:
    tree["student"]["lora"] = lora
    assert check_files(parse_recipe(tree)) == [message]
    with pytest.raises(RecipeError, match=message[:40]):
        build(parse_recipe(tree).student)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"lora": {"rank": 0}}, "student.lora.rank: found 0, expected a number greater than 0"),
        ({"lora": {"targets": []}}, "student.lora.targets: found [], expected 'all-linear' or at least one name of a linear layer"),
        ({"lora": {"targets": "q_proj"}}, "expected 'all-linear' or a valid list"),
        ({"lora": {"r": 8}}, "student.lora.r: unknown key"),
        ({"lora": {}, "num_layers": 2}, "student: found both num_layers and lora, expected one of them"),
        ({"lora": {}, "keep_layers": [0]}, "student: found both keep_layers and lora, expected one of them"),
    ],
)
def test_impossible_settings_are_refused_with_the_recipe(tree: dict[str, Any], student: dict[str, Any], message: str) -> None:
    tree["student"] = {"model": tree["student"]["model"], **student}
    with pytest.raises(RecipeError) as caught:
        parse_recipe(tree)
    assert message in str(caught.value)


def test_missing_package_is_named_with_the_command(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    assert check_files(parse_recipe(tree)) == ["student.lora: 'peft' is not installed; expected its package: pip install 'limbeck[lora]'"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "student", [{}, {"num_layers": 2}, {"lora": {"rank": 3}}, {"lora": {"rank": 3, "dora": True, "targets": ["v_proj"]}}]
)
def test_check_counts_what_is_trained_without_loading_it(
    tree: dict[str, Any], student: dict[str, Any], tied: bool, make_model_dir: Any
) -> None:
    tree["student"] = {"model": str(make_model_dir(tied=tied)), **student}
    model = build(parse_recipe(tree).student)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert check_of(tree) == {"trained": trained, "frozen": sum(parameter.numel() for parameter in model.parameters()) - trained}


def check_of(tree: dict[str, Any]) -> Any:
    import yaml

    file = Path(tree["source"]["data"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(tree))
    return check(file)["student_parameters"]


def test_shapes_come_from_all_files_of_a_model(tmp_path: Path) -> None:
    model = tiny_model(tied=False)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert weight_shapes(str(tmp_path)) == {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert len(linear_layers(weight_shapes(str(tmp_path)).items())) == 4 * 7


@pytest.mark.parametrize("content", [b"", b"\xff" * 16, b"\x02" + bytes(7) + b"[]", b"\x09" + bytes(7) + b'{"a": {}}'])
def test_weights_that_are_none_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="its weights are not readable as safetensors"):
        weight_shapes(str(tmp_path))


def test_adapters_start_at_zero_and_are_the_same_for_the_same_seed(model_dir: Path) -> None:
    ids, positions = torch.arange(3, 20)[None], torch.arange(17)[None]
    expected = forward(tiny_model(), ids, positions)[0]
    students = [build(Student(model=str(model_dir), lora=Lora(dropout=0.5)), seed=seed) for seed in (1, 1, 2)]
    drawn = [dict(student.named_parameters())["model.layers.0.mlp.up_proj.lora_A.default.weight"] for student in students]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(forward(students[0], ids, positions)[0], expected), "in eval mode, so nothing is dropped"
    assert list(adapters.base_weights(students[0])) == [name for name, _ in tiny_model().named_parameters()]


def test_base_is_the_teacher_without_a_second_copy(model_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Bit for bit what the same model says when it is loaded again, also when the adapters have been trained; and they are on again."""
    student = build(Student(model=str(model_dir), lora=Lora(rank=4, dropout=0.5))).train()
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    teacher, needs = ModelTeacher(model=str(model_dir)), Needs(output=True, layers=frozenset({1}))
    shared, loaded = teacher.open_beside(student, tokenizer, needs), teacher.open(tokenizer, needs)
    assert shared.model is student and loaded.model is not student
    batch = pad([_sample(tokenizer, tmp_path)], 2)
    ours, theirs = shared.score(batch), loaded.score(batch)
    assert torch.equal(ours.output, theirs.output) and torch.equal(ours.hidden[1], theirs.hidden[1])
    assert torch.equal(ours.teacher_head(ours.output), theirs.teacher_head(theirs.output))
    assert student.training and not torch.equal(
        forward(student.eval(), batch.input_ids, batch.position_ids)[0][0, batch.scored], ours.output
    )
    assert sum(parameter.requires_grad for parameter in student.parameters()) == 2 * 7 * len(blocks(student))


def _sample(tokenizer: Any, tmp_path: Path) -> Sample:
    file = write_jsonl(tmp_path / "sample.jsonl", [{"prompt": "The weather", "completion": " in Paris is sunny."}])
    return render_all(read_conversations(file), tokenizer, 64)[0][0]


@pytest.mark.parametrize("other", [{"dtype": "bfloat16"}, {"revision": "main"}, {"model": "another"}])
def test_another_teacher_is_loaded(other: dict[str, Any], model_dir: Path, make_model_dir: Any, tokenizer: Any) -> None:
    student = build(Student(model=str(model_dir), lora=Lora(rank=4)))
    other = {key: str(make_model_dir(seed=3)) if value == "another" else value for key, value in other.items()}
    assert ModelTeacher(**{"model": str(model_dir), **other}).open_beside(student, tokenizer, Needs(output=True)).model is not student
    full = build(Student(model=str(model_dir)))
    assert ModelTeacher(model=str(model_dir)).open_beside(full, tokenizer, Needs(output=True)).model is not full


def test_training_towards_the_base_equals_training_towards_a_copy_of_it(tree: dict[str, Any], make_model_dir: Any, tmp_path: Path) -> None:
    """Packed, and with states of blocks, whose hooks are on the very same modules."""
    tree["objective"] = [{"type": "ce"}, {"type": "logits"}, {"type": "hidden", "num_pairs": 2}]
    tree["train"] |= {"pack_length": 64, "gradient_checkpointing": True}
    shared, copied = (
        limbeck.train({**tree, "teacher": {"type": "model", "model": model}}, tmp_path / name)
        for name, model in (("shared", tree["student"]["model"]), ("copied", str(make_model_dir())))
    )
    losses = [{key: row[key] for key in row if "loss" in key or key == "teacher_nll"} for row in shared.metrics()]
    assert losses == [{key: row[key] for key in row if "loss" in key or key == "teacher_nll"} for row in copied.metrics()]
    assert losses[0]["loss/logits"] < 1e-6 < losses[-1]["loss/logits"]


def test_another_base_under_the_same_name_is_refused_on_resume(tree: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    """A checkpoint holds adapters alone: on another base they would be another student."""
    from helpers import save_model
    from limbeck.errors import RunError

    tree["student"]["model"] = str(save_model(tmp_path / "model", tiny_model(seed=1), tokenizer))
    run = limbeck.train(tree, tmp_path / "run", ["train.checkpoint_every=1"])
    run.write_json("run.json", {"status": "running"})
    save_model(tmp_path / "model", tiny_model(seed=2), tokenizer)
    with pytest.raises(RunError, match=r"student\.model changed since this run began"):
        limbeck.train(tree, tmp_path / "run", ["train.checkpoint_every=1"])
    about = run.read_json("data.json")
    del about["inputs"]  # of one from the hub, nothing is known by content but its weights
    run.write_json("data.json", about)
    with pytest.raises(RunError, match="began with a student of weights"):
        limbeck.train(tree, tmp_path / "run", ["train.checkpoint_every=1"])


def test_export_is_the_merged_student_and_its_card_says_how_it_was_trained(tree: dict[str, Any], tmp_path: Path) -> None:
    from limbeck.export import export

    tree["student"]["lora"] |= {"dora": True, "targets": ["q_proj", "v_proj"]}
    run = limbeck.train(tree, tmp_path / "run")
    path = export(run, tmp_path / "out")
    assert "| trained | DoRA of rank 4, alpha 32, on q_proj, v_proj; merged into the weights |" in (path / "README.md").read_text()
    assert set(weight_shapes(str(path))) == set(weight_shapes(tree["student"]["model"]))
