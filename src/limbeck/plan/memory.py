"""Memory of a training step, from config.json alone: the step itself runs on tensors that have shapes and no numbers, and every tensor that
is alive is counted. So chunks, checkpointing, adapters and hidden terms need no formulas of their own.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from limbeck import adapters, student
from limbeck.batch import Batch, Signal
from limbeck.learner import Learner
from limbeck.models import blocks, head, load_architecture, recompute_activations
from limbeck.objectives.base import HiddenTerm, Needs, needs_of
from limbeck.objectives.head import LIVE_BUFFERS, Head, num_chunks
from limbeck.recipe import Recipe
from limbeck.teachers.model import ModelScorer, ModelTeacher

BYTES_IN = {"8bit": 1.0, "4bit": 0.52}
"""Of a weight that bitsandbytes keeps, with the scales of its blocks."""
FLOAT = 4


@dataclass(frozen=True)
class Shapes:
    """What of the data decides memory: rows and width of the largest microbatch, its scored tokens, the bound of these that fixes the
    number of chunks, how many microbatches a process has in a step, and whether documents share a row."""

    rows: int
    width: int
    scored: int
    most_scored: int
    microbatches: int
    vocabulary: int
    is_packed: bool = False


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: what is trained (projections too), what of the student is frozen, the student that is saved, and the live
    teacher."""

    trained: int
    frozen: int
    saved: int
    taught: int

    @property
    def flops_per_position(self) -> float:
        """The usual count: 6 for a trained parameter (2 forward, 4 backward), 4 for a frozen one of the student, 2 for the teacher's."""
        return 6.0 * self.trained + 4.0 * self.frozen + 2.0 * self.taught


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, by part; their sum is the peak. `activations` are all that is alive at the peak and none of the others.

    `largest_block` and `root` (what is in no block) are weights that a sharded model gathers; `teacher_whole` is
    what processes do not share of the teacher: its head.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head_chunk: int
    teacher: int
    largest_block: int
    root: int
    teacher_whole: int
    sizes: Sizes

    @property
    def parts(self) -> dict[str, int]:
        names = ("weights", "gradients", "optimizer", "activations", "head_chunk", "teacher")
        return {name: getattr(self, name) for name in names}

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def simulate(recipe: Recipe, shapes: Shapes) -> Memory:
    """The peak of one process. Needs config.json of student and teacher, and no weights."""
    spec_student, spec = recipe.for_training()
    model = load_architecture(spec_student.model, spec_student.revision)
    total = len(blocks(model))
    if (kept := spec_student.kept(total)) != list(range(total)):
        student.prune(model, kept)
    if spec_student.lora is not None:
        adapters.attach(model, spec_student.lora, spec_student.model, spec_student.revision, recipe.seed)
    provided, teacher = recipe.teacher.provides(), recipe.teacher
    terms = {key: _settled(term, len(blocks(model)), provided.num_layers or 0) for key, term in recipe.terms.items()}
    needs = needs_of(terms, len(blocks(model)), provided.num_layers or 0) if provided.output else Needs()
    shares = isinstance(teacher, ModelTeacher) and needs.anything and _is_base(recipe, teacher)
    chunks = num_chunks(shapes.most_scored, shapes.vocabulary, spec.head_memory_mb)
    widths = provided.num_layers or 0, provided.width or 0
    learner = Learner(model, terms, shapes.vocabulary, *widths, chunks, spec.head == "fused", recipe.seed)
    if spec.gradient_checkpointing:
        recompute_activations(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _pretend(learner.train(), mode)
    theirs = model if shares else _taught(teacher, needs, mode)
    with mode, nullcontext() if shapes.is_packed else _without_mask():
        scorer = None
        if theirs is not None:
            alone = partial(adapters.switched_off, model) if shares else nullcontext
            scorer = ModelScorer(teacher.type, theirs, head(theirs).cut(shapes.vocabulary), len(blocks(theirs)), needs, alone)
        peak = _peak(learner, scorer, _batch(shapes), recipe, needs, shapes.microbatches)
        return _parts(recipe, learner, scorer, shares, chunks, shapes, peak)


def _parts(recipe: Recipe, learner: Learner, scorer: ModelScorer | None, shares: bool, chunks: int, shapes: Shapes, peak: int) -> Memory:
    trained, frozen = _numbers(learner)
    adapted, saved = _numbers(learner.student)
    taught = _numbers(scorer.model)[1] if scorer is not None else 0
    weights = _bytes(learner)
    block = max(_bytes(each) for each in blocks(learner.student))
    is_dense = recipe.teacher.provides().output and recipe.teacher.provides().support == "dense"
    rows = -(-shapes.scored // chunks)
    chunk = rows * shapes.vocabulary * FLOAT * (LIVE_BUFFERS if is_dense else 1) if learner.output_terms else 0
    chunk = min(chunk, max(peak - FLOAT * trained, 0))
    return Memory(
        weights=weights,
        gradients=FLOAT * trained,
        optimizer=2 * FLOAT * trained,
        activations=max(peak - FLOAT * trained - chunk, 0),
        head_chunk=chunk,
        teacher=0 if scorer is None or shares else _teacher_bytes(scorer, recipe.teacher),
        largest_block=block,
        root=weights - sum(_bytes(each) for each in blocks(learner.student)),
        teacher_whole=0 if scorer is None or shares else _bytes(scorer.model.get_output_embeddings()),
        sizes=Sizes(trained, frozen, saved or adapted, taught),
    )


def _peak(learner: Learner, scorer: ModelScorer | None, batch: Batch, recipe: Recipe, needs: Needs, microbatches: int) -> int:
    """Bytes alive beside weights and optimizer state, at most: the second microbatch meets the gradients of the first."""
    _, spec = recipe.for_training()
    terms = {key: term.at(0, 1) for key, term in learner.output_terms.items()} | learner.hidden_terms
    live = Live()
    with live:
        for _ in range(min(microbatches, 2)):
            signal = scorer.score(batch) if scorer is not None else _captured(recipe, needs, batch, learner.vocabulary)
            autocast = torch.autocast("cpu", torch.bfloat16) if spec.precision == "bfloat16" else nullcontext()
            with autocast:
                loss, sums = learner(batch, signal, dict.fromkeys(terms, 1.0), terms)
            loss.backward(torch.tensor(1.0))  # a number that is known, as the head asks for it
            del loss, sums, signal
    return live.peak


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that were made under it and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {self._key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and (key := self._key(leaf)) not in given and key not in self._known:
                storage = leaf.untyped_storage()
                size = storage.nbytes()
                self._known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, size)
        return output

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _pretend(module: nn.Module, mode: FakeTensorMode) -> None:
    """Make parameters and buffers say that they are on a CPU, tied ones once: kernels are chosen by the device."""
    known: dict[int, Any] = {}
    cpu = torch.device("cpu")
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in known:
                    fake = FakeTensor(mode, parameter.data.to("meta"), cpu)
                    known[id(parameter)] = parameter, nn.Parameter(fake, requires_grad=parameter.requires_grad)
                part._parameters[name] = known[id(parameter)][1]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = FakeTensor(mode, buffer.to("meta"), cpu)


@contextmanager
def _without_mask() -> Iterator[None]:
    """Positions that count on need no mask. transformers looks at their numbers for that, and takes what has none for packed documents."""
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    looked = getattr(masking_utils, name)
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, looked)


def _is_base(recipe: Recipe, teacher: ModelTeacher) -> bool:
    """Whether the teacher is the student with its adapters off, as `ModelTeacher.open_beside` decides it."""
    spec = recipe.student
    same = spec is not None and spec.lora is not None and (spec.model, spec.revision) == (teacher.model, teacher.revision)
    return same and teacher.dtype == "float32" and teacher.load_in is None


def _settled(term: Any, ours: int, theirs: int) -> Any:
    """A layer map that the data would decide needs as much memory as any other with as many pairs."""
    if not isinstance(term, HiddenTerm) or term.is_settled:
        return term
    return term.mapped(tuple((i, round(i * (theirs - 1) / max(ours - 1, 1))) for i in range(ours)))


def _taught(teacher: Any, needs: Needs, mode: FakeTensorMode) -> Any:
    """The model of a live teacher; None where nothing is asked of one."""
    if not isinstance(teacher, ModelTeacher) or not needs.anything:
        return None
    model = load_architecture(teacher.model, teacher.revision, teacher.dtype).requires_grad_(False).eval()
    _pretend(model, mode)
    return model


def _captured(recipe: Recipe, needs: Needs, batch: Batch, vocabulary: int) -> Signal:
    """What a store gives: rows and a head that count, and states. Sparse targets are small beside the rest; they count as rows too."""
    if not needs.anything:
        return Signal()
    width = recipe.teacher.provides().width or 1
    hidden = {layer: torch.empty(len(batch.represented), width) for layer in needs.layers}
    if not needs.output:
        return Signal(hidden=hidden)
    return Signal(output=torch.empty(len(batch.scored), width), teacher_head=Head(torch.empty(vocabulary, width)), hidden=hidden)


def _batch(shapes: Shapes) -> Batch:
    size = (shapes.rows, shapes.width)
    ids = torch.zeros(size, dtype=torch.long)
    scored = torch.zeros(min(shapes.scored, shapes.rows * shapes.width), dtype=torch.long)
    positions = torch.arange(shapes.width).expand(size)
    represented = torch.zeros(shapes.rows * shapes.width, dtype=torch.long)
    return Batch(ids, positions, ids, ids, ids, scored, torch.zeros_like(scored), represented)


def _numbers(module: nn.Module) -> tuple[int, int]:
    """Parameters that are trained, and that are frozen."""
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return trained, sum(parameter.numel() for parameter in module.parameters()) - trained


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _teacher_bytes(scorer: ModelScorer, spec: Any) -> int:
    if spec.load_in is None:
        return _bytes(scorer.model)
    linear = sum(layer.weight.numel() for block in blocks(scorer.model) for layer in block.modules() if isinstance(layer, nn.Linear))
    size = scorer.head.weight.element_size()
    return _bytes(scorer.model) - int(linear * (size - BYTES_IN[spec.load_in]))
