"""Capture: the walk of a batch up to `teacher.score`, written to a store. One teacher pass serves every arm of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from limbeck.log import progress, say
from limbeck.models import load_tokenizer, weights_hash
from limbeck.objectives.base import Needs
from limbeck.recipe import Recipe, parse_recipe, require_files
from limbeck.run import environment
from limbeck.store.manifest import MANIFEST, Manifest, TeacherIdentity, folder_of, read_manifest
from limbeck.store.reader import StoreReader
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
    require_files(recipe)
    teacher = recipe.teacher
    assert isinstance(teacher, ModelTeacher)
    tokenizer = (
        load_tokenizer(recipe.student.model, recipe.student.revision) if recipe.student else load_tokenizer(teacher.model, teacher.revision)
    )
    groups: list[tuple[Sequence[Sample], Needs]] = [(recipe.source.open(tokenizer, recipe.seed).samples, needs)]
    groups += [(benchmark.samples(tokenizer), Needs(output=True)) for benchmark in recipe.evaluate]
    scorer = teacher.open(tokenizer, needs)
    for samples, _ in groups:
        scorer.require(samples)
    path = folder_of(spec.path)
    writer = StoreWriter(path, _identity(path, teacher, scorer, tokenizer, needs), spec.samples_per_shard)
    reader = StoreReader(path)
    # cut into batches before anything is left out: a capture that goes on makes the batches, and so the bits, of one that never stopped
    everything = _once(groups)
    batches = [everything[start : start + spec.batch_size] for start in range(0, len(everything), spec.batch_size)]
    todo = [[(sample, wanted) for sample, wanted in batch if reader.missing([sample], wanted)[0]] for batch in batches]
    with progress("capture the teacher", sum(map(len, todo))) as bar:
        for part in filter(None, todo):
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


def _once(groups: Iterable[tuple[Sequence[Sample], Needs]]) -> list[tuple[Sample, Needs]]:
    """Every sample id once, with all that is asked of it, in order of length: batches of like lengths waste no padding."""
    unique: dict[int, tuple[Sample, Needs]] = {}
    for samples, needs in groups:
        for sample in samples:
            old, old_needs = unique.get(sample.sample_id, (sample, needs))
            unique[sample.sample_id] = (_both(old, sample), old_needs | needs)
    return sorted(unique.values(), key=lambda pair: (len(pair[0].ids), pair[0].sample_id))


def _both(a: Sample, b: Sample) -> Sample:
    """The longer cut of a sample, with the targets of both."""
    short, long = sorted((a, b), key=lambda sample: len(sample.ids))
    is_target = long.is_target.copy()
    is_target[: len(short.ids)] |= short.is_target
    return replace(long, is_target=is_target)


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
