"""Whether two runs were made alike, and whether they came to the same figures.

A circumstance is what figures may depend on besides the configuration: data, seed, software, hardware, threads, precision.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rafce_ray.run.folder import RunFolder

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


NOT_COMPARED = frozenset(
    {"images_per_s", "data_wait", "elapsed_s", "num_workers", "run_dir", "bundle", "weights_sha256"}
)
"""Timings, places and the number of workers, which is a circumstance; and the weights, of which no more than equality can be said."""

MISSING = "missing"

Records = Mapping[int | None, Mapping[str, Any]]
"""Records by epoch; None: that of the finished model."""


@dataclass(frozen=True)
class FigureDifference:
    """One figure of both runs; ``epoch`` None: of the finished model.

    ``size`` is |original - replay|, divided by the larger of both where that is above 1 (counts, norms); infinite where one is
    missing or undefined, or where it is no number and differs.
    """

    epoch: int | None
    figure: str
    original: Any
    replay: Any
    size: float

    def __str__(self) -> str:
        where = "of the finished model" if self.epoch is None else f"in epoch {self.epoch}"
        return f"{self.figure} {where}: {shown(self.original)} in the original, {shown(self.replay)} in the replay"


@dataclass(frozen=True)
class Comparison:
    """``num_figures`` of the original compared; those ``beyond`` the tolerance by epoch, and the ``largest`` difference of all.

    ``only_in_replay`` are figures that the original did not record.
    """

    num_figures: int
    tolerance: float
    beyond: tuple[FigureDifference, ...]
    largest: FigureDifference | None
    only_in_replay: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether no figure differs by more than the tolerance."""
        return not self.beyond

    def to_json(self) -> dict[str, Any]:
        """Plain values; an infinite size is null in JSON text."""
        return {
            "equal": self.equal,
            "tolerance": self.tolerance,
            "num_figures": self.num_figures,
            "largest": None if self.largest is None else asdict(self.largest),
            "beyond": [asdict(one) for one in self.beyond],
            "only_in_replay": list(self.only_in_replay),
        }


def compare_figures(original: Records, replay: Records, tolerance: float) -> Comparison:
    """Everything in the original's records against the replay's, but what NOT_COMPARED names."""
    found: list[FigureDifference] = []
    only_in_replay: set[str] = set()
    for epoch in sorted({*original, *replay}, key=lambda epoch: math.inf if epoch is None else epoch):
        if epoch not in original or epoch not in replay:
            there, here = ("there" if epoch in records else MISSING for records in (original, replay))
            found.append(FigureDifference(epoch, "the whole record", there, here, math.inf))
            continue
        before, after = dict(_leaves(original[epoch])), dict(_leaves(replay[epoch]))
        only_in_replay |= after.keys() - before.keys()
        for name, value in before.items():
            again = after.get(name, MISSING)
            found.append(FigureDifference(epoch, name, value, again, _size(value, again)))
    return Comparison(
        num_figures=len(found),
        tolerance=tolerance,
        beyond=tuple(one for one in found if one.size > tolerance),
        largest=max(found, key=lambda one: one.size, default=None),
        only_in_replay=tuple(sorted(only_in_replay)),
    )


def _leaves(record: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """``validation/per_class/sadly angry/f1`` and its value, for everything in a record that is compared."""
    if isinstance(record, dict):
        for key, value in record.items():
            if key not in NOT_COMPARED:
                yield from _leaves(value, f"{path}/{key}" if path else str(key))
    elif isinstance(record, list):
        for index, value in enumerate(record):
            named = value if isinstance(value, dict) else {}
            yield from _leaves(value, f"{path}/{named.get('emotion', named.get('action_unit', index))}")
    else:
        yield path, record


def _size(original: Any, replay: Any) -> float:
    if isinstance(original, int | float) and isinstance(replay, int | float):
        return abs(original - replay) / max(1.0, abs(original), abs(replay))
    return 0.0 if original == replay else math.inf


def shown(value: Any) -> str:
    """A figure for people."""
    return f"{value:.6g}" if isinstance(value, float) else "undefined" if value is None else str(value)
