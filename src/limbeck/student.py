"""Where a student comes from: a pre-trained model as it is, a depth-pruned copy of one, or one with adapters."""

from __future__ import annotations

from math import prod
from typing import Any

from pydantic import Field, model_validator

from limbeck import adapters, heap
from limbeck.adapters import Lora
from limbeck.cache import model_config, resolve_model, weight_shapes
from limbeck.errors import ModelError, RecipeError
from limbeck.spec import Spec


class Student(Spec):
    """The model to be trained."""

    model: str
    """A folder saved by save_pretrained, a name in Limbeck's cache, or a hub name."""
    revision: str | None = None
    """Commit, tag or branch of a hub model."""
    keep_layers: list[int] | None = None
    """Prune to these blocks, counted from 0, in this order of depth. A pruned model must be trained before it is good for anything."""
    num_layers: int | None = Field(None, gt=0)
    """Prune to this many blocks, spread evenly over the depth, the first and the last included."""
    lora: Lora | None = None
    """Train low-rank adapters and leave the model's own weights as they are; all weights are trained where it is not set."""

    @model_validator(mode="after")
    def _one_way(self) -> Student:
        if self.keep_layers is not None and self.num_layers is not None:
            raise ValueError("found both keep_layers and num_layers, expected one of them")
        if self.keep_layers is not None and (
            not self.keep_layers or sorted(set(self.keep_layers)) != self.keep_layers or self.keep_layers[0] < 0
        ):
            raise ValueError(f"keep_layers: found {self.keep_layers}, expected block numbers from 0, rising, none twice")
        if self.lora is not None and (key := "keep_layers" if self.keep_layers else "num_layers" if self.num_layers else None):
            raise ValueError(
                f"found both {key} and lora, expected one of them: adapters belong to a model that others have, and a pruned one must be "
                "trained as a whole first"
            )
        return self

    def kept(self, total: int) -> list[int]:
        """The blocks that are kept of `total`."""
        if self.keep_layers is not None:
            if self.keep_layers[-1] >= total:
                raise RecipeError(f"student.keep_layers: found block {self.keep_layers[-1]}, expected 0 to {total - 1}")
            return self.keep_layers
        if self.num_layers is None:
            return list(range(total))
        if self.num_layers > total:
            raise RecipeError(f"student.num_layers: found {self.num_layers}, expected at most {total}, the blocks of {self.model}")
        if self.num_layers == 1:
            return [total - 1]
        return [round(i * (total - 1) / (self.num_layers - 1)) for i in range(self.num_layers)]

    def shape(self) -> tuple[int, int] | None:
        """(blocks, width) after pruning, from config.json alone; None where it is not at hand."""
        config = model_config(self.model, self.revision)
        if not config or "num_hidden_layers" not in config or "hidden_size" not in config:
            return None
        return len(self.kept(config["num_hidden_layers"])), config["hidden_size"]

    def check(self) -> None:
        """Raise on what can be seen before the model is loaded: a missing model or package, adapters that it has no place for."""
        resolve_model(self.model)
        if self.lora is not None:
            shapes = weight_shapes(self.model, self.revision)
            self.lora.check(adapters.linear_layers(shapes.items()) if shapes is not None else None)

    def num_parameters(self) -> dict[str, int] | None:
        """Numbers that are trained and that are frozen, from the headers of the weights alone; None where these are not at hand."""
        config, shapes = model_config(self.model, self.revision), weight_shapes(self.model, self.revision)
        if not config or not shapes or "num_hidden_layers" not in config:
            return None
        kept = {None, *self.kept(config["num_hidden_layers"])}
        if config.get("tie_word_embeddings"):
            shapes.pop("lm_head.weight", None)
        total = sum(prod(shape) for name, shape in shapes.items() if adapters.block_of(name) in kept)
        if self.lora is None:
            return {"trained": total, "frozen": 0}
        return {"trained": self.lora.num_parameters(adapters.linear_layers(shapes.items())), "frozen": total}


def build(spec: Student, device: str = "cpu", seed: int = 0) -> Any:
    """The student in float32, pruned as the spec says, with its head verified, and adapters drawn from `seed`."""
    from limbeck.models import blocks, load_model, verify_head

    if device == "cpu":
        heap.without_holes(spec.lora is not None)
    model = load_model(spec.model, "float32", spec.revision, device)
    total = len(blocks(model))
    kept = spec.kept(total)
    if kept != list(range(total)):
        prune(model, kept)
    verify_head(model)
    if spec.lora is not None:
        adapters.attach(model, spec.lora, spec.model, spec.revision, seed)
    return model


def prune(model: Any, kept: list[int]) -> None:
    """Keep these blocks of a decoder, in place, and make its config say so: counts, and every per-block list (layer types and the like)."""
    from torch import nn

    from limbeck.models import backbone, blocks

    old = blocks(model)
    total, decoder, config = len(old), backbone(model), model.config.get_text_config()
    (name,) = (name for name, child in decoder.named_children() if child is old)
    setattr(decoder, name, nn.ModuleList([old[i] for i in kept]))
    for index, block in enumerate(getattr(decoder, name)):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == total:
            setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
    if len(blocks(model)) != len(kept):
        raise ModelError(f"{type(model).__name__}: could not be pruned to {len(kept)} blocks")
