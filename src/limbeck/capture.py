"""Capture: the walk of a batch up to `teacher.score`, written to a store. One teacher pass serves every arm of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from limbeck.log import progress, say
from limbeck.models import load_tokenizer, weights_hash
from limbeck.objectives.base import Needs
from limbeck.recipe import Recipe, parse_recipe
from limbeck.run import environment
from limbeck.store.manifest import MANIFEST, Manifest, TeacherIdentity, read_manifest
from limbeck.store.writer import StoreWriter, write_head
from limbeck.teachers.model import ModelScorer, ModelTeacher, observed_log_probs
from limbeck.tokens.identity import template_hash, vocabulary_hash
from limbeck.tokens.pad import pad
from limbeck.tokens.sample import Sample


def capture(recipe: Recipe | dict[str, Any] | str | Path, overrides: Iterable[str] = ()) -> Manifest:
    """Score the recipe's source, and the texts that its benchmarks compare with the teacher on, and write the store.

    Started again it goes on where it was, and does nothing where everything is captured.
    """
    recipe = parse_recipe(recipe, overrides)
    spec, needs = recipe.for_capture()
    teacher = recipe.teacher
    assert isinstance(teacher, ModelTeacher)
    tokenizer = (
        load_tokenizer(recipe.student.model, recipe.student.revision) if recipe.student else load_tokenizer(teacher.model, teacher.revision)
    )
    groups = [(recipe.source.open(tokenizer, recipe.seed).samples, needs)]
    groups += [(benchmark.samples(tokenizer), Needs(output=True)) for benchmark in recipe.evaluate]
    scorer = teacher.open(tokenizer, needs)
    path = Path(spec.path)
    writer = StoreWriter(path, _identity(path, teacher, scorer, tokenizer, needs), spec.samples_per_shard)
    todo = [(sample, wanted) for samples, wanted in groups for sample in _once(samples) if sample.sample_id not in writer.captured]
    with progress("capture the teacher", len(todo)) as bar:
        for start in range(0, len(todo), spec.batch_size):
            part = todo[start : start + spec.batch_size]
            for wanted in dict.fromkeys(wanted for _, wanted in part):
                _score(scorer.asking(wanted), writer, [sample for sample, its in part if its == wanted], tokenizer.pad_token_id or 0)
            bar.advance(len(part))
        writer.flush()
    manifest = read_manifest(path)
    say(
        f"captured {manifest.num_samples} conversations, {manifest.num_scored} scored tokens, {manifest.num_bytes / 2**20:.1f} MB in {path}"
    )
    return manifest


def _score(scorer: ModelScorer, writer: StoreWriter, samples: Sequence[Sample], pad_id: int) -> None:
    batch = pad(samples, pad_id)
    signal = scorer.score(batch)
    assert signal.output is not None
    writer.add(batch, replace(signal, observed=observed_log_probs(scorer.head, signal.output, batch.targets)))


def _once(samples: Sequence[Sample]) -> list[Sample]:
    """Every sample id once, in order of length: batches of like lengths waste no padding."""
    unique = {sample.sample_id: sample for sample in samples}
    return sorted(unique.values(), key=lambda sample: (len(sample.ids), sample.sample_id))


def _identity(path: Path, teacher: ModelTeacher, scorer: ModelScorer, tokenizer: Any, needs: Needs) -> Manifest:
    head = read_manifest(path).head if (path / MANIFEST).is_file() else write_head(path, scorer.head)
    return Manifest(
        teacher=TeacherIdentity(
            name=teacher.model,
            revision=teacher.revision,
            dtype=teacher.dtype,
            weights_sha256=weights_hash(dict(scorer.model.named_parameters())),
            num_layers=scorer.num_layers,
            width=scorer.width,
            head_scale=scorer.head.scale,
            head_soft_cap=scorer.head.soft_cap,
        ),
        vocabulary=scorer.vocabulary,
        vocabulary_hash=vocabulary_hash(tokenizer),
        template_hash=template_hash(tokenizer),
        layers=tuple(sorted(needs.layers)),
        head=head,
        packages=environment()["packages"],
    )
