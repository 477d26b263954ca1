"""Logit distillation without a trainer, from top to bottom: what `limbeck train` does with a live teacher, in one file.

    python examples/bare_distillation.py STUDENT TEACHER DATA.jsonl OUT

STUDENT and TEACHER are folders, or names of the Hugging Face Hub, of models with one vocabulary; DATA.jsonl has a conversation per line.
One process, float32, no checkpoints; `limbeck train` adds those and gives the same curve (tests/examples/test_bare_distillation.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from limbeck import optim
from limbeck.batch import Batch
from limbeck.learner import Learner
from limbeck.models import load_model, load_tokenizer, save_model
from limbeck.objectives import CrossEntropy, Logits, Needs
from limbeck.sources import DatasetSource
from limbeck.teachers import ModelTeacher
from limbeck.tokens.pad import pad


def distil(
    student: str,
    teacher: str,
    data: str,
    out: Path,
    steps: int = 30,
    batch_size: int = 8,
    micro_batch_size: int = 4,
    learning_rate: float = 3e-4,
    seed: int = 0,
) -> list[float]:
    """Train the student, save it as a Hugging Face folder, and return the loss of every step."""
    tokenizer = load_tokenizer(student)

    # Render: each conversation goes through the tokenizer's chat template once and becomes token ids and a mask of what is to be
    # learned, the assistant's words and nothing else. Which samples a step trains on depends on the seed and the step only.
    source = DatasetSource(data=data, max_length=512).open(tokenizer, seed)

    # The teacher is frozen. It refuses a tokenizer with another vocabulary, id by id.
    scorer = ModelTeacher(model=teacher).open(tokenizer, Needs(output=True))

    # The objective: a term returns one number per token, and its weight says what it counts.
    terms = {"ce": CrossEntropy(weight=0.2), "logits": Logits(divergence="forward_kl", temperature=1.0)}

    # The learner runs the student once and the output head a chunk at a time, on scored tokens only. Its forward holds the whole loss:
    # it is the module that one would wrap in DDP.
    model = load_model(student)
    learner = Learner(model, terms, scorer.vocabulary, chunks=4).train()

    schedule = optim.Optimizer(learning_rate=learning_rate, schedule="cosine", warmup_fraction=0.1)
    optimizer = optim.build(schedule, learner)

    losses = []
    for step in range(steps):
        # Pad: shift and mask happen here, and nowhere else.
        samples = source.at(step, batch_size)
        parts = [samples[start : start + micro_batch_size] for start in range(0, batch_size, micro_batch_size)]
        batches: list[Batch] = [pad(part, tokenizer.pad_token_id or 0) for part in parts]

        # Count, then scale, then sum. All tokens of the step are counted before the first forward, so a microbatch weighs as much as
        # it has tokens, and the result does not depend on how the step was cut.
        count = sum(batch.counts["scored"] for batch in batches)
        scales = {key: term.weight / count for key, term in terms.items()}

        optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            signal = scorer.score(batch)
            loss, sums = learner(batch, signal, scales)
            loss.backward()
            total += sum(scales[key] * sums[key].item() for key in terms)

        torch.nn.utils.clip_grad_norm_(learner.parameters(), schedule.max_grad_norm or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step, steps)
        optimizer.step()

        losses.append(total)
        print(f"step {step + 1}/{steps}  loss {total:.4f}")

    save_model(model, tokenizer, out)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Logit distillation without a trainer.")
    for name in ("student", "teacher", "data"):
        parser.add_argument(name)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    distil(**vars(parser.parse_args()))
