"""Capture: the walk of a batch up to `teacher.score`, written to a store. One teacher pass serves every arm of a comparison.

Any number of workers (torchrun) share the shards; what they write does not depend on how many they are, nor on what a kill left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from limbeck import distributed
from limbeck.batch import Batch, Signal
from limbeck.distributed import World
from limbeck.errors import StoreError
from limbeck.log import progress, say
from limbeck.models import load_tokenizer, weights_hash
from limbeck.objectives.base import Needs
from limbeck.recipe import Recipe, parse_recipe, require_files
from limbeck.run import environment
from limbeck.store.certificate import certify
from limbeck.store.codec import Exact
from limbeck.store.hidden import HiddenCodec
from limbeck.store.manifest import (
    HEAD,
    MODEL,
    Manifest,
    StoredFile,
    TeacherIdentity,
    check_file,
    has_manifest,
    read_manifest,
    refuse_other,
    write_manifest,
)
from limbeck.store.place import Place
from limbeck.store.plan import Plan, Wanted, make_plan, once
from limbeck.store.reader import StoreReader
from limbeck.store.verify import Damage, damages
from limbeck.store.writer import StoreWriter, collect, part_of, write_head, write_model
from limbeck.teachers.model import ModelScorer, ModelTeacher, observed_log_probs
from limbeck.tokens.identity import template_hash, vocabulary_hash
from limbeck.tokens.pad import pad
from limbeck.tokens.sample import Sample
from limbeck.tokens.spelling import Spelling

SPELT = 32
"""Samples by which it is told whether a tokenizer's tokens spell the text."""


def capture(recipe: Recipe | dict[str, Any] | str | Path, overrides: Iterable[str] = ()) -> Manifest:
    """Score the recipe's source, and the texts that its benchmarks compare with the teacher on, and write the store.

    Started again it goes on where it was, and does nothing where everything is captured.
    """
    recipe = parse_recipe(recipe, overrides)
    recipe.for_capture()
    require_files(recipe)
    with distributed.world() as world:
        return _Capture(recipe, world).run()


def repair(recipe: Recipe | dict[str, Any] | str | Path, overrides: Iterable[str] = ()) -> tuple[list[Damage], Manifest]:
    """Compare every file of the recipe's store with its checksum, and capture again the shards that are damaged; what they were."""
    recipe = parse_recipe(recipe, overrides)
    spec, _, _ = recipe.for_capture()
    require_files(recipe)
    read_manifest(spec.path)
    with distributed.world() as world:
        found = damages(spec.path)
        distributed.barrier(world)  # all have looked, before anything changes
        if world.is_main:
            forget(spec.folder, found)
        distributed.barrier(world)
        return found, _Capture(recipe, world).run()


def forget(folder: Path, found: Sequence[Damage]) -> None:
    """Take damaged files out of a store: a capture that goes on makes them again."""
    manifest, names = collect(folder), {damage.name for damage in found}
    kept = tuple(shard for shard in manifest.shards if shard.name not in names)
    write_manifest(folder, manifest.model_copy(update={"shards": kept}))
    for name in names:
        say(f"{folder / name}: damaged, to be captured again")
        (folder / name).unlink(missing_ok=True)


class _Capture:
    """What a worker knows of the capture: the recipe's samples, the opened teacher, and the store."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        self.spec, self.needs, self.hidden = recipe.for_capture()
        self.world, self.folder = world, self.spec.folder
        assert isinstance(recipe.teacher, ModelTeacher)
        self.teacher = recipe.teacher
        named = recipe.student or recipe.teacher
        self.tokenizer = load_tokenizer(named.model, named.revision)
        self.source = recipe.source.open(self.tokenizer, recipe.seed).samples
        groups: list[tuple[Sequence[Sample], Needs]] = [(self.source, self.needs)]
        groups += [(benchmark.samples(self.tokenizer), Needs(output=True)) for benchmark in recipe.evaluate]
        self.wanted = once(groups)
        self.spelling = Spelling(self.tokenizer)
        self.scorer = self.teacher.open(self.tokenizer, self.needs, world.device)
        for samples, _ in groups:
            self.scorer.require(samples)

    def run(self) -> Manifest:
        if self.world.is_main:
            self._begin()
        distributed.barrier(self.world)
        manifest = read_manifest(self.folder)
        plan = self._plan(manifest)
        todo = plan.todo(manifest) if plan else []
        distributed.barrier(self.world)  # all know what is to be done, before it changes
        if todo:
            self._write(manifest, todo[self.world.rank :: self.world.size])
        distributed.barrier(self.world)
        if self.world.is_main:
            manifest = collect(self.folder)
            total = f"{manifest.num_samples} conversations, {manifest.num_scored} scored tokens, {manifest.num_bytes / 2**20:.1f} MB"
            say(f"captured {total} in {self.folder}")
        distributed.barrier(self.world)
        return read_manifest(self.folder)

    def _begin(self) -> None:
        """Leave a manifest that describes this capture and has its pass, with the files that all shards need."""
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        identity = self._identity()
        if has_manifest(Place(self.folder)):
            manifest = collect(self.folder)
            names = ("codec", "vocabulary", "vocabulary_hash", "template_hash", "layers", "hidden", "observed", "byte_offsets")
            # a teacher is told by its weights; its name may be another path to them
            teacher = {f"teacher.{name}": getattr(identity.teacher, name) for name in TeacherIdentity.model_fields}
            wanted = {field: value for field, value in teacher.items() if field not in ("teacher.name", "teacher.revision")}
            refuse_other(self.spec.path, manifest, wanted | {name: getattr(identity, name) for name in names})
            self._restore(manifest)
        else:
            manifest = self._calibrated(identity)
            if manifest.codec.needs_head:
                manifest = manifest.model_copy(update={"head": write_head(self.folder, self.scorer.head)})
            if not manifest.byte_offsets:
                say(f"{self.folder}: the tokens of {self.teacher.model} do not spell its text; places in the text are left out")
            write_manifest(self.folder, manifest)
        plan = self._plan(manifest)
        if plan and plan.its not in manifest.passes:
            write_manifest(self.folder, manifest.model_copy(update={"passes": (*manifest.passes, plan.its)}))

    def _restore(self, manifest: Manifest) -> None:
        """Make again what a repair took away, and refuse what is damaged, or would come out as something else."""
        place = Place(self.folder)
        made: dict[str, StoredFile | None] = {}
        if manifest.head and place.size(HEAD) is None:
            made[HEAD] = write_head(self.folder, self.scorer.head)
        if manifest.model and place.size(MODEL) is None:
            made[MODEL] = self._calibrated(manifest).model
        for stored in filter(None, (manifest.head, manifest.model)):
            if made.get(stored.name, stored) != stored:
                (self.folder / stored.name).unlink()
                raise StoreError(f"{self.folder / stored.name}: cannot be made again as it was; capture into a new folder")
            check_file(place, stored)

    def _identity(self) -> Manifest:
        scorer = self.scorer
        # few bits mean nothing without their scales, which are no parameters
        weights = scorer.model.state_dict() if self.teacher.load_in else dict(scorer.model.named_parameters())
        return Manifest(
            codec=self.spec.codec,
            temperatures=self.spec.codec.serves,
            teacher=TeacherIdentity(
                name=self.teacher.model,
                revision=self.teacher.revision,
                dtype=self.teacher.dtype,
                load_in=self.teacher.load_in,
                weights_sha256=weights_hash(weights),
                num_layers=scorer.num_layers,
                width=scorer.width,
                head_scale=scorer.head.scale,
                head_soft_cap=scorer.head.soft_cap,
            ),
            vocabulary=scorer.vocabulary,
            vocabulary_hash=vocabulary_hash(self.tokenizer),
            template_hash=template_hash(self.tokenizer),
            layers=tuple(sorted(self.needs.layers)),
            hidden=self.hidden,
            byte_offsets=all(self.spelling.lengths(one.sample) is not None for one in self.wanted[:SPELT]),
            head=None,
            model=None,
            packages=environment()["packages"],
        )

    def _calibrated(self, manifest: Manifest) -> Manifest:
        """Fit the codecs on some documents of the source, write what they fitted, and measure on others what the states lose."""
        fitted, others = calibration_split(self.source, self.spec.calibrate_on)
        signals = Signals(self.scorer, fitted, self.spec.batch_size, self.world.device)
        model = {f"output.{name}": value for name, value in self.spec.codec.calibrate(self.scorer.head, signals.outputs).items()}
        for layer in manifest.layers:
            found = self.hidden.calibrate(signals.hidden(layer))
            model.update({f"hidden.{layer}.{name}": value for name, value in found.items()})
        stored = write_model(self.folder, model)
        error = dict.fromkeys(manifest.layers, 0.0)
        if manifest.teacher.dtype not in self.hidden.is_exact_for and others:
            held_out = Signals(self.scorer, others, self.spec.batch_size, self.world.device)
            error = {
                layer: hidden_error(self.hidden, part_of(model, f"hidden.{layer}"), held_out.hidden(layer)) for layer in manifest.layers
            }
        certificate = None
        if others and not isinstance(self.spec.codec, Exact):
            held_out = Signals(self.scorer, others, self.spec.batch_size, self.world.device)
            certificate = certify(self.spec.codec, self.scorer.head, part_of(model, "output"), held_out.outputs)
        ids = tuple(sample.sample_id for sample in fitted) if model else ()
        return manifest.model_copy(update={"model": stored, "hidden_error": error, "calibrated_on": ids, "certificate": certificate})

    def _plan(self, manifest: Manifest) -> Plan | None:
        reader = StoreReader(self.folder)

        def is_held(one: Wanted, below: int) -> bool:
            return not reader.missing([one.sample], one.needs, below)[0]

        return make_plan(self.wanted, manifest, is_held, self.spec.batch_size, self.spec.samples_per_shard)

    def _write(self, manifest: Manifest, shards: Sequence[tuple[int, Sequence[Sequence[Wanted]]]]) -> None:
        model = load_file(self.folder / MODEL) if manifest.model else {}
        total = sum(len(batch) for _, batches in shards for batch in batches)
        with StoreWriter(self.folder, manifest, self.scorer.head, model) as writer, progress("capture the teacher", total) as bar:
            for number, batches in shards:
                for part in batches:
                    batch, signal = score(self.scorer, part, self.world.device)
                    spelling = [self.spelling.lengths(one.sample) if manifest.byte_offsets else None for one in part]
                    writer.add(batch, signal, [one.needs.layers for one in part], spelling)
                    bar.advance(len(part))
                writer.end_shard(number)


def score(scorer: ModelScorer, part: Sequence[Wanted], device: str) -> tuple[Batch, Signal]:
    """What the teacher says of a batch: of all its samples what is wanted of any."""
    needs = Needs(output=True)
    for one in part:
        needs |= one.needs
    batch = pad([one.sample for one in part], 0).to(device)
    signal = scorer.asking(needs).score(batch)
    assert signal.output is not None
    return batch, replace(signal, observed=observed_log_probs(scorer.head, signal.output, batch.targets))


def calibration_split(samples: Sequence[Sample], count: int) -> tuple[list[Sample], list[Sample]]:
    """Up to `count` samples to fit codecs on, and as many others to measure them on: a choice that no order of the data changes."""
    unique = {sample.sample_id: sample for sample in samples}
    ordered = [unique[sample_id] for sample_id in sorted(unique)]  # hashes: as good as shuffled
    count = min(count, max(len(ordered) // 2, 1))
    return ordered[:count], ordered[count : 2 * count]


class Signals:
    """What the teacher says of some samples. It runs when that is first asked for; a codec that fits nothing costs nothing."""

    def __init__(self, scorer: ModelScorer, samples: Sequence[Sample], batch_size: int, device: str) -> None:
        self._scorer, self._samples, self._batch_size, self._device = scorer, samples, batch_size, device

    @cached_property
    def all(self) -> list[Signal]:
        wanted = [Wanted(sample, self._scorer.needs) for sample in self._samples]
        starts = range(0, len(wanted), self._batch_size)
        return [score(self._scorer, wanted[start : start + self._batch_size], self._device)[1] for start in starts]

    @property
    def outputs(self) -> Iterable[Tensor]:
        return _Lazy(self, lambda signal: signal.output)

    def hidden(self, layer: int) -> Iterable[Tensor]:
        return _Lazy(self, lambda signal: signal.hidden[layer].cpu())


class _Lazy:
    """A part of every signal; may be walked more than once."""

    def __init__(self, signals: Signals, part: Callable[[Signal], Any]) -> None:
        self._signals, self._part = signals, part

    def __iter__(self) -> Iterator[Tensor]:
        return map(self._part, self._signals.all)


def hidden_error(codec: HiddenCodec, model: dict[str, Tensor], states: Iterable[Tensor]) -> float:
    """Mean over tokens of |states - kept states| / |states|."""
    shares = []
    for rows in states:
        kept = codec.decode(model, codec.encode(model, rows), np.arange(len(rows)), rows.shape[1])
        shares.append((rows.float() - kept.float()).norm(dim=1) / rows.float().norm(dim=1).clamp(min=1e-30))
    return float(torch.cat(shares).mean())
