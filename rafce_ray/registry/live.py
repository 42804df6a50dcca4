"""Which version is live, since when and why: ``live.json``; all such records ever written are in ``history/``."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from rafce_ray.base.claim import SILENT_S, held
from rafce_ray.base.console import pretty_json
from rafce_ray.base.errors import GateError, RafceError
from rafce_ray.base.storage import Location, StorageError

LIVE = "live.json"
HISTORY = "history"

PATIENCE_S = 1.5 * SILENT_S
"""Seconds to wait for another program's change: longer than the claim of a program that died lasts."""

GateName = Literal["integrity", "canary", "taxonomy", "metrics", "latency"]
Verdict = Literal["passed", "refused", "nothing to compare with"]


class Gate(BaseModel, frozen=True, extra="forbid"):
    """One check of a version before it becomes live; ``figures`` has the numbers of ``detail`` for programs."""

    name: GateName
    verdict: Verdict
    detail: str
    figures: dict[str, Any] = Field(default_factory=dict)

    @property
    def may_be_overruled(self) -> bool:
        """Whether force helps: no service serves a bundle that is damaged or whose answers have changed."""
        return self.name not in ("integrity", "canary")


class LiveRecord(BaseModel, frozen=True, extra="forbid"):
    """One change of the live version.

    ``number`` counts the changes from 1. ``sha256``: of the version's weights. ``by``: who made the change.
    ``overruled``: names of gates that refused. ``before``: the versions of further rollbacks, the next one first.
    """

    format_version: Literal[1] = 1
    number: int = Field(ge=1)
    action: Literal["promote", "rollback"]
    version: str
    sha256: str
    since: datetime
    why: str
    by: str
    overruled: tuple[str, ...]
    gates: tuple[Gate, ...]
    before: tuple[str, ...]

    @property
    def may_change_taxonomy(self) -> bool:
        """Whether this change may replace the names of classes: the gate was overruled, or it is a rollback."""
        return self.action == "rollback" or "taxonomy" in self.overruled


def read_live(registry: Location) -> LiveRecord | None:
    """The live version; None where there never was one. RafceError where ``live.json`` cannot be read."""
    return _read(registry / LIVE)


def read_history(registry: Location) -> list[LiveRecord]:
    """Every change of the live version, the oldest first. RafceError where one cannot be read."""
    # Before the listing: a version that becomes live meanwhile is then in neither or in both.
    live = read_live(registry)
    folder = registry / HISTORY
    names = [info.base_name for info in folder.list() if info.is_file and not info.base_name.startswith(".")]
    records = list(filter(None, (_read(folder / name) for name in names)))
    # A program that died between its two writes left the newest change in live.json alone.
    if live is not None and live not in records:
        records.append(live)
    return sorted(records, key=lambda record: record.number)


def replace_live(registry: Location, seen: LiveRecord | None, new: LiveRecord) -> None:
    """Make ``new`` live, provided that ``seen`` still is; readers see the one or the other.

    Nothing is changed where it raises GateError (another program made a change meanwhile; the message says which) or
    RafceError (other programs hold the registry for long, or the storage took too long).
    """
    with held(registry, patience_s=PATIENCE_S) as check:
        now = read_live(registry)
        if now is None and seen is not None:
            raise GateError(
                f"{registry.shown}: {LIVE} was removed meanwhile. Nothing was changed; find out who did it."
            )
        if now is not None and now != seen:
            raise GateError(
                f"{registry.shown}: {now.by} made {now.version} live meanwhile ({now.action} number {now.number}, "
                f"{now.since:%Y-%m-%d %H:%M:%S} UTC: {now.why}), so this was checked against a version that is no "
                f"longer live. Nothing was changed; give the command again to check against {now.version}."
            )
        if now is not None:
            _remember(registry, now)
        check()
        # A long retry might overwrite the change of a program that came after the claim had ended.
        (registry / LIVE).write_bytes(pretty_json(new.model_dump(mode="json")), patient=False)
        _remember(registry, new)


def _remember(registry: Location, record: LiveRecord) -> None:
    """Append a change to the history, unless it is there."""
    file = registry / HISTORY / f"{record.number:06d}-{record.action}-{record.version}.json"
    if not file.exists():
        file.write_bytes(pretty_json(record.model_dump(mode="json")))


def _read(file: Location) -> LiveRecord | None:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    except StorageError:
        raise
    except OSError as error:
        raise RafceError(f"{file.shown}: cannot be read ({error}). Check the storage.") from None
    try:
        return LiveRecord.model_validate_json(content)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"])) or "the file"
        raise RafceError(
            f"{file.shown}: {place}: {fault['msg']}. It was altered, or written by another version of rafce_ray: "
            f"restore it from its copy in {HISTORY}/, or use that version."
        ) from None
