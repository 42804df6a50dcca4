"""What the doctor looks at: all that is on record of a run, from its folder or while it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from rafce_ray.base.console import finite, warn
from rafce_ray.base.errors import DamagedFile
from rafce_ray.base.figures import monitor_for
from rafce_ray.base.storage import locate
from rafce_ray.base.taxonomy import Taxonomy, make_taxonomy, parse_action_unit_token
from rafce_ray.config import Config
from rafce_ray.metrics.calibration import Calibration
from rafce_ray.metrics.split_outputs import SplitOutputs
from rafce_ray.run.folder import TRIALS, RunFolder


@dataclass(frozen=True)
class Evidence:
    """A run as it is on record. What is not known is None or empty; numbers that are undefined are None, never NaN.

    ``place`` is the run folder. ``records`` are its epochs, ``outputs`` the finished model's raw outputs on validation, ``calibration``
    that of its bundle. ``baseline``: the emotion-only run to compare with. ``next_name`` and ``next_storage``: where the next run goes.
    """

    config: Config
    records: list[dict[str, Any]]
    events: list[dict[str, Any]] = field(default_factory=list)
    audit: dict[str, Any] | None = None
    targets: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    outputs: SplitOutputs | None = None
    calibration: Calibration | None = None
    provenance: dict[str, Any] | None = None
    baseline: Evidence | None = None
    name: str = "run"
    place: str = ""
    next_name: str = "run-next"
    next_storage: str | None = None

    @classmethod
    def of_run(cls, folder: RunFolder, baseline: Evidence | None = None) -> Evidence:
        """All that a run folder tells."""
        location, config, result = folder.location, folder.config(), folder.result()
        provenance = location / "provenance.json"
        name = location.name
        around = location.parent
        storage = around.parent.parent if around.name == TRIALS else around
        return cls(
            config=config,
            records=folder.metrics(),
            events=folder.events(),
            audit=folder.audit(),
            targets=folder.targets(),
            result=result,
            # A run that was killed before its result has no figures that go with them.
            outputs=None if result is None else folder.outputs("validation"),
            calibration=None if result is None else _calibration(folder),
            provenance=folder.provenance() if provenance.exists() else None,
            baseline=baseline,
            name=name,
            place=str(location),
            next_name=storage.free_name(f"{name}-next"),
            next_storage=str(storage),
        )

    @classmethod
    def of_training(
        cls,
        config: Config,
        targets: dict[str, Any] | None,
        audit: dict[str, Any] | None,
        records: Sequence[dict[str, Any]],
    ) -> Evidence:
        """A run that is still in training."""
        name = config.run.name or "run"
        return cls(
            config=config,
            records=finite(list(records)),
            audit=finite(audit),
            targets=targets,
            name=name,
            place=str(locate(config.run.storage) / name),
            next_name=f"{name}-next",
        )

    @property
    def is_trial(self) -> bool:
        """Whether the run belongs to a study, which it must not outgrow."""
        return locate(self.place).parent.name == TRIALS

    @property
    def ended(self) -> bool:
        """Whether training is over, in whatever way."""
        return self.result is not None

    @property
    def status(self) -> str | None:
        """``finished``, ``stopped_early`` or ``diverged``; None before the end."""
        return None if self.result is None else str(self.result["status"])

    @property
    def metrics(self) -> dict[str, Any]:
        """The finished bundle's figures on validation; empty where there is no bundle."""
        return (self.result or {}).get("metrics") or {}

    @property
    def last(self) -> dict[str, Any]:
        """The last epoch's record; empty before the first."""
        return self.records[-1] if self.records else {}

    @property
    def best(self) -> dict[str, Any]:
        """The record of the epoch that the bundle holds, or would; the last one where none is the best."""
        number = self.last.get("best_epoch") if self.result is None else self.result.get("best_epoch")
        return next((record for record in self.records if record["epoch"] == number), self.last)

    @property
    def emotions(self) -> tuple[str, ...]:
        """Classes that are trained; empty where emotions are not."""
        if self.targets is not None:
            return tuple(self.targets["train"]["classes"])
        return tuple(entry["emotion"] for entry in self.last.get("validation", {}).get("per_class", ()))

    @property
    def action_units(self) -> tuple[str, ...]:
        """Codes of the action units that are trained; empty where they are not."""
        if self.targets is not None:
            return tuple(self.targets["train"]["action_units"])
        return tuple(entry["action_unit"] for entry in self.last.get("validation", {}).get("per_au", ()))

    @property
    def taxonomy(self) -> Taxonomy:
        """What is trained, with the components of classes that are known by name."""
        numbers = [parse_action_unit_token(code) for code in self.action_units]
        return make_taxonomy(self.emotions, tuple(number for number in numbers if number is not None))

    @property
    def monitor(self) -> str:
        """The metric that chooses the best epoch."""
        if self.result is not None:
            return str(self.result["monitor"])
        return monitor_for(
            self.config.optim.monitor, emotions=bool(self.emotions), action_units=bool(self.action_units)
        )

    @property
    def labelled_positives(self) -> int | None:
        """Positive action units in the train rows of the labels; None where nobody looked."""
        if self.audit is None:
            return None
        return _positives(self.audit["splits"]["train"])

    @property
    def train_positives(self) -> int | None:
        """Positive AU targets that training sees; without targets.json at least as many as are certain, None where none is."""
        if self.targets is not None:
            return _positives(self.targets["train"])
        if self.config.data.action_unit_targets == "all_zero":
            return 0
        if self.labelled_positives is not None:
            return self.labelled_positives
        seen = sum(entry["support"] for entry in self.last.get("train_natural", {}).get("per_au", ()))
        return seen or None

    def series(self, path: str) -> list[float]:
        """A figure of every epoch, NaN where undefined."""
        return [figure(record, path) for record in self.records]


def figure(record: Mapping[str, Any], path: str) -> float:
    """The number at a dotted path (``validation.accuracy``) of a record; NaN where it is missing or undefined."""
    value: Any = record
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else math.nan


def bounds(figures: Mapping[str, Any], name: str) -> tuple[float, float]:
    """The 95 % interval of a figure; NaN where unknown."""
    low, high = figures.get("intervals", {}).get(name) or (None, None)
    return (math.nan if low is None else float(low), math.nan if high is None else float(high))


def _positives(split: Mapping[str, Any]) -> int:
    return sum(int(entry["positives"]) for entry in split["action_units"].values())


def _calibration(folder: RunFolder) -> Calibration | None:
    """The calibration of the run's bundle; None without a bundle, and, with a warning, if its manifest is damaged."""
    try:
        manifest = (folder.bundle / "bundle.json").read_record(
            "Then rules about calibration are left out.", keys=("calibration",)
        )
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        warn(str(error))
        return None
    return TypeAdapter(Calibration).validate_python(manifest["calibration"])
