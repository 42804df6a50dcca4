"""What is in a dataset, what is wrong with it, and whether it may be trained on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rafce_ray.base.console import LEVEL_STYLES, printable
from rafce_ray.base.errors import LEVELS, Finding, GateError
from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.config import DataConfig
from rafce_ray.data.audit_checks import audit_command, count_action_units, label_findings, tokens_outside
from rafce_ray.data.audit_images import image_findings
from rafce_ray.data.labels import read_labels, resolve_targets, resolve_taxonomy
from rafce_ray.data.records import SPLITS, Labels, Progress, Targets

_EVIDENCE_IN_MESSAGE = 5


@dataclass(frozen=True)
class SplitSummary:
    """One split: labelled rows, those of them with an image file, and its labels.

    ``classes`` are rows per class; ``au_known``, ``au_positives`` and ``au_prevalence`` go by action unit, the last as
    a share of the known, NaN where none is known.
    """

    split: str
    num_rows: int
    num_images: int
    num_null: int
    num_emotion_unknown: int
    classes: tuple[int, ...]
    au_known: tuple[int, ...]
    au_positives: tuple[int, ...]
    au_prevalence: tuple[float, ...]


@dataclass(frozen=True)
class Audit:
    """The whole of what was found; ``findings`` are sorted with the gravest first.

    Null is read by ``null_policy`` in train and by ``evaluation_null_policy`` in the other splits: so are the counts of ``splits``.
    """

    root: str
    layout: str
    image_folder: str
    taxonomy: Taxonomy
    null_policy: str
    evaluation_null_policy: str
    num_rows: int
    num_missing_images: int
    num_extra_images: int
    images_checked: bool
    splits: tuple[SplitSummary, ...]
    token_counts: dict[str, int]
    findings: tuple[Finding, ...]

    @property
    def may_train(self) -> bool:
        """Whether nothing refuses the dataset."""
        return not self.refusals

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """Findings that keep the dataset from being trained on."""
        return tuple(finding for finding in self.findings if finding.level == "refusal")

    def to_json(self) -> dict[str, Any]:
        """Plain values; a prevalence that is unknown is NaN here and null in JSON text."""
        splits = {}
        for summary in self.splits:
            values = asdict(summary)
            values["classes"] = dict(zip(self.taxonomy.emotions, summary.classes, strict=True))
            values["action_units"] = {
                code: {"known": known, "positives": positives, "prevalence": prevalence}
                for code, known, positives, prevalence in zip(
                    self.taxonomy.action_unit_codes,
                    summary.au_known,
                    summary.au_positives,
                    summary.au_prevalence,
                    strict=True,
                )
            }
            splits[summary.split] = {
                key: value for key, value in values.items() if key != "split" and not key.startswith("au_")
            }
        return {
            "root": self.root,
            "layout": self.layout,
            "image_folder": self.image_folder,
            "may_train": self.may_train,
            "images_checked": self.images_checked,
            "emotions": list(self.taxonomy.emotions),
            "action_units": list(self.taxonomy.action_unit_codes),
            "null_policy": self.null_policy,
            "evaluation_null_policy": self.evaluation_null_policy,
            "num_rows": self.num_rows,
            "num_missing_images": self.num_missing_images,
            "num_extra_images": self.num_extra_images,
            "splits": splits,
            "token_counts": self.token_counts,
            "tokens_outside_vocabulary": tokens_outside(self.token_counts, self.taxonomy),
            "findings": [finding.to_json() for finding in self.findings],
        }


def audit(data: DataConfig, *, images: bool = True, progress: Progress | None = None) -> Audit:
    """Audit a dataset; ``images=False`` leaves the pixels alone and looks at labels and file names only.

    Raises:
        UsageError: there is no dataset, or it is not in a layout that can be read.
    """
    labels = read_labels(data)
    return audit_labels(labels, resolve_taxonomy(labels, data), data, images=images, progress=progress)


def audit_labels(
    labels: Labels, taxonomy: Taxonomy, data: DataConfig, *, images: bool = False, progress: Progress | None = None
) -> Audit:
    """:func:`audit` of labels that were read already."""
    targets = resolve_targets(labels.table, taxonomy, data.null_policy, data.null_policy_in_evaluation)
    splits = tuple(_summarise(split, labels.table, targets, taxonomy) for split in SPLITS)
    findings = [*labels.findings, *label_findings(labels, taxonomy, targets, data)]
    if images:
        findings += image_findings(labels, targets, progress)
    return Audit(
        root=str(labels.root),
        layout=labels.layout,
        image_folder=str(labels.image_root),
        taxonomy=taxonomy,
        null_policy=data.null_policy,
        evaluation_null_policy=data.null_policy_in_evaluation,
        num_rows=labels.table.num_rows,
        num_missing_images=labels.table["image_path"].null_count,
        num_extra_images=labels.num_extra_images,
        images_checked=images,
        splits=splits,
        token_counts=dict(sorted(labels.token_counts.items(), key=lambda item: (-item[1], item[0]))),
        findings=tuple(sorted(findings, key=lambda finding: LEVELS.index(finding.level))),
    )


def require_trainable(audit: Audit, data: DataConfig | None = None) -> None:
    """Let a dataset pass that may be trained on; ``data``: how it was read, for the command that lists everything.

    Raises:
        GateError: it may not; the message holds each reason with its first places and its remedy.
    """
    _refuse(data or DataConfig(root=audit.root), "this data may not be trained on", audit.refusals)


def require_readable(labels: Labels, data: DataConfig) -> None:
    """Refuse labels of which some were not read with certainty. Evaluation needs this, too.

    Raises:
        GateError: they were not; the message is as of :func:`require_trainable`.
    """
    refusals = tuple(finding for finding in labels.findings if finding.level == "refusal")
    _refuse(data, "these labels cannot be used", refusals)


def _refuse(data: DataConfig, what: str, refusals: tuple[Finding, ...]) -> None:
    if not refusals:
        return
    lines = [f"{data.root}: {what}."]
    for finding in refusals:
        lines.append(f"* {finding.message}")
        lines += [f"    {evidence}" for evidence in finding.evidence[:_EVIDENCE_IN_MESSAGE]]
        if finding.count > _EVIDENCE_IN_MESSAGE < len(finding.evidence):
            lines.append(f"    ... {finding.count} in all")
        lines.append(f"  {finding.remedy}")
    lines.append(f"The whole list: {audit_command(data)}")
    raise GateError("\n".join(lines))


def _summarise(split: str, table: pa.Table, targets: Targets, taxonomy: Taxonomy) -> SplitSummary:
    rows = targets.split == SPLITS.index(split)
    emotion = targets.emotion[rows]
    known, positives = count_action_units(targets.action_units, rows)
    prevalence = np.divide(positives, known, out=np.full(len(known), np.nan), where=known > 0)
    has_image = np.asarray(pc.is_valid(table["image_path"]))
    return SplitSummary(
        split=split,
        num_rows=int(rows.sum()),
        num_images=int((rows & has_image).sum()),
        num_null=int(targets.null_row[rows].sum()),
        num_emotion_unknown=int((emotion < 0).sum()),
        classes=_ints(np.bincount(emotion[emotion >= 0], minlength=taxonomy.num_emotions)),
        au_known=_ints(known),
        au_positives=_ints(positives),
        au_prevalence=tuple(float(share) for share in prevalence),
    )


def _ints(values: npt.NDArray[np.integer]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


_EVIDENCE_SHOWN = 3


def render(audit: Audit, console: Console) -> None:
    """Print what is there, per split, and every finding with its first evidence and its remedy."""
    console.print(_splits_table(audit))
    if audit.taxonomy.emotions:
        console.print(_classes_table(audit))
    if audit.taxonomy.action_units:
        console.print(_action_units_table(audit))
    for finding in audit.findings:
        _print_finding(finding, console)
    if not audit.findings:
        console.print("Nothing to remark.")


def _splits_table(audit: Audit) -> Table:
    table = Table(title=f"{audit.root} ({audit.layout} layout)", title_justify="left")
    table.add_column("split")
    for title in ("rows", "images", "emotion unknown", "AU label null"):
        table.add_column(title, justify="right")
    for split in audit.splits:
        values = (split.num_rows, split.num_images, split.num_emotion_unknown, split.num_null)
        table.add_row(split.split, *(f"{value:,}" for value in values))
    return table


def _classes_table(audit: Audit) -> Table:
    table = Table(title="images per class", title_justify="left")
    table.add_column("class")
    for split in audit.splits:
        table.add_column(split.split, justify="right")
    for label, name in enumerate(audit.taxonomy.emotions):
        table.add_row(f"{label} {name}", *(f"{split.classes[label]:,}" for split in audit.splits))
    return table


def _action_units_table(audit: Audit) -> Table:
    reading = f"null_policy {audit.null_policy}"
    if audit.evaluation_null_policy != audit.null_policy:
        reading += f", in validation and test {audit.evaluation_null_policy}"
    table = Table(title=f"action units: positives (share of the known; {reading})", title_justify="left")
    table.add_column("AU")
    for split in audit.splits:
        table.add_column(split.split, justify="right")
    for column, code in enumerate(audit.taxonomy.action_unit_codes):
        cells = []
        for split in audit.splits:
            known = split.au_known[column]
            cells.append(f"{split.au_positives[column]:,} ({split.au_prevalence[column]:.1%})" if known else "unknown")
        table.add_row(code, *cells)
    return table


def _print_finding(finding: Finding, console: Console) -> None:
    console.print(
        Text.assemble(
            (f"{finding.level}: ", LEVEL_STYLES[finding.level]), finding.message, (f" [{finding.code}]", "dim")
        )
    )
    for evidence in finding.evidence[:_EVIDENCE_SHOWN]:
        console.print(Text(f"    {printable(str(evidence))}"))
    if finding.evidence and finding.count > len(finding.evidence[:_EVIDENCE_SHOWN]):
        console.print(Text("    ..."))
    if finding.remedy:
        console.print(Text(f"  {finding.remedy}"))
