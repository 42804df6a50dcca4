"""One trial of a population takes over another's weights and epochs, and goes on with new values: what is handed over, and how.

A trial's folder then tells the history of the weights that it now has: the donor's checkpoints and epoch records up to the exchange, and
``schedule.jsonl``, one line for each change of values on the way to these weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rafce_ray.checkpoint import best_valid, newest_valid
from rafce_ray.config import build_config, config_hash, flatten
from rafce_ray.console import to_json
from rafce_ray.errors import RafceError
from rafce_ray.run_folder import METRICS_FILE, RunFolder
from rafce_ray.session import Job
from rafce_ray.storage import Location
from rafce_ray.study.trials import TrialPlan, check_sampled, read_plan
from rafce_ray.study_folder import StudyFolder

SCHEDULE_FILE = "schedule.jsonl"
OFFER_FILE = "marker.json"
PENDING_FILE = "adoption.json"
PENDING_FOLDER = "adoption"
CHECKPOINTS = "checkpoints"

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Adoption:
    """That a trial is to go on from ``donor``'s weights after ``epoch`` epochs, with ``values`` by dotted key.

    ``config_hash``: of the configuration with these values. ``clipped``: what was said of values that would have left their domain.
    ``id``: no other adoption has it, in any start of the study.
    """

    id: str
    donor: str
    epoch: int
    values: dict[str, Any]
    config_hash: str
    clipped: list[str]


def write_offer(folder: RunFolder, epoch: int, values: Values, into: Path) -> bool:
    """Copy what another trial would take over into a local folder: records, schedule, newest and best checkpoint.

    False, and nothing written, where no valid checkpoint of this epoch is there; the trial's events say so.
    """
    newest, _ = newest_valid(folder.checkpoints)
    if newest is None or (newest.epoch, newest.step) != (epoch, 0):
        message = f"the checkpoint of epoch {epoch} is missing or altered: no other trial can take it over"
        folder.add_event("warning", message=message)
        return False
    best, _ = best_valid(folder.checkpoints)
    offered = {one.name: one for one in (best, newest) if one is not None}
    for checkpoint in offered.values():
        checkpoint.location.download(into / CHECKPOINTS / checkpoint.name)
    RunFolder(str(into)).write_metrics([record for record in folder.metrics() if record["epoch"] <= epoch])
    schedule = read_schedule(folder) or [{"epoch": 0, "trial": folder.location.name, "values": values, "from": None}]
    # Named, since Ray may write an offer over an older one that nobody took.
    marker = {"trial": folder.location.name, "epoch": epoch, "checkpoints": list(offered), "schedule": schedule}
    (into / OFFER_FILE).write_text(to_json(marker))
    return True


def read_schedule(folder: RunFolder) -> list[dict[str, Any]]:
    """With which values the weights of a trial were trained: ``values`` hold after ``epoch`` epochs, in ``trial``, which took the weights
    over ``from`` another trial. Empty where they never changed."""
    return (folder.location / SCHEDULE_FILE).read_records("What is left is the schedule that is known.")


def is_on_record(folder: RunFolder, adoption_id: str) -> bool:
    """Whether a trial's events have this adoption."""
    return any(event["event"] == "adopted" and event["id"] == adoption_id for event in folder.events())


def adopt(study: StudyFolder, name: str, adoption: Adoption, offer: Path) -> None:
    """Make a trial go on from what another offered; an adoption that is on record is not made again.

    A kill at any moment leaves a trial that can go on: before ``adoption.json`` is there it is the one it was, and what was prepared is
    thrown away; afterwards the next start carries out the rest (:func:`complete_adoption`).

    Raises:
        RafceError: the offer is not the donor's of that epoch, or with these values the trial would train something else.
    """
    folder = study.trial(name)
    complete_adoption(study, name)
    if is_on_record(folder, adoption.id):
        return
    marker = json.loads((offer / OFFER_FILE).read_bytes())
    if (marker["trial"], marker["epoch"]) != (adoption.donor, adoption.epoch):
        raise RafceError(
            f"trial {name} should take over {adoption.donor} after epoch {adoption.epoch}, but was handed {marker['trial']} after epoch "
            f"{marker['epoch']}. Run the same command again: the trial goes on from its own newest checkpoint."
        )
    found = read_plan(folder)
    if found is None:
        raise RafceError(f"trial {name}: {folder.location} has no plan. Can every node reach the study's storage?")
    plan, job = _changed(*found, adoption)
    pending = {
        "plan": asdict(plan),
        "job": job.to_plain(),
        "checkpoints": marker["checkpoints"],
        "schedule": [
            *marker["schedule"],
            {"epoch": adoption.epoch, "trial": name, "values": plan.values, "from": adoption.donor},
        ],
        "event": _event(adoption, found[1], job),
    }
    # The checkpoints first and adoption.json last: once it is there, all that it needs is there.
    _prepared(folder).upload(offer)
    (folder.location / PENDING_FILE).write_bytes(to_json(pending).encode())
    complete_adoption(study, name)


def complete_adoption(study: StudyFolder, name: str) -> None:
    """Carry out an adoption that was decided in a trial's folder; throw away one that was only being prepared."""
    folder = study.trial(name)
    file, prepared = folder.location / PENDING_FILE, _prepared(folder)
    if not file.exists():
        prepared.parent.delete()
        return
    # Each step may be repeated, and none uses up what it reads: a kill between any two is mended by doing all of them again.
    pending = file.read_record("The trial then goes on from its own newest checkpoint.")
    with _local(prepared) as offer:
        folder.checkpoints.delete()
        for checkpoint in pending["checkpoints"]:
            (folder.checkpoints / checkpoint).upload(offer / CHECKPOINTS / checkpoint)
        (folder.location / METRICS_FILE).write_bytes((offer / METRICS_FILE).read_bytes())
    job = Job.from_plain(pending["job"])
    TrialPlan(**pending["plan"]).write(study, job)
    folder.start(job.config, job.provenance, folder.audit() or {})
    lines = "".join(to_json(line) + "\n" for line in pending["schedule"])
    (folder.location / SCHEDULE_FILE).write_bytes(lines.encode())
    if not is_on_record(folder, pending["event"]["id"]):
        folder.add_event("adopted", **pending["event"])
    file.delete()
    prepared.parent.delete()


def _prepared(folder: RunFolder) -> Location:
    """Where an offer lies in the folder of the trial that takes it over; what a killed copy left lies beside it."""
    return folder.location / PENDING_FOLDER / "offer"


@contextmanager
def _local(place: Location) -> Iterator[Path]:
    """A folder as a local one (a temporary copy where it is remote)."""
    if place.local is not None:
        yield place.local
        return
    with TemporaryDirectory() as scratch:
        place.download(Path(scratch) / place.name)
        yield Path(scratch) / place.name


def _changed(plan: TrialPlan, job: Job, adoption: Adoption) -> tuple[TrialPlan, Job]:
    """A trial's plan and job with an adoption's values."""
    sections = job.config.model_dump(mode="json")
    for key, value in adoption.values.items():
        section, _, inner = key.partition(".")
        sections[section][inner] = value
    config = build_config(sections)
    trained = flatten(config)
    values = {key: json.loads(to_json(trained[key])) for key in adoption.values}
    provenance = job.provenance | {"config": config.model_dump(mode="json"), "config_hash": config_hash(config)}
    changed = replace(plan, values=values, config_hash=adoption.config_hash)
    new_job = replace(job, config=config, provenance=provenance)
    check_sampled(changed, new_job)
    return changed, new_job


def _event(adoption: Adoption, before: Job, after: Job) -> dict[str, Any]:
    old, new = flatten(before.config), flatten(after.config)
    changes = ", ".join(f"{key} {old[key]} -> {new[key]}" for key in adoption.values if old[key] != new[key])
    held = f"; kept within the domain: {', '.join(adoption.clipped)}" if adoption.clipped else ""
    return {
        "id": adoption.id,
        "donor": adoption.donor,
        "epoch": adoption.epoch,
        "before": {key: old[key] for key in adoption.values},
        "after": {key: new[key] for key in adoption.values},
        "clipped": adoption.clipped,
        "message": f"takes over weights and epochs of {adoption.donor} after epoch {adoption.epoch}; {changes or 'no value changes'}{held}",
    }
