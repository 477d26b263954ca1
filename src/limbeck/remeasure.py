"""Measuring a capture again: what it gives back for some of its samples, against the live teacher. A store holds no tokens, so the recipe
that wrote it says which they were."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from limbeck.calibration import score
from limbeck.errors import RecipeError, StoreError
from limbeck.models import load_tokenizer
from limbeck.objectives.base import Needs
from limbeck.recipe import Recipe, tokenizer_name
from limbeck.store.certificate import means, measure
from limbeck.store.manifest import Manifest, refuse_other
from limbeck.store.plan import Wanted
from limbeck.store.reader import StoreReader
from limbeck.tokens.identity import template_hash, vocabulary_hash
from limbeck.tokens.sample import Sample

BATCH = 8
"""Conversations per forward of the teacher."""


def remeasure(path: str | Path, recipe: Recipe, count: int) -> dict[str, Any]:
    """The certificate's measures on up to `count` of the recipe's samples that the store holds and was not fitted on, and `observed_error`:
    the mean difference of the targets' log-probabilities, which every store keeps in float16."""
    if not recipe.teacher.computes:
        raise RecipeError(f"teacher.type: found {recipe.teacher.type!r}, expected 'model' or 'server': the teacher that was captured")
    reader = StoreReader(path)
    tokenizer = load_tokenizer(*tokenizer_name(recipe))
    hashes = {"vocabulary_hash": vocabulary_hash(tokenizer), "template_hash": template_hash(tokenizer)}
    _refuse_another(path, reader.manifest, hashes)
    samples = _held(reader, recipe.source.open(tokenizer, recipe.seed).samples, count)
    if not samples:
        raise StoreError(f"store {str(path)!r}: holds no sample of this recipe's source; expected the recipe that it was captured with")
    scorer = recipe.teacher.open(tokenizer, Needs(output=True))
    identity = recipe.teacher.identity(scorer)
    _refuse_another(path, reader.manifest, {f"teacher.{field}": getattr(identity, field) for field in ("weights_sha256", "told")})
    parts, errors = [], []
    for start in range(0, len(samples), BATCH):
        batch, live = score(scorer, [Wanted(sample, scorer.needs) for sample in samples[start : start + BATCH]], "cpu")
        kept = reader.read(batch, Needs(output=True))
        assert live.output is not None and live.observed is not None and kept.observed is not None
        parts.append(measure(scorer.head, live.output, kept))
        errors.append((live.observed - kept.observed).abs())
    return {"num_samples": len(samples), **means(parts), "observed_error": float(torch.cat(errors).mean())}


def _held(reader: StoreReader, samples: Sequence[Sample], count: int) -> list[Sample]:
    """By the order of their ids, which are hashes: as good as drawn at random."""
    fitted, unique = set(reader.manifest.calibrated_on), {sample.sample_id: sample for sample in samples}
    found: list[Sample] = []
    for sample_id in sorted(unique.keys() - fitted):
        sample = unique[sample_id]
        if len(found) < count and sample.is_target[1:].any() and not reader.missing([sample], Needs(output=True))[0]:
            found.append(sample)
    return found


def _refuse_another(path: str | Path, manifest: Manifest, wanted: dict[str, Any]) -> None:
    refuse_other(str(path), manifest, wanted, "Give the recipe that it was captured with")
