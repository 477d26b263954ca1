"""`train.kernels`: what cannot work is refused by key, Liger is wired to all but its losses, and a study does not see it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import limbeck
from helpers import tiny_model, write_jsonl
from limbeck import kernels, student, trainer
from limbeck import training as training_module
from limbeck.errors import ModelError, RecipeError
from limbeck.recipe import check_files, parse_recipe


@pytest.fixture
def tree(make_model_dir: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": "The weather", "completion": " in Paris is sunny."}]
    return {
        "student": {"model": str(make_model_dir(layers=2, seed=1))},
        "teacher": {"type": "model", "model": str(make_model_dir(seed=2))},
        "source": {"type": "dataset", "data": str(write_jsonl(tmp_path / "data.jsonl", rows))},
        "objective": [{"type": "ce"}, {"type": "logits"}],
        "train": {"steps": 1},
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.kernels=[compil]"], r"train\.kernels\.0: found 'compil', expected 'compile' or 'liger'"),
        (
            ["train.kernels=[compile]", "train.head=plain"],
            r"train: kernels: found 'compile' beside head 'plain', expected it beside 'fused'",
        ),
        (
            ["train.kernels=[compile]", "objective.1.temperature={type: linear, start: 2, end: 1}"],
            r"train\.kernels: found 'compile' beside a schedule of temperature \(the 'logits' term\)",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_recipe(tree: dict[str, Any], overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(tree, overrides)


def test_missing_package_is_named_with_the_command(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_module, "find_spec", lambda name: None)
    expected = "train.kernels: 'liger_kernel' is not installed; expected its package: pip install 'limbeck[liger]'"
    assert check_files(parse_recipe(tree, ["train.kernels=[liger]"])) == [expected]


def test_liger_on_a_cpu_is_refused_before_a_model_is_loaded(tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_module, "find_spec", lambda name: object())
    monkeypatch.setattr("limbeck.trainer.build_student", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(RecipeError, match=r"train\.kernels: found 'liger' on a CPU, expected an accelerator"):
        limbeck.train(tree, tmp_path / "run", ["train.kernels=[liger]"])
    assert not (tmp_path / "run").exists()


def test_liger_gets_all_parts_but_its_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the signature that its functions have; the kernels themselves run on accelerators alone."""
    calls = []

    def apply(
        rope: bool = True,
        cross_entropy: bool = False,
        fused_linear_cross_entropy: bool = True,
        rms_norm: bool = True,
        swiglu: bool = True,
        layer_norm: bool = False,
        model: Any = None,
    ) -> None:
        calls.append((rope, cross_entropy, fused_linear_cross_entropy, rms_norm, swiglu, layer_norm, model))

    package = ModuleType("liger_kernel.transformers")
    package.monkey_patch = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": apply})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    model = tiny_model()
    kernels.use_liger(model)
    assert calls == [(True, False, False, True, True, True, model)]
    model.config.model_type = "gpt2"
    with pytest.raises(ModelError, match=r"train\.kernels: liger has no kernels for models of type 'gpt2', expected one of: llama"):
        kernels.use_liger(model)


def test_liger_comes_after_all_that_runs_where_models_are_opened(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under FSDP2 that is main memory, where its kernels do not run: nothing calls the student between them and the division."""
    events: list[str] = []

    def noted(name: str, result: Callable[..., Any] = lambda *_: None) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            events.append(name)
            return result(*arguments)

        return call

    def build(*arguments: Any) -> Any:
        model = student.build(*arguments)
        model.get_decoder().register_forward_pre_hook(noted("forward"))
        return model

    monkeypatch.setattr(training_module, "find_spec", lambda name: object())
    monkeypatch.setattr(kernels, "refuse_cpu", lambda device: None)
    monkeypatch.setattr(kernels, "use_liger", noted("liger"))
    monkeypatch.setattr(trainer, "divide", noted("divide", trainer.divide))
    monkeypatch.setattr(trainer, "build_student", build)
    limbeck.train(tree, tmp_path / "run", ["train.kernels=[liger]", "train.steps=1", "train.pack_length=64"])
    at = events.index("liger")
    assert events[at : at + 3] == ["liger", "divide", "forward"] and set(events[:at]) == {"forward"}


def test_liger_as_it_is_takes_the_blocks_and_leaves_the_head() -> None:
    patching = pytest.importorskip("liger_kernel.transformers.monkey_patch", exc_type=ImportError)
    assert set(inspect.signature(patching.apply_liger_kernel_to_llama).parameters) >= kernels.LOSSES
    model = tiny_model()
    forward, mlp = model.forward.__func__, model.model.layers[0].mlp
    before = mlp.forward.__func__
    kernels.use_liger(model)
    assert model.forward.__func__ is forward and mlp.forward.__func__ is not before
