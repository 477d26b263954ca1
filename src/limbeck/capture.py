"""Capture: the walk of a batch up to `teacher.score`, written to a store. One teacher pass serves every arm of a comparison.

Any number of workers (torchrun) share the shards; what they write does not depend on how many they are, nor on what a kill left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from limbeck import distributed, stopping
from limbeck.calibration import Signals, calibration_split, hidden_error, score
from limbeck.distributed import World
from limbeck.errors import StoreError
from limbeck.jobs import Executor, Job, Local
from limbeck.log import megabytes, progress, say, warn
from limbeck.models import load_tokenizer
from limbeck.objectives.base import Needs
from limbeck.recipe import Recipe, parse_recipe, require_files, tokenizer_name
from limbeck.run import environment
from limbeck.store.certificate import certify
from limbeck.store.choose import Target, choose, chosen
from limbeck.store.codec import Exact
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
from limbeck.teachers.model import ModelScorer
from limbeck.teachers.told import ToldScorer
from limbeck.tokens.identity import template_hash, vocabulary_hash
from limbeck.tokens.pad import pad
from limbeck.tokens.sample import Sample
from limbeck.tokens.spelling import Spelling

SAME_TEACHER = 0.1
"""Nats by which a served teacher's log-probabilities may be off on average when it is asked again: other batches, other hardware."""
SPELT = 32
"""Samples by which it is told whether a tokenizer's tokens spell the text."""


def capture(recipe: Recipe | dict[str, Any] | str | Path, overrides: Iterable[str] = (), executor: Executor | None = None) -> Manifest:
    """Score the recipe's source, and the texts that its benchmarks compare with the teacher on, and write the store.

    Started again it goes on where it was, and does nothing where everything is captured. With an `executor` of workers elsewhere, these
    hold the teacher, and this process does not.
    """
    recipe = parse_recipe(recipe, overrides)
    spec, _, _ = recipe.for_capture()
    require_files(recipe)
    if executor is not None and not isinstance(executor, Local):
        return _by_workers(recipe, spec.folder, executor)
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


def _by_workers(recipe: Recipe, folder: Path, executor: Executor) -> Manifest:
    """The walk of `_Capture.run`: one worker begins, all write shards, and here they are taken into the manifest."""
    ((_, todo),) = executor.run([Job("begin the capture", partial(_begun, recipe))])
    if todo:
        with progress("shards of the teacher", len(todo)) as bar:
            for _ in executor.map(partial(_ShardWorker, recipe), todo):
                bar.advance()
    _ended(folder)
    return read_manifest(folder)


def _begun(recipe: Recipe) -> list[int]:
    """In a worker: leave a manifest with the capture's pass; numbers of the shards that are to be made."""
    with distributed.world() as world:
        begun = _Capture(recipe, world)
        begun.begin()
        return list(begun.todo())


class _ShardWorker:
    """In a worker: holds the teacher and writes shards by their numbers."""

    def __init__(self, recipe: Recipe) -> None:
        with distributed.world() as world:
            self._capture = _Capture(recipe, world)
        self._todo = self._capture.todo()

    def __call__(self, item: int) -> int:
        if item in self._todo:  # else a worker that died had finished it
            self._capture.write([(item, self._todo[item])])
        return item


def _ended(folder: Path) -> None:
    """Take the workers' entries into the manifest."""
    clean(folder)
    manifest = collect(folder)
    total = f"{manifest.num_samples} conversations, {manifest.num_scored} scored tokens, {megabytes(manifest.num_bytes)} MB"
    say(f"captured {total} in {folder}")


def clean(folder: Path) -> None:
    """Take away what killed workers have not finished."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


class _Capture:
    """What a worker knows of the capture: the recipe's samples, the opened teacher, and the store."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        self.spec, self.needs, self.hidden = recipe.for_capture()
        self.world, self.folder = world, self.spec.folder
        self.teacher, self.student = recipe.teacher, recipe.student
        self.tokenizer = load_tokenizer(*tokenizer_name(recipe))
        self.source = recipe.source.open(self.tokenizer, recipe.seed).samples
        groups: list[tuple[Sequence[Sample], Needs]] = [(self.source, self.needs)]
        groups += [(benchmark.samples(self.tokenizer), Needs(output=True)) for benchmark in recipe.evaluate]
        self.wanted = once(groups)
        self.spelling = Spelling(self.tokenizer)
        self.scorer: ModelScorer | ToldScorer = self.teacher.open(self.tokenizer, self.needs, world.device)
        for samples, _ in groups:
            self.scorer.require(samples)
        if isinstance(self.scorer, ToldScorer):
            self.wanted = self.scorer.arranged(self.wanted)

    def run(self) -> Manifest:
        if self.world.is_main:
            self.begin()
        distributed.barrier(self.world)
        todo = list(self.todo().items())
        distributed.barrier(self.world)  # all know what is to be done, before it changes
        if todo:
            self.write(todo[self.world.rank :: self.world.size])
        distributed.barrier(self.world)
        if self.world.is_main:
            _ended(self.folder)
        distributed.barrier(self.world)
        return read_manifest(self.folder)

    def todo(self) -> dict[int, Sequence[Sequence[Wanted]]]:
        """The batches of the shards that are not there, by number."""
        manifest = read_manifest(self.folder)
        plan = self._plan(manifest)
        return dict(plan.todo(manifest)) if plan else {}

    def begin(self) -> None:
        """Leave a manifest that describes this capture and has its pass, with the files that all shards need."""
        clean(self.folder)
        identity = self._identity()
        if has_manifest(Place(self.folder)):
            manifest = collect(self.folder)
            names = ("codec", "vocabulary", "vocabulary_hash", "template_hash", "layers", "hidden", "observed", "byte_offsets")
            # a teacher is told by its weights, and its name may be another path to them; one that runs elsewhere by its name and its words
            unsaid = () if identity.teacher.weights_sha256 is None else ("name", "revision")
            fields = [name for name in TeacherIdentity.model_fields if name not in unsaid]
            wanted = {f"teacher.{name}": getattr(identity.teacher, name) for name in fields}
            wanted |= {name: getattr(identity, name) for name in names} | self.spec.codec_in(manifest)
            refuse_other(self.spec.path, manifest, wanted)
            if identity.teacher.weights_sha256 is None:
                self._refuse_another_teacher()
            self._restore(manifest)
        else:
            manifest = self._calibrated(identity, self.spec.target)
            if manifest.codec.needs_head:
                manifest = manifest.model_copy(update={"head": write_head(self.folder, self.scorer.head)})
            if not manifest.byte_offsets:
                say(f"{self.folder}: the tokens of {self.scorer.name} do not spell its text; places in the text are left out")
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
        return Manifest(
            codec=self.spec.codec,
            target=self.spec.target.model_dump() if self.spec.target else None,
            temperatures=self.spec.codec.serves,
            teacher=self.teacher.identity(self.scorer),
            vocabulary=self.scorer.vocabulary,
            vocabulary_hash=vocabulary_hash(self.tokenizer),
            template_hash=template_hash(self.tokenizer),
            layers=tuple(sorted(self.needs.layers)),
            hidden=self.hidden,
            byte_offsets=all(self.spelling.lengths(one.sample) is not None for one in self.wanted[:SPELT]),
            head=None,
            model=None,
            packages=environment()["packages"],
        )

    def _refuse_another_teacher(self) -> None:
        """Ask a teacher of unknown weights for a conversation that the store holds: behind its name may be another model by now."""
        reader = StoreReader(self.folder)
        asked = (one for one in self.wanted if one.sample.num_scored and not reader.missing([one.sample], one.needs)[0])
        for one in islice(asked, 1):
            batch, signal = score(self.scorer, [one], self.world.device)
            kept = reader.read(batch, Needs(output=True))
            assert signal.observed is not None and kept.observed is not None
            if (error := float((signal.observed - kept.observed).abs().mean())) > SAME_TEACHER:
                raise StoreError(
                    f"store {self.spec.path!r}: holds another teacher: {self.scorer.name!r} now finds the same tokens {error:.2f} nats "
                    f"more or less likely, expected at most {SAME_TEACHER}. Set capture.path to a new folder, or delete this one"
                )

    def _calibrated(self, manifest: Manifest, target: Target | None = None) -> Manifest:
        """Fit the codecs on some documents of the source, write what they fitted, and measure on others what is lost; with a target, choose
        the output's codec so that it is met."""
        fitted, others = (
            Signals(self.scorer, samples, self.spec.batch_size, self.world.device)
            for samples in calibration_split(self.source, self.spec.calibrate_on)
        )
        head, codec = self.scorer.head, manifest.codec
        if target:
            codec, of_output = choose(codec, target, head, fitted.outputs, others.outputs)
        else:
            of_output = codec.calibrate(head, fitted.outputs, others.outputs)
        if problem := codec.doubt(fitted.outputs):
            warn(f"{self.folder}: {problem}")
        model = {f"output.{name}": value for name, value in of_output.items()}
        for layer in manifest.layers:
            found = self.hidden.calibrate(fitted.hidden(layer))
            model.update({f"hidden.{layer}.{name}": value for name, value in found.items()})
        stored = write_model(self.folder, model)
        error = dict.fromkeys(manifest.layers, 0.0)
        if manifest.teacher.dtype not in self.hidden.is_exact_for and others.samples:
            error = {layer: hidden_error(self.hidden, part_of(model, f"hidden.{layer}"), others.hidden(layer)) for layer in manifest.layers}
        certificate = None
        if others.samples and not isinstance(codec, Exact):
            # a gradient wants the tokens that were not told, too
            student = others.of_student(self.student) if self.student and not manifest.teacher.told else None
            certificate = certify(codec, head, of_output, others.outputs, student)
        if target and certificate:
            say(f"{self.folder}: chose {chosen(codec, target, certificate)}")
        ids = tuple(sample.sample_id for sample in fitted.samples) if model else ()
        changes = {"codec": codec, "model": stored, "hidden_error": error, "calibrated_on": ids, "certificate": certificate}
        return manifest.model_copy(update=changes)

    def _plan(self, manifest: Manifest) -> Plan | None:
        reader = StoreReader(self.folder)

        def is_held(one: Wanted, below: int) -> bool:
            return not reader.missing([one.sample], one.needs, below)[0]

        return make_plan(self.wanted, manifest, is_held, self.spec.batch_size, self.spec.samples_per_shard)

    def write(self, shards: Sequence[tuple[int, Sequence[Sequence[Wanted]]]]) -> None:
        """Score the batches of some shards, and publish each shard as it is whole."""
        manifest = read_manifest(self.folder)
        model = load_file(self.folder / MODEL) if manifest.model else {}
        coming = [part for _, batches in shards for part in batches]
        with (
            stopping.deferred(),
            StoreWriter(self.folder, manifest, self.scorer.head, model) as writer,
            progress("capture the teacher", sum(map(len, coming))) as bar,
        ):
            for number, batches in shards:
                for part in batches:
                    self.scorer.expect([pad([one.sample for one in its], 0) for its in coming[:2]])
                    coming = coming[1:]
                    batch, signal = score(self.scorer, part, self.world.device)
                    spelling = [self.spelling.lengths(one.sample) if manifest.byte_offsets else None for one in part]
                    writer.add(batch, signal, [one.needs.layers for one in part], spelling)
                    bar.advance(len(part), note=getattr(self.scorer, "note", ""))
                writer.end_shard(number)
                if stopping.asked():  # what is scored is written when the writer ends
                    break
