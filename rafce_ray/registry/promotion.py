"""Make a version live once it passed its gates, or go back to the one before; whatever is refused changes nothing."""

from __future__ import annotations

import getpass
import socket
from dataclasses import dataclass, field
from datetime import UTC, datetime

from rafce_ray.base.errors import GateError, UsageError
from rafce_ray.base.storage import Location
from rafce_ray.bundle.bundle import BundleError, find_bundle
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
            raise UsageError(
                "force: overruling a gate needs its reason, which stays in the history; give why (--why TEXT) as well."
            )


@dataclass(frozen=True)
class Rules:
    """How gates measure. ``max_latency_ratio``: times the live version's ms per face that a candidate may take."""

    max_latency_ratio: float = 1.5
    engine: EngineChoice = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.max_latency_ratio < float("inf"):
            raise UsageError(f"max_latency_ratio {self.max_latency_ratio}: give a number above 0.")


class Refused(GateError):
    """Gates said no: of ``version`` (None: a bundle that was not even added), with all ``gates`` that were asked."""

    def __init__(self, message: str, version: str | None, gates: tuple[Gate, ...]) -> None:
        super().__init__(message)
        self.version = version
        self.gates = gates


@dataclass(frozen=True)
class Outcome:
    """What is live now, and whether that is new; False where the version was live already."""

    live: LiveRecord
    changed: bool


def take_candidate(registry: Location, source: str, name: str | None = None) -> tuple[str, bool]:
    """The version that ``source`` names, or the bundle at this place added as one; and whether it was added now.

    Raises:
        Refused: the bundle may not be used.
        UsageError: ``source`` is neither, or the name cannot be given.
    """
    if is_name(source) and source in version_names(registry):
        if name is not None:
            raise UsageError(
                f"{source!r} is a version already and keeps its name; --as names a bundle that is added. Write "
                f"./{source} for a folder."
            )
        return source, False
    try:
        place = find_bundle(source)
    except BundleError as error:
        known = ", ".join(version_names(registry)) or "none"
        raise UsageError(
            f"{source!r} is no version of {registry.shown} (there are: {known}), and as a place: {error}"
        ) from None
    try:
        return add_version(registry, place.uri, name)
    except BundleError as error:
        raise _refusal(registry, None, (damaged(error),)) from None


def promote(registry: Location, version: str, reason: Reason, rules: Rules) -> Outcome:
    """Make a version live that passes its gates, or whose gates are overruled.

    Raises:
        Refused: a gate said no.
        GateError: another program changed what is live meanwhile.
        UsageError: there is no such version.
    """
    folder = version_folder(registry, version)
    seen = read_live(registry)
    if seen is not None and seen.version == version:
        return Outcome(seen, changed=False)
    live = None if seen is None else version_folder(registry, seen.version)
    gates, bundle = examine(folder, live, max_latency_ratio=rules.max_latency_ratio, engine=rules.engine)
    refusing = [gate for gate in gates if gate.verdict == "refused"]
    if bundle is None or any(not (reason.force and gate.may_be_overruled) for gate in refusing):
        raise _refusal(registry, version, gates)
    new = LiveRecord(
        number=1 if seen is None else seen.number + 1,
        action="promote",
        version=version,
        sha256=bundle.weights_sha256,
        since=datetime.now(UTC),
        why=reason.why or ("the first version" if seen is None else "every gate passed"),
        by=reason.by,
        overruled=tuple(gate.name for gate in refusing),
        gates=gates,
        before=() if seen is None else (seen.version, *seen.before),
    )
    replace_live(registry, seen, new)
    return Outcome(new, changed=True)


def roll_back(registry: Location, reason: Reason, rules: Rules) -> Outcome:
    """Make live again what was before; again, and it is what was before that.

    Only whether the version is whole and answers as stored is asked: it was live, and something is wrong with what is
    now.

    Raises:
        Refused: it is not whole any more.
        UsageError: there is nothing to go back to.
    """
    seen = read_live(registry)
    if seen is None or not seen.before:
        what = "nothing is live" if seen is None else f"nothing was live before {seen.version}"
        raise UsageError(
            f"{registry.shown}: {what}, so there is nothing to go back to. Promote a version by its name instead."
        )
    version = seen.before[0]
    gates, predictor = verify(version_folder(registry, version), rules.engine)
    if predictor is None or any(gate.verdict == "refused" for gate in gates):
        raise _refusal(registry, version, gates)
    new = LiveRecord(
        number=seen.number + 1,
        action="rollback",
        version=version,
        sha256=predictor.bundle.weights_sha256,
        since=datetime.now(UTC),
        why=reason.why or f"rolled back from {seen.version}",
        by=reason.by,
        overruled=(),
        gates=gates,
        before=seen.before[1:],
    )
    replace_live(registry, seen, new)
    return Outcome(new, changed=True)


def _refusal(registry: Location, version: str | None, gates: tuple[Gate, ...]) -> Refused:
    """Why nothing was changed, and what can be done."""
    refusing = [gate for gate in gates if gate.verdict == "refused"]
    said = "\n".join(f"  {gate.name}: {gate.detail}" for gate in refusing)
    what = "the bundle" if version is None else version
    if all(gate.may_be_overruled for gate in refusing):
        remedy = (
            f"Choose another version, or overrule with: rafce bundle promote {registry.command} {version} "
            "--force --why TEXT"
        )
    else:
        remedy = (
            "No service would serve it, so force does not help: get the bundle again from its source, or choose "
            "another."
        )
    return Refused(f"{what} was not made live, and nothing was changed:\n{said}\n{remedy}", version, gates)
