"""A trial of several workers: Ray Train's trainer inside a Ray Tune trial, whose workers are freed when the trial is stopped."""

from __future__ import annotations

from typing import Any

import ray
from ray.tune.integration.ray_train import TuneReportCallback
from ray.util.placement_group import PlacementGroup, PlacementGroupID, remove_placement_group

from rafce_ray.base.errors import RafceError
from rafce_ray.run.folder import RunFolder
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import conclude
from rafce_ray.train.launch import build_trainer
from rafce_ray.train.worker import read_trial_job


def nested_trial(plain: dict[str, Any], study: str, metric: str) -> dict[str, Any]:
    """Ray Tune's function for a trial of several workers; returns how it ended, as :func:`rafce_ray.train.worker.trial_worker` does."""
    folder = StudyFolder(study)
    try:
        job = read_trial_job(plain, folder)
        resources = ray.cluster_resources()
        cpus, gpus = float(resources.get("CPU", 0)), float(resources.get("GPU", 0))
        # Tune starts a failed trial again, not the trainer: it must end when its workers are taken away (free_workers).
        trainer = build_trainer(job, cpus, gpus, max_failures=0, callbacks=[TuneReportCallback()])
        outcome = trainer.fit().return_value
        if outcome is None or "error" in outcome:
            raise RafceError("training ended without a result" if outcome is None else str(outcome["error"]))
    except RafceError as error:
        conclude(folder.trial(str(plain["trial"])), metric, "failed", str(error))
        return {"status": "failed"}
    return {"status": outcome["status"]}


def free_workers(folder: RunFolder) -> None:
    """Give back what the workers of a trial that has ended still hold.

    When Tune stops a trial, its trainer's controller trains on or dies with it, and frees nothing; Ray's own cleaner does so some seconds
    after its death, and not at all where it cannot reach the cluster's state (no dashboard, several clusters on a machine). So rank 0
    writes its placement group down, and its removal ends the workers, and with them a controller that still lives.
    """
    placed = {str(event["placement_group"]) for event in folder.events() if event["event"] == "placed"}
    if not placed:
        return
    table = ray.util.placement_group_table()
    for group in placed:
        if table.get(group, {}).get("state") not in (None, "REMOVED"):
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
