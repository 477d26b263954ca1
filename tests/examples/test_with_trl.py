"""Limbeck's loss in TRL's trainer gives the curve of Limbeck's trainer, where TRL is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import limbeck
from helpers import write_jsonl

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "with_trl.py"


@pytest.mark.parametrize("accumulation", [1, 3])
def test_curve_is_ours(accumulation: int, make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """Every step has the whole data, so the two agree in spite of their own orders; the last microbatch is a smaller one."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    spec = spec_from_file_location("with_trl", EXAMPLE)
    assert spec and spec.loader
    example = module_from_spec(spec)
    spec.loader.exec_module(example)

    rows = [{"prompt": "The weather", "completion": " in Paris is sunny." * (1 + i)} for i in range(6)]
    student, teacher = str(make_model_dir(layers=2, seed=1)), str(make_model_dir(layers=3, width=48, seed=2))
    settings: dict[str, Any] = {"learning_rate": 0.01, "max_grad_norm": 1.0}
    args = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=4,
        per_device_train_batch_size=6 // accumulation,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.0,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        **settings,
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    trainer = example.DistillationTrainer(
        teacher=teacher, model=model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    recipe = {
        "student": {"model": student},
        "teacher": {"type": "model", "model": teacher},
        "source": {"type": "dataset", "data": str(write_jsonl(tmp_path / "data.jsonl", rows))},
        "objective": [{"type": "ce", "weight": 0.2}, {"type": "logits"}],
        "train": {"steps": 4, "batch_size": 6, "optimizer": {**settings, "schedule": "constant", "warmup_fraction": 0}},
    }
    ours = [row["loss"] for row in limbeck.train(recipe, tmp_path / "run").metrics()]
    assert losses == pytest.approx(ours, rel=1e-4) and losses[-1] < 0.8 * losses[0]
