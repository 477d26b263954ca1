"""The section `train` of a recipe. Torch-free."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from pydantic import Field, model_validator

from limbeck.errors import RecipeError
from limbeck.optim import Optimizer
from limbeck.spec import Spec
from limbeck.trackers import TrackerName
from limbeck.trackers import require as require_trackers


class Best(Spec):
    """What chooses among the students that evaluations saw. Its score is then the best of several, and too good: judge by other cases."""

    benchmark: str
    """One of `evaluate`, by its name."""
    metric: str = ""
    """The benchmark's first metric where it is empty. Whether more of it is better, the benchmark knows."""


class Train(Spec):
    """How the student is trained."""

    steps: int | None = Field(None, gt=0)
    """Optimizer steps. Give this or `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the data, rounded up to whole steps."""
    batch_size: int = Field(8, gt=0)
    """Conversations per optimizer step, over all processes. Changes what is learned; `micro_batch_size` does not."""
    micro_batch_size: int = Field(1, gt=0)
    """Rows per forward in each process: as many as fit in memory. A row is a conversation, or several with `pack_length`. The result does
    not depend on it."""
    pack_length: int | None = Field(None, gt=1)
    """Pack the conversations of a step into rows of up to this many tokens, which saves padding. None of them is cut or sees another, and a
    longer one has a row of its own: the result does not depend on it. Where it is not set, every conversation has its row."""
    optimizer: Optimizer = Optimizer()
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` is autocast over float32 weights and optimizer state; use it where the hardware has it."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    head: Literal["fused", "plain"] = "fused"
    """`fused` computes the head's gradient a chunk at a time; `plain` is the reference by autograd, with all logits in memory."""
    head_memory_mb: int = Field(512, gt=0)
    """Memory for the logits of a chunk, student's and teacher's with their gradients. Fixes the number of chunks for the whole run."""
    kernels: list[Literal["compile", "liger"]] | None = None
    """Other ways to compute the same, to rounding. `compile` takes what the terms do with a block of logits through torch.compile; `liger`,
    for accelerators, puts Liger's Triton kernels in the place of the student's norms, rotary embeddings and gated MLPs."""
    checkpoint_every: int | None = Field(None, gt=0)
    """Steps between checkpoints; none are written where it is not set, and a run that is stopped starts over."""
    keep_checkpoints: int = Field(1, ge=0)
    """Checkpoints kept. 0 keeps the newest one only until the run has finished."""
    evaluate_every: int | None = Field(None, gt=0)
    """Steps between evaluations during training, into evaluations.jsonl: before the first step, every so many, and after the last. They
    change nothing of what is learned."""
    evaluate_only: list[str] | None = Field(None, min_length=1)
    """The benchmarks of `evaluate` that are asked during training, by name; all of them where it is not set."""
    best: Best | None = None
    """Keep the weights of the evaluation that was best by this, and make them the student at the end; those of the last step where it is
    not set."""
    max_skipped_steps: int = Field(0, ge=0)
    """Steps in a row that are left out where loss or gradient is infinite or no number: weights and optimizer stay as they were, and the
    next step's data come. At one more, or at the first with 0, the run stops. `limbeck replay` does such a step again."""
    report_to: list[TrackerName] = []
    """Trackers that get each row of metrics.jsonl too; their packages are installed apart."""

    @model_validator(mode="after")
    def _fused_is_compiled(self) -> Train:
        if self.uses("compile") and self.head != "fused":
            raise ValueError(f"kernels: found 'compile' beside head {self.head!r}, expected it beside 'fused'")
        return self

    def uses(self, kernel: str) -> bool:
        return kernel in (self.kernels or ())

    def check(self) -> None:
        """Raise where a package is missing."""
        require_trackers(self.report_to)
        if self.uses("liger") and find_spec("liger_kernel") is None:
            raise RecipeError("train.kernels: 'liger_kernel' is not installed; expected its package: pip install 'limbeck[liger]'")

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"found {'both steps and epochs' if self.steps else 'neither steps nor epochs'}, expected one of them")
        return self
