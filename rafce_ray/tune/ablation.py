"""The ablation: the seed's eight changes alone and combined, measured over several seeds, on Ray Tune."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rafce_ray.base.claim import claimed
from rafce_ray.base.console import progress_bar, say, warn
from rafce_ray.base.errors import UsageError, did_you_mean
from rafce_ray.base.storage import locate
from rafce_ray.config import Config, identity_of, with_values
from rafce_ray.data.loader import Prepared, Readings, batch_remark, prepare
from rafce_ray.run.weights import find_all_weights
from rafce_ray.study.ablation import Ablation, Arm, ablated_keys, ablation_arms, read_ablation, trial_name
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import Training
from rafce_ray.train.environment import check_ray
from rafce_ray.train.launch import named, tell_findings
from rafce_ray.tune.launch import shares_of

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

    ``only``: names of arms, with those that they are compared with; empty: all. ``minority``: classes whose F1 is
    shown; None: the seed's four, or the four rarest of another taxonomy. Arms set whole recipes: what the base says of
    the keys that they vary is not used.

    Raises:
        UsageError: an unknown arm or class, or the study's folder is another program's or holds something else.
        GateError: the data may not be trained on.
    """
    one_worker = {"run.num_workers": 1, "run.cpus_per_worker": base.run.cpus_per_worker or 1}
    base = with_values(named(base, prefix="ablation-"), one_worker)
    check_ray()
    locate(base.run.storage).check_writable()
    every_arm = ablation_arms(base)
    arms = choose_arms(every_arm, only)
    study = StudyFolder(str(locate(base.run.storage) / str(base.run.name)))
    weights = find_all_weights([arm.config(base).model for arm in arms], study.weights())
    readings = Readings(partial(prepare, progress=progress_bar))
    readings.prepare_all({f"arm {arm.name}": arm.config(base).data for arm in arms})
    first = readings.of(arms[0].config(base).data)
    tell_findings(first, base)
    if (remark := batch_remark(first.audit.splits[0].num_images, base.optim.batch_size)) is not None:
        warn(remark)
    minority = check_minority(minority, first)
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
        study.write_weights(weights)
        trainings = [
            Training(trial_name(arm, seed), number, arm.name, arm.config(base, seed), arm.changes)
            for seed in numbers
            for number, arm in enumerate(every_arm)
            if arm in arms
        ]
        folders = [study.trial(one.name) for one in trainings]
        if any(folder.result() is None or folder.checkpoints.exists() for folder in folders):
            with shares_of(base, f"rafce ablate {study.location.name}", concurrent=concurrent) as shares:
                # Ray reads its environment when it is imported: shares_of has set it by now.
                from rafce_ray.tune.sweep import train_seeds
                from rafce_ray.tune.trials import Settings

                settings = Settings(shares, base.run.max_failures, concurrent)
                train_seeds(study, trainings, settings, readings, "sweep")
    return study, read_ablation(study, arms, numbers, minority)


def choose_arms(arms: list[Arm], only: Sequence[str]) -> list[Arm]:
    """The arms of these names with their references; every arm if ``only`` is empty. UsageError: a name is unknown."""
    by_name = {arm.name: arm for arm in arms}
    for name in only:
        if name not in by_name:
            raise UsageError(
                f"--arms: unknown arm {name!r}{did_you_mean(name, list(by_name))}. Arms: {', '.join(by_name)}."
            )
    chosen = {*only, *(by_name[name].reference for name in only)}
    return [arm for arm in arms if not only or arm.name in chosen]


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
