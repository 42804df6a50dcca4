"""``MODEL_CARD.md``: what a bundle is, what of it to believe and what not to do with it, in Markdown for people.

Sections follow Mitchell et al. 2019 ("Model Cards for Model Reporting"). Every number is one of the bundle's own
figures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
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

_MARKDOWN = re.compile(r"([\\`*_{}\[\]#|~])")


def model_card(
    *,
    taxonomy: Taxonomy,
    architecture: Architecture,
    calibration: Calibration,
    metrics: Mapping[str, Any],
    provenance: Mapping[str, Any],
    audit: dict[str, Any] | None = None,
    targets: dict[str, Any] | None = None,
) -> str:
    """The card of a bundle, from what :func:`rafce_ray.bundle.bundle.save_bundle` is given and what the run knows of
    its data.

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
        _use(),
        _training_data(provenance, audit, targets),
        _evaluation(figures),
        _calibration(taxonomy, calibration, figures),
        _per_class(figures),
        _per_action_unit(figures),
        _limits(figures, audit, targets),
        _provenance(provenance, figures),
        _how_to_use(),
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
    extras = [
        text
        for is_on, text in (
            (architecture.au_attention, "one attention query per action unit"),
            (architecture.compositional_head, "emotion logits with scores of basic emotions"),
        )
        if is_on
    ]
    lines = [
        "## What it is",
        f"A {architecture.backbone} network{' with ' + ' and '.join(extras) if extras else ''} that reads "
        f"{' and '.join(reads)} from an aligned face of {architecture.image_px} px a side. {PERCEIVED}",
    ]
    reached = headline(figures, str(figures.get("split", "validation"))) if figures else None
    return "\n\n".join([*lines, *([f"**{reached}**"] if reached else [])])


def _use() -> str:
    return "\n".join(
        [
            "## Intended use\n",
            *(f"* {one}" for one in INTENDED_USE),
            "\n## Prohibited use\n",
            *(f"* {one}" for one in PROHIBITED_USE),
        ]
    )


def _training_data(provenance: Mapping[str, Any], audit: dict[str, Any] | None, targets: dict[str, Any] | None) -> str:
    lines = [
        "## Training data",
        f"Data fingerprint: `{provenance.get('data_fingerprint', UNDEFINED)}`. The licence is the data's own.",
    ]
    sizes = split_sizes(audit, targets)
    if audit is None and targets is None:
        return "\n\n".join([*lines, "There is no record of its labels."])
    rows = [
        (split, *(_count(size[key]) for key in ("rows", "images", "null", "emotion_unknown", "trained")))
        for split, size in sizes.items()
    ]
    head = ("split", "labelled rows", "with an image", "AU label null", "emotion unknown", "in this run")
    lines.append(_table(head, rows))
    for what, counts in (("class", class_counts(audit, targets)), ("action unit", action_unit_counts(audit, targets))):
        if counts:
            unit = "images" if what == "class" else "positives"
            rows = [(_text(key), *(_as_trained(one) for one in by_split.values())) for key, by_split in counts.items()]
            lines.append(_table((what, *(f"{split} {unit}" for split in sizes)), rows))
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
        (
            FIGURES[key].title,
            number(figures.get(key)),
            interval(figures.get("intervals", {}).get(key)),
            number(figures.get(str(FIGURES[key].floor))) if FIGURES[key].floor else "",
        )
        for key in WITH_INTERVAL
        if figures.get(key) is not None
    ]
    table = _table(("figure", "value", "95 % interval", "without a model"), rows)
    note = SPLIT_NOTES.get(str(figures.get("split")), f"These figures are of the {figures.get('split')} split.")
    return "\n\n".join(["## Evaluation", note, *summary(figures), table])


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
    reliability = figures.get("reliability") or {}
    rows = [
        (task, when, *(f"{number(one[key])} ({interval(one['intervals'][key], 3)})" for key in ("ece", "nll", "brier")))
        for task, key_of_task in (("emotions", "emotion"), ("action units", "action_units"))
        for when, one in (
            ("before", (reliability.get("before") or {}).get(key_of_task)),
            ("after", (reliability.get("after") or {}).get(key_of_task)),
            ("after, cross-fitted", (held_out.get("after") or {}).get(key_of_task)),
        )
        if one is not None
    ]
    if rows:
        lines.append(_table(("task", "calibration", "ECE (95 % interval)", "log loss", "Brier score"), rows))
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
        (
            _text(entry["emotion"]),
            _count(entry["support"]),
            number(constant_f1(entry["support"], figures["emotion_known"])),
            number(entry["f1"]),
            interval(entry.get("f1_interval")),
            number(entry["precision"]),
            number(entry["recall"]),
        )
        for entry in figures["per_class"]
    ]
    head = ("emotion", "images", "floor", "F1", "95 % interval", "precision", "recall")
    return (
        f"## Per emotion\n\n{_table(head, rows)}\n\nFloor: F1 of always naming this class. {UNDEFINED}: undefined, "
        "not 0."
    )


def _per_action_unit(figures: Mapping[str, Any]) -> str:
    if not figures.get("per_au"):
        return ""
    rows = [
        (
            f"{entry['action_unit']} {_text(entry['name'])}".strip(),
            _count(entry["support"]),
            _count(entry["known"]),
            number(entry["floor"]),
            number(entry["f1"]),
            interval(entry.get("f1_interval")),
            against_floor(entry) or UNDEFINED,
            number(entry.get("f1_at_half")),
            number(entry.get("threshold")),
            number(entry.get("ap")),
        )
        for entry in figures["per_au"]
    ]
    head = (
        "action unit",
        "positive",
        "known",
        "floor",
        "F1",
        "95 % interval",
        "against floor",
        "F1 at 0.5",
        "threshold",
        "AP",
    )
    note = "Floor: F1 of always saying present. Unclear: the interval holds the floor."
    return f"## Per action unit\n\n{_table(head, rows)}\n\n{note}"


def _limits(figures: Mapping[str, Any], audit: dict[str, Any] | None, targets: dict[str, Any] | None) -> str:
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
    for text, chosen in (
        (
            "Classes that do not occur in the split, of which nothing is known",
            [e for e in classes if e["support"] == 0],
        ),
        (
            f"Classes with under {MIN_SUPPORT} images, whose figures mean little",
            [e for e in classes if 0 < e["support"] < MIN_SUPPORT],
        ),
        ("Classes that it never gets right", [e for e in classes if e["support"] >= MIN_SUPPORT and e["f1"] == 0]),
    ):
        if chosen:
            yield f"{text}: {', '.join(_text(entry['emotion']) for entry in chosen)}."
    units = figures.get("per_au", [])
    for text, chosen in (
        (
            "Action units without a positive in the split, of which nothing is known",
            [e for e in units if e["support"] == 0],
        ),
        ("Action units below the floor of always saying present", [e for e in units if against_floor(e) == "below"]),
        ("Action units that cannot be told apart from that floor", [e for e in units if against_floor(e) == "unclear"]),
    ):
        if chosen:
            yield f"{text}: {', '.join(entry['action_unit'] for entry in chosen)}."
    floor, bounds = figures.get("majority_accuracy"), figures.get("intervals", {}).get("accuracy")
    if floor is not None and bounds is not None and bounds[0] is not None and bounds[0] <= floor:
        yield (
            f"Its accuracy cannot be told apart from always naming the commonest class ({percent(floor)}), or is "
            "below it."
        )


def _provenance(provenance: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    software = provenance.get("software", {})
    rows = [
        ("best epoch", provenance.get("best_epoch")),
        ("seed", provenance.get("seed")),
        ("configuration hash", provenance.get("config_hash")),
        ("data fingerprint", provenance.get("data_fingerprint")),
        ("images measured", figures.get("num_images")),
        *software.items(),
    ]
    lines = [f"* {name}: `{value}`" for name, value in rows if value is not None]
    return "\n".join(["## Provenance\n", *lines, "* configuration: `bundle.json`, under `provenance`"])


def _how_to_use() -> str:
    return "\n\n".join(
        [
            "## How to use it",
            "```\nrafce predict --bundle FOLDER PHOTO.jpg          # every face of a photograph, as JSON\n"
            "rafce evaluate --bundle FOLDER data.root=PATH    # its figures on other labelled faces\n```",
            "Measure it on faces like yours before you rely on it.",
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _count(value: int | None) -> str:
    return UNDEFINED if value is None else f"{value:,}"


def _text(text: str) -> str:
    """Text from data as Markdown that shows it as it is: one line, no markup, no HTML."""
    one_line = " ".join(text.split())
    return _MARKDOWN.sub(r"\\\1", one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


# What a model was trained on: what the labels say (audit.json) and what training saw (targets.json).

Record = dict[str, Any] | None


@dataclass(frozen=True)
class Count:
    """Of one class or action unit in one split: images or positives by the labels and as trained, and known AU elements
    as trained.

    None where the run has no record of it.
    """

    labels: int | None
    trained: int | None
    known: int | None = None

    @property
    def differs(self) -> bool:
        """Whether both are on record and not the same."""
        return self.labels is not None and self.trained is not None and self.labels != self.trained

    @property
    def best(self) -> int | None:
        """What was trained on, or the labels where that is not on record."""
        return self.labels if self.trained is None else self.trained


def class_counts(audit: Record, targets: Record) -> dict[str, dict[str, Count]]:
    """Images ``[class][split]``, in the order of the labels; empty where emotions are not trained or nothing is on
    record.
    """
    names = _keys(audit, targets, "classes")
    return {
        name: {
            split: Count(_get(_labels(audit), split, "classes", name), _get(targets, split, "classes", name))
            for split in SPLITS
        }
        for name in names
    }


def action_unit_counts(audit: Record, targets: Record) -> dict[str, dict[str, Count]]:
    """Positives ``[code][split]``, in the order of the vocabulary; empty where AUs are not trained or nothing is on
    record.
    """
    codes = _keys(audit, targets, "action_units")
    found = {}
    for code in codes:
        found[code] = {
            split: Count(
                _get(_labels(audit), split, "action_units", code, "positives"),
                _get(targets, split, "action_units", code, "positives"),
                _first(
                    _get(targets, split, "action_units", code, "known"),
                    _get(_labels(audit), split, "action_units", code, "known"),
                ),
            )
            for split in SPLITS
        }
    return found


def split_sizes(audit: Record, targets: Record) -> dict[str, dict[str, int | None]]:
    """Per split: labelled ``rows``, those with an image, null AU labels, unknown emotions, and images as
    ``trained``.
    """
    return {
        split: {key: _get(_labels(audit), split, name) for key, name in _SIZES.items()}
        | {"trained": _get(targets, split, "num_images")}
        for split in SPLITS
    }


_SIZES = {
    "rows": "num_rows",
    "images": "num_images",
    "null": "num_null",
    "emotion_unknown": "num_emotion_unknown",
}


def label_differences(audit: Record, targets: Record) -> list[str]:
    """Sentences on where training saw other targets than the labels say; empty where it saw the same, or one of both is
    not on record.

    The gravest first: action units and classes whose labels were lost altogether.
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
    plural = {"class": "classes"}.get(what, f"{what}s")
    return f"{names[0]}" if len(names) == 1 else f"{len(names)} {plural}"


def _labels(audit: Record) -> Record:
    return None if audit is None else audit.get("splits")


def _keys(audit: Record, targets: Record, kind: str) -> list[str]:
    for record in (targets, _labels(audit)):
        found = _get(record, "train", kind)
        if found:
            return list(found)
    return []


def _get(record: Any, *path: str) -> Any:
    for key in path:
        if not isinstance(record, dict) or key not in record:
            return None
        record = record[key]
    return record


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
