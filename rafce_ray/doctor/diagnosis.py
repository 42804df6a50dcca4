"""What the doctor finds of a run (``Diagnosis``), and the commands that carry out its remedies."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rafce_ray.config import Config, flatten, parse_yaml
from rafce_ray.data import audit_checks
from rafce_ray.data.table import TABLE_EXTENSIONS
from rafce_ray.doctor.evidence import Evidence
from rafce_ray.errors import Finding, Level
from rafce_ray.storage import locate

Verdict = Literal["confirmed", "ruled out", "possible", "unknown"]


@dataclass(frozen=True)
class Cause:
    """One possible cause: what may be wrong, the verdict, and the evidence for it."""

    text: str
    verdict: Verdict
    evidence: str


@dataclass(frozen=True)
class Diagnosis(Finding):
    """A finding of a run: ``message`` holds the numbers, ``causes`` come in the order to look at them.

    ``patch`` maps dotted configuration keys to the values of the next run; empty where no setting mends it. ``command`` runs that
    next run, or shows the data; empty where there is nothing to run.
    """

    causes: tuple[Cause, ...] = ()
    patch: dict[str, Any] = field(default_factory=dict)
    command: str = ""

    @property
    def headline(self) -> str:
        """One line: what was seen, and the first sentence of the remedy."""
        return f"{self.message} {re.split(r'(?<=[.]) (?=[A-Z])', self.remedy, maxsplit=1)[0]}"

    def to_json(self) -> dict[str, Any]:
        """Plain values under the names that ``rafce doctor --json`` has had from the start."""
        return {
            "code": self.code,
            "level": self.level,
            "seen": self.message,
            "causes": [asdict(cause) for cause in self.causes],
            "advice": self.remedy,
            "patch": self.patch,
            "command": self.command,
        }


def diagnose(
    evidence: Evidence,
    code: str,
    level: Level,
    message: str,
    *,
    remedy: str,
    causes: Sequence[Cause] = (),
    patch: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> Diagnosis:
    """A diagnosis whose command, unless given, trains with the patch; what the configuration says already is left out of the patch."""
    changes = changes_of(evidence.config, patch or {})
    if command is None:
        command = train_command(evidence, changes) if changes else ""
    return Diagnosis(level, code, message, remedy, causes=tuple(causes), patch=changes, command=command)


def changes_of(config: Config, patch: Mapping[str, Any]) -> dict[str, Any]:
    """What a patch changes in a configuration: without what it says already."""
    current = flatten(config)
    return {key: value for key, value in patch.items() if current[key] != value}


def train_command(evidence: Evidence, patch: Mapping[str, Any], *, name: str | None = None) -> str:
    """``rafce train`` with this run's configuration and the patch, as the next run, quoted for a shell."""
    return _command(evidence, patch, evidence.next_storage, name or evidence.next_name)


def resume_command(evidence: Evidence, patch: Mapping[str, Any]) -> str | None:
    """``rafce train --resume``: the run itself goes on, which it may with more epochs or patience; None where it cannot from here.

    A trial must not outgrow its study, and a run is resumed with the data.root that it was started with.
    """
    if evidence.is_trial or _moved_root(evidence) is not None:
        return None
    folder = locate(evidence.place)
    return _command(evidence, patch, str(folder.parent), folder.name) + " --resume"


def audit_command(evidence: Evidence) -> str:
    """The command that shows what is in the labels."""
    return audit_checks.audit_command(evidence.config.data, _found_root(evidence))


def _command(evidence: Evidence, patch: Mapping[str, Any], storage: str | None, name: str) -> str:
    config, values = evidence.config, dict(patch)
    if (root := _moved_root(evidence)) is not None:
        values["data.root"] = root
    if storage is not None and str(locate(config.run.storage)) != storage:
        values["run.storage"] = storage
    if config.run.name != name:
        values["run.name"] = name
    if locate(evidence.place).local is not None:
        start = ["rafce", "train", "--config", (locate(evidence.place) / "config.yaml").shown]
    else:
        # --config reads local files only: everything that is not a default is said instead.
        defaults, current = flatten(Config()), flatten(config)
        values = {key: value for key, value in current.items() if value != defaults[key]} | values
        start = ["rafce", "train"]
    return shlex.join([*start, *(f"{key}={as_yaml(value)}" for key, value in values.items())])


def _moved_root(evidence: Evidence) -> str | None:
    """Where the data are, if data.root does not lead there from here: a relative one is meant from where the run was started."""
    root, found = evidence.config.data.root, _found_root(evidence)
    if root is None or found is None or root == found or locate(root).exists():
        return None
    return found


def _found_root(evidence: Evidence) -> str | None:
    """Where the audit found the data: the folder, or the table in it that data.root names."""
    root, found = evidence.config.data.root, (evidence.audit or {}).get("root")
    name = locate(root).name if root is not None else ""
    if found is None or name.rpartition(".")[2].lower() not in TABLE_EXTENSIONS:
        return found
    return str(locate(found) / name)


def as_yaml(value: Any) -> str:
    """A configuration value as ``section.key=`` takes it: YAML on one line that is read back as the same value."""
    if isinstance(value, str) and re.fullmatch(r"[\w./~:-]+", value) and parse_yaml(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)
