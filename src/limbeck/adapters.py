"""Low-rank adapters in a student (LoRA, DoRA): the only file that imports PEFT.

The adapters are put into the model's own linear layers, so that it stays the model of transformers that everything else knows: a frozen
base, and a few parameters that ask for gradients. A model without adapters passes through every function here unchanged.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from limbeck.cache import resolve_model
from limbeck.errors import RecipeError, RunError, nearest
from limbeck.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


class Lora(Spec):
    """Low-rank adapters beside frozen weights: W x + alpha/rank B A x (LoRA, 2106.09685). B starts at 0, so the student starts as its base.

    Nothing else is trained, and checkpoints hold nothing else. The run ends with the adapters in PEFT's format, and with the student into
    whose weights they are merged.
    """

    rank: int = Field(16, gt=0)
    """Rows of A and columns of B: how much can be learned, and how much memory it takes."""
    alpha: float = Field(32.0, ge=0.001, le=1e6)
    """The adapters' output is multiplied by alpha / rank. It acts like the learning rate, which wants to be about ten times that of full
    training."""
    dropout: float = Field(0.0, ge=0, le=0.99)
    """Share of the adapters' inputs that is dropped in training; other microbatches drop others, so results then depend on their size."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Linear layers that get adapters: all those of the blocks, or those that bear, or end in, these names (`[q_proj, v_proj]`)."""
    dora: bool = False
    """Train the length of each row of a weight by itself, and its direction by the adapters (DoRA, 2402.09353): slower, often better at
    low rank."""

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: str | list[str]) -> str | list[str]:
        if not targets:
            raise ValueError("expected 'all-linear' or at least one name of a linear layer")
        return targets

    def check(self, linear: Shapes | None) -> None:
        """Refuse what cannot be put into a model with these linear layers (None: not known yet), or without PEFT."""
        if find_spec("peft") is None:
            raise RecipeError("student.lora: 'peft' is not installed; expected its package: pip install 'limbeck[lora]'")
        if linear is not None:
            self.chosen(linear)

    def chosen(self, linear: Shapes) -> dict[str, tuple[int, ...]]:
        """Those of a model's linear layers (name and shape of the weight) that get adapters."""
        if not linear:
            raise RecipeError("student.lora: found no linear layers in the model's blocks, expected some to put adapters into")
        for target in [] if self.targets == "all-linear" else self.targets:
            if not any(_is_named(name, target) for name in linear):
                known = sorted({name.rpartition(".")[2] for name in linear})
                hint = nearest(target, known)
                raise RecipeError(f"student.lora.targets: found {target!r}, expected linear layers of the blocks: {', '.join(known)}{hint}")
        found = {
            name: shape
            for name, shape in linear.items()
            if self.targets == "all-linear" or any(_is_named(name, target) for target in self.targets)
        }
        smallest = min(found, key=lambda name: min(found[name]))
        if self.rank > min(found[smallest]):
            raise RecipeError(
                f"student.lora.rank: found {self.rank}, expected at most {min(found[smallest])}: the weight of {smallest} is "
                f"{' x '.join(map(str, found[smallest]))}, and no change of it has a higher rank"
            )
        return found

    def num_parameters(self, linear: Shapes) -> int:
        """Numbers that are trained in a model with these linear layers."""
        shapes = self.chosen(linear).values()
        return sum(self.rank * sum(shape) + (shape[0] if self.dora else 0) for shape in shapes)


def linear_layers(weights: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """The linear layers of the blocks, by the names and shapes of a model's weights: matrices below a number. No embeddings, no head."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in weights
        if name.endswith(".weight") and len(shape) == 2 and block_of(name) is not None
    }


def block_of(name: str) -> int | None:
    """The number of the block that a weight belongs to."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def attach(model: Any, lora: Lora, base: str, revision: str | None, seed: int) -> None:
    """Put adapters into a model's linear layers, in place, and freeze all else. `seed` draws A; `base` is the model's name."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    linear = _linear_modules(model)
    lora.check(linear)
    names = sorted({name.rpartition(".")[2] for name in linear}) if lora.targets == "all-linear" else list(lora.targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=names,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        revision=revision,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    model.train(model.training)  # what was put in has the mode of the rest
    got = {name for name, _ in _adapted(model)}
    if got != set(lora.chosen(linear)):
        other = sorted(got ^ set(lora.chosen(linear)))[0]
        raise RecipeError(f"student.lora.targets: {other!r} is no linear layer of a block; expected names that no other layer ends in")


def base_of(model: Any) -> tuple[str, str | None] | None:
    """(name, revision) of the model that adapters were put into; None for a model without."""
    config = getattr(model, "peft_config", {}).get("default")
    return (resolve_model(config.base_model_name_or_path), config.revision) if config else None


@contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """The base alone, in eval mode, for as long as this lasts."""
    was_training, layers = model.training, [layer for _, layer in _adapted(model)]
    trained = [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]
    model.eval()
    for layer in layers:
        layer.enable_adapters(False)
    for parameter in trained:
        parameter.requires_grad_(True)  # PEFT freezes them too; what FSDP2 gathers meanwhile would stay frozen
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        model.train(was_training)


def base_weights(model: Any) -> dict[str, Tensor]:
    """The parameters by the names that they have without adapters, which are left out."""
    own = {id(parameter) for _, layer in _adapted(model) for parameter in layer.parameters() if parameter.requires_grad}
    return {name.replace(".base_layer.", "."): value for name, value in model.named_parameters() if id(value) not in own}


def save(model: Any, path: Path) -> None:
    """Write a model's adapters to a folder that PEFT loads; nothing for a model without."""
    if base_of(model) is None:
        return
    from peft import get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f"{path.name}.tmp")
    state = {
        f"base_model.model.{name}": value.contiguous()
        for name, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(state, temporary / "adapter_model.safetensors", {"format": "pt"})
        config = copy(model.peft_config["default"])
        config.inference_mode = True  # of who loads them: frozen
        config.save_pretrained(temporary)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: the adapters could not be written ({error})") from error


def merge(model: Any) -> None:
    """Add the adapters to the weights beside them and take them out: what is left is a model like any other."""
    for name, layer in list(_adapted(model)):
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if base_of(model) is not None:
        del model.peft_config


def _adapted(model: Any) -> Iterator[tuple[str, Any]]:
    """Layers that have adapters, with their names."""
    if base_of(model) is not None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        yield from ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


def _linear_modules(model: Any) -> dict[str, tuple[int, ...]]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    named = ((f"{name}.weight", tuple(module.weight.shape)) for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D))
    return linear_layers(named)
