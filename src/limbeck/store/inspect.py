"""Inspecting a capture: what its manifest says, in numbers for programs and lines for people. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.log import megabytes
from limbeck.store.certificate import in_words
from limbeck.store.manifest import MANIFEST, read_manifest
from limbeck.store.place import Place

_UNKNOWN = {"tail": "that mass was not told, and counts as 0", "observed": "of targets outside of those the log-probability is a mean"}


def summary(path: str | Path) -> dict[str, Any]:
    """What a store holds. `bytes_per_token` counts everything that lies on the disk, per scored token."""
    place = Place(path)
    manifest = read_manifest(place)
    size = manifest.num_bytes + (place.size(MANIFEST) or 0)
    tree = manifest.model_dump(mode="json", exclude={"shards", "passes", "format", "calibrated_on"})
    counts = {
        "store": str(place),
        "complete": not manifest.num_missing,
        "num_shards": len(manifest.shards),
        "num_shards_missing": manifest.num_missing,
        "num_samples": manifest.num_samples,
        "num_scored": manifest.num_scored,
        "num_represented": sum(shard.num_represented for shard in manifest.shards),
        "bytes": size,
        "bytes_per_token": size / manifest.num_scored if manifest.num_scored else None,
    }
    return counts | tree


def lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """A summary for people."""
    teacher = found["teacher"]
    revision = f" at {teacher['revision']}" if teacher["revision"] else ""
    bits = f" in {teacher['load_in']}" if teacher["load_in"] else ""
    weights = f"{teacher['dtype']}, weights {teacher['weights_sha256'][:12]}" if teacher["weights_sha256"] else "its weights are not known"
    told = f"; it told {teacher['told']} tokens and the mass of the others" if teacher["told"] else ""
    told += "".join(f"; {_UNKNOWN[name]}" for name in teacher["unknown"])
    shown = [
        ("teacher", f"{teacher['name']}{revision}{bits}, {weights}{told}"),
        ("codec", _settings(found["codec"]) + ", " + _temperatures(found["temperatures"])),
        ("holds", f"{found['num_samples']:,} conversations, {found['num_scored']:,} scored tokens in {found['num_shards']:,} shards"),
        ("size", _size(found)),
    ]
    if found["target"]:
        wanted = ", ".join(f"{name} {value:g}" for name, value in found["target"].items() if value is not None)
        shown.append(("chosen for", f"at most {wanted}"))
    if found["certificate"]:
        shown.extend(_certificate(found))
    if found["num_shards_missing"]:
        shown.append(("missing", f"{found['num_shards_missing']:,} shards; start the capture again, and it goes on"))
    if found["layers"]:
        errors = ", ".join(f"{layer}: {found['hidden_error'].get(str(layer), 0.0):.2%}" for layer in found["layers"])
        shown.append(("hidden states", f"{_settings(found['hidden'])}, {found['num_represented']:,} tokens; error by block {errors}"))
    shown.append(("text", "each target's bytes are known" if found["byte_offsets"] else "not known where the targets stand in it"))
    template = (found["template_hash"] or "none")[:12]
    shown.append(("tokenizer", f"{found['vocabulary']:,} tokens, {found['vocabulary_hash'][:12]}, template {template}"))
    shown.append(("written by", ", ".join(f"{name} {version}" for name, version in found["packages"].items())))
    return shown


def bars(found: dict[str, Any]) -> dict[str, list[tuple[str, float, str]]]:
    """What is worth a look as bars: by title, the label, value and text of each."""
    measured, charts = found["certificate"], {}
    if measured:
        parts = {name: part for name, part in measured["by_entropy"].items() if part["num_scored"]}
        names = {name: f"{name} ({part['num_scored'] / measured['num_scored']:.0%})" for name, part in parts.items()}
        key, shown = _distance(measured)
        charts[f"{shown}, by how sure the teacher is"] = [
            (names[name], max(part[key], 0.0), f"{part[key]:.4f}") for name, part in parts.items()
        ]
        if "gradient_angle" in measured:
            charts["gradient of a new student: angle in degrees"] = [
                (names[name], part["gradient_angle"], f"{part['gradient_angle']:.2f}")
                for name, part in parts.items()
                if "gradient_angle" in part
            ]
    once = {name: found[name]["bytes"] for name in ("head", "model") if found[name]}
    sizes = {"shards": found["bytes"] - sum(once.values()), **once}
    charts["MB on the disk"] = [(name, size / 2**20, megabytes(size)) for name, size in sizes.items()]
    return charts


def _settings(spec: dict[str, Any]) -> str:
    return " ".join([spec["type"], *(f"{key}={value}" for key, value in spec.items() if key != "type" and value is not None)])


def _certificate(found: dict[str, Any]) -> list[tuple[str, str]]:
    measured = found["certificate"]
    once = sum(found[name]["bytes"] for name in ("head", "model") if found[name])
    key, shown = _distance(measured)
    buckets = ", ".join(f"{name} {part[key]:.3f}" for name, part in measured["by_entropy"].items() if part["num_scored"])
    what = f"{in_words(measured)}, same first token {measured['top1']:.1%}, mass kept {measured['mass']:.1%}"
    size = f"{measured['bytes_per_token']:.1f} bytes per token and {megabytes(once)} MB once (head, tables)"
    found_lines = [
        ("fidelity", f"{what}, on {measured['num_scored']:,} tokens that it was not fitted on{_told(found)}"),
        ("", f"{size}; {shown} where the teacher is {buckets}"),
    ]
    if "gradient_angle" in measured:
        ratio = f"{measured['gradient_ratio']:.3f} of its length"
        found_lines.append(("", f"a new student's gradient: {measured['gradient_angle']:.2f} degrees off the exact one, {ratio}"))
    return found_lines


def _told(found: dict[str, Any]) -> str:
    return "; of what the teacher told alone: what it left untold is not known" if found["teacher"]["told"] else ""


def _distance(measured: dict[str, Any]) -> tuple[str, str]:
    """What says how far off a capture is, and its name: draws have no KL."""
    return ("kl", "KL") if "kl" in measured else ("l1", "L1")


def _temperatures(served: list[float] | None) -> str:
    return "serves every temperature" if served is None else f"serves temperatures {', '.join(f'{each:g}' for each in served)}"


def _size(found: dict[str, Any]) -> str:
    per_token = f", {found['bytes_per_token']:.1f} bytes per scored token" if found["bytes_per_token"] else ""
    return f"{megabytes(found['bytes'])} MB{per_token}, with all that lies there"
