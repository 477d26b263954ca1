"""A live teacher: a frozen causal LM in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from limbeck import adapters
from limbeck.cache import model_config, model_content, resolve_model
from limbeck.errors import RecipeError
from limbeck.log import say
from limbeck.objectives.base import Needs
from limbeck.store.manifest import TeacherIdentity
from limbeck.teachers.base import Provides, Teacher
from limbeck.tokens.sample import Sample

if TYPE_CHECKING:
    from torch import Tensor

    from limbeck.batch import Batch, Signal

Alone = Callable[[], AbstractContextManager[None]]
States = Callable[..., "tuple[Tensor, dict[int, Tensor]]"]


class ModelTeacher(Teacher):
    """A causal LM of transformers, never trained.

    Where it is the very model that a LoRA student adapts, it is the student with its adapters switched off, and no second copy is loaded.
    """

    type: Literal["model"] = "model"
    model: str
    """A folder saved by save_pretrained, a name in Limbeck's cache, or a hub name."""
    revision: str | None = None
    """Commit, tag or branch of a hub model; pin it, or the teacher may change between runs."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` halves its memory; on a CPU without bf16 instructions it is several times slower."""
    load_in: Literal["8bit", "4bit"] | None = None
    """Keep the weights of its linear layers in 8 or 4 bits: a quarter or an eighth of their memory, and a slightly other teacher. Needs
    bitsandbytes."""

    computes: ClassVar[bool] = True

    @property
    def speaks(self) -> tuple[str, str | None]:
        return self.model, self.revision

    def check(self) -> None:
        resolve_model(self.model)
        if self.load_in is not None and (missing := [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]):
            raise RecipeError(f"teacher.load_in: {missing[0]!r} is not installed; expected its package: pip install 'limbeck[quantized]'")

    def provides(self) -> Provides:
        config = model_config(self.model, self.revision) or {}
        layers = config.get("num_hidden_layers")
        return Provides(
            output=True,
            layers=frozenset(range(layers)) if layers else None,
            num_layers=layers,
            width=config.get("hidden_size"),
            vocabulary=config.get("vocab_size"),
        )

    def content(self) -> str | None:
        return model_content(self.model)

    def prepare(self) -> None:
        if model_config(self.model, self.revision) is None:
            from limbeck.models import fetch_config

            fetch_config(self.model, self.revision)

    def open(self, tokenizer: Any, needs: Needs, device: str = "cpu") -> ModelScorer:
        from limbeck.models import load_model

        model = load_model(self.model, self.dtype, self.revision, device, self.load_in).requires_grad_(False)
        return self._scorer(model, tokenizer, needs, nullcontext)

    def open_beside(self, student: Any, tokenizer: Any, needs: Needs, device: str = "cpu") -> ModelScorer:
        is_base = adapters.base_of(student) == (resolve_model(self.model), self.revision)
        if not is_base or self.dtype != "float32" or self.load_in is not None:
            return self.open(tokenizer, needs, device)
        say(f"teacher {self.model}: the student with its adapters switched off")
        return self._scorer(student, tokenizer, needs, partial(adapters.switched_off, student))

    def identity(self, scorer: Any) -> TeacherIdentity:
        from limbeck.models import weights_hash

        # few bits mean nothing without their scales, which are no parameters
        weights = scorer.model.state_dict() if self.load_in else dict(scorer.model.named_parameters())
        return TeacherIdentity(
            name=self.model,
            revision=self.revision,
            dtype=self.dtype,
            load_in=self.load_in,
            weights_sha256=weights_hash(weights),
            num_layers=scorer.num_layers,
            width=scorer.width,
            head_scale=scorer.head.scale,
            head_soft_cap=scorer.head.soft_cap,
        )

    def _scorer(self, model: Any, tokenizer: Any, needs: Needs, alone: Alone) -> ModelScorer:
        from limbeck.models import blocks, head, load_tokenizer, verify_head
        from limbeck.tokens.identity import shared_vocabulary

        vocabulary = shared_vocabulary(tokenizer, load_tokenizer(self.model, self.revision))
        with alone():
            verify_head(model)
        return ModelScorer(self.model, model, head(model).cut(vocabulary), len(blocks(model)), needs, alone)


class ModelScorer:
    """Runs the teacher once per batch. Its logits are never made here, but a chunk at a time by whoever applies `teacher_head`.

    `alone` makes the model the teacher for as long as it lasts, where it is something else in between. `states` computes its hidden states;
    it is another's where weights that are divided among processes are gathered by that.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        head: Any,
        num_layers: int,
        needs: Needs,
        alone: Alone = nullcontext,
    ) -> None:
        from limbeck.models import forward

        self.name, self.model, self.head, self.num_layers, self.needs, self.alone = name, model, head, num_layers, needs, alone
        self.states: States = partial(forward, model)
        self.width = head.weight.shape[1]
        self.vocabulary = head.weight.shape[0]

    def asking(self, needs: Needs) -> ModelScorer:
        """The same model, asked for something else."""
        return ModelScorer(self.name, self.model, self.head, self.num_layers, needs, self.alone)

    def require(self, samples: Sequence[Sample]) -> None:
        """A live model can score anything that its positions reach."""
        from limbeck.models import check_size

        check_size(self.model, self.vocabulary, max((len(sample.ids) for sample in samples), default=0))

    def verify_packing(self) -> None:
        from limbeck.models import verify_packing

        with self.alone():
            verify_packing(self.model)

    def expect(self, batches: Sequence[Batch]) -> None:
        """A forward cannot be done ahead."""

    def score(self, batch: Batch) -> Signal:
        import torch

        from limbeck.batch import Signal

        with torch.no_grad(), self.alone():
            last, states = self.states(batch.input_ids, batch.position_ids, sorted(self.needs.layers))
            rows = last.flatten(0, 1)[batch.scored]
            hidden = {layer: state.flatten(0, 1)[batch.represented] for layer, state in states.items()}
            if self.needs.output:
                return Signal(output=rows, teacher_head=self.head, hidden=hidden)
            return Signal(hidden=hidden, observed=observed_log_probs(self.head, rows, batch.targets))


def observed_log_probs(head: Any, rows: Tensor, targets: Tensor, rows_per_chunk: int = 256) -> Tensor:
    """The teacher's log-probability of each target `[N]`, a chunk of logits at a time."""
    import torch

    parts = [rows.new_zeros(0, dtype=torch.float32)]
    for chunk, wanted in zip(rows.split(rows_per_chunk), targets.split(rows_per_chunk), strict=True):
        logits = head(chunk)
        parts.append(logits.gather(-1, wanted[:, None]).squeeze(-1) - logits.logsumexp(-1))
    return torch.cat(parts)
