"""Named accelerators: their peak figures and where these are from, in data/devices.yaml. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from limbeck.errors import RecipeError, nearest
from limbeck.spec import Spec, validate

FILE = Path(__file__).parent.parent / "data" / "devices.yaml"


class Device(Spec):
    """One accelerator."""

    memory_gb: float
    """Memory, decimal GB."""
    float32: float
    """Peak of a float32 matrix product, teraFLOP/s."""
    bfloat16: float
    """Peak of a bfloat16 matrix product, teraFLOP/s."""
    utilisation: float
    """Share of the peak that a training step is assumed to reach."""
    wire_gb_per_s: float
    """Between two of them in one machine, one direction, decimal GB per second."""
    source: str
    """Where the peaks are stated."""

    def flops_per_second(self, precision: str) -> float:
        """What a step is assumed to reach."""
        return float(getattr(self, precision)) * 1e12 * self.utilisation


def device(name: str) -> Device:
    """A device by its name."""
    known: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    if name not in known:
        raise RecipeError(f"--device: found {name!r}, expected one of: {', '.join(known)}{nearest(name, known)}")
    return validate(Device, known[name], f"{FILE.name}: {name}")
