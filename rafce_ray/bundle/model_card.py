"""``MODEL_CARD.md``: describes a bundle for people, with its measured quality, its limits and its prohibited uses.

Sections follow Mitchell et al. 2019 ("Model Cards for Model Reporting"). Every number is one of the bundle's own
figures. The card compares what the labels say (``audit.json``) with what training saw (``targets.json``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rafce_ray.base.console import finite
from rafce_ray.base.figures import FIGURES, MIN_SUPPORT, WITH_INTERVAL
from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.data.records import SPLITS
from rafce_ray.metrics.calibration import Calibration
from rafce_ray.metrics.text import UNDEFINED, against_floor, constant_f1, headline, interval, number, percent, summary
from rafce_ray.model.network import Architecture

PERCEIVED = (
    "The outputs are perceived expression: what people would say that a face shows. They are not what the person "
    "feels, and nothing about a person's character, health or intent follows from them."
)
INTENDED_USE = (
    "Research on facial expression, and tools whose users know of the model and agree to it.",
    "Faces like those it was trained on: one face an image, cut out and aligned, of the same kind of photographs.",
)
PROHIBITED_USE = (
    "Inferring emotions of people at work or in education: prohibited in the European Union, except for medical or "
    "safety reasons (AI Act, Regulation (EU) 2024/1689, Article 5(1)(f)).",
    "Use on people who have not been told that the system is in operation (AI Act, Article 50(3)).",
    "Decisions about a person, and any claim of what somebody truly feels, thinks or intends.",
)
SPLIT_NOTES = {
    "validation": "These figures are of the validation split. It chose the best epoch, the temperature and the "
    "thresholds, so they are optimistic. Cross-fitted figures calibrate each fifth of the split by the other four; "
    "they still share the choice of epoch.",
    "test": "These figures are of the test split, which chose nothing in this run. They stay honest as long as nobody "
    "chooses by them.",
    "held-out": "These figures are of the validation and test splits together, which gives groups enough images. The "
    "validation part chose the best epoch, the temperature and the thresholds, so they are a little optimistic.",
}

HOW_TO_USE = """## How to use it

```
rafce predict --bundle FOLDER PHOTO.jpg          # every face of a photograph, as JSON
rafce evaluate --bundle FOLDER data.root=PATH    # its figures on other labelled faces
```

Measure it on faces like yours before you rely on it."""

Record = dict[str, Any] | None
"""A run's ``audit.json`` (what the labels say) or ``targets.json`` (what training saw); None where it is missing."""

_MARKDOWN = re.compile(r"([\\`*_{}\[\]#|~])")


def model_card(
    *,
    taxonomy: Taxonomy,
    architecture: Architecture,
    calibration: Calibration,
    metrics: Mapping[str, Any],
    provenance: Mapping[str, Any],
    audit: Record = None,
    targets: Record = None,
) -> str:
    """The card of a bundle, from the arguments of ``save_bundle`` and the run's records of its data.

    ``metrics``: of :func:`rafce_ray.bundle.evaluate.evaluate_outputs` with ``split`` and, if there are any,
    ``cross_fitted``; empty where nothing was measured. ``audit`` and ``targets``: the run's audit.json and
    targets.json. NaN and None are undefined and written as a dash.
    """
    figures = finite(dict(metrics))
    config = provenance.get("config", {})
    name = _text(str(config.get("run", {}).get("name") or f"{architecture.backbone} for facial expression"))
    parts = [
        f"# Model card: {name}",
        _what_it_is(taxonomy, architecture, figures),
        "## Intended use\n\n" + "\n".join(f"* {one}" for one in INTENDED_USE),
        "## Prohibited use\n\n" + "\n".join(f"* {one}" for one in PROHIBITED_USE),
        _training_data(provenance, audit, targets),
        _evaluation(figures),
        _calibration(taxonomy, calibration, figures),
        _per_class(figures),
        _per_action_unit(figures),
        _limits(figures, audit, targets),
        _provenance(provenance, figures),
        HOW_TO_USE,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what_it_is(taxonomy: Taxonomy, architecture: Architecture, figures: Mapping[str, Any]) -> str:
    reads = []
    if taxonomy.num_emotions:
        reads.append(f"one of {taxonomy.num_emotions} emotions ({', '.join(map(_text, taxonomy.emotions))})")
    if taxonomy.num_action_units:
        plural = "s" if taxonomy.num_action_units > 1 else ""
        reads.append(
            f"{taxonomy.num_action_units} facial action unit{plural} ({', '.join(taxonomy.action_unit_codes)})"
        )
    extras = ["one attention query per action unit"] if architecture.au_attention else []
    extras += ["emotion logits with scores of basic emotions"] if architecture.compositional_head else []
    text = (
        f"## What it is\n\nA {architecture.backbone} network{' with ' + ' and '.join(extras) if extras else ''} that "
        f"reads {' and '.join(reads)} from an aligned face of {architecture.image_px} px a side. {PERCEIVED}"
    )
    reached = headline(figures, str(figures.get("split", "validation"))) if figures else None
    return text if reached is None else f"{text}\n\n**{reached}**"


def _training_data(provenance: Mapping[str, Any], audit: Record, targets: Record) -> str:
    lines = [
        "## Training data",
        f"Data fingerprint: `{provenance.get('data_fingerprint', UNDEFINED)}`. The licence is the data's own.",
    ]
    if audit is None and targets is None:
        return "\n\n".join([*lines, "There is no record of its labels."])
    titles = "labelled rows", "with an image", "AU label null", "emotion unknown", "in this run"
    rows = [
        {"split": split, **dict(zip(titles, map(_count, size.values()), strict=True))}
        for split, size in split_sizes(audit, targets).items()
    ]
    lines.append(_table(rows))
    for what, unit, counts in (
        ("class", "images", class_counts(audit, targets)),
        ("action unit", "positives", action_unit_counts(audit, targets)),
    ):
        if counts:
            rows = [
                {what: _text(name), **{f"{split} {unit}": _as_trained(one) for split, one in by_split.items()}}
                for name, by_split in counts.items()
            ]
            lines.append(_table(rows))
    lines += [
        f"**Training did not see what the labels say.** {_text(one)}" for one in label_differences(audit, targets)
    ]
    return "\n\n".join(lines)


def _as_trained(count: Count) -> str:
    return f"{_count(count.labels)} (trained on: {_count(count.trained)})" if count.differs else _count(count.best)


def _evaluation(figures: Mapping[str, Any]) -> str:
    if not figures:
        return "## Evaluation\n\nNothing was measured."
    rows = [
        {
            "figure": FIGURES[key].title,
            "value": number(figures[key]),
            "95 % interval": interval(figures.get("intervals", {}).get(key)),
            "without a model": number(figures.get(str(FIGURES[key].floor))) if FIGURES[key].floor else "",
        }
        for key in WITH_INTERVAL
        if figures.get(key) is not None
    ]
    note = SPLIT_NOTES.get(str(figures.get("split")), f"These figures are of the {figures.get('split')} split.")
    return "\n\n".join(["## Evaluation", note, *summary(figures), _table(rows)])


def _calibration(taxonomy: Taxonomy, calibration: Calibration, figures: Mapping[str, Any]) -> str:
    lines = ["## Calibration and thresholds"]
    if taxonomy.num_emotions:
        unsure = (
            "No emotion is marked unsure."
            if calibration.unsure_below is None
            else f"Below a probability of {number(calibration.unsure_below)} an emotion is marked unsure."
        )
        lines.append(f"Emotion logits are divided by a temperature of {number(calibration.temperature)}. {unsure}")
    if taxonomy.num_action_units:
        how = "calibrated probability" if calibration.au_slopes else "network's own probability"
        lines.append(f"An action unit is active where its {how} reaches its threshold, which stands in its table.")
    held_out = figures.get("cross_fitted") or {}
    measured = {
        "before": _get(figures, "reliability", "before"),
        "after": _get(figures, "reliability", "after"),
        "after, cross-fitted": held_out.get("after"),
    }
    measures = {"ECE (95 % interval)": "ece", "log loss": "nll", "Brier score": "brier"}
    rows = [
        {"task": title, "calibration": when}
        | {name: f"{number(one[key])} ({interval(one['intervals'][key], 3)})" for name, key in measures.items()}
        for title, task in (("emotions", "emotion"), ("action units", "action_units"))
        for when, by_task in measured.items()
        if (one := _get(by_task, task)) is not None
    ]
    if rows:
        lines.append(_table(rows))
    if held_out and taxonomy.num_action_units:
        lines.append(
            f"Mean AU-F1 is {number(held_out.get('au_f1_mean_before'))} with thresholds of 0.5 on the network's own "
            f"probabilities, and {number(held_out.get('au_f1_mean_after'))} with thresholds chosen on other images "
            "(cross-fitted)."
        )
    return "\n\n".join(lines)


def _per_class(figures: Mapping[str, Any]) -> str:
    if not figures.get("per_class") or not figures.get("emotion_known"):
        return ""
    rows = [
        {
            "emotion": _text(entry["emotion"]),
            "images": _count(entry["support"]),
            "floor": number(constant_f1(entry["support"], figures["emotion_known"])),
            "F1": number(entry["f1"]),
            "95 % interval": interval(entry.get("f1_interval")),
            "precision": number(entry["precision"]),
            "recall": number(entry["recall"]),
        }
        for entry in figures["per_class"]
    ]
    note = f"Floor: F1 of always naming this class. {UNDEFINED}: undefined, not 0."
    return f"## Per emotion\n\n{_table(rows)}\n\n{note}"


def _per_action_unit(figures: Mapping[str, Any]) -> str:
    if not figures.get("per_au"):
        return ""
    rows = [
        {
            "action unit": f"{entry['action_unit']} {_text(entry['name'])}".strip(),
            "positive": _count(entry["support"]),
            "known": _count(entry["known"]),
            "floor": number(entry["floor"]),
            "F1": number(entry["f1"]),
            "95 % interval": interval(entry.get("f1_interval")),
            "against floor": against_floor(entry) or UNDEFINED,
            "F1 at 0.5": number(entry.get("f1_at_half")),
            "threshold": number(entry.get("threshold")),
            "AP": number(entry.get("ap")),
        }
        for entry in figures["per_au"]
    ]
    note = "Floor: F1 of always saying present. Unclear: the interval holds the floor."
    return f"## Per action unit\n\n{_table(rows)}\n\n{note}"


def _limits(figures: Mapping[str, Any], audit: Record, targets: Record) -> str:
    lines = [
        *_limits_of_figures(figures),
        *(f"Training did not see what the labels say. {_text(one)}" for one in label_differences(audit, targets)),
        "Labels of expressions are the votes or codes of people, who often disagree: no model can agree with all of "
        "them.",
        "Nothing here says how figures differ between groups of people. `rafce report RUN --slices FILE.csv` measures "
        "that.",
        "Intervals hold the luck of which images were measured, not what another seed of training would change.",
    ]
    return "\n".join(["## Limits and known failures\n", *(f"* {line}" for line in lines)])


def _limits_of_figures(figures: Mapping[str, Any]) -> Iterator[str]:
    classes = figures.get("per_class", []) if figures.get("emotion_known") else []
    images = {_text(entry["emotion"]): entry["support"] for entry in classes}
    never_right = [_text(one["emotion"]) for one in classes if one["support"] >= MIN_SUPPORT and one["f1"] == 0]
    units = figures.get("per_au", [])
    against = {entry["action_unit"]: against_floor(entry) for entry in units}
    absent = [name for name, support in images.items() if support == 0]
    rare = [name for name, support in images.items() if 0 < support < MIN_SUPPORT]
    without_positive = [entry["action_unit"] for entry in units if entry["support"] == 0]
    below, unclear = ([code for code in against if against[code] == verdict] for verdict in ("below", "unclear"))
    for text, names in (
        ("Classes that do not occur in the split, of which nothing is known", absent),
        (f"Classes with under {MIN_SUPPORT} images, whose figures mean little", rare),
        ("Classes that it never gets right", never_right),
        ("Action units without a positive in the split, of which nothing is known", without_positive),
        ("Action units below the floor of always saying present", below),
        ("Action units that cannot be told apart from that floor", unclear),
    ):
        if names:
            yield f"{text}: {', '.join(names)}."
    floor, bounds = figures.get("majority_accuracy"), figures.get("intervals", {}).get("accuracy")
    if floor is not None and bounds is not None and bounds[0] is not None and bounds[0] <= floor:
        yield (
            f"Its accuracy cannot be told apart from always naming the commonest class ({percent(floor)}), or is "
            "below it."
        )


def _provenance(provenance: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    values = {
        "best epoch": provenance.get("best_epoch"),
        "seed": provenance.get("seed"),
        "configuration hash": provenance.get("config_hash"),
        "data fingerprint": provenance.get("data_fingerprint"),
        "images measured": figures.get("num_images"),
        **provenance.get("software", {}),
    }
    lines = [f"* {name}: `{value}`" for name, value in values.items() if value is not None]
    return "\n".join(["## Provenance\n", *lines, "* configuration: `bundle.json`, under `provenance`"])


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows by column name as a Markdown table; empty without rows."""
    if not rows:
        return ""
    head, *body = (f"| {' | '.join(cells)} |" for cells in (rows[0], *(row.values() for row in rows)))
    return "\n".join([head, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *body])


def _count(value: int | None) -> str:
    return UNDEFINED if value is None else f"{value:,}"


def _text(text: str) -> str:
    """Text from data as Markdown that shows it as it is: one line, no markup, no HTML."""
    one_line = " ".join(text.split())
    return _MARKDOWN.sub(r"\\\1", one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


@dataclass(frozen=True)
class Count:
    """Images of a class or positives of an action unit in one split; None where the run has no record.

    ``labels``: what the labels say; ``trained``: what training saw; ``known``: known elements of an action unit.
    """

    labels: int | None
    trained: int | None
    known: int | None = None

    @property
    def differs(self) -> bool:
        """Whether both are on record and differ."""
        return self.labels is not None and self.trained is not None and self.labels != self.trained

    @property
    def best(self) -> int | None:
        """What training saw, or what the labels say where that is not on record."""
        return self.labels if self.trained is None else self.trained


def class_counts(audit: Record, targets: Record) -> dict[str, dict[str, Count]]:
    """Images ``[class][split]`` in label order; empty where emotions are not trained or nothing is on record."""
    return _counts(audit, targets, "classes", Count)


def action_unit_counts(audit: Record, targets: Record) -> dict[str, dict[str, Count]]:
    """Positives ``[code][split]`` in vocabulary order; empty where AUs are not trained or nothing is on record."""

    def count(labels: Record, trained: Record) -> Count:
        said, seen = labels or {}, trained or {}
        return Count(said.get("positives"), seen.get("positives"), seen.get("known", said.get("known")))

    return _counts(audit, targets, "action_units", count)


def _counts(
    audit: Record, targets: Record, task: str, count: Callable[[Any, Any], Count]
) -> dict[str, dict[str, Count]]:
    labels = _get(audit, "splits")
    names = _get(targets, "train", task) or _get(labels, "train", task) or ()
    return {
        name: {split: count(_get(labels, split, task, name), _get(targets, split, task, name)) for split in SPLITS}
        for name in names
    }


def split_sizes(audit: Record, targets: Record) -> dict[str, dict[str, int | None]]:
    """Per split: labelled ``rows``, ``images``, ``null`` AU labels, ``emotion_unknown``, and images as ``trained``."""
    return {
        split: {
            name: _get(audit, "splits", split, f"num_{name}") for name in ("rows", "images", "null", "emotion_unknown")
        }
        | {"trained": _get(targets, split, "num_images")}
        for split in SPLITS
    }


def label_differences(audit: Record, targets: Record) -> list[str]:
    """Sentences on where training saw other targets than the labels say; empty where both agree or one is missing.

    The most serious come first: action units and classes whose labels were all lost.
    """
    lost, changed = [], []
    for what, unit, counts in (
        ("action unit", "positives", action_unit_counts(audit, targets)),
        ("class", "images", class_counts(audit, targets)),
    ):
        for split in SPLITS:
            differing = {name: by_split[split] for name, by_split in counts.items() if by_split[split].differs}
            gone = {name: count for name, count in differing.items() if count.trained == 0}
            if gone:
                total = sum(count.labels or 0 for count in gone.values())
                lost.append(
                    f"In {split} the labels hold {total:,} {unit} of {_named(what, list(gone))}, and training saw none "
                    "of them."
                )
            rest = {name: count for name, count in differing.items() if name not in gone}
            if rest:
                examples = ", ".join(
                    f"{name} {count.trained:,} of {count.labels:,}" for name, count in list(rest.items())[:3]
                )
                changed.append(
                    f"In {split} training saw another number of {unit} than the labels hold for "
                    f"{_named(what, list(rest))} ({examples}{', ...' if len(rest) > 3 else ''})."
                )
    return lost + changed


def _named(what: str, names: list[str]) -> str:
    plural = "classes" if what == "class" else f"{what}s"
    return names[0] if len(names) == 1 else f"{len(names)} {plural}"


def _get(record: Any, *path: str) -> Any:
    for key in path:
        if not isinstance(record, dict) or key not in record:
            return None
        record = record[key]
    return record
