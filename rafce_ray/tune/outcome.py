"""The end of a study: its verdict, the winner measured on test once, what it leaves behind, and its last lines."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rafce_ray.base.console import pretty_json, progress_bar, say, warn
from rafce_ray.base.errors import RafceError
from rafce_ray.config import build_config, to_yaml
from rafce_ray.report.study_page import write_study_report
from rafce_ray.run.folder import RunFolder
from rafce_ray.study.config import StudyConfig
from rafce_ray.study.finalists import best_run, judge, judge_sweep
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.on_test import measure_on_test
from rafce_ray.study.trials import Trial, read_trials
from rafce_ray.study.verdict import Verdict, sentences


def conclude_study(study: StudyConfig, folder: StudyFolder, finalists: Sequence[Trial]) -> dict[str, Any]:
    """Judge a study whose trials have ended and write ``finalists.json``, ``best.yaml``, ``best/``, ``test.json``, ``report.html``.

    Raises:
        RafceError: no trial gave a score.
    """
    trials = [one for one in read_trials(folder, study.metric) if one.plan.role == "sweep"]
    failed = [one.name for one in trials if one.status in ("failed", "diverged")]
    if failed:
        warn(
            f"{len(failed)} of {len(trials)} trials failed or diverged: {', '.join(failed)} (rafce trials {folder.location.command})"
        )
    if not any(one.score is not None for one in trials):
        raise RafceError(
            f"no trial of {folder.location} has a {study.metric}: nothing can be judged. Look at why: rafce trials {folder.location.command}"
        )
    verdict = (
        judge(folder, study.metric, [one.name for one in finalists], base=base_name(trials))
        if finalists
        else judge_sweep(folder, study.metric, trials)
    )
    (folder.location / "finalists.json").write_bytes(pretty_json(verdict.to_json()))
    write_best(study, folder, verdict)
    on_test = measure_on_test(folder, verdict, progress=progress_bar)
    report = write_study_report(folder, study.metric)
    for line in [*sentences(verdict), *([] if on_test is None else on_test.sentences())]:
        say(line)
    place, root = folder.location, shlex.quote(str(study.base_config().data.root))
    best, curves = (place / "best").command, f"tensorboard --logdir {(place / 'ray').command}"
    if place.local is None:
        curves = f"copy {(place / 'ray').command} to a disk for TensorBoard"
    say(
        f"made {place.command}: best/ (bundle), best.yaml, {report.name}, trials.jsonl; curves: {curves}\n"
        f"next: rafce train --config {(place / 'best.yaml').command}   or: rafce evaluate --bundle {best} data.root={root}   "
        f"or: rafce serve --bundle {best}   or: rafce predict --bundle {best} PHOTO...   or: rafce trials {place.command}"
    )
    return {
        "study": str(folder.location),
        "verdict": verdict.to_json(),
        "test": None if on_test is None else on_test.to_json(),
        "bundle": str(folder.location / "best"),
        "report": str(report),
    }


def base_name(trials: Sequence[Trial]) -> str:
    """The trial that is the base configuration."""
    return next(one.name for one in trials if one.plan.is_base)


def write_best(study: StudyConfig, folder: StudyFolder, verdict: Verdict) -> None:
    """``best.yaml``: the winner's configuration, ready to train with; ``best/``: the bundle of its best run."""
    run = best_run(folder, verdict)
    plain = folder.trial(verdict.winner).config().model_dump(mode="json")
    # A trial's share of the machine is not the share of a run of its own.
    plain["run"] |= {"name": None, "storage": study.storage, "cpus_per_worker": None}
    head = f"# The winner of study {study.name}: {verdict.winner}.\n#   rafce train --config {(folder.location / 'best.yaml').command}\n"
    (folder.location / "best.yaml").write_bytes((head + to_yaml(build_config(plain))).encode())
    replace_bundle(folder, run)


def replace_bundle(folder: StudyFolder, run: RunFolder) -> None:
    """Copy a run's bundle to ``best/``: it is there whole or not at all, and then the same command makes it."""
    best = folder.location / "best"
    with TemporaryDirectory() as scratch:
        copy = Path(scratch) / "bundle"
        run.bundle.download(copy)
        best.delete()
        best.upload(copy)
