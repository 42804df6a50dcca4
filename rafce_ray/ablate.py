"""The ablation: the seed's eight changes alone and combined, measured over several seeds, on Ray Tune."""

from __future__ import annotations

from collections.abc import Sequence

from rafce_ray.ablation.arms import Arm, ablated_keys, ablation_arms
from rafce_ray.ablation.results import Ablation, read_ablation, trial_name
from rafce_ray.claim import claimed
from rafce_ray.config import Config, build_config, identity_of
from rafce_ray.console import progress_bar, say, to_json, warn
from rafce_ray.data.dataset import Prepared, prepare
from rafce_ray.data.loader import batch_remark
from rafce_ray.errors import UsageError, did_you_mean
from rafce_ray.ray_environment import check_ray
from rafce_ray.session import Job
from rafce_ray.storage import locate
from rafce_ray.study_folder import StudyFolder
from rafce_ray.train.launch import named, provenance_of, ray_cluster, tell_findings

SEED_MINORITY = ("sadly surprised", "fearfully disgusted", "happily fearful", "happily sad")
"""The four classes (4, 8, 12, 13) at F1 = 0 in the seed's log."""


def ablate(
    base: Config,
    *,
    seeds: int = 3,
    only: Sequence[str] = (),
    minority: Sequence[str] | None = None,
    concurrent: int | None = None,
) -> tuple[StudyFolder, Ablation]:
    """Run what is missing of the ablation of a base configuration, and read all of it; the same call again goes on.

    ``only``: names of arms, with those that they are compared with; empty: all. ``minority``: classes whose F1 is shown; None: the
    seed's four, or the four rarest of another taxonomy. Arms set whole recipes: what the base says of the keys that they vary is
    not used.

    Raises:
        UsageError: an unknown arm or class, or the study's folder is another program's or holds something else.
        GateError: the data may not be trained on.
    """
    base = named(base, prefix="ablation-")
    check_ray()
    locate(base.run.storage).check_writable()
    every_arm = ablation_arms(base)
    arms = choose_arms(every_arm, only)
    prepared = _prepare_all(base, arms)
    first = prepared[arms[0].name]
    tell_findings(first, base)
    if (remark := batch_remark(first.audit.splits[0].num_images, base.optim.batch_size)) is not None:
        warn(remark)
    minority = check_minority(minority, first)
    study = StudyFolder(str(locate(base.run.storage) / str(base.run.name)))
    ablated = ablated_keys(every_arm)
    plan = {
        "kind": "ablation",
        "base": {key: value for key, value in identity_of(base).items() if key not in ablated},
        "data_fingerprint": first.fingerprint,
        "may_grow": {"arms": {arm.name: arm.changes for arm in arms}},
    }
    numbers = range(base.run.seed, base.run.seed + seeds)
    say(
        f"ablation of {base.data.root}: {len(arms)} arms x {seeds} seeds = {len(arms) * seeds} trials of up to "
        f"{base.optim.epochs} epochs of {base.model.backbone} at {base.model.image_px} px; results go to "
        f"{study.location}"
    )
    with claimed(study.location, "study", key="run.name"):
        study.claim(plan)
        jobs = [_job(study, base, arm, seed, prepared[arm.name]) for seed in numbers for arm in arms]
        if any(study.trial(str(job.config.run.name)).result() is None for job in jobs):
            with ray_cluster(jobs[0].config, f"rafce ablate {study.location.name}"):
                # Ray reads its environment when it is imported: ray_cluster has set it by now.
                from rafce_ray.tune.trials import run_trials

                run_trials(study, jobs, concurrent=concurrent)
        for job in jobs:
            folder = study.trial(str(job.config.run.name))
            if folder.result() is not None:
                # Their bundles stay; the checkpoints of a hundred finished trials would fill a disk.
                folder.checkpoints.delete()
    return study, read_ablation(study, arms, numbers, minority)


def choose_arms(arms: list[Arm], only: Sequence[str]) -> list[Arm]:
    """The arms of these names, and those that they are compared with; all of them for none. UsageError for an unknown one."""
    by_name = {arm.name: arm for arm in arms}
    chosen: set[str] = set()
    for name in only:
        if name not in by_name:
            raise UsageError(
                f"--arms: unknown arm {name!r}{did_you_mean(name, list(by_name))}. Arms: {', '.join(by_name)}."
            )
        chosen |= {name} | ({reference} if (reference := by_name[name].reference) else set())
    return [arm for arm in arms if not only or arm.name in chosen]


def _prepare_all(base: Config, arms: list[Arm]) -> dict[str, Prepared]:
    """The data of each arm; arms that read it alike share one reading."""
    by_reading: dict[str, Prepared] = {}
    prepared = {}
    for arm in arms:
        data = arm.config(base).data
        reading = to_json(data.model_dump(include={"null_policy", "action_units"}))
        if reading not in by_reading:
            by_reading[reading] = prepare(data, progress=progress_bar)
        prepared[arm.name] = by_reading[reading]
    return prepared


def check_minority(minority: Sequence[str] | None, prepared: Prepared) -> list[str]:
    """The classes whose F1 is shown, from names or numbers; None: the seed's four, or the four rarest.

    Raises:
        UsageError: a class is unknown.
    """
    emotions = prepared.taxonomy.emotions
    if minority is None:
        if all(name in emotions for name in SEED_MINORITY):
            return list(SEED_MINORITY)
        counts = dict(zip(emotions, prepared.audit.splits[0].classes, strict=True))
        return sorted(emotions, key=lambda name: counts[name])[:4]
    chosen = [emotions[int(name)] if name.isdecimal() and int(name) < len(emotions) else name for name in minority]
    unknown = [name for name in chosen if name not in emotions]
    if unknown:
        raise UsageError(f"--minority: {unknown} are no classes; expected some of {list(emotions)}, or their numbers.")
    # A class that is named twice, as by its name and its number, is shown once.
    return list(dict.fromkeys(chosen))


def _job(study: StudyFolder, base: Config, arm: Arm, seed: int, prepared: Prepared) -> Job:
    """The job of one trial, whose run folder is started if need be."""
    run = {"name": trial_name(arm, seed), "storage": str(study.trials), "seed": seed}
    run |= {"num_workers": 1, "cpus_per_worker": base.run.cpus_per_worker or 1}
    values = arm.config(base).model_dump(mode="json")
    config = build_config(values | {"run": values["run"] | run})
    folder = study.trial(str(config.run.name))
    job = Job(config, prepared.store_uri, prepared.taxonomy, folder.place, provenance_of(config, prepared))
    if not folder.exists():
        folder.start(config, job.provenance, prepared.audit.to_json())
    return job
