"""The folder of a run: configuration, provenance, audit, targets, epochs, events, checkpoints, result, bundle, report.

Raw outputs of the finished model are kept there too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rafce_ray.base.console import pretty_json, to_json, warn
from rafce_ray.base.errors import DamagedFile, RafceError, UsageError
from rafce_ray.base.storage import Location, StorageError, locate
from rafce_ray.config import Config, ConfigError, build_config, parse_yaml, to_yaml
from rafce_ray.metrics.calibration import SplitOutputs

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
PROGRESS_FILE = "progress.json"

STARTED_AGAIN = "The command that trained the run then writes it again and goes on from the newest checkpoint."

TRIALS = "trials"
"""Folder of a study that holds its run folders."""


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, by path or URI. Only rank 0 of a run writes to it; anyone may read."""

    place: str

    @cached_property
    def location(self) -> Location:
        """Where the folder is."""
        return locate(self.place)

    @cached_property
    def study(self) -> str | None:
        """Name of the study whose trial the run is; None for a run outside of a study."""
        above = self.location.parent
        return above.parent.name if above.name == TRIALS else None

    @property
    def label(self) -> str:
        """The run's name next to runs of other studies: ``NAME``, or ``STUDY/NAME`` for a trial."""
        return self.location.name if self.study is None else f"{self.study}/{self.location.name}"

    @property
    def checkpoints(self) -> Location:
        """Folder of checkpoints."""
        return self.location / "checkpoints"

    @property
    def bundle(self) -> Location:
        """The finished run's bundle: its best epoch."""
        return self.location / "bundle"

    def exists(self) -> bool:
        """Whether a run was started here."""
        return (self.location / "config.yaml").exists()

    def start(self, config: Config, provenance: dict[str, Any], audit: dict[str, Any]) -> None:
        """Record the run and the audit of its data, before any work.

        The configuration goes last: with it, a run exists.
        """
        (self.location / "audit.json").write_bytes(pretty_json(audit))
        (self.location / "provenance.json").write_bytes(pretty_json(provenance))
        (self.location / "config.yaml").write_bytes(to_yaml(config).encode())

    def audit(self) -> dict[str, Any] | None:
        """The findings in the labels before training; None without an audit."""
        return self._read("audit.json")

    def write_targets(self, targets: dict[str, Any]) -> None:
        """Record what training sees: per split, its images, classes and action units."""
        (self.location / "targets.json").write_bytes(pretty_json(targets))

    def targets(self) -> dict[str, Any] | None:
        """What :meth:`write_targets` wrote; None before training has started."""
        return self._read("targets.json")

    def write_outputs(self, split: str, outputs: SplitOutputs) -> None:
        """Keep the finished model's raw outputs on a split."""
        (self.location / f"outputs_{split}.parquet").write_bytes(outputs.to_parquet())

    def outputs(self, split: str) -> SplitOutputs | None:
        """The finished model's raw outputs on a split; None where they were not kept."""
        file = self.location / f"outputs_{split}.parquet"
        try:
            return SplitOutputs.from_parquet(file.read_bytes())
        except FileNotFoundError:
            return None
        except StorageError:
            raise
        except RafceError as error:
            raise file.damaged(str(error).rstrip("."), "What needs it then says so.") from None

    def config(self) -> Config:
        """The stored configuration; DamagedFile where it cannot be read, or a section is missing."""
        file = self.location / "config.yaml"
        content = file.read_bytes()
        try:
            values = parse_yaml(content, file.name)
            if missing := [name for name in Config.model_fields if name not in (values or {})]:
                raise ValueError(f"section {missing[0]!r} is missing")
            return build_config(values)
        except (ConfigError, ValueError, TypeError) as error:
            raise file.damaged(" ".join(str(error).split()).rstrip("."), STARTED_AGAIN) from None

    def provenance(self) -> dict[str, Any]:
        """The run's origin (data fingerprint, configuration, versions, commit, seed); DamagedFile if unreadable."""
        file = self.location / "provenance.json"
        try:
            return file.read_record("")
        except DamagedFile as error:
            found = str(error).partition(" Remove it: ")[0]
            both = f"{file.command} {(self.location / 'config.yaml').command}"
            raise DamagedFile(f"{found} Remove both: rm {both}\n{STARTED_AGAIN}") from None

    def result(self) -> dict[str, Any] | None:
        """The finished run's result; None while it has none; DamagedFile where it cannot be read."""
        file = self.location / "result.json"
        try:
            return file.read_record("The command that trained it then ends it again.", keys=("status",))
        except FileNotFoundError:
            return None

    def write_result(self, result: dict[str, Any]) -> None:
        """Mark the run as ended."""
        (self.location / "result.json").write_bytes(pretty_json(result))

    def has_trained(self) -> bool:
        """Whether a step was trained here; if not, another run may take the folder."""
        # Progress that cannot be read counts too.
        has_progress = (self.location / PROGRESS_FILE).exists()
        return bool(has_progress or self.metrics() or self.checkpoints.list()) or self.result() is not None

    def forget(self) -> None:
        """Free the name of a run that has not trained; its event log stays."""
        (self.location / "config.yaml").delete()

    def reopen(self) -> None:
        """Remove a finished run's result and bundle, so that it can continue; checkpoints and metrics stay."""
        (self.location / "result.json").delete()
        self.bundle.delete()

    def metrics(self) -> list[dict[str, Any]]:
        """One record per epoch, in order; DamagedFile where a line cannot be read."""
        return (self.location / METRICS_FILE).read_records("Of that epoch nothing is known then; all others stay.")

    def stamp(self, file: str) -> tuple[int | None, int | None]:
        """Size and modification time of one of the run's files, to see whether it has changed."""
        info = (self.location / file).info()
        return info.size, info.mtime_ns

    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        """Replace the epoch records (a resume drops those after its checkpoint)."""
        (self.location / METRICS_FILE).write_bytes("".join(to_json(record) + "\n" for record in records).encode())

    def events(self) -> list[dict[str, Any]]:
        """The events in order; DamagedFile where a line cannot be read."""
        return (self.location / EVENTS_FILE).read_records("All other events stay.")

    def add_event(self, kind: str, **details: Any) -> None:
        """Append one event to the run's log; ``message`` in ``details`` is the text for people.

        The log is ``events.jsonl``, one JSON object per line, for log collectors: ``time`` (Unix, seconds), ``run``
        (the folder's name), ``study`` for a trial, ``event`` (started, resumed, warning, finding, invalid_checkpoint,
        hung_worker, ...), and the event's own fields. Figures are in ``metrics.jsonl``, one line per epoch. The
        terminal shows messages as they come.
        """
        who = {"run": self.location.name} | ({} if self.study is None else {"study": self.study})
        line = to_json({"time": round(time.time(), 3), **who, "event": kind, **details}) + "\n"
        file = self.location / EVENTS_FILE
        if file.local is None:
            earlier = file.read_bytes() if file.exists() else b""
            file.write_bytes(earlier + line.encode())
            return
        file.local.parent.mkdir(parents=True, exist_ok=True)
        with file.local.open("a", encoding="utf-8") as stream:
            stream.write(line)

    def write_progress(self, progress: dict[str, Any]) -> None:
        """Record the position inside the epoch, for those who watch."""
        (self.location / PROGRESS_FILE).write_bytes(to_json(progress).encode())

    def progress(self) -> dict[str, Any]:
        """The last progress; empty before the first or where it cannot be read, since the next step rewrites it."""
        try:
            return (self.location / PROGRESS_FILE).read_record("", keys=("epoch", "step", "steps"))
        except (FileNotFoundError, DamagedFile):
            return {}

    def _read(self, name: str) -> dict[str, Any] | None:
        """An optional file; None, with a warning, where it cannot be read."""
        try:
            return (self.location / name).read_record("It is left out; without it, this warning ends.")
        except FileNotFoundError:
            return None
        except DamagedFile as error:
            warn(str(error))
            return None


def open_finished(place: str) -> RunFolder:
    """The run folder at a path or URI; ``STUDY/TRIAL`` is a trial. UsageError if there is none, or it has not ended."""
    location = locate(place)
    # Resolved, "." and a link have the run's own name.
    folder = RunFolder(place if location.local is None else str(location.local.resolve()))
    trial = RunFolder(str(folder.location.parent / TRIALS / folder.location.name))
    if not folder.exists() and trial.exists():
        folder = trial
    if not folder.exists():
        folder.location.check_reachable()
        remedy = "Name a folder that rafce train made."
        if trials := (folder.location / TRIALS).list():
            remedy = f"It is a study: name one of its trials, such as {folder.location / TRIALS / trials[0].base_name}."
        raise UsageError(f"{folder.location} is no run: it has no config.yaml. {remedy}")
    if folder.result() is None:
        raise UsageError(
            f"{folder.location} has not finished: it has no result.json. Give the command that started it again; it "
            "goes on from where it was."
        )
    return folder
