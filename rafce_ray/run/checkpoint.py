"""Checkpoints of a run, each with a manifest of sha256 sums.

``checkpoints/epoch_0003_step_00000/`` holds ``trainer_state.pt`` (optimizer and counters), ``bundle/`` (the weights,
ready to predict with) and ``manifest.json``. A checkpoint is valid only if every file in its manifest is there and
unaltered. A resume goes back to the newest valid one, which Ray Train's own snapshot cannot do.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import truediv
from pathlib import Path
from typing import Any

import torch

from rafce_ray.base.errors import RafceError
from rafce_ray.base.storage import Location, StorageError

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.pt"
BUNDLE = "bundle"
SCRATCH_PREFIX = ".writing-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint after ``epoch`` epochs and ``step`` steps of the next one.

    ``score`` is that of the last whole epoch, higher is better.
    """

    location: Location
    epoch: int
    step: int
    score: float | None

    @property
    def name(self) -> str:
        """Folder name."""
        return checkpoint_name(self.epoch, self.step)

    def num_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(info.size or 0 for info in self.location.list(recursive=True))


@dataclass(frozen=True)
class InvalidCheckpoint:
    """A checkpoint that may not be used, and why."""

    name: str
    reason: str


def checkpoint_name(epoch: int, step: int) -> str:
    """``epoch_0003_step_00000``: sorts by age."""
    return f"epoch_{epoch:04d}_step_{step:05d}"


def save_checkpoint(
    folder: Location,
    *,
    epoch: int,
    step: int,
    score: float | None,
    state: dict[str, Any],
    save_bundle: Callable[[Path], object],
) -> Checkpoint:
    """Write one checkpoint, which appears whole or not at all; one of the same name (left by a resume) is replaced.

    Args:
        state: optimizer state and counters; tensors and plain values only, since it is read with ``weights_only``.
        save_bundle: writes the bundle into the folder it is given.
    """
    target = folder / checkpoint_name(epoch, step)
    with _scratch_beside(folder) as scratch:
        content = io.BytesIO()
        torch.save(state, content)
        (scratch / TRAINER_STATE).write_bytes(content.getbuffer())
        save_bundle(scratch / BUNDLE)
        files = {}
        for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
            with path.open("rb") as stream:
                files[str(path.relative_to(scratch))] = hashlib.file_digest(stream, "sha256").hexdigest()
        manifest = json.dumps({"epoch": epoch, "step": step, "score": score, "sha256": files}, indent=1)
        target.delete()
        if target.local is None:
            # Object stores have no rename: the manifest goes last, and without it a checkpoint does not count.
            target.upload(scratch)
            (target / MANIFEST).write_bytes(manifest.encode())
        else:
            (scratch / MANIFEST).write_text(manifest)
            scratch.rename(target.local)
    return Checkpoint(target, epoch, step, score)


def list_checkpoints(folder: Location) -> tuple[list[Checkpoint], list[InvalidCheckpoint]]:
    """All checkpoints with a readable manifest, oldest first, and those without one; contents are not checked yet."""
    found, invalid = [], []
    for info in folder.list():
        name = info.base_name
        if not name.startswith("epoch_"):
            continue
        try:
            manifest = json.loads((folder / name / MANIFEST).read_bytes())
            found.append(Checkpoint(folder / name, int(manifest["epoch"]), int(manifest["step"]), manifest["score"]))
        except StorageError:
            # A store that does not answer does not mean that its checkpoints are lost.
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            invalid.append(InvalidCheckpoint(name, f"{MANIFEST} cannot be read ({type(error).__name__})"))
    return sorted(found, key=lambda checkpoint: (checkpoint.epoch, checkpoint.step)), invalid


def fault(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint may not be used; None where every file of its manifest is there and unaltered."""
    manifest = json.loads((checkpoint.location / MANIFEST).read_bytes())
    for file, expected in manifest["sha256"].items():
        try:
            content = reduce(truediv, file.split("/"), checkpoint.location).read_bytes()
        except StorageError:
            raise
        except OSError:
            return f"{file} is missing"
        found = hashlib.sha256(content).hexdigest()
        if found != expected:
            return f"{file} was altered: sha256 {found[:12]}… instead of {expected[:12]}…"
    return None


def newest_valid(folder: Location) -> tuple[Checkpoint | None, list[InvalidCheckpoint]]:
    """The newest valid checkpoint, and the newer or unreadable ones that are invalid."""
    found, invalid = list_checkpoints(folder)
    return _first_valid(found[::-1], invalid)


def best_valid(folder: Location) -> tuple[Checkpoint | None, list[InvalidCheckpoint]]:
    """The valid whole-epoch checkpoint with the best score (the earliest among equals), and better invalid ones."""
    found, invalid = list_checkpoints(folder)
    return _first_valid(_best_first(found), invalid)


def _first_valid(
    found: list[Checkpoint], invalid: list[InvalidCheckpoint]
) -> tuple[Checkpoint | None, list[InvalidCheckpoint]]:
    for checkpoint in found:
        reason = fault(checkpoint)
        if reason is None:
            return checkpoint, invalid
        invalid.append(InvalidCheckpoint(checkpoint.name, reason))
    return None, invalid


def prune(folder: Location, keep_best: int, keep_latest: int = 2) -> None:
    """Keep the best whole-epoch checkpoints and the latest ones; two latest, so that one may turn out broken."""
    found, _ = list_checkpoints(folder)
    best = _best_first(found)[:keep_best]
    kept = {checkpoint.name for checkpoint in best + found[-keep_latest:]}
    for checkpoint in found:
        if checkpoint.name not in kept:
            checkpoint.location.delete()


def _best_first(found: list[Checkpoint]) -> list[Checkpoint]:
    """The whole-epoch checkpoints that have a score, best first, the earliest among equals."""
    scored = [(-one.score, one.epoch, one) for one in found if one.score is not None and one.step == 0]
    return [one for *_, one in sorted(scored, key=lambda entry: entry[:2])]


def read_trainer_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Optimizer state and counters of a valid checkpoint; tensors on the CPU."""
    place = checkpoint.location / TRAINER_STATE
    state = torch.load(io.BytesIO(place.read_bytes()), map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise RafceError(f"{place}: holds a {type(state).__name__}, expected a mapping. Delete this checkpoint.")
    return state


def clear_scratch(folder: Location) -> None:
    """Remove what a killed writer left."""
    for info in folder.list():
        if info.base_name.startswith(SCRATCH_PREFIX):
            (folder / info.base_name).delete()


@contextmanager
def _scratch_beside(folder: Location) -> Iterator[Path]:
    """A temporary folder on the same filesystem as ``folder`` where that is local, so that a rename is enough."""
    if folder.local is not None:
        folder.local.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=folder.local, ignore_cleanup_errors=True) as scratch:
        inner = Path(scratch) / "checkpoint"
        inner.mkdir()
        yield inner
