"""What a run's figures may depend on beside its configuration: data, seed, software, hardware, threads, precision."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rafce_ray.errors import UsageError
from rafce_ray.run_folder import TRIALS, RunFolder
from rafce_ray.storage import locate

ENDS = ("finished", "stopped_early", "diverged")
"""Events with which a run ends."""


@dataclass(frozen=True)
class Circumstance:
    """Something that figures may depend on, in one run and in another; None is unknown."""

    what: str
    original: str | None
    replay: str | None

    @property
    def verdict(self) -> str:
        """``same``, ``differs`` or ``unknown``: equal commits with uncommitted changes may be different code."""
        if self.original is None or self.replay is None:
            return "unknown"
        if self.original != self.replay:
            return "differs"
        is_code_known = self.what != "git commit" or re.fullmatch("[0-9a-f]{40,64}", self.original)
        return "same" if is_code_known else "unknown"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "verdict": self.verdict}


def circumstances_of(folder: RunFolder) -> dict[str, str | None]:
    """The circumstances of a run by name, as its folder tells them; None is unknown."""
    provenance, events = folder.provenance(), folder.events()
    starts = [number for number, event in enumerate(events) if event["event"] == "started"]
    before_last_start = events[: starts[-1]] if starts else []
    started = [events[number] | events[number].get("hardware", {}) for number in starts]

    return {
        "configuration": str(provenance["config_hash"]),
        "data fingerprint": str(provenance["data_fingerprint"]),
        "seed": str(provenance["seed"]),
        **software_circumstances(provenance["software"]),
        "workers": distinct(started, "num_workers") or str(provenance["config"]["run"]["num_workers"]),
        "device": distinct(started, "device"),
        "processor": distinct(started, "name"),
        "threads": distinct(started, "threads"),
        "precision": distinct(started, "precision"),
        # Epochs before an extension were trained under the learning rates of a shorter run.
        "trained": "extended after its end" if any(one["event"] in ENDS for one in before_last_start) else "in one go",
    }


def distinct(records: Iterable[Mapping[str, Any]], key: str) -> str | None:
    """What a key holds in records that have it; where that changes from record to record, every value once: ``2 then 4``."""
    return " then ".join(dict.fromkeys(str(one[key]) for one in records if key in one)) or None


def software_circumstances(software: Mapping[str, Any]) -> dict[str, str | None]:
    """Versions and git commit, named for people."""
    return {name.replace("_", " "): str(version) for name, version in software.items()}


def compare_circumstances(
    original: Mapping[str, str | None], replay: Mapping[str, str | None]
) -> tuple[Circumstance, ...]:
    """Both runs' circumstances side by side."""
    return tuple(Circumstance(what, original.get(what), replay.get(what)) for what in {**original, **replay})


def open_finished(place: str) -> RunFolder:
    """The run folder at a path or URI; ``STUDY/TRIAL`` is the study's trial. UsageError where there is none, or its run has not ended."""
    location = locate(place)
    # Resolved, "." and a link have the run's own name.
    folder = RunFolder(place if location.local is None else str(location.local.resolve()))
    trial = RunFolder(str(folder.location.parent / TRIALS / folder.location.name))
    if not folder.exists() and trial.exists():
        folder = trial
    if not folder.exists():
        folder.location.check_reachable()
        trials = [info.base_name for info in (folder.location / TRIALS).list()]
        remedy = "Name a folder that rafce train made."
        if trials:
            remedy = f"It is a study: name one of its trials, such as {folder.location / TRIALS / trials[0]}."
        raise UsageError(f"{folder.location} is no run: it has no config.yaml. {remedy}")
    if folder.result() is None:
        raise UsageError(
            f"{folder.location} has not finished: it has no result.json. Give the command that started it again; it goes on from where it was."
        )
    return folder
