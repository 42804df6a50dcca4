"""A study's folder: ``study.json``, ``trials/NAME/`` (each a run folder) and Ray Tune's own files in ``ray/``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rafce_ray.base.console import pretty_json, to_json
from rafce_ray.base.errors import UsageError
from rafce_ray.base.storage import Location, locate
from rafce_ray.config import ConfigError, parse_yaml
from rafce_ray.run.folder import TRIALS, RunFolder


@dataclass(frozen=True)
class StudyFolder:
    """A study's folder, by path or URI."""

    place: str

    @cached_property
    def location(self) -> Location:
        """Where the folder is."""
        return locate(self.place)

    @property
    def trials(self) -> Location:
        """Folder of the trials' run folders."""
        return self.location / TRIALS

    def exists(self) -> bool:
        """Whether a study was started here."""
        return (self.location / "study.json").exists()

    def claim(self, plan: dict[str, Any]) -> None:
        """Start a study here, or go on with the one of this plan. The mappings under ``may_grow`` may get more entries.

        Raises:
            UsageError: the folder holds another study.
        """
        (self.location / "study.json").write_bytes(pretty_json(self.check(plan)))

    def check(self, plan: dict[str, Any]) -> dict[str, Any]:
        """What :meth:`claim` would write, nothing written; UsageError where the folder holds another study."""
        if not self.exists():
            return plan
        before, now = self.plan(), json.loads(to_json(plan))
        grown = {key: {**before["may_grow"].get(key, {}), **value} for key, value in now["may_grow"].items()}
        changed = {key: (before.get(key), now[key]) for key in now if key != "may_grow" and before.get(key) != now[key]}
        for key, entries in now["may_grow"].items():
            there = before["may_grow"].get(key, {})
            changed |= {
                f"{key}/{name}": (there[name], value)
                for name, value in entries.items()
                if there.get(name, value) != value
            }
        if changed:
            lines = "\n".join(f"  {key}: {_differing(*values)}" for key, values in sorted(changed.items()))
            raise UsageError(
                f"{self.location} holds a study that differs:\n{lines}\nChoose another name, or give the same values "
                "to go on with it."
            )
        return {**now, "may_grow": grown}

    def plan(self) -> dict[str, Any]:
        """What the study is. DamagedFile where that cannot be read."""
        return (self.location / "study.json").read_record(
            "The study's command then writes it again and goes on with the trials that are there.", keys=("may_grow",)
        )

    def settings(self) -> dict[str, Any] | None:
        """``study.yaml``, as it was resolved; None without one, as in an ablation. DamagedFile if it cannot be read."""
        file = self.location / "study.yaml"
        try:
            values = parse_yaml(file.read_bytes(), file.name)
            if not isinstance(values, dict):
                raise ValueError(f"it holds a {type(values).__name__}, expected keys")
            return values
        except FileNotFoundError:
            return None
        except (ConfigError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise file.damaged(reason, "The study's command then writes it again.") from None

    def weights(self) -> dict[str, str]:
        """What ``model.weights=auto`` means in this study, by backbone; empty before its first start."""
        try:
            return (self.location / "weights.json").read_record("The study's command then finds them again.")
        except FileNotFoundError:
            return {}

    def write_weights(self, weights: Mapping[str, str]) -> None:
        """Keep what ``model.weights=auto`` means, so that trials of a later start begin from the same."""
        if weights:
            (self.location / "weights.json").write_bytes(pretty_json({**self.weights(), **weights}))

    def trial(self, name: str) -> RunFolder:
        """The run folder of a trial."""
        return RunFolder(str(self.trials / name))

    def trial_names(self) -> list[str]:
        """Names of all trials that were started, sorted."""
        return [
            info.base_name for info in self.trials.list() if (self.trials / info.base_name / "config.yaml").exists()
        ]


def _differing(before: Any, now: Any) -> str:
    """What differs between two values, key by key where both are mappings."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return "; ".join(f"{key} {_differing(before.get(key), now.get(key))}" for key in keys)
    return f"{before!r} there, {now!r} here"
