"""Named accelerators: their peak figures and where these are from, in data/devices.yaml; and how fast the machine is on which this runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import yaml

from limbeck.errors import RecipeError, nearest
from limbeck.spec import Spec, validate

EFFICIENCY = 0.5
"""Share of the speed of a bare matrix product that a training step reaches."""
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


def flops_per_second() -> float:
    """Of a bare float32 matrix product on this machine's default device, the best of three."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
