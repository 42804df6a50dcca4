"""What a model was trained on: what the labels say (``audit.json``) beside what training saw (``targets.json``), and where they part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rafce_ray.data.records import SPLITS

Record = dict[str, Any] | None


@dataclass(frozen=True)
class Count:
    """Of one class or action unit in one split: images or positives by the labels and as trained, and known AU elements as trained.

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
    """Images ``[class][split]``, in the order of the labels; empty where emotions are not trained or nothing is on record."""
    names = _keys(audit, targets, "classes")
    return {
        name: {
            split: Count(_get(_labels(audit), split, "classes", name), _get(targets, split, "classes", name))
            for split in SPLITS
        }
        for name in names
    }


def action_unit_counts(audit: Record, targets: Record) -> dict[str, dict[str, Count]]:
    """Positives ``[code][split]``, in the order of the vocabulary; empty where AUs are not trained or nothing is on record."""
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
    """Per split: labelled ``rows``, those with an image, null AU labels, unknown emotions, and images as ``trained``."""
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
    """Sentences on where training saw other targets than the labels say; empty where it saw the same, or one of both is not on record.

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
                    f"In {split} the labels hold {total:,} {unit} of {_names(what, list(gone))}, and training saw none of them."
                )
            rest = {name: count for name, count in differing.items() if name not in gone}
            if rest:
                examples = ", ".join(
                    f"{name} {count.trained:,} of {count.labels:,}" for name, count in list(rest.items())[:3]
                )
                changed.append(
                    f"In {split} training saw another number of {unit} than the labels hold for {_names(what, list(rest))} ({examples}"
                    f"{', ...' if len(rest) > 3 else ''})."
                )
    return lost + changed


def _names(what: str, names: list[str]) -> str:
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
