"""Make a version live when it passes its gates, or roll back to the one before. A refusal changes nothing."""

from __future__ import annotations

import getpass
import socket
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from rafce_ray.base.errors import GateError, UsageError
from rafce_ray.base.storage import Location
from rafce_ray.bundle.bundle import Bundle, BundleError, find_bundle
from rafce_ray.bundle.engines import EngineChoice
from rafce_ray.registry.gates import damaged, examine, verify
from rafce_ray.registry.live import Gate, LiveRecord, read_live, replace_live
from rafce_ray.registry.versions import add_version, is_name, version_folder, version_names

MAX_WHY = 500
"""Characters of a reason, which is one line of the history."""


def this_person() -> str:
    """Who runs this program, where: ``user@host``."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


@dataclass(frozen=True)
class Reason:
    """Why something becomes live, and who says so. ``force``: gates that may be overruled are; that needs a ``why``."""

    why: str | None = None
    force: bool = False
    by: str = field(default_factory=this_person)

    def __post_init__(self) -> None:
        if self.why is not None and not (0 < len(self.why.strip()) <= MAX_WHY and self.why.isprintable()):
            raise UsageError(f"why: give one line of 1 to {MAX_WHY} printable characters.")
        if self.force and self.why is None:
            needed = "overruling a gate needs its reason, which stays in the history; give why (--why TEXT) as well."
            raise UsageError(f"force: {needed}")


@dataclass(frozen=True)
class Rules:
    """How gates measure. ``max_latency_ratio``: times the live version's ms per face that a candidate may take."""

    max_latency_ratio: float = 1.5
    engine: EngineChoice = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.max_latency_ratio < float("inf"):
            raise UsageError(f"max_latency_ratio {self.max_latency_ratio}: give a number above 0.")


class Refused(GateError):
    """Gates refused ``version`` (None: a bundle that was not even added); ``gates`` are all that were checked."""

    def __init__(self, message: str, version: str | None, gates: tuple[Gate, ...]) -> None:
        super().__init__(message)
        self.version = version
        self.gates = gates


@dataclass(frozen=True)
class Outcome:
    """The live version, and whether it has changed; False where it was live already."""

    live: LiveRecord
    changed: bool


def take_candidate(registry: Location, source: str, name: str | None = None) -> tuple[str, bool]:
    """The version that ``source`` names, or the bundle at this place added as one; and whether it was added now.

    Refused where the bundle may not be used; UsageError where ``source`` is neither, or the name cannot be given.
    """
    if is_name(source) and source in version_names(registry):
        if name is not None:
            found = f"{source!r} is a version already and keeps its name"
            raise UsageError(f"{found}; --as names a bundle that is added. Write ./{source} for a folder.")
        return source, False
    try:
        place = find_bundle(source)
    except BundleError as error:
        known = ", ".join(version_names(registry)) or "none"
        found = f"{source!r} is no version of {registry.shown} (there are: {known})"
        raise UsageError(f"{found}, and as a place: {error}") from None
    try:
        return add_version(registry, place.uri, name)
    except BundleError as error:
        raise _refusal(registry, None, (damaged(error),)) from None


def promote(registry: Location, version: str, reason: Reason, rules: Rules) -> Outcome:
    """Make a version live that passes its gates, or whose gates are overruled.

    Refused where a gate refuses, GateError where another program made a change meanwhile, UsageError where there is no
    such version.
    """
    folder = version_folder(registry, version)
    seen = read_live(registry)
    if seen is not None and seen.version == version:
        return Outcome(seen, changed=False)
    live = None if seen is None else version_folder(registry, seen.version)
    gates, bundle = examine(folder, live, max_latency_ratio=rules.max_latency_ratio, engine=rules.engine)
    why, before = ("the first version", ()) if seen is None else ("every gate passed", (seen.version, *seen.before))
    return _make_live(registry, seen, "promote", bundle, reason, why, gates, (version, *before))


def roll_back(registry: Location, reason: Reason, rules: Rules) -> Outcome:
    """Roll back to the version before; a second rollback goes to the one before that.

    The only checks are that the version is whole and answers as stored: it was live once, and the present one is
    wrong. Refused where it is damaged; UsageError where there is no version before.
    """
    seen = read_live(registry)
    if seen is None or not seen.before:
        what = "nothing is live" if seen is None else f"nothing was live before {seen.version}"
        remedy = "Promote a version by its name instead."
        raise UsageError(f"{registry.shown}: {what}, so there is nothing to go back to. {remedy}")
    gates, predictor = verify(version_folder(registry, seen.before[0]), rules.engine)
    bundle, why = None if predictor is None else predictor.bundle, f"rolled back from {seen.version}"
    return _make_live(registry, seen, "rollback", bundle, reason, why, gates, seen.before)


def _make_live(
    registry: Location,
    seen: LiveRecord | None,
    action: Literal["promote", "rollback"],
    bundle: Bundle | None,
    reason: Reason,
    why: str,
    gates: tuple[Gate, ...],
    versions: tuple[str, ...],
) -> Outcome:
    """Make the first of ``versions`` live, from which further rollbacks go to the others; Refused by its gates.

    ``why``: the reason where none was given.
    """
    refusing = [gate for gate in gates if gate.verdict == "refused"]
    if bundle is None or any(not (reason.force and gate.may_be_overruled) for gate in refusing):
        raise _refusal(registry, versions[0], gates)
    new = LiveRecord(
        number=1 if seen is None else seen.number + 1,
        action=action,
        sha256=bundle.weights_sha256,
        since=datetime.now(UTC),
        why=reason.why or why,
        by=reason.by,
        overruled=tuple(gate.name for gate in refusing),
        gates=gates,
        version=versions[0],
        before=versions[1:],
    )
    replace_live(registry, seen, new)
    return Outcome(new, changed=True)


def _refusal(registry: Location, version: str | None, gates: tuple[Gate, ...]) -> Refused:
    """Why nothing was changed, and what can be done."""
    refusing = [gate for gate in gates if gate.verdict == "refused"]
    said = "\n".join(f"  {gate.name}: {gate.detail}" for gate in refusing)
    what = "the bundle" if version is None else version
    remedy = (
        "No service would serve it, so force does not help: get the bundle again from its source, or choose another."
    )
    if all(gate.may_be_overruled for gate in refusing):
        command = f"rafce bundle promote {registry.command} {version} --force --why TEXT"
        remedy = f"Choose another version, or overrule with: {command}"
    return Refused(f"{what} was not made live, and nothing was changed:\n{said}\n{remedy}", version, gates)
