"""An audit as tables for a person."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rafce_ray.console import printable
from rafce_ray.data.audit import Audit
from rafce_ray.data.records import Finding

_STYLES = {"info": "dim", "warning": "yellow", "error": "red", "refusal": "bold red"}
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
        Text.assemble((f"{finding.level}: ", _STYLES[finding.level]), finding.message, (f" [{finding.code}]", "dim"))
    )
    for evidence in finding.evidence[:_EVIDENCE_SHOWN]:
        console.print(Text(f"    {printable(str(evidence))}"))
    if finding.evidence and finding.count > len(finding.evidence[:_EVIDENCE_SHOWN]):
        console.print(Text("    ..."))
    if finding.remedy:
        console.print(Text(f"  {finding.remedy}"))
