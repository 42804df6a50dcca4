"""Which version is live, since when, why and what was before: ``live.json``; and every such record there ever was, in
``history/``.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rafce_ray.base.claim import SILENT_S, held
from rafce_ray.base.console import pretty_json
from rafce_ray.base.errors import GateError, RafceError
from rafce_ray.base.storage import Location, StorageError

LIVE = "live.json"
HISTORY = "history"

PATIENCE_S = 1.5 * SILENT_S
"""Seconds to wait for another program's change: longer than the claim of a program that died lasts."""

Verdict = Literal["passed", "refused", "nothing to compare with"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Gate(_Record):
    """One check of a version before it becomes live; ``figures`` are what ``detail`` tells, for machines."""

    name: Literal["integrity", "canary", "taxonomy", "metrics", "latency"]
    verdict: Verdict
    detail: str
    figures: dict[str, Any] = Field(default_factory=dict)

    @property
    def may_be_overruled(self) -> bool:
        """Whether force helps: a bundle that is damaged or answers otherwise than when it was made is served by no
        service.
        """
        return self.name not in ("integrity", "canary")


class LiveRecord(_Record):
    """One change of what is live.

    ``number`` counts the changes from 1. ``sha256``: of the version's weights. ``by``: whoever did it. ``overruled``:
    names of gates that said no. ``before``: the versions that a rollback goes back to, the next first.
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
        """Whether this change knowingly put other names in place: overruled, or back to what was there before that."""
        return self.action == "rollback" or "taxonomy" in self.overruled


def read_live(registry: Location) -> LiveRecord | None:
    """What is live; None where nothing ever was.

    Raises:
        RafceError: ``live.json`` cannot be read.
    """
    return _read(registry / LIVE)


def read_history(registry: Location) -> list[LiveRecord]:
    """Every change of what is live, the first one first. RafceError where one cannot be read."""
    # Before the listing: what becomes live meanwhile is then in neither or in both.
    live = read_live(registry)
    folder = registry / HISTORY
    names = [info.base_name for info in folder.list() if info.is_file and not info.base_name.startswith(".")]
    records = [record for name in names if (record := _read(folder / name)) is not None]
    # A program that died between its two writes left the newest change in live.json alone.
    if live is not None and live not in records:
        records.append(live)
    return sorted(records, key=lambda record: record.number)


def replace_live(registry: Location, seen: LiveRecord | None, new: LiveRecord) -> None:
    """Make ``new`` what is live, provided that ``seen`` still is; readers see the one or the other.

    Raises:
        GateError: another program changed what is live meanwhile; it says who and to what. Nothing was changed.
        RafceError: other programs hold the registry for long, or the storage took too long. Nothing was changed.
    """
    with held(registry, patience_s=PATIENCE_S) as check:
        now = read_live(registry)
        if now != seen:
            raise GateError(_overtaken(registry, now))
        if now is not None:
            _remember(registry, now)
        check()
        # Tried again for long, it might overwrite the change of a program that came after the claim had ended.
        (registry / LIVE).write_bytes(_to_bytes(new), patient=False)
        _remember(registry, new)


def _overtaken(registry: Location, now: LiveRecord | None) -> str:
    if now is None:
        return f"{registry.shown}: {LIVE} was removed meanwhile. Nothing was changed; find out who did it."
    return (
        f"{registry.shown}: {now.by} made {now.version} live meanwhile ({now.action} number {now.number}, "
        f"{now.since:%Y-%m-%d %H:%M:%S} UTC: {now.why}), so this was checked against a version that is no longer live. "
        f"Nothing was changed; give the command again to check against {now.version}."
    )


def _remember(registry: Location, record: LiveRecord) -> None:
    """Append a change to the history, unless it is there."""
    file = registry / HISTORY / f"{record.number:06d}-{record.action}-{record.version}.json"
    if not file.exists():
        file.write_bytes(_to_bytes(record))


def _to_bytes(record: LiveRecord) -> bytes:
    return pretty_json(record.model_dump(mode="json"))


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
