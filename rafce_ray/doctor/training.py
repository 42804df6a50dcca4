"""The doctor's rules on the course of a training: learning rate, batch size, overfitting, underfitting, early end."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rafce_ray.config import Config
from rafce_ray.data.loader import batch_remark, num_steps
from rafce_ray.doctor.evidence import (
    STILL_FALLING,
    TAIL_EPOCHS,
    Cause,
    Diagnosis,
    Evidence,
    Step,
    Verdict,
    change,
    confirmed_if,
    figure,
    more_epochs,
    next_capacity,
    next_regularisation,
    possible_if,
    settings,
    significant,
    strongly_regularised,
)

AUGMENTATION = "data.augmentation"
LARGEST_GAP = 0.30  # Train-validation gap from which a run overfits (the seed's rule)
CURVE_EPOCHS = 5  # Epochs that a rule on a curve needs
# Standard errors beyond which an accuracy has changed. Epochs share images, so that their noise is even smaller.
NOISE = 2.0
# A run has learnt if its train accuracy goes this share of the way from always naming the commonest class to 1.
LEARNT_SHARE = 0.25
STEPS_AN_EPOCH = 4  # Least steps an epoch that a smaller batch size should give
# Below this gap a low train accuracy is underfitting, not strong regularisation on a small train split.
SMALL_GAP = 0.10


def overfitting(evidence: Evidence) -> list[Diagnosis]:
    """Train minus validation, on natural images in evaluation mode, exceeds 30 points at the last or best epoch."""
    name, title = ("accuracy", "accuracy") if evidence.emotions else ("au_f1_mean", "mean AU-F1")
    # max compares with NaN wrongly.
    worst = max((evidence.best, evidence.last), key=lambda record: np.nan_to_num(figure(record, f"gap.{name}"), nan=-1))
    gap = figure(worst, f"gap.{name}")
    if not gap > LARGEST_GAP:
        return []
    train, validation = (figure(worst, f"{split}.{name}") for split in ("train_natural", "validation"))
    config = evidence.config
    seen = (
        f"The train-validation gap in {title} is {100 * gap:.1f} points at epoch {worst['epoch']} (train {train:.1%}, "
        f"validation {validation:.1%}); above {100 * LARGEST_GAP:.0f} a model remembers more than it has understood."
    )
    best_gap = figure(evidence.best, f"gap.{name}")
    if worst is not evidence.best and not best_gap > LARGEST_GAP:
        seen += f" At epoch {evidence.best['epoch']}, the best one, it is {100 * best_gap:.1f} points."
    known, what = ("emotion_known", "images") if evidence.emotions else ("au_known", "known AUs of images")
    counts = " and ".join(f"{figure(worst, f'{split}.{known}'):,.0f}" for split in ("train_natural", "validation"))
    images = "an unknown number of images"
    if evidence.targets is not None:
        images = f"{evidence.targets['train']['num_images']:,} train images"
    resampled = "the gap is measured on resampled or augmented images"
    strength = settings(config, "model.dropout", "optim.weight_decay", "optim.grad_clip")
    causes = [
        Cause(resampled, "ruled out", f"{counts} natural {what}, in evaluation mode"),
        Cause("no augmentation", confirmed_if(config.data.augmentation == "none"), settings(config, AUGMENTATION)),
        Cause("regularisation is too weak", "possible", strength),
        Cause("the model is too large for the data", "possible", f"{config.model.backbone} on {images}"),
    ]
    spent = "The ladder of dropout, weight decay, clipping and smaller backbones is spent: only more train images help."
    step = next_regularisation(config) or Step({}, spent)
    return [evidence.diagnose("overfitting", "warning", seen, step, causes)]


def validation_falling(evidence: Evidence) -> list[Diagnosis]:
    """The last epochs' validation accuracy is below the best one by more than noise, at least three epochs ago."""
    values = evidence.series("validation.accuracy")
    if not evidence.emotions or len(values) < CURVE_EPOCHS or not any(map(math.isfinite, values)):
        return []
    at = int(np.nanargmax(values))
    if at > len(values) - 1 - TAIL_EPOCHS:
        return []
    best, now = evidence.records[at], float(np.mean(values[-TAIL_EPOCHS:]))
    error = standard_error(values[at], figure(best, "validation.emotion_known"))
    if not values[at] - now > NOISE * error:
        return []
    train = evidence.series("train_natural.accuracy")
    train_now = float(np.mean(train[-TAIL_EPOCHS:]))
    unlearns = train[at] - train_now > NOISE * standard_error(train[at], figure(best, "train_natural.emotion_known"))
    seen = (
        f"Validation accuracy fell from {values[at]:.1%} at epoch {best['epoch']} to {now:.1%} (mean of the last "
        f"{TAIL_EPOCHS}; one standard error is {100 * error:.1f} points), while train accuracy went from "
        f"{train[at]:.1%} to {train_now:.1%}."
    )
    steered = _au_gradient_dominates(evidence)
    causes = _falling_causes(evidence, unlearns=unlearns, steered=steered, train_now=train_now)
    step = _against_falling(evidence.config, unlearns=unlearns, steered=steered is True)
    kept = f"The best epoch's weights are kept ({evidence.best.get('epoch')} by {evidence.monitor})."
    return [evidence.diagnose("validation_falling", "warning", seen, Step(step.patch, f"{step.text} {kept}"), causes)]


def _falling_causes(evidence: Evidence, *, unlearns: bool, steered: bool | None, train_now: float) -> list[Cause]:
    config = evidence.config
    trend = f"train accuracy {'falls too' if unlearns else f'holds or rises, to {train_now:.1%}'}"
    rate, au_weight = settings(config, "optim.lr"), settings(config, "loss.au_weight")
    strength = settings(config, "model.dropout", "optim.weight_decay")
    if not evidence.action_units:
        weight: tuple[Verdict, str] = ("ruled out", "AUs are not trained")
    elif steered is None:
        weight = ("unknown", f"{au_weight}; no gradients on record")
    else:
        size = "larger" if steered else "smaller"
        weight = (possible_if(steered), f"{au_weight}; the AU gradient on the trunk is the {size} one")
    slow = f"{rate}: a low rate learns slowly, it does not unlearn"
    return [
        Cause("overfitting", confirmed_if(not unlearns), trend),
        Cause("the learning rate is too high", possible_if(unlearns), f"{rate}; {trend}"),
        Cause("the learning rate is too low (the seed's guess)", "ruled out", slow),
        Cause("regularisation is too strong (the seed's guess)", possible_if(unlearns), f"{strength}; {trend}"),
        Cause("the weight of the AU loss is too high", *weight),
    ]


def _against_falling(config: Config, *, unlearns: bool, steered: bool) -> Step:
    if steered:
        return change(config, "loss.au_weight", 0.5 if config.loss.au_weight > 0.5 else config.loss.au_weight / 2)
    if not unlearns:
        return next_regularisation(config) or Step({}, "Only more train images help.")
    return change(config, "optim.lr", significant(config.optim.lr / 3))


def _au_gradient_dominates(evidence: Evidence) -> bool | None:
    """Whether the weighted AU gradient on the trunk is the larger one, by its recent median; None where unknown."""
    if evidence.config.loss.au_stop_gradient:
        return False
    ratios = [
        figure(one, "au_weight") * figure(one, "gradient.au_norm") / norm
        for one in evidence.records[-CURVE_EPOCHS:]
        if (norm := figure(one, "gradient.emotion_norm")) > 0
    ]
    defined = [ratio for ratio in ratios if math.isfinite(ratio)]
    return float(np.median(defined)) > 1 if defined else None


def underfitting(evidence: Evidence) -> list[Diagnosis]:
    """At the end, train images are hardly read better than by naming the commonest class, and the gap is small."""
    if not evidence.ended or evidence.status == "diverged" or len(evidence.records) < TAIL_EPOCHS:
        return []
    record, config = evidence.best, evidence.config
    paths = ("train_natural.accuracy", "train_natural.majority_accuracy", "gap.accuracy")
    train, majority, gap = (figure(record, path) for path in paths)
    if not (learnt_share(evidence) < LEARNT_SHARE and gap < SMALL_GAP):
        return []
    seen = (
        f"The model underfits: at its best epoch ({record['epoch']}) even train accuracy is {train:.1%}, where naming "
        f"the commonest class gets {majority:.1%}, and the gap to validation is {100 * gap:.1f} points."
    )
    strong = strongly_regularised(config) or config.data.augmentation == "strong"
    strength = settings(config, "model.dropout", "optim.weight_decay", AUGMENTATION)
    frozen, weights = config.model.freeze_backbone, config.model.weights
    causes = [
        Cause("too few epochs", possible_if(evidence.still_learning()), evidence.loss_trend()),
        Cause("regularisation or augmentation is too strong", possible_if(strong), strength),
        Cause("the trunk cannot learn", confirmed_if(frozen), settings(config, "model.freeze_backbone")),
        Cause("it starts from nothing", possible_if(weights == "none"), f"model.weights={weights}"),
    ]
    return [evidence.diagnose("underfitting", "warning", seen, next_capacity(evidence), causes)]


def learnt_share(evidence: Evidence) -> float:
    """Share of the way from majority accuracy to 1 on natural train images at the best epoch; NaN where undefined."""
    train, majority = (figure(evidence.best, f"train_natural.{name}") for name in ("accuracy", "majority_accuracy"))
    return (train - majority) / (1 - majority) if majority < 1 else math.nan


def batch_of_all_images(evidence: Evidence) -> list[Diagnosis]:
    """A batch has room for more images than the train split has, so that an epoch is a single step."""
    batch_size = evidence.config.optim.batch_size
    num_images = ((evidence.targets or {}).get("train") or {}).get("num_images")
    if num_images is None or (seen := batch_remark(num_images, batch_size)) is None:
        return []
    smaller = max(2 * evidence.config.run.most_workers, 2 ** int(math.log2(max(2, num_images / STEPS_AN_EPOCH))))
    steps = num_steps(num_images, smaller)
    if steps < 2:
        step = Step({}, "Label more train images: these are too few for more than one step an epoch.")
    else:
        step = Step({"optim.batch_size": smaller}, f"Lower optim.batch_size to {smaller}, for {steps} steps an epoch.")
    return [evidence.diagnose("batch_of_all_images", "warning", seen, step)]


def train_longer(evidence: Evidence) -> list[Diagnosis]:
    """All epochs were used, and the run still improved: the best epoch is the last or near, the train loss fell."""
    num_epochs = len(evidence.records)
    if evidence.status != "finished" or num_epochs < TAIL_EPOCHS:
        return []
    recent, fall = evidence.last["epoch"] - evidence.best["epoch"] < TAIL_EPOCHS, evidence.late_fall()
    if not (evidence.best_is_last() or (recent and fall > STILL_FALLING)):
        return []
    config, epochs = evidence.config, more_epochs(evidence.config)
    seen = f"Epoch {evidence.best['epoch']} of {num_epochs} is the best: the run ended while it was still improving."
    verdict: Verdict = "unknown" if math.isnan(fall) else "confirmed" if fall > STILL_FALLING else "possible"
    found = f"{evidence.loss_trend()}; optim.patience={config.optim.patience} was not spent"
    command = evidence.resume_command({"optim.epochs": epochs})
    advice = f"Train longer: {epochs} epochs."
    if command is not None:
        advice += " --resume goes on from the last epoch, with the learning rate of the longer schedule."
    step = Step({"optim.epochs": epochs}, advice, command)
    return [evidence.diagnose("train_longer", "info", seen, step, [Cause("too few epochs", verdict, found)])]


def standard_error(share: float, count: float) -> float:
    """Binomial standard error of a share of ``count`` images."""
    return math.sqrt(max(share * (1 - share), 0.0) / max(count, 1))


SAFE_CLIP = 1.0  # Gradient norm at which the seed's fixed recipe clips
RISEN = 1.10  # Ratio of train loss to its minimum from which it has risen: means over thousands of images vary by less
SWING = 1.05  # Ratio of train loss to that of the epoch before from which the epoch went the wrong way
SWINGING_SHARE = 1 / 3  # Share of epochs that went the wrong way from which a loss swings
EXPLODED = 10.0  # Ratio of largest to median gradient norm of epochs from which gradients explode
# Learning rates below which they are blamed for a slow descent: a fifth of the usual ones.
LOW_LR = {"adamw": 1e-4, "adam": 1e-4, "sgd": 1e-2}
SLOW_FALL = 0.10  # Share of its first value by which a train loss falls over a whole run that hardly learns
FASTER = 5.0  # Factor by which a rate that is too low is raised


def diverged(evidence: Evidence) -> list[Diagnosis]:
    """A loss was not finite: the run stopped as diverged, or validation already has no finite loss."""
    validation = evidence.last.get("validation", {})
    undefined = [
        f"{title} loss"
        for title, task in (("emotion", "emotion"), ("AU", "au"))
        if figure(validation, f"{task}_known") > 0 and math.isnan(figure(validation, f"{task}_loss"))
    ]
    has_stopped = evidence.status == "diverged"
    if not has_stopped and not undefined:
        return []
    optim, epoch = evidence.config.optim, len(evidence.records) + has_stopped
    clip, rate = settings(evidence.config, "optim.grad_clip"), settings(evidence.config, "optim.lr")
    what = "a train loss" if has_stopped else f"the validation {' and '.join(undefined)}"
    seen = f"Training diverged: {what} was not finite in epoch {epoch} ({rate}, {clip})."
    if evidence.result is not None:
        best = evidence.result.get("best_epoch")
        kept = f"The bundle of epoch {best}, the best one before, is intact."
        seen += " No epoch could be kept." if best is None else f" {kept}"
    norms = [f"{norm:.3g}" for norm in evidence.series("train.grad_norm") if math.isfinite(norm)]
    trend = f"gradient norms by epoch: {', '.join(norms[-CURVE_EPOCHS:])}" if norms else "no epoch is on record"
    precision = next((event["precision"] for event in reversed(evidence.events) if "precision" in event), None)
    coarse: Verdict = "unknown" if precision is None else possible_if(precision == "bf16")
    causes = [
        Cause("gradients are not clipped", possible_if(optim.grad_clip == 0), f"{clip}; {trend}"),
        Cause("the learning rate is too high", "possible", f"{rate} with {optim.optimizer}"),
        Cause("bf16 is too coarse", coarse, f"precision {precision or 'not on record'}"),
    ]
    patch: dict[str, Any]
    if optim.grad_clip == 0:
        patch = {"optim.grad_clip": SAFE_CLIP, "optim.lr": significant(optim.lr / 3)}
        advice = f"Clip gradients at {SAFE_CLIP:g} and lower optim.lr to a third, {patch['optim.lr']:g}."
    else:
        patch = {"optim.lr": significant(optim.lr / 10)}
        if optim.grad_clip > SAFE_CLIP:
            patch["optim.grad_clip"] = SAFE_CLIP
        advice = f"Lower optim.lr tenfold, to {patch['optim.lr']:g}."
    return [evidence.diagnose("diverged", "serious", seen, Step(patch, advice), causes)]


def learning_rate_too_high(evidence: Evidence) -> list[Diagnosis]:
    """After the warm-up the train loss rises or swings, or gradients that nothing clips explode."""
    settled = _settled(evidence)
    if len(settled) < CURVE_EPOCHS:
        return []
    losses, norms = _losses(evidence, settled), np.array([figure(one, "train.grad_norm") for one in settled])
    optim = evidence.config.optim
    lowest, wrong_way = float(losses.min()), int((losses[1:] > SWING * losses[:-1]).sum())
    signs = []
    if (losses[-2:] > RISEN * lowest).all():
        at = settled[int(losses.argmin())]["epoch"]
        signs.append(f"the train loss rose from {lowest:.3f} at epoch {at} to {losses[-1]:.3f}")
    if wrong_way >= max(2, SWINGING_SHARE * (len(losses) - 1)):
        rise = f"{100 * (SWING - 1):.0f} %"
        signs.append(f"the train loss rose by more than {rise} in {wrong_way} of {len(losses) - 1} epochs")
    loss_shows_it = bool(signs)
    if optim.grad_clip == 0 and norms.max() > EXPLODED * np.median(norms):
        signs.append(f"the mean gradient norm of an epoch reached {norms.max():.3g} (median {np.median(norms):.3g})")
    if not signs:
        return []
    seen = f"After the warm-up, {', and '.join(signs)}."
    verdict: Verdict = "confirmed" if loss_shows_it else "possible"
    rate, clip = settings(evidence.config, "optim.lr"), settings(evidence.config, "optim.grad_clip")
    causes = [
        Cause("the learning rate is too high", verdict, f"{rate} with {optim.optimizer}"),
        Cause("gradients are not clipped", possible_if(optim.grad_clip == 0), clip),
    ]
    lower = significant(optim.lr / 3)
    patch, advice = {"optim.lr": lower}, f"Lower optim.lr from {optim.lr:g} to {lower:g}"
    if optim.grad_clip == 0:
        patch["optim.grad_clip"] = SAFE_CLIP
        advice += f" and clip gradients at {SAFE_CLIP:g}"
    return [evidence.diagnose("learning_rate_too_high", "warning", seen, Step(patch, f"{advice}."), causes)]


def learning_rate_too_low(evidence: Evidence) -> list[Diagnosis]:
    """At the end, with a small rate, the train loss was still falling in every epoch, and by little in all."""
    settled, optim = _settled(evidence), evidence.config.optim
    if not evidence.ended or evidence.status == "diverged" or len(settled) < CURVE_EPOCHS:
        return []
    losses, usual = _losses(evidence, settled), LOW_LR[optim.optimizer]
    fall = 1 - losses[-1] / losses[0]
    if not (optim.lr < usual and (np.diff(losses) < 0).all() and fall < SLOW_FALL):
        return []
    seen = (
        f"The train loss fell in every epoch after the warm-up, but by {fall:.1%} in all ({losses[0]:.3f} to "
        f"{losses[-1]:.3f} in {len(losses)} epochs), with optim.lr={optim.lr:g}."
    )
    causes = [
        Cause("the learning rate is too low", "confirmed", f"below {usual:g}, and the descent is steady and slow"),
        Cause("the loss swings", "ruled out", "it fell in every epoch"),
    ]
    step = change(evidence.config, "optim.lr", significant(optim.lr * FASTER))
    return [evidence.diagnose("learning_rate_too_low", "warning", seen, step, causes)]


def _settled(evidence: Evidence) -> list[dict[str, Any]]:
    """Records of the epochs after the warm-up and after the AU loss has come in."""
    loss = evidence.config.loss
    first = max(math.ceil(evidence.config.optim.warmup_epochs), loss.au_start_epoch + loss.au_ramp_epochs)
    settled = [record for record in evidence.records if record["epoch"] > first]
    return settled if np.isfinite(_losses(evidence, settled)).all() else []


def _losses(evidence: Evidence, records: list[dict[str, Any]]) -> np.ndarray:
    """The train loss of emotions, or of AUs where emotions are not trained: the total moves with the AU weight too."""
    name = "train.emotion_loss" if evidence.emotions else "train.au_loss"
    return np.array([figure(record, name) for record in records])
